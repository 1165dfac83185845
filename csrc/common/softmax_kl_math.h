// The row mathematics of softmax_kl: divergences between p = softmax(teacher / T) and q =
// softmax(student / T).
//
// Everything a row needs is linear in a handful of sums, whichever way the hardware goes through
// it. The CPU kernels call these functions on SIMD vectors (any V with + - * and an fma found
// beside it) and on doubles, the CUDA kernels on floats.
//
// Note [Centred KL]
// ~~~~~~~~~~~~~~~~~
// Sum of p * (log p - log q) cancels when the student is close to the teacher. With, for class j,
//
//     x_j = (s_j - t_j) / T - c         c: any constant of the row, near the mean of (s - t) / T
//     under p e_j = exp((t_j - m_t) / T)        m_t: the teacher's shift, its maximum or near it
//     p_j = e_j / Z_t                   Z_t = sum of e
//
//     r   = E_p[x]            the linear mean
//     b   = E_p[exp(x) - 1 - x]         the excess, a sum of non-negative terms
//     1 + A = E_p[exp(x)]               so A = r + b, and q_j = p_j * exp(x_j) / (1 + A)
//
//     KL(p || q) = log1p(A) - r
//
// which does not cancel beyond the size of r, and r's own rounding error enters only as r * dr.
//   * near rows, |x| <= 1 everywhere: exp(x) - 1 - x is a polynomial, and no exponential of the
//   student is needed.
//   * far rows: log1p(A) = log(Z_s / Z_t) + (m_s - m_t) / T - c, from Z_s = sum of exp((s - m_s) /
//   T). Good while the KL is not small and r not large; beyond kFarKlFloor, kFarMeanFraction and
//   kFarMeanLimit a row is summed again with the terms of both kinds (general rows).
// Shift and normaliser are kept apart: one merged log-sum-exp loses digits when logits have an
// offset.
//
// Gradients, per unit of loss, for the logits (not for logits / T):
//     d KL / d s = (q - p) / T            q - p = p * (exp(x) - 1 - A) / (1 + A)  in near rows
//     d KL / d t = -p * (x - r) / T
//     Jeffreys, KL(p || q) + KL(q || p) = E_q[x] - E_p[x], with r_q = E_q[x]:
//     d J / d s = ((q - p) + q * (x - r_q)) / T
//     d J / d t = ((p - q) - p * (x - r)) / T
//
// Note [Hard rows]
// ~~~~~~~~~~~~~~~~
// KL:       both -inf: the class contributes 0. Teacher -inf, student finite: contributes 0; dKL/ds
// = q there, dKL/dt = 0.
//           Student -inf where p > 0: +inf, gradients NaN. NaN, +inf, or all -inf on a side: NaN.
// reverse:  the same with the sides exchanged.
// Jeffreys: the sum of the two, so one side -inf where the other's probability is positive: +inf,
// gradients NaN. JS:       finite for every pair of distributions: a class that is -inf on one side
// contributes
//           beta * p * log(1 / beta), or (1 - beta) * q * log(1 / (1 - beta)); its own gradient is
//           0 on that side.
// A probability that underflows is positive all the same: what excludes a class is a logit of -inf.

#pragma once

#include "common/inline.h"

namespace afm {

// The index into DIVERGENCES of afm_kernels/ops.py.
enum class Divergence : int { kKl = 0, kReverseKl = 1, kJeffreys = 2, kJs = 3 };

// How a row's sums were taken, which decides the formula of its gradients. See Note [Centred KL].
enum class RowKind : int {
  kNear,      // |x| <= 1 everywhere, all finite
  kFar,       // all finite
  kGeneral,   // -inf logits, or a small KL with large |x| somewhere
  kUnlooked,  // the divergence has weight 0
  kInfinite,  // the loss is +inf and the gradients NaN
  kNan,       // the loss and the gradients are NaN
  kMasked,    // weight 0: all is 0, whatever the row holds
};

// Up to which |x| the polynomial for exp(x) - 1 - x holds.
constexpr double kNearLimit = 1.0;
// Far rows whose KL comes out below this are summed again. float32: at 0.1 the plain form is good
// to 2e-6.
constexpr double kFarKlFloor = 0.1;
// ... or below this fraction of |r|, whose rounding error would show.
constexpr double kFarMeanFraction = 0.05;

// Far rows whose x has a larger mean are summed again around it: what rounding leaves of the mean
// is noise in the teacher's gradient, which is next to nothing where one class has nearly all of p.
constexpr double kFarMeanLimit = 64;

// A number k that takes a large gap between the sides out of s - t, by subtracting it from the side
// that has the offset before the other side comes in: both steps are then exact or nearly so. A
// whole number, but where float32 has no fraction left: there a cast to int32 would not be defined,
// and the gap itself does.
template <class T>
AFM_INLINE T coarse_gap(T gap) {
  const T limit = T(8388608);
  if (!(gap > T(16) || gap < T(-16))) return T(0);
  if (gap > limit || gap < -limit) return gap - gap == T(0) ? gap : T(0);  // 0 for infinity
  return T(static_cast<int>(gap));
}

// log(1 + a) - a, without cancellation.
template <class T>
AFM_INLINE T log1p_minus(T a) {
  if (a > T(0.03125) || a < T(-0.03125))
    return static_cast<T>(__builtin_log1p(static_cast<double>(a))) - a;
  T series = T(0);  // a^12 / 13 is below 1e-19
  for (int n = 12; n >= 2; --n) series = T(1) / T(n) - a * series;
  return -a * a * series;
}

// KL(p || q) from r and b.
template <class T>
AFM_INLINE T near_kl(T r, T excess) {
  return log1p_minus(r + excess) + excess;
}

// Whether rounding in b, which contains r^2 / 2, shows in a KL this small: better to sum again
// around c + r.
template <class T>
AFM_INLINE bool near_centre_is_off(T kl, T r) {
  return r * r > T(30) * kl;
}

// E_q[x] - E_p[x], from A, r and E_p[x * (exp(x) - 1)]: the Jeffreys divergence of a near row.
template <class T>
AFM_INLINE T near_jeffreys(T a, T r, T curvature) {
  return (curvature - a * r) / (T(1) + a);
}

// Whether a far row has to be taken again in the general form; true for NaN.
template <class T>
AFM_INLINE bool far_sums_are_off(T kl, T r) {
  const T magnitude = r < T(0) ? -r : r;
  return !(kl >= T(kFarKlFloor) && kl >= T(kFarMeanFraction) * magnitude &&
           magnitude <= T(kFarMeanLimit));
}

}  // namespace afm
