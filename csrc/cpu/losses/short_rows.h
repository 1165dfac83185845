// KL and Jeffreys, with or without a cross-entropy, and their gradients for a block of short rows,
// one in each lane. See Note [Rows across lanes] and Note [Centred KL].

#pragma once

#include "cpu/losses/certain_rows.h"
#include "cpu/losses/kl_sweeps.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// A lane adds one class after another. Sums of a few classes at a time, added up, keep the rounding
// of 128 classes as small as that of ten: f(first element of a class) is called for the classes of
// a chunk, end_of_chunk() after each.
constexpr int64_t kChunk = 16;

// As kFarMeanLimit. What such rows cost here is a loop without exponentials.
constexpr double kLaneMeanLimit = 8;

template <class T, class F, class G>
AFM_INLINE void for_chunks(int64_t classes, const F& f, const G& end_of_chunk) {
  constexpr int64_t kStep = Vec<T>::width;
  for (int64_t begin = 0; begin < classes; begin += kChunk) {
    const int64_t end = begin + kChunk < classes ? begin + kChunk : classes;
    for (int64_t j = begin * kStep; j < end * kStep; j += kStep) f(j);
    end_of_chunk();
  }
}

// A sum in chunks.
template <class T>
struct ChunkedSum {
  Vec<T> part = Vec<T>(T(0)), total = Vec<T>(T(0));
  AFM_MEMBER void end_chunk() { total = total + part, part = Vec<T>(T(0)); }
};

// Tiles of `classes` vectors. What the loops leave in them:
template <class T>
struct LaneTiles {
  const T *student, *teacher;
  T* student_part;  // exp((s - m_s) / T); in near rows e_j (exp(x_j) - 1). Then the student's
                    // gradient
  T* teacher_exp;   // e_j
  T* gap;    // (s - m_s) - (t - m_t); in near rows x_j; for JS log(p / m). Then the teacher's
             // gradient
  T* extra;  // for JS log(q / m); with labels exp(s - m_s), where that is another exponential
};

// What the sums of a block come to, for each row.
//   p = e * p_exp      q = student_part * q_part + e * q_exp      x = gap * x_unit
template <class T>
struct LaneSums {
  using V = Vec<T>;
  V divergence;  // NaN: a row that lanes do not serve
  V student_max, teacher_max, student_sum, teacher_sum;
  V p_exp, q_part, q_exp;
  V apart_exp;  // q - p = student_part * q_part + e * apart_exp
  V x_unit;
  // E_p[gap]; Jeffreys: E_q[gap]; JS: E_p[log(p / m)] and E_q[log(q / m)]
  V mean, student_mean;
  V student_rest;  // Jeffreys: what student_mean is off by
};

// (s - t) / T about its value at the maxima, without the digits that an offset of one side costs:
// it comes off the side that has it, as RowConstants does with coarse_gap.
template <class T>
struct LaneGaps {
  using V = Vec<T>;
  V student, teacher, inv_t, base;
  V off = V(T(0));

  AFM_MEMBER LaneGaps(V s_max, V t_max, T inverse_temperature) : inv_t(inverse_temperature) {
    const V zero(T(0)), apart = s_max - t_max;
    const V whole = select(abs(apart) < V(T(4194304)), nearest_integer(apart), apart);
    const V gap = select(V(T(16)) < abs(apart), whole, zero);
    const auto student_is_large = abs(t_max) <= abs(s_max);
    student = select(student_is_large, gap, zero);
    teacher = select(student_is_large, zero, zero - gap);
    base = difference(s_max, t_max);
  }
  AFM_MEMBER V difference(V s, V t) const { return (s - student) - (t - teacher); }
  // 0 at the maxima, exactly, at any temperature.
  AFM_MEMBER V x(V s, V t) const { return fma(difference(s, t) - base, inv_t, off); }
};

// Sums of near rows, as sum_general takes them: the classes within |x| <= 1 by the polynomial.
// Overwrites what the far loop left, where a row `is_near`.
template <bool kJeffreys, class T>
AFM_LOOP void near_lanes(const LaneTiles<T>& tiles, int64_t classes, T inv_t,
                         typename Vec<T>::Mask is_near, LaneSums<T>& sums) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1));
  const LaneGaps<T> gaps(sums.student_max, sums.teacher_max, inv_t);
  ChunkedSum<T> linear, excess, curvature;
  const auto add = [&](int64_t j) AFM_LAMBDA_INLINE {
    const V a = V::load(tiles.student + j), b = V::load(tiles.teacher + j);
    const V e_s = V::load(tiles.student_part + j), e_t = V::load(tiles.teacher_exp + j);
    const V x = gaps.x(a, b), above = excess_of_exp<T>(x);
    const auto is_small = abs(x) <= one;
    const V moved = select(is_small, e_t * (x + above), e_s - e_t);
    linear.part = fma(e_t, x, linear.part);
    excess.part = excess.part + select(is_small, e_t * above, moved - e_t * x);
    if constexpr (kJeffreys) curvature.part = fma(moved, x, curvature.part);
    select(is_near, moved, e_s).store(tiles.student_part + j);
    select(is_near, x, V::load(tiles.gap + j)).store(tiles.gap + j);
  };
  for_chunks<T>(classes, add, [&]() AFM_LAMBDA_INLINE {
    linear.end_chunk(), excess.end_chunk();
    if constexpr (kJeffreys) curvature.end_chunk();
  });
  const V p = sums.p_exp, r = linear.total * p, b = excess.total * p, a = r + b;
  const V q = p / (one + a);
  const V not_served(__builtin_nan(""));
  V value = log1p_minus(a) + b;
  const auto is_off = V(T(30)) * value < r * r;  // as near_centre_is_off
  if constexpr (kJeffreys) {                     // as near_jeffreys
    value = (curvature.total * p - a * r) / (one + a);
    sums.student_mean = select(is_near, r + value, sums.student_mean);
    sums.student_rest = select(is_near, zero, sums.student_rest);
  }
  value = select(is_off, not_served, value);
  value = select(both(V(T(-0.5)) < a, a < one), value, not_served);
  sums.divergence = select(is_near, value, sums.divergence);
  sums.q_part = select(is_near, q, sums.q_part);
  sums.q_exp = select(is_near, q, sums.q_exp);
  sums.apart_exp = select(is_near, zero - q * a, sums.apart_exp);
  sums.x_unit = select(is_near, one, sums.x_unit);
  sums.mean = select(is_near, r, sums.mean);
}

// Exact maxima, both exponentials, and KL in the plain form.
template <bool kJeffreys, class T>
AFM_LOOP LaneSums<T> far_lanes(const LaneTiles<T>& tiles, int64_t classes, const RowExp<T>& exp,
                               T inv_t) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1));
  V s_max(Float<T>::lowest), t_max(Float<T>::lowest);
  const int64_t end = classes * V::width;
  for (int64_t j = 0; j < end; j += V::width)
    s_max = max(V::load(tiles.student + j), s_max), t_max = max(V::load(tiles.teacher + j), t_max);
  ChunkedSum<T> student, teacher, linear, student_linear;
  const auto add = [&](int64_t j) AFM_LAMBDA_INLINE {
    const V v = V::load(tiles.student + j) - s_max, w = V::load(tiles.teacher + j) - t_max;
    const V e_s = exp.unbounded(v), e_t = exp.unbounded(w), gap = v - w;
    student.part = student.part + e_s, teacher.part = teacher.part + e_t;
    linear.part = fma(e_t, gap, linear.part);
    if constexpr (kJeffreys) student_linear.part = fma(e_s, gap, student_linear.part);
    e_s.store(tiles.student_part + j), e_t.store(tiles.teacher_exp + j), gap.store(tiles.gap + j);
  };
  for_chunks<T>(classes, add, [&]() AFM_LAMBDA_INLINE {
    student.end_chunk(), teacher.end_chunk(), linear.end_chunk();
    if constexpr (kJeffreys) student_linear.end_chunk();
  });
  LaneSums<T> sums;
  sums.student_max = s_max, sums.teacher_max = t_max;
  sums.student_sum = student.total, sums.teacher_sum = teacher.total;
  sums.p_exp = one / teacher.total, sums.q_part = one / student.total;
  sums.q_exp = zero, sums.apart_exp = zero - sums.p_exp;
  sums.x_unit = V(inv_t);
  sums.mean = linear.total * sums.p_exp;
  sums.student_mean = student_linear.total * sums.q_part, sums.student_rest = zero;
  // Anything that is not finite has shown in a sum, and makes the row NaN.
  const V lost = (linear.total - linear.total) + (student.total - student.total);
  sums.divergence = log(student.total * sums.p_exp) - sums.mean * sums.x_unit + lost;
  return sums;
}

// Jeffreys, where x has large means: what rounding leaves of them is not small next to gradients.
// Takes E_p[gap] out of `gap` in rows that are `far_off`, and what is left of the means after that.
template <class T>
AFM_LOOP void centre_lanes(const LaneTiles<T>& tiles, int64_t classes,
                           typename Vec<T>::Mask far_off, LaneSums<T>& sums) {
  using V = Vec<T>;
  const V shift = select(far_off, sums.mean, V(T(0)));
  ChunkedSum<T> linear, student_linear, student_rest;
  const auto move = [&](int64_t j) AFM_LAMBDA_INLINE {
    const V gap = V::load(tiles.gap + j) - shift;
    linear.part = fma(V::load(tiles.teacher_exp + j), gap, linear.part);
    student_linear.part = fma(V::load(tiles.student_part + j), gap, student_linear.part);
    gap.store(tiles.gap + j);
  };
  for_chunks<T>(classes, move,
                [&]() AFM_LAMBDA_INLINE { linear.end_chunk(), student_linear.end_chunk(); });
  sums.mean = linear.total * sums.p_exp;
  sums.student_mean = student_linear.total * sums.q_part;
  const auto take_rest = [&](int64_t j) AFM_LAMBDA_INLINE {
    const V off = V::load(tiles.gap + j) - sums.student_mean;
    student_rest.part = fma(V::load(tiles.student_part + j), off, student_rest.part);
  };
  for_chunks<T>(classes, take_rest, [&]() AFM_LAMBDA_INLINE { student_rest.end_chunk(); });
  sums.student_rest = student_rest.total * sums.q_part;
}

// KL, or Jeffreys.
template <bool kJeffreys, class T>
AFM_INLINE LaneSums<T> sum_kl_lanes(const LaneTiles<T>& tiles, int64_t classes,
                                    const RowExp<T>& exp, T inv_t) {
  using V = Vec<T>;
  LaneSums<T> sums = far_lanes<kJeffreys>(tiles, classes, exp, inv_t);
  // As far_sums_are_off, but for the mean.
  const V floor = max(abs(sums.mean * sums.x_unit) * V(T(kFarMeanFraction)), V(T(kFarKlFloor)));
  const auto is_near = sums.divergence < floor;
  if constexpr (kJeffreys) {
    const V lost = sums.divergence - sums.divergence;
    sums.divergence = (sums.student_mean - sums.mean) * sums.x_unit + lost;
    const auto far_off =
        V(T(kLaneMeanLimit)) < max(abs(sums.mean), abs(sums.student_mean)) * sums.x_unit;
    if (any(far_off)) centre_lanes(tiles, classes, far_off, sums);
  }
  if (any(is_near)) near_lanes<kJeffreys>(tiles, classes, inv_t, is_near, sums);
  return sums;
}

// The softmax of the student at temperature 1, where the loss has another one: unnormalised, to
// `extra`. Returns the sums.
template <class T>
AFM_LOOP Vec<T> plain_lanes(const LaneTiles<T>& tiles, int64_t classes, const RowExp<T>& hard_exp,
                            Vec<T> s_max) {
  using V = Vec<T>;
  ChunkedSum<T> sum;
  const auto add = [&](int64_t j) AFM_LAMBDA_INLINE {
    const V e = hard_exp(V::load(tiles.student + j) - s_max);
    sum.part = sum.part + e;
    e.store(tiles.extra + j);
  };
  for_chunks<T>(classes, add, [&]() AFM_LAMBDA_INLINE { sum.end_chunk(); });
  return sum.total;
}

// The sum of the student's logits, each less the row's maximum.
template <class T>
AFM_LOOP Vec<T> logit_lanes(const LaneTiles<T>& tiles, int64_t classes, Vec<T> s_max) {
  ChunkedSum<T> sum;
  const auto add = [&](int64_t j) AFM_LAMBDA_INLINE {
    sum.part = sum.part + (Vec<T>::load(tiles.student + j) - s_max);
  };
  for_chunks<T>(classes, add, [&]() AFM_LAMBDA_INLINE { sum.end_chunk(); });
  return sum.total;
}

// What the terms of each row's gradient are multiplied with.
template <class T>
struct LaneScales {
  Vec<T> student, teacher;         // the divergence's, with 1 / T
  Vec<T> softmax = Vec<T>(T(0));   // q, the cross-entropy's at temperature 1
  Vec<T> plain = Vec<T>(T(0));     // `extra`, the cross-entropy's at other temperatures
  Vec<T> constant = Vec<T>(T(0));  // 1: label smoothing
};

// Which gradient a block gets: KL's also has the cross-entropy's, the third one with `extra`.
enum class LaneGradient { kKl, kJeffreys, kWithPlain, kJs };

// The gradients take the places of what they are made of; one that is not wanted is left out.
template <LaneGradient kGradient, bool kStudent, bool kTeacher, class T>
AFM_LOOP void gradient_lanes(const LaneTiles<T>& tiles, int64_t classes, const LaneSums<T>& sums,
                             const LaneScales<T>& by) {
  using V = Vec<T>;
  constexpr bool kJeffreys = kGradient == LaneGradient::kJeffreys;
  constexpr bool kJs = kGradient == LaneGradient::kJs;
  const V zero(T(0)), p_exp = by.teacher * sums.p_exp;
  const V teacher_x = kJs ? p_exp : zero - p_exp * sums.x_unit;
  const V part = sums.q_part * (by.student + by.softmax);
  const V q_exp = by.student * sums.q_exp;
  const V apart_exp = fma(by.student, sums.apart_exp, by.softmax * sums.q_exp);
  for (int64_t j = 0; j < classes * V::width; j += V::width) {
    const V e = V::load(tiles.teacher_exp + j), f = V::load(tiles.student_part + j);
    const V gap = V::load(tiles.gap + j);
    if constexpr (kStudent) {
      V grad;
      if constexpr (kJs) {
        grad = fma(f, part, e * q_exp) * (V::load(tiles.extra + j) - sums.student_mean);
      } else {
        grad = fma(f, part, fma(e, apart_exp, by.constant));
        if constexpr (kJeffreys)
          grad = fma(fma(f, part, e * q_exp) * (gap - sums.student_mean - sums.student_rest),
                     sums.x_unit, grad);
        if constexpr (kGradient == LaneGradient::kWithPlain)
          grad = fma(V::load(tiles.extra + j), by.plain, grad);
      }
      grad.store(tiles.student_part + j);
    }
    if constexpr (kTeacher) {
      V grad = e * (gap - sums.mean) * teacher_x;
      if constexpr (kJeffreys) grad = grad - fma(f, part, e * apart_exp);
      grad.store(tiles.gap + j);
    }
  }
}

// The rows of a mask: a side is certain of a class. `sum`: of its exponentials, the largest being
// the raised 1.
template <class T>
AFM_INLINE typename Vec<T>::Mask certain_lanes(Vec<T> sum) {
  return sum < Vec<T>(T(kRaise / kCertain));
}

// See Note [Certain rows]: in rows of a mask, makes the gradient of the class whose number is `top`
// minus the sum of the others.
template <class T>
AFM_LOOP void settle_lanes(const T* numbers, Vec<T> top, int64_t classes,
                           typename Vec<T>::Mask rows, T* grads) {
  using V = Vec<T>;
  const V zero(T(0));
  ChunkedSum<T> others;
  const auto add = [&](int64_t j) AFM_LAMBDA_INLINE {
    const auto is_top = V::load(numbers + j) == top;
    others.part = others.part + select(is_top, zero, V::load(grads + j));
  };
  for_chunks<T>(classes, add, [&]() AFM_LAMBDA_INLINE { others.end_chunk(); });
  const V peak = zero - others.total;
  for (int64_t j = 0; j < classes * V::width; j += V::width) {
    const auto is_top = both(rows, V::load(numbers + j) == top);
    select(is_top, peak, V::load(grads + j)).store(grads + j);
  }
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
