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

#pragma once

#include "cpu/kl_sweeps.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <class T>
struct JsTerms {
  Vec<T> p, q;
  Vec<T> log_p_over_m, log_q_over_m;  // 0 where the logit is -inf
  Vec<T> value;
};

template <class T>
struct JsRow {
  using V = Vec<T>;
  RowConstants<T> row;
  ScaledExp<T> plain_exp;
  T beta, gamma, log_beta, log_gamma;
  T inv_student, inv_teacher;  // 1 / Z_s, 1 / Z_t
  T log_ratio;                 // delta = x - log_ratio

  // psi(y), given u = log(1 + y), |u| <= 1: (1 + y) u - y = u y - (exp(u) - 1 - u), of which at
  // least half is left.
  static AFM_MEMBER V psi(V y, V u) { return u * y - excess_of_exp<T>(u); }

  AFM_MEMBER JsTerms<T> terms(V s, V t) const {
    const V zero(T(0)), one(T(1)), excluded(-Float<T>::infinity);
    const auto in_s = excluded < s, in_t = excluded < t, in_both = both(in_s, in_t);
    JsTerms<T> out;
    out.p = row.teacher_exp(t) * V(inv_teacher), out.q = row.student_exp(s) * V(inv_student);
    const V delta = select(in_both, row.x(s, t) - V(log_ratio), zero);
    const auto is_near = both(in_both, abs(delta) <= one);

    const V d = select(is_near, delta, zero), e = d + excess_of_exp<T>(d);
    const V near_log = log1p(V(gamma) * e);  // log(m / p)
    const V near_value = out.p * (V(gamma) * psi(e, d) - psi(V(gamma) * e, near_log));

    // From the larger of the two probabilities, so that nothing overflows.
    const auto p_is_larger = delta < zero;
    const V u = plain_exp(zero - abs(delta));
    const V base = log(select(p_is_larger, fma(V(gamma), u, V(beta)), fma(V(beta), u, V(gamma))));
    const V p_over_m =
        select(in_both, select(p_is_larger, zero, zero - delta) - base, zero - V(log_beta));
    const V q_over_m =
        select(in_both, select(p_is_larger, delta, zero) - base, zero - V(log_gamma));
    out.log_p_over_m = select(is_near, zero - near_log, select(in_t, p_over_m, zero));
    out.log_q_over_m = select(is_near, d - near_log, select(in_s, q_over_m, zero));
    const V far_value = V(beta) * out.p * out.log_p_over_m + V(gamma) * out.q * out.log_q_over_m;
    out.value = select(is_near, near_value, far_value);
    return out;
  }
};

struct JsSums {
  double value = 0, student = 0, teacher = 0;  // the last two: E_q[log(q / m)], E_p[log(p / m)]
};

template <class T>
AFM_LOOP void sum_js(const T* s, const T* t, int64_t n, const JsRow<T>& js, JsSums& sums) {
  using V = Vec<T>;
  Accumulator<T> value, student, teacher;
  const V excluded(-Float<T>::infinity);
  sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    const JsTerms<T> c = js.terms(access.load(s + j, excluded), access.load(t + j, excluded));
    value.add(u, c.value);
    student.add_product(u, c.q, c.log_q_over_m), teacher.add_product(u, c.p, c.log_p_over_m);
  });
  sums.value += value.sum(), sums.student += student.sum(), sums.teacher += teacher.sum();
}

// grad_s = student_scale * q * (log(q / m) - student_mean), grad_t likewise; null where not wanted.
template <class T>
AFM_LOOP void gradient_js(const T* s, const T* t, int64_t n, const JsRow<T>& js, T student_scale,
                          T student_mean, T teacher_scale, T teacher_mean, T* grad_student,
                          T* grad_teacher) {
  using V = Vec<T>;
  const V excluded(-Float<T>::infinity);
  sweep<V>(0, n, [&](auto access, int64_t j, int) AFM_STEP {
    const JsTerms<T> c = js.terms(access.load(s + j, excluded), access.load(t + j, excluded));
    if (grad_student != nullptr)
      access.store(grad_student + j, V(student_scale) * c.q * (c.log_q_over_m - V(student_mean)));
    if (grad_teacher != nullptr)
      access.store(grad_teacher + j, V(teacher_scale) * c.p * (c.log_p_over_m - V(teacher_mean)));
  });
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
