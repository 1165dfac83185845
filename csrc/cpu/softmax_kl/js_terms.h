// What a class of a row comes to under the Jensen-Shannon divergence.
//
//     JS = beta KL(p || m) + gamma KL(q || m)      gamma = 1 - beta      m = beta p + gamma q
//
// Note [Centred JS]
// ~~~~~~~~~~~~~~~~~
// With delta = log q - log p and e = exp(delta) - 1, so that q = p (1 + e), a class contributes
//
//     p (gamma psi(e) - psi(gamma e))      psi(y) = (1 + y) log(1 + y) - y >= 0, near 0 y^2 / 2
//
// whose first-order terms, which sum to 0, are gone before they can cancel. Where |delta| > 1 it is
// beta p log(p / m) + gamma q log(q / m). The gradients need two means besides:
//
//     d JS / d s = gamma q (log(q / m) - E_q[log(q / m)]) / T
//     d JS / d t = beta p (log(p / m) - E_p[log(p / m)]) / T
//
// Near an end of beta all of this is as small as the smaller weight. The sides are exchanged so
// that this is gamma: log(m / p) = log(1 + gamma e) then has all digits, and no logarithm less
// delta loses any.

#pragma once

#include "cpu/losses/kl_sweeps.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <class T>
struct JsTerms {
  // A class that one side all but excludes: a larger delta changes nothing, and an infinite one
  // would make its probability of 0 NaN.
  static constexpr T kMostDelta = T(1e30);
  Vec<T> log_p_over_m, log_q_over_m;  // 0 where the logit is -inf
  Vec<T> value;
};

// A class with finite logits. beta >= gamma.
template <class T>
AFM_INLINE JsTerms<T> js_terms(Vec<T> delta, Vec<T> p, Vec<T> q, Vec<T> beta, Vec<T> gamma,
                               const ScaledExp<T>& plain_exp) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1)), two(T(2));
  const auto is_near = abs(delta) <= one;
  // psi(y), given u = log(1 + y), |u| <= 1: (1 + y) u - y = u y - (exp(u) - 1 - u), of which at
  // least half is left.
  const auto psi = [](V y, V u) AFM_LAMBDA_INLINE { return u * y - excess_of_exp<T>(u); };
  const V d = select(is_near, delta, zero), above = excess_of_exp<T>(d), e = d + above;
  const V y = gamma * e;
  JsTerms<T> out;
  if (!any(one < abs(delta))) {
    const V u = log1p<T>(y);
    out.log_p_over_m = zero - u, out.log_q_over_m = d - u;
    out.value = p * (gamma * (d * e - above) - psi(y, u));
    return out;
  }
  // log(m / p) = log(1 + y); where q is so much larger that y is, log(m / q), from an exponential
  // that does not overflow.
  const auto p_is_larger = delta < zero;
  const V small = plain_exp(zero - abs(delta)), lost = gamma * (small - one);
  const V m_over_q = fma(beta, small, gamma);
  const V y_unit = select(p_is_larger, one, small);  // y = far_y / y_unit
  const V far_y = select(p_is_larger, lost, zero - lost);
  const auto is_long = V(T(1.7)) * y_unit < far_y;
  const V numerator = select(is_near, y, select(is_long, mantissa(m_over_q) - one, far_y));
  const V unit = select(is_near, one, select(is_long, one, y_unit));
  const V u = fma(select(is_long, exponent(m_over_q), zero), V(kLn2<T>),
                  twice_artanh<T>(numerator, fma(two, unit, numerator)));
  out.log_p_over_m = select(is_long, zero - (u + delta), zero - u);
  out.log_q_over_m = select(is_long, zero - u, delta - u);
  out.value = select(is_near, p * (gamma * (d * e - above) - psi(y, u)),
                     beta * p * out.log_p_over_m + gamma * q * out.log_q_over_m);
  return out;
}

template <class T>
struct JsRow {
  using V = Vec<T>;
  RowConstants<T> row;
  ScaledExp<T> plain_exp;
  T beta, gamma, log_beta, log_gamma;
  T inv_student, inv_teacher;  // p = e * inv_teacher; q = f * inv_student, in near rows p * (1 + f)
                               // * inv_student, with e and f as GradientFactors names them
  T log_ratio;                 // delta = x - log_ratio

  AFM_MEMBER V teacher_probability(V e) const { return e * V(inv_teacher); }
  template <RowKind kKind>
  AFM_MEMBER V student_probability(V f, V p) const {
    if constexpr (kKind == RowKind::kNear) return p * fma(f, V(inv_student), V(inv_student));
    return f * V(inv_student);
  }

  template <RowKind kKind>
  AFM_MEMBER JsTerms<T> terms(V s, V t, V p, V q) const {
    const V zero(T(0)), most(JsTerms<T>::kMostDelta);
    const V x = kKind == RowKind::kGeneral ? row.general_x(s, t) : row.x(s, t);
    const V delta = max(min(x - V(log_ratio), most), zero - most);
    if constexpr (kKind != RowKind::kGeneral)
      return js_terms<T>(delta, p, q, V(beta), V(gamma), plain_exp);
    const auto in_s = V(row.student_excluded) < s, in_t = V(row.teacher_excluded) < t;
    const auto in_both = both(in_s, in_t);
    JsTerms<T> out = js_terms<T>(select(in_both, delta, zero), p, q, V(beta), V(gamma), plain_exp);
    out.log_p_over_m = select(in_both, out.log_p_over_m, select(in_t, zero - V(log_beta), zero));
    out.log_q_over_m = select(in_both, out.log_q_over_m, select(in_s, zero - V(log_gamma), zero));
    out.value = select(in_both, out.value,
                       V(beta) * p * out.log_p_over_m + V(gamma) * q * out.log_q_over_m);
    return out;
  }
};

struct JsSums {
  double value = 0, student = 0, teacher = 0;  // the last two: E_q[log(q / m)], E_p[log(p / m)]
};

// A row of each, for the gradients: what `terms` came to is too dear to be taken twice.
template <class T>
struct JsCache {
  T *p, *q, *log_p_over_m, *log_q_over_m;
};

// Near and far rows: cache.p and cache.q hold the exponentials that the first loop kept. They are
// overwritten with p and q where kKeep.
template <RowKind kKind, bool kKeep, class T>
AFM_LOOP void sum_js(const T* s, const T* t, int64_t j0, int64_t n, const JsRow<T>& js,
                     const JsCache<T>& cache, JsSums& sums) {
  using V = Vec<T>;
  Accumulator<T> value, student, teacher;
  const V excluded(-Float<T>::infinity), zero(T(0));
  sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    constexpr bool kGeneral = kKind == RowKind::kGeneral;
    const V a = access.load(s + j, kGeneral ? excluded : zero);
    const V b = access.load(t + j, kGeneral ? excluded : zero);
    V e, f;
    if constexpr (kGeneral) {
      e = js.row.teacher_exp(b), f = js.row.student_exp(a);
    } else {
      e = access.load(static_cast<const T*>(cache.p) + j0 + j, zero);
      f = access.load(static_cast<const T*>(cache.q) + j0 + j, zero);
    }
    const V p = js.teacher_probability(e), q = js.template student_probability<kKind>(f, p);
    const JsTerms<T> c = js.template terms<kKind>(a, b, p, q);
    value.add(u, access.or_zero(c.value));
    student.add_product(u, q, c.log_q_over_m), teacher.add_product(u, p, c.log_p_over_m);
    if constexpr (kKeep) {
      access.store(cache.p + j0 + j, p), access.store(cache.q + j0 + j, q);
      access.store(cache.log_p_over_m + j0 + j, c.log_p_over_m);
      access.store(cache.log_q_over_m + j0 + j, c.log_q_over_m);
    }
  });
  sums.value += value.sum(), sums.student += student.sum(), sums.teacher += teacher.sum();
}

// grad[j] = scale * probability * (log_over_m - mean).
template <class T>
AFM_LOOP void gradient_js(const T* probability, const T* log_over_m, int64_t n, T scale, T mean,
                          T* grad) {
  using V = Vec<T>;
  const V zero(T(0)), factor(scale), centre(mean);
  sweep<V>(0, n, [&](auto access, int64_t j, int) AFM_STEP {
    const V by = factor * access.load(probability + j, zero);
    access.store(grad + j, by * (access.load(log_over_m + j, zero) - centre));
  });
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
