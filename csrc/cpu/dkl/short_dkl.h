// The decoupled KL for a block of short rows, one in each lane. See Note [Rows across lanes] and
// Note [Decoupled KL in O(C)].

#pragma once

#include "cpu/losses/short_rows.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// A mean of d as large as this, less the gap, shows that the gap is not that of the classes that
// have weight: next to it their digits would be lost.
constexpr double kGapLimit = 16;

// Where the weights of the second term come from: the call; the exponentials of the first term; or
// exponentials of their own, at another temperature.
enum class DklWeights { kGiven, kOfTeacher, kOwn };

// Tiles of `classes` vectors. What the loops leave in them:
template <class T>
struct DklTiles {
  const T *student, *teacher;
  T* weight;       // as given, or unnormalised exponentials; where those are kOfTeacher, not used
  T* student_exp;  // exp((s - m_s) / T). Then the student's gradient
  T* teacher_exp;  // exp((t - m_t) / T)
  T* difference;   // d. Then the teacher's gradient

  AFM_MEMBER const T* weights(DklWeights kind) const {
    return kind == DklWeights::kOfTeacher ? teacher_exp : weight;
  }
};

// What the sums of a block come to, for each row.
template <class T>
struct DklSums {
  Vec<T> soft_cross_entropy;  // log sum exp(s / T) - E_p[s / T]
  Vec<T> variance;            // of d under the weights; NaN: a row that lanes do not serve
  Vec<T> mean;                // of d under the weights
  Vec<T> student_sum, teacher_sum, weight_sum;
  Vec<T> student_max, teacher_max;
  Vec<T> weight_max;  // where weights are kGiven
};

template <DklWeights kWeights, class T>
AFM_LOOP DklSums<T> sum_dkl_lanes(const DklTiles<T>& tiles, int64_t classes, const RowExp<T>& exp,
                                  const RowExp<T>& weight_exp, T inv_t) {
  using V = Vec<T>;
  V s_max(Float<T>::lowest), t_max(Float<T>::lowest);
  for (int64_t j = 0; j < classes * V::width; j += V::width)
    s_max = max(V::load(tiles.student + j), s_max), t_max = max(V::load(tiles.teacher + j), t_max);
  const LaneGaps<T> gaps(s_max, t_max, inv_t);
  ChunkedSum<T> students, teachers, logits, weights, products;
  V weight_max(T(0));
  for_chunks<T>(
      classes,
      [&](int64_t j) AFM_LAMBDA_INLINE {
        const V a = V::load(tiles.student + j), b = V::load(tiles.teacher + j);
        const V v = a - s_max, w = b - t_max, e_s = exp(v), e_t = exp(w);
        const V d = V(T(0)) - gaps.difference(a, b);
        V weight = e_t;
        if constexpr (kWeights == DklWeights::kGiven)
          weight = V::load(tiles.weight + j), weight_max = max(weight, weight_max);
        if constexpr (kWeights == DklWeights::kOwn)
          weight = weight_exp(w), weight.store(tiles.weight + j);
        students.part = students.part + e_s, teachers.part = teachers.part + e_t;
        logits.part = fma(e_t, v, logits.part);
        weights.part = weights.part + weight, products.part = fma(weight, d, products.part);
        e_s.store(tiles.student_exp + j), e_t.store(tiles.teacher_exp + j);
        d.store(tiles.difference + j);
      },
      [&]() AFM_LAMBDA_INLINE {
        students.end_chunk(), teachers.end_chunk(), logits.end_chunk();
        weights.end_chunk(), products.end_chunk();
      });
  // Anything that is not finite makes `products` so, and the mean with it.
  const V inv_weight = V(T(1)) / weights.total, guess = products.total * inv_weight;
  ChunkedSum<T> rest, squares;
  for_chunks<T>(
      classes,
      [&](int64_t j) AFM_LAMBDA_INLINE {
        const V off = V::load(tiles.difference + j) - guess;
        const V weighted_off = V::load(tiles.weights(kWeights) + j) * off;
        rest.part = rest.part + weighted_off, squares.part = fma(weighted_off, off, squares.part);
      },
      [&]() AFM_LAMBDA_INLINE { rest.end_chunk(), squares.end_chunk(); });
  const V left = rest.total * inv_weight, variance = squares.total * inv_weight - left * left;
  DklSums<T> sums;
  sums.student_sum = students.total, sums.teacher_sum = teachers.total;
  sums.weight_sum = weights.total, sums.mean = guess + left;
  sums.student_max = s_max, sums.teacher_max = t_max, sums.weight_max = weight_max;
  sums.soft_cross_entropy =
      log(students.total * V(T(1 / kRaise))) - logits.total / teachers.total * V(inv_t);
  sums.variance = select(variance < V(T(0)), V(T(0)), variance);
  const auto has_gap = V(T(0)) < abs(gaps.student) + abs(gaps.teacher);
  const auto is_off = both(V(T(kGapLimit)) < abs(guess), has_gap);
  sums.variance = select(is_off, V(T(__builtin_nan(""))), sums.variance);
  return sums;
}

// What the terms of each row's gradient are multiplied with.
template <class T>
struct DklScales {
  Vec<T> student_exp, teacher_exp;  // the first term's: q and -p
  Vec<T> weight;                    // the second term's, by the teacher
  bool symmetric;                   // whether the second term's reaches the student
};

// The gradients take the places of what they are made of; one that is not wanted is left out.
template <DklWeights kWeights, bool kStudent, bool kTeacher, class T>
AFM_LOOP void dkl_gradient_lanes(const DklTiles<T>& tiles, int64_t classes, const Vec<T> mean,
                                 const DklScales<T>& by) {
  using V = Vec<T>;
  const V student_weight = by.symmetric ? V(T(0)) - by.weight : V(T(0));
  for (int64_t j = 0; j < classes * V::width; j += V::width) {
    const V off = V::load(tiles.difference + j) - mean;
    const V weighted_off = V::load(tiles.weights(kWeights) + j) * off;
    if constexpr (kStudent) {
      const V soft = fma(V::load(tiles.student_exp + j), by.student_exp,
                         V::load(tiles.teacher_exp + j) * by.teacher_exp);
      fma(weighted_off, student_weight, soft).store(tiles.student_exp + j);
    }
    if constexpr (kTeacher) (weighted_off * by.weight).store(tiles.difference + j);
  }
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
