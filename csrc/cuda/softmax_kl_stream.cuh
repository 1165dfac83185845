// Rows too long for the registers of a block: read in one pass for a loss or a reduction, and once
// more for gradients. The second reading walks backwards, because what was read last is still in
// the caches.
//
//   stream_rows      a block a row does everything: reduction, loss, gradients
//   stream_partial   few rows: `splits` blocks a row, each reduces its part and leaves a partial
//   stream_terms     (Jeffreys, JS) the second reduction over the same parts
//   stream_finish    combines the partials of its row in a fixed order (every block by itself: a
//                    few hundred bytes) and writes loss, stats, and the gradients of its part
//   stream_settle    the gradients at the peaks of certain rows that several blocks shared
//
// Jeffreys and JS need the normalisers before their terms can be summed, so their loss alone reads
// twice (4Ne); KL and the distillation loss read once (2Ne), see StreamState.

#pragma once

#include "cuda/softmax_kl_row.cuh"

namespace afm::cuda {

// A finite pair of logits of the row that the differences are measured from: of 32 classes spread
// over the row, the one the teacher likes best. Every block of a row finds the same one. Near a
// fixed point any class would do, as all differences are small there; elsewhere nothing depends on
// it but rounding.
template <typename A>
struct Reference {
  Base<A> base;
  A anchor;  // the student's logit
};

template <class Pair>
__device__ __forceinline__ Reference<typename Pair::A> reference_of(const RowsProblem& problem,
                                                                    const RowPlace& place) {
  using A = typename Pair::A;
  const int lane = threadIdx.x % kWarp;
  const int column =
      static_cast<int>(static_cast<int64_t>(problem.classes - 1) * lane / (kWarp - 1));
  A s = Pair::StudentAccess::element(place.student.data, problem.student.dtype, column, A(0));
  A t = Pair::TeacherAccess::element(place.teacher.data, problem.teacher.dtype, column, A(0));
  if (!is_finite(s) || !is_finite(t)) s = t = -infinity<A>();
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const A other_s = __shfl_xor_sync(kFullMask, s, offset);
    const A other_t = __shfl_xor_sync(kFullMask, t, offset);
    if (other_t > t || (other_t == t && other_s > s)) {
      s = other_s;
      t = other_t;
    }
  }
  if (t == -infinity<A>()) s = t = A(0);
  Reference<A> reference;
  reference.base = Base<A>::of(A(1) / static_cast<A>(problem.temperature), s, t);
  reference.anchor = s;
  return reference;
}

// The vectors [first, last) of a row that a split is answerable for.
struct Part {
  int first, last;
};

template <int kN>
__device__ __forceinline__ Part part_of(const RowsProblem& problem, const RowPlace& place,
                                        int split) {
  const int64_t vectors = (static_cast<int64_t>(problem.classes) + place.head + kN - 1) / kN;
  Part part;
  part.first = static_cast<int>(vectors * split / problem.splits);
  part.last = static_cast<int>(vectors * (split + 1) / problem.splits);
  return part;
}

// A partial row: the state, what excludes it, and the sums of the cross-entropy.
template <typename A>
struct Partial {
  StreamState<A> state;
  A excluded;
  A label_z, linear;
};

template <class Pair, Variant kVariant>
__device__ __forceinline__ void add_vector(const RowsProblem& problem,
                                           const Reference<typename Pair::A>& reference,
                                           Partial<typename Pair::A>& partial,
                                           const typename Pair::StudentChunk& s,
                                           const typename Pair::TeacherChunk& t, int column) {
  using A = typename Pair::A;
  constexpr int kN = Pair::kN;
  constexpr A kLog2E = A(1.4426950408889634074);
  StreamState<A>& state = partial.state;
  A top_s = state.max_s, top_t = state.max_t;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    top_s = max_of(top_s, s.template get<A>(i));
    top_t = max_of(top_t, t.template get<A>(i));
  }
  if (top_s > state.max_s || top_t > state.max_t) {
    if constexpr (kVariant == Variant::kDistillation) {
      partial.label_z *= exp2_of((state.max_s - safe_max(top_s)) * kLog2E);
    }
    state.rescale(top_s, top_t, reference.base.exponent_scale);
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const A s_i = s.template get<A>(i), t_i = t.template get<A>(i);
    bool excluded = excludes(s_i, t_i);
    if constexpr (kVariant == Variant::kSymmetric) {
      excluded = excluded || excludes(t_i, s_i);
      state.add_normalisers(reference.base, s_i, t_i);
    } else {
      state.add(reference.base, s_i, t_i);
    }
    if (excluded) partial.excluded = A(1);
    if constexpr (kVariant == Variant::kDistillation) {
      partial.label_z += exp2_of((s_i - safe_max(state.max_s)) * kLog2E);
      if (column + i >= 0 && column + i < problem.classes) {
        partial.linear += s_i - reference.anchor;
      }
    }
  }
}

// This thread's share of the part: vectors first + thread, and so on by the block. Two vectors of
// each side are read before either is used.
template <class Pair, Variant kVariant>
__device__ __forceinline__ Partial<typename Pair::A> reduce_part(
    const RowsProblem& problem, const RowPlace& place, const Part& part,
    const Reference<typename Pair::A>& reference) {
  using A = typename Pair::A;
  constexpr int kN = Pair::kN;
  Partial<A> partial = {StreamState<A>::empty(), A(0), A(0), A(0)};
  const int threads = blockDim.x;
  int vector = part.first + threadIdx.x;
  for (; vector < part.last - threads; vector += 2 * threads) {
    const int column = vector * kN - place.head, next = (vector + threads) * kN - place.head;
    const auto s = load_student<Pair>(problem, place, column);
    const auto t = load_teacher<Pair>(problem, place, column);
    const auto s_next = load_student<Pair>(problem, place, next);
    const auto t_next = load_teacher<Pair>(problem, place, next);
    add_vector<Pair, kVariant>(problem, reference, partial, s, t, column);
    add_vector<Pair, kVariant>(problem, reference, partial, s_next, t_next, next);
  }
  if (vector < part.last) {
    const int column = vector * kN - place.head;
    add_vector<Pair, kVariant>(problem, reference, partial,
                               load_student<Pair>(problem, place, column),
                               load_teacher<Pair>(problem, place, column), column);
  }
  return partial;
}

// Combines what each thread of a group holds: maxima first, then plain sums relative to them.
template <int kGroup, Variant kVariant, typename A>
__device__ __forceinline__ void combine(const RowsProblem& problem, Partial<A>& partial,
                                        A* shared_tops, A* shared_sums) {
  constexpr A kLog2E = A(1.4426950408889634074);
  A tops[3] = {partial.state.max_s, partial.state.max_t, partial.excluded};
  reduce_in_group<kGroup, MaxOf>(tops, shared_tops);
  if constexpr (kVariant == Variant::kDistillation) {
    partial.label_z *= exp2_of((partial.state.max_s - safe_max(tops[0])) * kLog2E);
  }
  partial.state.rescale(tops[0], tops[1], kLog2E / static_cast<A>(problem.temperature));
  partial.excluded = tops[2];
  A sums[7] = {partial.state.zs,   partial.state.zt,  partial.state.difference,
               partial.state.near, partial.state.far, partial.label_z,
               partial.linear};
  reduce_in_group<kGroup, SumOf>(sums, shared_sums);
  partial.state.zs = sums[0];
  partial.state.zt = sums[1];
  partial.state.difference = sums[2];
  partial.state.near = sums[3];
  partial.state.far = sums[4];
  partial.label_z = sums[5];
  partial.linear = sums[6];
}

template <typename A>
__device__ __forceinline__ void store_partial(A* to, const Partial<A>& partial) {
  to[0] = partial.state.max_s;
  to[1] = partial.state.max_t;
  to[2] = partial.state.zs;
  to[3] = partial.state.zt;
  to[4] = partial.state.difference;
  to[5] = partial.state.near;
  to[6] = partial.state.far;
  to[7] = partial.excluded;
  to[8] = partial.label_z;
  to[9] = partial.linear;
}

// The row of all its splits, in every lane of every warp: lanes share the splits out.
template <Variant kVariant, typename A>
__device__ __forceinline__ Partial<A> combine_splits(const RowsProblem& problem, int64_t row) {
  Partial<A> partial = {StreamState<A>::empty(), A(0), A(0), A(0)};
  const A* from = static_cast<const A*>(problem.partials) + row * problem.splits * kPartial;
  // A lane's own splits, one after the other: at most kMaxSplits / 32 of them.
  for (int split = threadIdx.x % kWarp; split < problem.splits; split += kWarp) {
    const A* one = from + split * kPartial;
    Partial<A> next = {
        {one[0], one[1], one[2], one[3], one[4], one[5], one[6]}, one[7], one[8], one[9]};
    constexpr A kLog2E = A(1.4426950408889634074);
    const A scale = kLog2E / static_cast<A>(problem.temperature);
    const A top_s = max_of(partial.state.max_s, next.state.max_s);
    const A top_t = max_of(partial.state.max_t, next.state.max_t);
    if constexpr (kVariant == Variant::kDistillation) {
      partial.label_z *= exp2_of((partial.state.max_s - safe_max(top_s)) * kLog2E);
      next.label_z *= exp2_of((next.state.max_s - safe_max(top_s)) * kLog2E);
    }
    partial.state.rescale(top_s, top_t, scale);
    next.state.rescale(top_s, top_t, scale);
    partial.state.zs += next.state.zs;
    partial.state.zt += next.state.zt;
    partial.state.difference += next.state.difference;
    partial.state.near += next.state.near;
    partial.state.far += next.state.far;
    partial.excluded = max_of(partial.excluded, next.excluded);
    partial.label_z += next.label_z;
    partial.linear += next.linear;
  }
  combine<kWarp, kVariant, A>(problem, partial, nullptr, nullptr);
  return partial;
}

template <Variant kVariant, typename A>
__device__ __forceinline__ RowStats<A> stats_of(const RowsProblem& problem,
                                                const Partial<A>& partial,
                                                const Reference<A>& reference) {
  if constexpr (kVariant == Variant::kSymmetric) {
    return normaliser_stats(partial.state, A(1) / static_cast<A>(problem.temperature));
  } else {
    return finish_stream(partial.state, reference.base, partial.excluded > A(0));
  }
}

// Second reduction of a part (kSymmetric), for every thread of the block.
template <class Pair>
__device__ __forceinline__ RowTerms<typename Pair::A> reduce_terms(
    const RowsProblem& problem, const RowPlace& place, const Part& part,
    const RowStats<typename Pair::A>& stats, typename Pair::A* shared) {
  using A = typename Pair::A;
  constexpr int kN = Pair::kN;
  const Base<A> base =
      Base<A>::of(A(1) / static_cast<A>(problem.temperature), stats.max_s, stats.max_t);
  RowTerms<A> terms = {A(0), A(0), A(0)};
  for (int vector = part.last - 1 - static_cast<int>(threadIdx.x); vector >= part.first;
       vector -= blockDim.x) {
    const int column = vector * kN - place.head;
    const auto s = load_student<Pair>(problem, place, column);
    const auto t = load_teacher<Pair>(problem, place, column);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const Class<A> c = class_of(stats, base, s.template get<A>(i), t.template get<A>(i));
      add_symmetric(terms, c, problem.divergence, weights_of<A>(problem));
    }
  }
  A all[kRowTerms] = {terms.first, terms.second, terms.excess};
  reduce_in_block<SumOf>(all, shared);
  return {all[0], all[1], all[2]};
}

// The gradients of a part. Where the part is the row it is settled here, else by
// stream_settle_kernel.
template <class Pair, Variant kVariant>
__device__ __forceinline__ void write_part(const RowsProblem& problem, const RowPlace& place,
                                           const Part& part, int64_t row,
                                           const RowStats<typename Pair::A>& stats,
                                           const LabelTerm<typename Pair::A>& label) {
  using A = typename Pair::A;
  constexpr int kN = Pair::kN;
  const Base<A> base =
      Base<A>::of(A(1) / static_cast<A>(problem.temperature), stats.max_s, stats.max_t);
  const Factors<A> factors =
      factors_of<kVariant>(problem, row, weight_of<A>(problem, row), stats, label.active);
  Others<A> others;
  __shared__ A shared_others[2 * Pair::kStreamThreads / kWarp];
  __shared__ int peaks[kPeaks];
  const bool settles = may_have_peaks<kVariant>(problem, stats);
  if (settles) {
    if (threadIdx.x < kPeaks) peaks[threadIdx.x] = -1;
    __syncthreads();
  }
  for (int vector = part.last - 1 - static_cast<int>(threadIdx.x); vector >= part.first;
       vector -= blockDim.x) {
    const int column = vector * kN - place.head;
    write_gradients<Pair, kVariant>(problem, place, base, stats, factors, label.label,
                                    load_student<Pair>(problem, place, column),
                                    load_teacher<Pair>(problem, place, column), column, others,
                                    peaks);
  }
  if (settles) {
    A sums[2] = {others.student, others.teacher};
    reduce_in_block<SumOf>(sums, shared_others);  // a barrier too: peaks after what is none
    others.student = sums[0];
    others.teacher = sums[1];
  }
  if (threadIdx.x != 0) return;
  if (problem.splits > 1) {
    // A block is a split of a row.
    double* left = problem.others + blockIdx.x * int64_t(kOthers);
    left[0] = others.student;
    left[1] = others.teacher;
    left[2] = settles ? peaks[0] : -1;
    left[3] = settles ? peaks[1] : -1;
  } else if (settles) {
    write_peaks<Pair>(problem, place, others.student, others.teacher, peaks);
  }
}

// Cross-entropy, loss and stats of a complete row; one thread writes.
template <class Pair, Variant kVariant>
__device__ __forceinline__ void finish_row(const RowsProblem& problem, const RowPlace& place,
                                           int64_t row, const Partial<typename Pair::A>& partial,
                                           const Reference<typename Pair::A>& reference,
                                           const LabelTerm<typename Pair::A>& label,
                                           RowStats<typename Pair::A>& stats, bool write) {
  using A = typename Pair::A;
  A entropy = A(0);
  if constexpr (kVariant == Variant::kDistillation) {
    stats.inv_label = A(1) / partial.label_z;
    if (label.active) {
      entropy =
          cross_entropy(problem, label_logit<Pair>(problem, place, label.label),
                        partial.state.max_s, partial.label_z, reference.anchor, partial.linear);
      if (!is_finite(entropy)) stats.inv_label = not_a_number<A>();
    }
  }
  if (!write) return;
  if (problem.stats_out != nullptr) store_stats(problem.stats_out, row, stats);
  if (problem.loss != nullptr) {
    static_cast<A*>(problem.loss)[row] =
        weighted(value_of<kVariant>(problem, stats, label.active, entropy),
                 weight_of<A>(problem, row), problem.scale);
  }
}

template <class Pair, Variant kVariant>
__global__ void __launch_bounds__(Pair::kStreamThreads, Pair::kMinBlocks)
    stream_rows_kernel(const RowsProblem problem) {
  using A = typename Pair::A;
  constexpr int kWarps = Pair::kStreamThreads / kWarp;
  __shared__ A shared_tops[3 * kWarps], shared_sums[7 * kWarps], shared_terms[kRowTerms * kWarps];
  const int64_t row = blockIdx.x;
  const RowPlace place = locate<Pair>(problem, row);
  const Part whole = part_of<Pair::kN>(problem, place, 0);
  const Reference<A> reference = reference_of<Pair>(problem, place);
  LabelTerm<A> label = {false, -1};
  if constexpr (kVariant == Variant::kDistillation) label = label_of<A>(problem, row);

  Partial<A> partial = reduce_part<Pair, kVariant>(problem, place, whole, reference);
  combine<Pair::kStreamThreads, kVariant>(problem, partial, shared_tops, shared_sums);
  RowStats<A> stats = stats_of<kVariant>(problem, partial, reference);
  if constexpr (kVariant == Variant::kSymmetric) {
    const RowTerms<A> terms = reduce_terms<Pair>(problem, place, whole, stats, shared_terms);
    finish_symmetric(stats, terms, problem.divergence, partial.excluded > A(0));
  }
  finish_row<Pair, kVariant>(problem, place, row, partial, reference, label, stats,
                             threadIdx.x == 0);
  if (problem.grad_student.data != nullptr || problem.grad_teacher.data != nullptr) {
    write_part<Pair, kVariant>(problem, place, whole, row, stats, label);
  }
}

template <class Pair, Variant kVariant>
__global__ void __launch_bounds__(Pair::kStreamThreads, Pair::kMinBlocks)
    stream_partial_kernel(const RowsProblem problem) {
  using A = typename Pair::A;
  constexpr int kWarps = Pair::kStreamThreads / kWarp;
  __shared__ A shared_tops[3 * kWarps], shared_sums[7 * kWarps];
  const int64_t row = blockIdx.x / problem.splits;
  const int split = blockIdx.x % problem.splits;
  const RowPlace place = locate<Pair>(problem, row);
  const Part part = part_of<Pair::kN>(problem, place, split);
  const Reference<A> reference = reference_of<Pair>(problem, place);
  Partial<A> partial = reduce_part<Pair, kVariant>(problem, place, part, reference);
  combine<Pair::kStreamThreads, kVariant>(problem, partial, shared_tops, shared_sums);
  if (threadIdx.x == 0) {
    store_partial(static_cast<A*>(problem.partials) + blockIdx.x * int64_t(kPartial), partial);
  }
}

template <class Pair>
__global__ void __launch_bounds__(Pair::kStreamThreads, Pair::kMinBlocks)
    stream_terms_kernel(const RowsProblem problem) {
  using A = typename Pair::A;
  __shared__ A shared_terms[kRowTerms * Pair::kStreamThreads / kWarp];
  const int64_t row = blockIdx.x / problem.splits;
  const int split = blockIdx.x % problem.splits;
  const RowPlace place = locate<Pair>(problem, row);
  const Partial<A> partial = combine_splits<Variant::kSymmetric, A>(problem, row);
  const RowStats<A> stats =
      normaliser_stats(partial.state, A(1) / static_cast<A>(problem.temperature));
  const RowTerms<A> terms = reduce_terms<Pair>(
      problem, place, part_of<Pair::kN>(problem, place, split), stats, shared_terms);
  if (threadIdx.x == 0) {
    A* to = static_cast<A*>(problem.terms) + blockIdx.x * int64_t(kRowTerms);
    to[0] = terms.first;
    to[1] = terms.second;
    to[2] = terms.excess;
  }
}

// A block for each split where gradients are wanted (or stats are given), else a warp for each row.
template <class Pair, Variant kVariant>
__global__ void __launch_bounds__(Pair::kStreamThreads, Pair::kMinBlocks)
    stream_finish_kernel(const RowsProblem problem) {
  using A = typename Pair::A;
  const bool gradients =
      problem.grad_student.data != nullptr || problem.grad_teacher.data != nullptr;
  const int64_t row = gradients ? blockIdx.x / problem.splits : blockIdx.x;
  const int split = gradients ? blockIdx.x % problem.splits : 0;
  const RowPlace place = locate<Pair>(problem, row);
  LabelTerm<A> label = {false, -1};
  if constexpr (kVariant == Variant::kDistillation) label = label_of<A>(problem, row);

  RowStats<A> stats;
  if (problem.stats_in != nullptr) {
    stats = load_stats<A>(problem.stats_in, row);
  } else {
    const Partial<A> partial = combine_splits<kVariant, A>(problem, row);
    const Reference<A> reference = reference_of<Pair>(problem, place);
    stats = stats_of<kVariant>(problem, partial, reference);
    if constexpr (kVariant == Variant::kSymmetric) {
      A all[kRowTerms] = {A(0), A(0), A(0)};
      const A* from = static_cast<const A*>(problem.terms) + row * problem.splits * kRowTerms;
      for (int other = threadIdx.x % kWarp; other < problem.splits; other += kWarp) {
#pragma unroll
        for (int i = 0; i < kRowTerms; ++i) all[i] += from[kRowTerms * other + i];
      }
      reduce_in_warp<kWarp, SumOf>(all);
      finish_symmetric(stats, {all[0], all[1], all[2]}, problem.divergence,
                       partial.excluded > A(0));
    }
    finish_row<Pair, kVariant>(problem, place, row, partial, reference, label, stats,
                               split == 0 && threadIdx.x == 0);
  }
  if (gradients) {
    write_part<Pair, kVariant>(problem, place, part_of<Pair::kN>(problem, place, split), row, stats,
                               label);
  }
}

// The peaks of rows whose gradients are complete: a warp for each row.
template <class Pair>
__global__ void __launch_bounds__(kWarp) stream_settle_kernel(const RowsProblem problem) {
  using A = typename Pair::A;
  const int64_t row = blockIdx.x;
  const double* from = problem.others + row * problem.splits * kOthers;
  double peaks[2] = {-1, -1};
  for (int split = threadIdx.x; split < problem.splits; split += kWarp) {
    peaks[0] = max_of(peaks[0], from[split * kOthers + 2]);
    peaks[1] = max_of(peaks[1], from[split * kOthers + 3]);
  }
  reduce_in_warp<kWarp, MaxOf>(peaks);
  if (peaks[0] < 0 && peaks[1] < 0) return;
  double sums[2] = {0, 0};
  for (int split = threadIdx.x; split < problem.splits; split += kWarp) {
    sums[0] += from[split * kOthers];
    sums[1] += from[split * kOthers + 1];
  }
  reduce_in_warp<kWarp, SumOf>(sums);
  if (threadIdx.x != 0) return;
  const int columns[kPeaks] = {static_cast<int>(peaks[0]), static_cast<int>(peaks[1])};
  write_peaks<Pair>(problem, locate<Pair>(problem, row), static_cast<A>(sums[0]),
                    static_cast<A>(sums[1]), columns);
}

}  // namespace afm::cuda
