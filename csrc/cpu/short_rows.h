// KL and its gradients for a block of short rows, one in each lane. See Note [Rows across lanes]
// and Note [Centred KL].

#pragma once

#include "cpu/kl_sweeps.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// A lane adds one class after another. Sums of a few classes at a time, added up, keep the rounding
// of 128 classes as small as that of ten: f(first element of a class) is called for the classes of
// a chunk, end_of_chunk() after each.
constexpr int64_t kChunk = 16;

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
  T* gap;           // (s - m_s) - (t - m_t); in near rows x_j. Then the teacher's gradient
};

// What the sums of a block come to: a value and the factors of the gradients for each row.
//   grad_s = student_part * by_part + e * by_exp      grad_t = e * (gap * by_gap + by_mean)
template <class T>
struct LaneSums {
  Vec<T> divergence;  // NaN: a row that lanes do not serve
  Vec<T> by_part, by_exp, by_gap, by_mean;
};

// Sums of near rows, as sum_general takes them: the classes within |x| <= 1 by the polynomial.
// Overwrites what the far loop left, where a row `is_near`.
template <class T>
AFM_LOOP void near_lanes(const LaneTiles<T>& tiles, int64_t classes, T inv_t, Vec<T> s_max,
                         Vec<T> t_max, Vec<T> z_t, Vec<T> scale, typename Vec<T>::Mask is_near,
                         LaneSums<T>& sums) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1));
  // A whole number off the side that has the offset, as RowConstants does with coarse_gap.
  const V apart = s_max - t_max;
  const V whole =
      select(both(V(T(16)) < abs(apart), abs(apart) < V(T(4194304))), nearest_integer(apart), zero);
  const auto student_is_large = abs(t_max) <= abs(s_max);
  const V student_gap = select(student_is_large, whole, zero);
  const V teacher_gap = select(student_is_large, zero, zero - whole);
  const V centre = ((s_max - student_gap) - (t_max - teacher_gap)) * V(inv_t);
  ChunkedSum<T> linear, excess;
  const auto add = [&](int64_t j) AFM_LAMBDA_INLINE {
    const V a = V::load(tiles.student + j), b = V::load(tiles.teacher + j);
    const V e_s = V::load(tiles.student_part + j), e_t = V::load(tiles.teacher_exp + j);
    const V x = fma((a - student_gap) - (b - teacher_gap), V(inv_t), zero - centre);
    const V above = excess_of_exp<T>(x);
    const auto is_small = abs(x) <= one;
    const V moved = select(is_small, e_t * (x + above), e_s - e_t);
    linear.part = fma(e_t, x, linear.part);
    excess.part = excess.part + select(is_small, e_t * above, moved - e_t * x);
    select(is_near, moved, e_s).store(tiles.student_part + j);
    select(is_near, x, V::load(tiles.gap + j)).store(tiles.gap + j);
  };
  for_chunks<T>(classes, add, [&]() AFM_LAMBDA_INLINE { linear.end_chunk(), excess.end_chunk(); });
  const V inv_z = one / z_t, r = linear.total * inv_z, b = excess.total * inv_z, a = r + b;
  V kl = log1p_minus(a) + b;
  const V not_served(__builtin_nan(""));
  kl = select(r * r <= V(T(30)) * kl, kl, not_served);  // as near_centre_is_off
  kl = select(both(V(T(-0.5)) < a, a < one), kl, not_served);
  const V p = scale * V(inv_t) * inv_z, q = p / (one + a);
  sums.divergence = select(is_near, kl, sums.divergence);
  sums.by_part = select(is_near, q, sums.by_part);
  sums.by_exp = select(is_near, zero - q * a, sums.by_exp);
  sums.by_gap = select(is_near, zero - p, sums.by_gap);
  sums.by_mean = select(is_near, p * r, sums.by_mean);
}

// `scale`: of each row's gradient.
template <class T>
AFM_LOOP LaneSums<T> sum_lanes(const LaneTiles<T>& tiles, int64_t classes, const ScaledExp<T>& exp,
                               T inv_t, Vec<T> scale) {
  using V = Vec<T>;
  const V zero(T(0));
  V s_max = no_class<T>(), t_max = no_class<T>();
  const int64_t end = classes * V::width;
  for (int64_t j = 0; j < end; j += V::width)
    s_max = max(V::load(tiles.student + j), s_max), t_max = max(V::load(tiles.teacher + j), t_max);
  ChunkedSum<T> student, teacher, linear;
  const auto add = [&](int64_t j) AFM_LAMBDA_INLINE {
    const V v = V::load(tiles.student + j) - s_max, w = V::load(tiles.teacher + j) - t_max;
    const V e_s = exp(v), e_t = exp(w), gap = v - w;
    student.part = student.part + e_s, teacher.part = teacher.part + e_t;
    linear.part = fma(e_t, gap, linear.part);
    e_s.store(tiles.student_part + j), e_t.store(tiles.teacher_exp + j), gap.store(tiles.gap + j);
  };
  for_chunks<T>(classes, add, [&]() AFM_LAMBDA_INLINE {
    student.end_chunk(), teacher.end_chunk(), linear.end_chunk();
  });
  const V z_s = student.total, z_t = teacher.total, lost = linear.total - linear.total;
  const V inv_z = V(T(1)) / z_t, r = linear.total * inv_z * V(inv_t), p = scale * V(inv_t) * inv_z;
  LaneSums<T> sums;
  // Anything that is not finite has shown in `linear`, and makes the row NaN.
  sums.divergence = log(z_s * inv_z) - r + lost;
  sums.by_part = scale * V(inv_t) / z_s, sums.by_exp = zero - p;
  sums.by_gap = zero - p * V(inv_t), sums.by_mean = p * r;
  // As far_kl_is_too_small.
  const V floor = max(abs(r) * V(T(kFarMeanFraction)), V(T(kFarKlFloor)));
  const auto is_near = sums.divergence < floor;
  if (any(is_near)) near_lanes(tiles, classes, inv_t, s_max, t_max, z_t, scale, is_near, sums);
  return sums;
}

// The gradients take the places of what they are made of; one that is not wanted is left out.
template <bool kStudent, bool kTeacher, class T>
AFM_LOOP void gradient_lanes(const LaneTiles<T>& tiles, int64_t classes, const LaneSums<T>& by) {
  using V = Vec<T>;
  for (int64_t j = 0; j < classes * V::width; j += V::width) {
    const V e = V::load(tiles.teacher_exp + j);
    if constexpr (kStudent)
      fma(V::load(tiles.student_part + j), by.by_part, e * by.by_exp).store(tiles.student_part + j);
    if constexpr (kTeacher)
      (e * fma(V::load(tiles.gap + j), by.by_gap, by.by_mean)).store(tiles.gap + j);
  }
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
