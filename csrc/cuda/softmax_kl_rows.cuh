// Rows that are kept on chip: read once, whatever is asked for. Loss and both gradients move 4Ne
// bytes (2 reads, 2 writes of N elements of e bytes), which is the least there is.
//
// A row belongs to kGroup threads (4 to 32 lanes of a warp, or a block), each of which holds kVecs
// vectors of both sides in registers as they came from memory.

#pragma once

#include "cuda/softmax_kl_row.cuh"

namespace afm::cuda {

// The most threads of a block. Rows of a few classes need few registers, and the more of them a
// block takes, the larger the batch whose loss is one launch.
AFM_HD constexpr int rows_block_threads(int group) {
  return group > kWarp ? group : group <= 4 ? 512 : 256;
}

// See forget_derived: between the passes over a row that takes many registers.
template <int kVecs, class StudentChunk, class TeacherChunk>
__device__ __forceinline__ void next_pass(StudentChunk (&s)[kVecs], TeacherChunk (&t)[kVecs]) {
  if constexpr (kVecs >= 2) {
#pragma unroll
    for (int k = 0; k < kVecs; ++k) {
      forget_derived<sizeof(StudentChunk) / 4>(reinterpret_cast<unsigned*>(s[k].raw));
      forget_derived<sizeof(TeacherChunk) / 4>(reinterpret_cast<unsigned*>(t[k].raw));
    }
  }
}

template <class Pair, int kGroup, int kVecs, Variant kVariant>
__device__ __forceinline__ RowStats<typename Pair::A> reduce_row(
    const RowsProblem& problem, const RowPlace& place, int lane,
    const LabelTerm<typename Pair::A>& label, typename Pair::StudentChunk (&s)[kVecs],
    typename Pair::TeacherChunk (&t)[kVecs], Base<typename Pair::A>& base,
    typename Pair::A& entropy) {
  using A = typename Pair::A;
  constexpr int kN = Pair::kN;
  constexpr int kWarps = rows_block_threads(kGroup) / kWarp;
  constexpr int kSums = kVariant == Variant::kDistillation ? 5 : 3;
  __shared__ A shared_tops[3 * kWarps], shared_sums[kSums * kWarps],
      shared_terms[kRowTerms * kWarps];

  // Largest logits; and is a class excluded (-inf) on the side that makes the divergence infinite?
  A tops[3] = {-infinity<A>(), -infinity<A>(), A(0)};
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const A s_i = s[k].template get<A>(i), t_i = t[k].template get<A>(i);
      tops[0] = max_of(tops[0], s_i);
      tops[1] = max_of(tops[1], t_i);
      bool excluded = excludes(s_i, t_i);
      if constexpr (kVariant == Variant::kSymmetric) excluded = excluded || excludes(t_i, s_i);
      if (excluded) tops[2] = A(1);
    }
  }
  reduce_in_group<kGroup, MaxOf>(tops, shared_tops);
  const A max_s = tops[0], max_t = tops[1];
  const bool excluded = tops[2] > A(0);
  base = Base<A>::of(A(1) / static_cast<A>(problem.temperature), max_s, max_t);

  // Normalisers, and the mean difference.
  next_pass(s, t);
  RowSums<A> sums = {A(0), A(0), A(0)};
  A label_z = A(0), linear = A(0);
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const A s_i = s[k].template get<A>(i), t_i = t[k].template get<A>(i);
      add_class(sums, base, max_s, max_t, s_i, t_i);
      if constexpr (kVariant == Variant::kDistillation) {
        const int column = (k * kGroup + lane) * kN + i - place.head;
        label_z += exp2_of((s_i - max_s) * A(1.4426950408889634074));
        if (column >= 0 && column < problem.classes) linear += s_i - max_s;
      }
    }
  }
  A totals[kSums];
  totals[0] = sums.zs;
  totals[1] = sums.zt;
  totals[2] = sums.difference;
  if constexpr (kVariant == Variant::kDistillation) {
    totals[3] = label_z;
    totals[4] = linear;
  }
  reduce_in_group<kGroup, SumOf>(totals, shared_sums);
  sums = {totals[0], totals[1], totals[2]};
  RowStats<A> stats = direct_stats(sums, base, max_s, max_t, excluded);

  // A second look, at what cancelled in the first: rows near their minimum, and means of large
  // differences. Jeffreys and JS are sums of this pass to begin with.
  const bool near = stats.value < centred_below<A>();
  RowTerms<A> terms = {A(0), A(0), A(0)};
  next_pass(s, t);
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const Class<A> c = class_of(stats, base, s[k].template get<A>(i), t[k].template get<A>(i));
      if constexpr (kVariant == Variant::kSymmetric) {
        add_symmetric(terms, c, problem.divergence, weights_of<A>(problem));
      } else if (near) {
        add_kl(terms, c);
      } else {
        add_mean_error(terms, c, stats.other);
      }
    }
  }
  constexpr int kTerms = kVariant == Variant::kSymmetric ? kRowTerms : 2;
  A all[kTerms];
  all[0] = terms.first;
  all[1] = terms.second;
  if constexpr (kTerms == 3) all[2] = terms.excess;
  reduce_in_group<kGroup, SumOf>(all, shared_terms);
  terms.first = all[0];
  terms.second = all[1];
  if constexpr (kVariant == Variant::kSymmetric) {
    terms.excess = all[2];
    finish_symmetric(stats, terms, problem.divergence, excluded);
  } else if (near) {
    finish_kl(stats, terms);
  } else {
    correct_mean(stats, terms);
  }

  entropy = A(0);
  if constexpr (kVariant == Variant::kDistillation) {
    stats.inv_label = A(1) / totals[3];
    if (label.active) {
      entropy = cross_entropy(problem, label_logit<Pair>(problem, place, label.label), max_s,
                              totals[3], max_s, totals[4]);
      // A row without a cross-entropy has no gradient of it either.
      if (!is_finite(entropy)) stats.inv_label = not_a_number<A>();
    }
  }
  return stats;
}

template <class Pair, int kGroup, int kVecs, Variant kVariant>
__global__ void __launch_bounds__(rows_block_threads(kGroup), kGroup > 4 ? Pair::kMinBlocks : 1)
    rows_kernel(const RowsProblem problem) {
  using A = typename Pair::A;
  constexpr int kN = Pair::kN;
  const int lane = threadIdx.x % kGroup;
  const int64_t group = threadIdx.x / kGroup;
  const int64_t asked = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kGroup) + group;
  // Threads beyond the last row compute it again, for the shuffles' sake, and write nothing.
  const bool mine = asked < problem.rows;
  const int64_t row = mine ? asked : problem.rows - 1;

  const RowPlace place = locate<Pair>(problem, row);
  typename Pair::StudentChunk s[kVecs];
  typename Pair::TeacherChunk t[kVecs];
#pragma unroll
  for (int k = 0; k < kVecs; ++k) {
    const int column = (k * kGroup + lane) * kN - place.head;
    s[k] = load_student<Pair>(problem, place, column);
    t[k] = load_teacher<Pair>(problem, place, column);
  }
  const A weight = weight_of<A>(problem, row);
  LabelTerm<A> label = {false, -1};
  if constexpr (kVariant == Variant::kDistillation) label = label_of<A>(problem, row);

  Base<A> base;
  RowStats<A> stats;
  A entropy = A(0);
  if (problem.stats_in != nullptr) {
    stats = load_stats<A>(problem.stats_in, row);
    base = Base<A>::of(A(1) / static_cast<A>(problem.temperature), stats.max_s, stats.max_t);
  } else {
    stats =
        reduce_row<Pair, kGroup, kVecs, kVariant>(problem, place, lane, label, s, t, base, entropy);
    if (problem.stats_out != nullptr && mine && lane == 0) {
      store_stats(problem.stats_out, row, stats);
    }
  }

  if (problem.loss != nullptr) {
    A value =
        weighted(value_of<kVariant>(problem, stats, label.active, entropy), weight, problem.scale);
    if (!problem.sum) {
      if (mine && lane == 0) static_cast<A*>(problem.loss)[row] = value;
    } else if constexpr (kGroup > kWarp) {
      if (lane == 0) static_cast<A*>(problem.loss)[blockIdx.x] = value;
    } else {
      // The block's rows, in an order that depends on nothing.
      __shared__ A shared_loss[rows_block_threads(kGroup) / kWarp];
      A total[1] = {mine && lane == 0 ? value : A(0)};
      reduce_in_block<SumOf>(total, shared_loss);
      if (threadIdx.x == 0) static_cast<A*>(problem.loss)[blockIdx.x] = total[0];
    }
  }

  if (problem.grad_student.data != nullptr || problem.grad_teacher.data != nullptr) {
    __shared__ A shared_others[2 * rows_block_threads(kGroup) / kWarp];
    const Factors<A> factors = factors_of<kVariant>(problem, row, weight, stats, label.active);
    Others<A> others;
    int peaks[kPeaks] = {-1, -1};  // those that this thread comes by
    next_pass(s, t);
#pragma unroll
    for (int k = 0; k < kVecs; ++k) {
      const int column = (k * kGroup + lane) * kN - place.head;
      if (mine && column < problem.classes) {
        write_gradients<Pair, kVariant>(problem, place, base, stats, factors, label.label, s[k],
                                        t[k], column, others, peaks);
      }
    }
    bool settles = may_have_peaks<kVariant>(problem, stats);
    if constexpr (kGroup <= kWarp) settles = __any_sync(kFullMask, settles);
    if (settles) {
      A sums[2] = {others.student, others.teacher};
      reduce_in_group<kGroup, SumOf>(sums, shared_others);
      write_peaks<Pair>(problem, place, sums[0], sums[1], peaks);
    }
  }
}

}  // namespace afm::cuda
