// JS for a block of short rows, one in each lane. See Note [Rows across lanes].
//
// Note [JS from the larger side]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// With P the larger of p and q, w the weight that the smaller has in m, and a = |log q - log p|,
//
//     v = exp(-a) - 1      m = P (1 + w v)      log(P / m) = -log(1 + w v)
//
// and what a class contributes under Note [Centred JS] is P (w psi(v) - psi(w v)): nothing
// overflows, no term is negative, and no row needs a second look. With L = log(1 + y), psi(y) is L
// y + (L - y); with L = -a it is -(a exp(-a) + v).
//
// That is for weights that are not too far apart. A w near 1 would lose the digits of a small 1 -
// w, and take a logarithm more: there the terms are those of long rows.

#pragma once

#include "cpu/losses/short_rows.h"
#include "cpu/softmax_kl/js_terms.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// After far_lanes. Leaves log(p / m) in `gap`, log(q / m) in `extra`.
template <class T>
AFM_LOOP void js_lanes(const LaneTiles<T>& tiles, int64_t classes, const ScaledExp<T>& plain_exp,
                       T inv_t, T beta, T gamma, LaneSums<T>& sums) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1)), weight_p(beta), weight_q(gamma), inv_z_s = sums.q_part;
  LaneGaps<T> gaps(sums.student_max, sums.teacher_max, inv_t);
  // Rounding in the logarithm reaches the loss squared. Equal sums leave none: equal sides give 0.
  gaps.off = zero - log(sums.student_sum / sums.teacher_sum);
  ChunkedSum<T> value, student, teacher;
  const auto add = [&](int64_t j, V p, V q, const JsTerms<T>& c) AFM_LAMBDA_INLINE {
    teacher.part = fma(p, c.log_p_over_m, teacher.part);
    student.part = fma(q, c.log_q_over_m, student.part);
    c.log_p_over_m.store(tiles.gap + j), c.log_q_over_m.store(tiles.extra + j);
  };
  const auto add_from_larger = [&](int64_t j) AFM_LAMBDA_INLINE {
    const V delta = gaps.x(V::load(tiles.student + j), V::load(tiles.teacher + j));
    const V p = V::load(tiles.teacher_exp + j) * sums.p_exp;
    const V q = V::load(tiles.student_part + j) * inv_z_s;
    const auto p_is_larger = delta < zero;
    const V larger = select(p_is_larger, p, q), weight = select(p_is_larger, weight_q, weight_p);
    const V a = min(abs(delta), V(JsTerms<T>::kMostDelta)), u = plain_exp(zero - a),
            above = excess_of_exp<T>(zero - a);
    const auto is_small = a < one;
    const V v = select(is_small, above - a, u - one);
    const V psi_v = zero - select(is_small, fma(a, v, above), fma(a, u, v));
    const V y = weight * v, above_log = log1p_minus<T>(y), logarithm = y + above_log;
    const V psi_y = fma(logarithm, y, above_log);
    const V of_larger = zero - logarithm, of_smaller = of_larger - a;
    JsTerms<T> c;
    value.part = fma(larger, fma(weight, psi_v, zero - psi_y), value.part);
    c.log_p_over_m = select(p_is_larger, of_larger, of_smaller);
    c.log_q_over_m = select(p_is_larger, of_smaller, of_larger);
    add(j, p, q, c);
  };
  const auto add_from_p = [&](int64_t j) AFM_LAMBDA_INLINE {
    const V most(JsTerms<T>::kMostDelta);
    const V x = gaps.x(V::load(tiles.student + j), V::load(tiles.teacher + j));
    const V delta = max(min(x, most), zero - most);
    const V p = V::load(tiles.teacher_exp + j) * sums.p_exp;
    const V q = V::load(tiles.student_part + j) * inv_z_s;
    const JsTerms<T> c = js_terms<T>(delta, p, q, weight_p, weight_q, plain_exp);
    value.part = value.part + c.value;
    add(j, p, q, c);
  };
  const auto end_chunk = [&]() AFM_LAMBDA_INLINE {
    value.end_chunk(), student.end_chunk(), teacher.end_chunk();
  };
  constexpr T kMostWeight = T(0.63);  // log1p serves down to 1/e - 1
  if (beta <= kMostWeight)
    for_chunks<T>(classes, add_from_larger, end_chunk);
  else
    for_chunks<T>(classes, add_from_p, end_chunk);
  const V lost = sums.divergence - sums.divergence;
  sums.divergence = value.total + lost;
  sums.mean = teacher.total, sums.student_mean = student.total;
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
