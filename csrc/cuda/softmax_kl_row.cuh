// What the kernels that keep a row on chip and those that stream it share: finding a row in memory,
// its loss, and its gradients.
//
// Note [Aligned body]
// ~~~~~~~~~~~~~~~~~~~
// A row is cut into vectors of N classes on a grid that starts at the 16-byte boundary at or before
// the student's first class, so a row at any address has an aligned body, and a vector at each end
// that is read class by class. A tensor whose rows are misaligned by another number of classes than
// the student's (a view at an odd offset beside a whole tensor) is read class by class throughout:
// the same cache lines, N times the instructions.

#pragma once

#include "cuda/element.cuh"
#include "cuda/reduce.cuh"
#include "cuda/softmax_kl.h"

namespace afm::cuda {

// Student and teacher dtype, accumulation dtype, classes in a vector.
template <typename Student_, typename Teacher_, typename A_, int kN_>
struct Pair {
  using Student = Student_;
  using Teacher = Teacher_;
  using A = A_;
  static constexpr int kN = kN_;
  // What is resident on a multiprocessor at once, which bounds the registers of a thread: two
  // blocks, so that one reads while the other computes. Streaming 16-bit logits (8 a vector) needs
  // 80 registers, others 64; float64 is served, not tuned.
  static constexpr int kStreamThreads = kN == 8 ? 384 : 512;
  static constexpr int kMinBlocks = sizeof(A) == 8 ? 1 : 2;
  using StudentAccess = Access<Student, kN>;
  using TeacherAccess = Access<Teacher, kN>;
  using StudentChunk = Chunk<Student, kN>;
  using TeacherChunk = Chunk<Teacher, kN>;
};

using HalfPair = Pair<__half, __half, float, 8>;
using BFloat16Pair = Pair<__nv_bfloat16, __nv_bfloat16, float, 8>;
using FloatPair = Pair<float, float, float, 4>;
using DoublePair = Pair<double, double, double, 2>;
using MixedPair = Pair<AnyOf<float>, AnyOf<float>, float, 4>;
using MixedDoublePair = Pair<AnyOf<double>, AnyOf<double>, double, 2>;

struct RowAt {
  char* data;
  bool aligned;
};

// The row `row` of each tensor, and `head`: the vector grid starts that many classes before it.
struct RowPlace {
  RowAt student, teacher, grad_student, grad_teacher;
  int head;
};

template <int kN>
__device__ __forceinline__ RowAt row_at(const RowsView& view, int64_t offset, int element_bytes,
                                        int head) {
  const int word = kN * element_bytes < 16 ? kN * element_bytes : 16;
  RowAt at;
  at.data = view.data + offset * element_bytes;
  at.aligned = (reinterpret_cast<uintptr_t>(at.data) - head * element_bytes) % word == 0;
  return at;
}

template <class Pair>
__device__ __forceinline__ RowPlace locate(const RowsProblem& problem, int64_t row) {
  int64_t student = 0, teacher = 0, grad_student = 0, grad_teacher = 0;
  int64_t rest = row;
  for (int dim = problem.row_dims - 1; dim >= 0; --dim) {
    int64_t index = rest;
    if (dim > 0) {
      index = rest % problem.row_sizes[dim];
      rest /= problem.row_sizes[dim];
    }
    student += index * problem.student.strides[dim];
    teacher += index * problem.teacher.strides[dim];
    grad_student += index * problem.grad_student.strides[dim];
    grad_teacher += index * problem.grad_teacher.strides[dim];
  }
  constexpr int kN = Pair::kN;
  const int student_bytes = Pair::StudentAccess::element_bytes(problem.student.dtype);
  const int teacher_bytes = Pair::TeacherAccess::element_bytes(problem.teacher.dtype);
  const int word = kN * student_bytes < 16 ? kN * student_bytes : 16;
  const uintptr_t address =
      reinterpret_cast<uintptr_t>(problem.student.data) + student * student_bytes;
  RowPlace place;
  place.head = static_cast<int>(address % word) / student_bytes;
  place.student = row_at<kN>(problem.student, student, student_bytes, place.head);
  place.teacher = row_at<kN>(problem.teacher, teacher, teacher_bytes, place.head);
  place.grad_student = row_at<kN>(problem.grad_student, grad_student, student_bytes, place.head);
  place.grad_teacher = row_at<kN>(problem.grad_teacher, grad_teacher, teacher_bytes, place.head);
  return place;
}

template <class Pair>
__device__ __forceinline__ typename Pair::StudentChunk load_student(const RowsProblem& problem,
                                                                    const RowPlace& place,
                                                                    int column) {
  return Pair::StudentAccess::load(place.student.data, problem.student.dtype, column,
                                   problem.classes, place.student.aligned, -infinity<float>());
}

template <class Pair>
__device__ __forceinline__ typename Pair::TeacherChunk load_teacher(const RowsProblem& problem,
                                                                    const RowPlace& place,
                                                                    int column) {
  return Pair::TeacherAccess::load(place.teacher.data, problem.teacher.dtype, column,
                                   problem.classes, place.teacher.aligned, -infinity<float>());
}

template <typename A>
__device__ __forceinline__ RowStats<A> load_stats(const void* stats_in, int64_t row) {
  const A* from = static_cast<const A*>(stats_in) + row * kRowStats;
  return {from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7]};
}

template <typename A>
__device__ __forceinline__ void store_stats(void* stats_out, int64_t row,
                                            const RowStats<A>& stats) {
  A* to = static_cast<A*>(stats_out) + row * kRowStats;
  to[0] = stats.max_s;
  to[1] = stats.inv_zs;
  to[2] = stats.max_t;
  to[3] = stats.inv_zt;
  to[4] = stats.center;
  to[5] = stats.value;
  to[6] = stats.other;
  to[7] = stats.inv_label;
}

template <typename A>
__device__ __forceinline__ A weight_of(const RowsProblem& problem, int64_t row) {
  return problem.row_weight == nullptr ? A(1) : static_cast<const A*>(problem.row_weight)[row];
}

// Cross-entropy of a row (kDistillation): its label, and what smoothing and normaliser contribute.
template <typename A>
struct LabelTerm {
  bool active;  // the row has a label and cross-entropy has a share in the loss
  int64_t label;
};

template <typename A>
__device__ __forceinline__ LabelTerm<A> label_of(const RowsProblem& problem, int64_t row) {
  LabelTerm<A> term;
  term.label = problem.labels[row];
  term.active = term.label != problem.ignore_index && problem.alpha != 1;
  // A label out of range has no class to be read; the row is NaN, as nothing can raise here.
  return term;
}

// Cross-entropy with smoothing, from sums relative to `anchor`: z = sum exp(s - max_s),
// linear = sum (s - anchor).
template <typename A>
__device__ __forceinline__ A cross_entropy(const RowsProblem& problem, A label_logit, A max_s, A z,
                                           A anchor, A linear) {
  const A smoothing = static_cast<A>(problem.label_smoothing);
  const A log_z = log_of(z);
  A value = (max_s - label_logit) + log_z;
  // All of the weight on the even share: 0 times the label's term, were it infinite.
  value = smoothing == A(1) && value == infinity<A>() ? A(0) : (A(1) - smoothing) * value;
  if (smoothing > A(0)) {
    value += smoothing * (((max_s - anchor) + log_z) - linear / static_cast<A>(problem.classes));
  }
  return value;
}

template <class Pair>
__device__ __forceinline__ typename Pair::A label_logit(const RowsProblem& problem,
                                                        const RowPlace& place, int64_t label) {
  using A = typename Pair::A;
  if (label < 0 || label >= problem.classes) return not_a_number<A>();
  return Pair::StudentAccess::element(place.student.data, problem.student.dtype,
                                      static_cast<int>(label), A(0));
}

template <typename A>
__device__ __forceinline__ Weights<A> weights_of(const RowsProblem& problem) {
  return {static_cast<A>(problem.beta), static_cast<A>(problem.gamma)};
}

// The value of a row, without weight and scale. `entropy`: its cross-entropy (kDistillation).
template <Variant kVariant, typename A>
__device__ __forceinline__ A value_of(const RowsProblem& problem, const RowStats<A>& stats,
                                      bool labelled, A entropy) {
  if constexpr (kVariant == Variant::kDistillation) {
    const A alpha = static_cast<A>(problem.alpha);
    const A temperature = static_cast<A>(problem.temperature);
    A value = A(0);
    if (problem.alpha != 0) value += alpha * temperature * temperature * stats.value;
    if (labelled) value += (A(1) - alpha) * entropy;
    return value;
  } else if constexpr (kVariant == Variant::kSymmetric) {
    return row_value(stats, problem.divergence, weights_of<A>(problem));
  } else {
    return stats.value;
  }
}

template <typename A>
__device__ __forceinline__ A weighted(A value, A weight, double scale) {
  return weight == A(0) ? A(0) : value * weight * static_cast<A>(scale);
}

// What the gradients of a row are multiplied with. A row without a gradient gets NaN, a row of
// weight 0 is `silent`: exactly 0 whatever it holds.
template <typename A>
struct Factors {
  bool silent;
  A divergence;
  A entropy;  // kDistillation
};

template <Variant kVariant, typename A>
__device__ __forceinline__ Factors<A> factors_of(const RowsProblem& problem, int64_t row, A weight,
                                                 const RowStats<A>& stats, bool labelled) {
  A factor = weight * static_cast<A>(problem.scale);
  if (problem.grad_loss != nullptr) {
    factor *= static_cast<const A*>(problem.grad_loss)[row * problem.grad_loss_stride];
  }
  Factors<A> factors;
  factors.silent = weight == A(0);
  factors.entropy = A(0);
  if constexpr (kVariant == Variant::kDistillation) {
    const A alpha = static_cast<A>(problem.alpha);
    factors.divergence = factor * alpha * static_cast<A>(problem.temperature);  // T^2 / T
    if (labelled) factors.entropy = factor * (A(1) - alpha);
    // The two terms are one row: where either is not finite, neither has a gradient.
    if ((problem.alpha != 0 && !has_gradient(stats)) || (labelled && !is_finite(stats.inv_label))) {
      factors.divergence = factors.entropy = not_a_number<A>();
    }
    if (problem.alpha == 0) factors.divergence = A(0);
  } else {
    factors.divergence = factor / static_cast<A>(problem.temperature);
    if (!has_gradient(stats)) factors.divergence = not_a_number<A>();
  }
  return factors;
}

// Sums of the gradients of a row but those of its peaks. See Note [Certain rows].
template <typename A>
struct Others {
  A student = A(0), teacher = A(0);
};

// The columns of a row's peaks, by student and by teacher; -1 where there is none.
constexpr int kPeaks = 2;

// Whether a row may have a peak. The largest class of a side has the probability 1 / Z.
template <Variant kVariant, typename A>
__device__ __forceinline__ bool may_have_peaks(const RowsProblem& problem,
                                               const RowStats<A>& stats) {
  if constexpr (kVariant == Variant::kSymmetric) {
    return problem.divergence == Divergence::kJs &&
           (is_certain(stats.inv_zs) || is_certain(stats.inv_zt));
  } else if constexpr (kVariant == Variant::kDistillation) {
    return is_certain(stats.inv_zt) || is_certain(stats.inv_label);
  } else {
    return is_certain(stats.inv_zt);
  }
}

template <class Pair>
__device__ __forceinline__ void write_peaks(const RowsProblem& problem, const RowPlace& place,
                                            typename Pair::A others_student,
                                            typename Pair::A others_teacher,
                                            const int (&peaks)[kPeaks]) {
  using A = typename Pair::A;
  if (peaks[0] >= 0 && problem.grad_student.data != nullptr) {
    Pair::StudentAccess::store_element(place.grad_student.data, problem.student.dtype, peaks[0],
                                       A(0) - others_student);
  }
  if (peaks[1] >= 0 && problem.grad_teacher.data != nullptr) {
    Pair::TeacherAccess::store_element(place.grad_teacher.data, problem.teacher.dtype, peaks[1],
                                       A(0) - others_teacher);
  }
}

// Writes the gradients of one vector of classes.
template <class Pair, Variant kVariant>
__device__ __forceinline__ void write_gradients(
    const RowsProblem& problem, const RowPlace& place, const Base<typename Pair::A>& base,
    const RowStats<typename Pair::A>& stats, const Factors<typename Pair::A>& factors,
    int64_t label, const typename Pair::StudentChunk& s, const typename Pair::TeacherChunk& t,
    int column, Others<typename Pair::A>& others, int (&peaks)[kPeaks]) {
  using A = typename Pair::A;
  constexpr int kN = Pair::kN;
  A student[kN], teacher[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const A s_i = s.template get<A>(i), t_i = t.template get<A>(i);
    const Class<A> c = class_of(stats, base, s_i, t_i);
    ClassGradient<A> g;
    bool teacher_peak = is_certain(c.p), student_peak = teacher_peak && is_certain(c.q);
    if constexpr (kVariant == Variant::kSymmetric) {
      g = symmetric_gradient(stats, c, problem.divergence, weights_of<A>(problem));
      const bool is_js = problem.divergence == Divergence::kJs;
      student_peak = is_js && is_certain(c.q);
      teacher_peak = is_js && teacher_peak;
    } else {
      g = kl_gradient(stats, c);
    }
    if constexpr (kVariant == Variant::kDistillation) {
      const A smoothing = static_cast<A>(problem.label_smoothing);
      const A even = smoothing / static_cast<A>(problem.classes);
      // alpha = 0 leaves nothing of the divergence, not even its NaN.
      student[i] = factors.divergence == A(0) ? A(0) : g.student * factors.divergence;
      teacher[i] = factors.divergence == A(0) ? A(0) : g.teacher * factors.divergence;
      if (factors.entropy != A(0)) {
        const A own = exp2_times((s_i - stats.max_s) * A(1.4426950408889634074), stats.inv_label);
        const A wanted = column + i == label ? even + (A(1) - smoothing) : even;
        student[i] += factors.entropy * (own - wanted);
        student_peak = student_peak || (column + i == label && is_certain(own));
      }
    } else {
      student[i] = g.student * factors.divergence;
      teacher[i] = g.teacher * factors.divergence;
    }
    if (factors.silent) student[i] = teacher[i] = A(0);
    if (column + i >= 0 && column + i < problem.classes) {
      if (student_peak) {
        peaks[0] = column + i;
      } else {
        others.student += student[i];
      }
      if (teacher_peak) {
        peaks[1] = column + i;
      } else {
        others.teacher += teacher[i];
      }
    }
  }
  if (problem.grad_student.data != nullptr) {
    Pair::StudentAccess::store(place.grad_student.data, problem.student.dtype, column,
                               problem.classes, place.grad_student.aligned, student);
  }
  if (problem.grad_teacher.data != nullptr) {
    Pair::TeacherAccess::store(place.grad_teacher.data, problem.teacher.dtype, column,
                               problem.classes, place.grad_teacher.aligned, teacher);
  }
}

}  // namespace afm::cuda
