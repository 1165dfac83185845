// What a row of logits is reduced to, and how its loss and gradients follow: every divergence of
// softmax(student / T) and softmax(teacher / T), in scalar code that has no opinion on who runs it.
//
// The GPU kernels call it lane by lane; the tests run the same kernels on the CPU. With s, t the
// logits, s' = s/T, t' = t/T, q = softmax(s'), p = softmax(t'), each class has
//
//     y = log q - log p = ((s - a) - (t - b) - d) / T - center
//
// Note [Base of the differences]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Near a fixed point s and t agree in most bits and s - t is exact, so (a, b) = (0, 0). When one
// side is offset by a constant, s - t is rounded to the coarser grid; (a, b) = (max s, max t) then
// takes the offset off first. d is what is left at the maxima, or at a class like it: where that
// class has nearly all of p and q, y is next to nothing, and `center` has to be as small to keep
// its digits, as has the teacher's mean of the differences.
//
// Note [Rows near their minimum]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// KL = sum p (-y) cancels to nothing when q is close to p. With f(x) = expm1(x) - x >= 0,
//
//     KL(p||q) = sum p f(y)        KL(q||p) = sum q f(-y)
//
// have no negative term, and an error c of `center` reaches them as c^2/2 only. For any center,
// log E_p[exp y] = log1p(u) with u = E_p[f(y)] + E_p[y], which is what `center` was off by.
//
// Note [Certain rows]
// ~~~~~~~~~~~~~~~~~~~
// Where a side has nearly all of its mass on one class, the gradient that reaches it is next to
// nothing, and at the peak it is the difference of two numbers that are not: a slope and its mean,
// or a probability and 1. What rounding leaves there is larger than the whole gradient. The other
// classes keep their digits, and the gradients of a row sum to 0: so the peak's is minus the sum of
// the others. KL needs it of the teacher, and of the student where both sides have the same peak;
// JS of both sides; a cross-entropy where its label is the peak. (Jeffreys is taken around the
// maxima, where nothing is left at a peak of both sides; with a peak each, nothing of it is small.)

#pragma once

#include <cmath>

#include "common/softmax_kl_math.h"

#define AFM_HD AFM_MEMBER

namespace afm {

template <typename A>
AFM_HD A infinity() {
  return static_cast<A>(INFINITY);
}

template <typename A>
AFM_HD A not_a_number() {
  return static_cast<A>(NAN);
}

// 2^x. In float32 one instruction on a GPU: 2 units in the last place, subnormal results are 0.
AFM_HD float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return ::exp2f(x);
#endif
}
AFM_HD double exp2_of(double x) { return ::exp2(x); }

// 2^x times a factor of at most 1, with all digits down to the smallest subnormal number, which
// exp2_of has not. That far below 0 adding 24 is exact.
template <typename A>
AFM_HD A exp2_times(A x, A factor) {
  const bool is_low = x < A(-100);
  return exp2_of(is_low ? x + A(24) : x) * (is_low ? factor * A(5.9604644775390625e-8) : factor);
}

AFM_HD float abs_of(float x) { return ::fabsf(x); }
AFM_HD double abs_of(double x) { return ::fabs(x); }
AFM_HD float log_of(float x) { return ::logf(x); }
AFM_HD double log_of(double x) { return ::log(x); }
AFM_HD float log1p_of(float x) { return ::log1pf(x); }
AFM_HD double log1p_of(double x) { return ::log1p(x); }
AFM_HD float expm1_of(float x) { return ::expm1f(x); }
AFM_HD double expm1_of(double x) { return ::expm1(x); }

// The larger; a NaN is passed over (the sums that follow pick it up).
AFM_HD float max_of(float a, float b) { return ::fmaxf(a, b); }
AFM_HD double max_of(double a, double b) { return ::fmax(a, b); }

AFM_HD bool is_finite(float x) { return abs_of(x) < infinity<float>(); }
AFM_HD bool is_finite(double x) { return abs_of(x) < infinity<double>(); }

// expm1(x) - x for |x| <= 1/2: the series, to the last digit of its type.
AFM_HD float expm1_minus_x(float x) {
  float series = 1.f / 40320.f;
  series = series * x + 1.f / 5040.f;
  series = series * x + 1.f / 720.f;
  series = series * x + 1.f / 120.f;
  series = series * x + 1.f / 24.f;
  series = series * x + 1.f / 6.f;
  series = series * x + 0.5f;
  return series * x * x;
}
AFM_HD double expm1_minus_x(double x) {
  double series = 1;
  for (int n = 17; n > 2; --n) series = series * x / n + 1;
  return series * x * x / 2;
}

// x - log1p(x) for x > -1.
template <typename A>
AFM_HD A x_minus_log1p(A x) {
  if (abs_of(x) < A(0.1)) {
    const int terms = sizeof(A) == 4 ? 8 : 17;
    A series = A(1) / A(terms + 1);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int n = terms; n > 1; --n) series = A(1) / A(n) - x * series;
    return x * x * series;
  }
  return x - log1p_of(x);
}

// Below this the series of expm1(x) - x is used, above it the exponentials themselves.
template <typename A>
AFM_HD A series_limit() {
  return A(0.5);
}

// Rows with a larger KL take the direct form: nothing cancels there.
template <typename A>
AFM_HD A centred_below() {
  return A(0.25);
}

// A side with a larger probability is certain. Below, the rounding at the peak is 4e-6 of the
// gradient.
template <typename A>
AFM_HD bool is_certain(A probability) {
  return probability > A(0.98);
}

// What the classes share: the temperature and the subtrahends of the differences.
template <typename A>
struct Base {
  A inv_temperature;
  A exponent_scale;           // log2(e) / T
  A shift_s, shift_t, shift;  // a, b, d

  // See Note [Base of the differences].
  static AFM_HD Base of(A inv_temperature, A top_s, A top_t) {
    Base base;
    base.inv_temperature = inv_temperature;
    base.exponent_scale = inv_temperature * A(1.4426950408889634074);
    const bool apart = abs_of(top_s - top_t) > A(8);
    base.shift_s = apart ? top_s : A(0);
    base.shift_t = apart ? top_t : A(0);
    base.shift = apart ? A(0) : top_s - top_t;
    return base;
  }

  // 0 at what the base is of.
  AFM_HD A difference(A s, A t) const {
    return (((s - shift_s) - (t - shift_t)) - shift) * inv_temperature;
  }
};

// A maximum that can be subtracted: an empty set has none.
template <typename A>
AFM_HD A safe_max(A top) {
  return top == -infinity<A>() ? A(0) : top;
}

// One row, as a backward needs it: eight scalars, the columns of row_stats.
template <typename A>
struct RowStats {
  A max_s, inv_zs;  // softmax(s') = exp((s - max_s) / T) inv_zs
  A max_t, inv_zt;
  A center;     // of y, against Base::of(1/T, max_s, max_t)
  A value;      // KL(p||q); for JS KL(p||m). NaN or infinite: the row has no gradient
  A other;      // Jeffreys: KL(q||p); JS: KL(q||m); KL: the teacher's mean of the differences
  A inv_label;  // distillation: 1 / sum exp(s - max_s)
};

// First reduction of a row that is known whole: sums relative to its maxima.
template <typename A>
struct RowSums {
  A zs, zt;      // sums of exp
  A difference;  // sum of exp(t' - max) times the difference
};

// True where the first argument excludes a class that the second has: the divergence is infinite.
template <typename A>
AFM_HD bool excludes(A by, A of) {
  return by == -infinity<A>() && of > -infinity<A>();
}

template <typename A>
AFM_HD void add_class(RowSums<A>& sums, const Base<A>& base, A max_s, A max_t, A s, A t) {
  const A es = exp2_of((s - max_s) * base.exponent_scale);
  const A et = exp2_of((t - max_t) * base.exponent_scale);
  sums.zs += es;
  sums.zt += et;
  // Excluded classes (s or t is -inf) have no finite difference; they are dealt with by `excludes`.
  const bool live = et > A(0) && s > -infinity<A>();
  sums.difference += live ? et * base.difference(s, t) : A(0);
}

// What the sums say: probabilities, centre and the direct form of KL(p||q), which is exact unless
// it is small. `excluded`: some class is excluded by the student alone.
template <typename A>
AFM_HD RowStats<A> direct_stats(const RowSums<A>& sums, const Base<A>& base, A max_s, A max_t,
                                bool excluded) {
  RowStats<A> stats;
  stats.max_s = max_s;
  stats.max_t = max_t;
  stats.inv_zs = A(1) / sums.zs;
  stats.inv_zt = A(1) / sums.zt;
  stats.center = base.difference(max_s, max_t) + log_of(sums.zs / sums.zt);
  const A mean = sums.difference / sums.zt;
  const A direct = stats.center - mean;
  // Rounding may leave a tiny negative value; NaN has to stay.
  stats.value = excluded ? direct + infinity<A>() : (direct < A(0) ? A(0) : direct);
  stats.other = mean;
  stats.inv_label = A(0);
  return stats;
}

// Second reduction, see Note [Rows near their minimum]: two sums of terms that never cancel, and
// for Jeffreys and JS the excess E_p[expm1(y)], which is what `center` is off by.
template <typename A>
struct RowTerms {
  A first, second, excess;
};
constexpr int kRowTerms = 3;

// One class.
template <typename A>
struct Class {
  A p, q;
  A difference;  // see Base
  A y;           // log q - log p
  bool live;     // y may be multiplied by p
};

template <typename A>
AFM_HD Class<A> class_of(const RowStats<A>& stats, const Base<A>& base, A s, A t) {
  Class<A> c;
  c.q = exp2_times((s - stats.max_s) * base.exponent_scale, stats.inv_zs);
  c.p = exp2_times((t - stats.max_t) * base.exponent_scale, stats.inv_zt);
  c.difference = base.difference(s, t);
  c.y = c.difference - stats.center;
  c.live = s > -infinity<A>() && t > -infinity<A>();
  return c;
}

// KL: first = E_p[f(y)], second = E_p[y].
template <typename A>
AFM_HD void add_kl(RowTerms<A>& terms, const Class<A>& c) {
  const A py = c.live && c.p > A(0) ? c.p * c.y : A(0);
  const bool near = c.live && abs_of(c.y) < series_limit<A>();
  terms.first += near ? c.p * expm1_minus_x(c.y) : (c.q - c.p) - py;
  terms.second += py;
}

// A row that is far from its minimum: second = E_p[difference - mean], which is what the mean is
// off by. It matters where one class has nearly all of p: its slope is next to nothing, and a mean
// that was summed from large differences is not good enough.
template <typename A>
AFM_HD void add_mean_error(RowTerms<A>& terms, const Class<A>& c, A mean) {
  terms.second += c.live && c.p > A(0) ? c.p * (c.difference - mean) : A(0);
}

template <typename A>
AFM_HD void correct_mean(RowStats<A>& stats, const RowTerms<A>& terms) {
  if (!is_finite(stats.value)) return;
  stats.other += terms.second;
  const A value = stats.center - stats.other;
  stats.value = value < A(0) ? A(0) : value;
}

template <typename A>
AFM_HD void finish_kl(RowStats<A>& stats, const RowTerms<A>& terms) {
  const A u = terms.first + terms.second;
  const A value = terms.first - x_minus_log1p(u);
  stats.value = value < A(0) ? A(0) : value;
  stats.other = stats.center + terms.second;
  stats.center += log1p_of(u);
}

// q - p without cancellation.
template <typename A>
AFM_HD A probability_gap(const Class<A>& c) {
  const bool near = c.live && abs_of(c.y) < series_limit<A>();
  return near ? c.p * (expm1_minus_x(c.y) + c.y) : c.q - c.p;
}

// Jeffreys: first = KL(p||q), second = KL(q||p).
template <typename A>
AFM_HD void add_jeffreys(RowTerms<A>& terms, const Class<A>& c) {
  const A py = c.live && c.p > A(0) ? c.p * c.y : A(0);
  const A qy = c.live && c.q > A(0) ? c.q * c.y : A(0);
  const bool near = c.live && abs_of(c.y) < series_limit<A>();
  terms.first += near ? c.p * expm1_minus_x(c.y) : (c.q - c.p) - py;
  terms.second += near ? c.q * expm1_minus_x(-c.y) : (c.p - c.q) + qy;
}

// The weights of p and q in m, and of KL(p||m) and KL(q||m) in JS. They sum to 1; the smaller one
// would have few digits as 1 less the other.
template <typename A>
struct Weights {
  A beta, gamma;
};

// log(m / p) and log(q / m), m = beta p + gamma q, for any y in [-inf, inf].
template <typename A>
struct MixtureLogs {
  A m_over_p, q_over_m;
};

// With P the larger of p and q, S the smaller, a = |y|, w the weight of S and v that of P:
// log(m / P) = log1p(w expm1(-a)). A small v is not to be lost beside w: then it is log(v + w
// exp(-a)); and where m is nearly S, log(m / S) is next to nothing and taken first.
template <typename A>
AFM_HD MixtureLogs<A> mixture_logs(A y, const Weights<A>& weights) {
  const A a = abs_of(y);
  const bool p_is_larger = y <= A(0);
  const A w = p_is_larger ? weights.gamma : weights.beta;
  const A v = p_is_larger ? weights.beta : weights.gamma;
  A m_over_larger, m_over_smaller;
  const A excess = v < A(0.25) && a < A(80) ? v * expm1_of(a) : A(1);
  if (excess < A(1)) {
    m_over_smaller = log1p_of(excess);
    m_over_larger = m_over_smaller - a;
  } else {
    m_over_larger = v < A(0.25) ? log_of(v + w * exp2_of(-a * A(1.4426950408889634074)))
                                : log1p_of(w * expm1_of(-a));
    m_over_smaller = a + m_over_larger;
  }
  MixtureLogs<A> logs;
  logs.m_over_p = p_is_larger ? m_over_larger : m_over_smaller;
  logs.q_over_m = -(p_is_larger ? m_over_smaller : m_over_larger);
  return logs;
}

// JS: first = KL(p||m) = sum p (h - log1p h), h = m/p - 1; second = KL(q||m) likewise.
template <typename A>
AFM_HD void add_js(RowTerms<A>& terms, const Class<A>& c, const Weights<A>& weights) {
  if (abs_of(c.y) < A(0.0625)) {
    terms.first += c.p * x_minus_log1p(weights.gamma * expm1_of(c.y));
    terms.second += c.q * x_minus_log1p(weights.beta * expm1_of(-c.y));
  } else {
    const MixtureLogs<A> logs = mixture_logs(c.y, weights);
    terms.first += weights.gamma * (c.q - c.p) - (c.p > A(0) ? c.p * logs.m_over_p : A(0));
    terms.second += weights.beta * (c.p - c.q) + (c.q > A(0) ? c.q * logs.q_over_m : A(0));
  }
}

template <typename A>
AFM_HD void add_symmetric(RowTerms<A>& terms, const Class<A>& c, Divergence divergence,
                          const Weights<A>& weights) {
  terms.excess += probability_gap(c);
  if (divergence == Divergence::kJs) {
    add_js(terms, c, weights);
  } else {
    add_jeffreys(terms, c);
  }
}

template <typename A>
AFM_HD void finish_symmetric(RowStats<A>& stats, const RowTerms<A>& terms, Divergence divergence,
                             bool excluded) {
  stats.value = terms.first < A(0) ? A(0) : terms.first;
  stats.other = terms.second < A(0) ? A(0) : terms.second;
  if (divergence == Divergence::kJeffreys && excluded) stats.value += infinity<A>();
  if (stats.value + stats.other < centred_below<A>()) stats.center += log1p_of(terms.excess);
}

// The divergence of the row.
template <typename A>
AFM_HD A row_value(const RowStats<A>& stats, Divergence divergence, const Weights<A>& weights) {
  if (divergence == Divergence::kJeffreys) return stats.value + stats.other;
  if (divergence == Divergence::kJs)
    return weights.beta * stats.value + weights.gamma * stats.other;
  return stats.value;
}

template <typename A>
AFM_HD bool has_gradient(const RowStats<A>& stats) {
  return is_finite(stats.value) && is_finite(stats.other);
}

// Gradients of one class, but for the factor 1/T (and scale, weight, upstream gradient).
template <typename A>
struct ClassGradient {
  A student, teacher;
};

template <typename A>
AFM_HD ClassGradient<A> kl_gradient(const RowStats<A>& stats, const Class<A>& c) {
  ClassGradient<A> g;
  g.student = probability_gap(c);
  // y + KL, but rounded once.
  g.teacher = c.live && c.p > A(0) ? -c.p * (c.difference - stats.other) : A(0);
  return g;
}

template <typename A>
AFM_HD ClassGradient<A> symmetric_gradient(const RowStats<A>& stats, const Class<A>& c,
                                           Divergence divergence, const Weights<A>& weights) {
  ClassGradient<A> g;
  if (divergence == Divergence::kJs) {
    const MixtureLogs<A> logs = mixture_logs(c.y, weights);
    g.teacher = c.p > A(0) ? -weights.beta * c.p * (logs.m_over_p + stats.value) : A(0);
    g.student = c.q > A(0) ? weights.gamma * c.q * (logs.q_over_m - stats.other) : A(0);
  } else {
    const A gap = probability_gap(c);
    g.student = gap + (c.live && c.q > A(0) ? c.q * (c.y - stats.other) : A(0));
    g.teacher = -gap - (c.live && c.p > A(0) ? c.p * (c.y + stats.value) : A(0));
  }
  return g;
}

// A row that is seen once, in any order and in pieces: maxima and sums relative to them.
//
// `far` holds exp(s' - max) of the classes whose y is too large for the series. Only when the row
// is complete is it brought to the teacher's maximum, so that nothing overflows on the way.
template <typename A>
struct StreamState {
  A max_s, max_t;
  A zs, zt;
  A difference;  // sum exp(t' - max) x, x = the difference
  A near;        // sum exp(t' - max) f(x) where x is small, else of exp(t' - max) (-1 - x)
  A far;

  static AFM_HD StreamState empty() {
    return {-infinity<A>(), -infinity<A>(), A(0), A(0), A(0), A(0), A(0)};
  }

  // Brings the sums to larger maxima.
  AFM_HD void rescale(A new_s, A new_t, A exponent_scale) {
    const A rs = exp2_of((max_s - safe_max(new_s)) * exponent_scale);
    const A rt = exp2_of((max_t - safe_max(new_t)) * exponent_scale);
    zs *= rs;
    far *= rs;
    zt *= rt;
    difference *= rt;
    near *= rt;
    max_s = new_s;
    max_t = new_t;
  }

  AFM_HD void add(const Base<A>& base, A s, A t) {
    const A es = exp2_of((s - safe_max(max_s)) * base.exponent_scale);
    const A et = exp2_of((t - safe_max(max_t)) * base.exponent_scale);
    const bool live = et > A(0) && s > -infinity<A>();
    const A x = live ? base.difference(s, t) : A(0);
    const bool small = live && abs_of(x) < series_limit<A>();
    zs += es;
    zt += et;
    difference += et * x;
    near += small ? et * expm1_minus_x(x) : -et * (A(1) + x);
    far += small ? A(0) : es;
  }

  // Normalisers only.
  AFM_HD void add_normalisers(const Base<A>& base, A s, A t) {
    zs += exp2_of((s - safe_max(max_s)) * base.exponent_scale);
    zt += exp2_of((t - safe_max(max_t)) * base.exponent_scale);
  }
};

// The stats of a complete row. `base` is what every add() was given.
template <typename A>
AFM_HD RowStats<A> finish_stream(const StreamState<A>& state, const Base<A>& base, bool excluded) {
  RowStats<A> stats;
  stats.max_s = state.max_s;
  stats.max_t = state.max_t;
  // A row of -inf alone: its sums are 0, its reciprocals would be infinite, its value is NaN.
  stats.inv_zs = A(1) / state.zs;
  stats.inv_zt = A(1) / state.zt;
  const A gap = base.difference(state.max_s, state.max_t);
  A log_mean = gap + log_of(state.zs / state.zt);  // log E_p[exp x]
  const A mean = state.difference / state.zt;
  A value = log_mean - mean;
  if (value < centred_below<A>()) {
    const A bulge = (state.near + state.far * exp2_of(gap * A(1.4426950408889634074))) / state.zt;
    const A u = bulge + mean;
    value = bulge - x_minus_log1p(u);
    log_mean = log1p_of(u);
  }
  stats.value = excluded ? value + infinity<A>() : (value < A(0) ? A(0) : value);
  // From this base to the one that a backward derives from the maxima.
  const Base<A> own = Base<A>::of(base.inv_temperature, state.max_s, state.max_t);
  const A moved =
      (((base.shift_s - own.shift_s) - (base.shift_t - own.shift_t)) + (base.shift - own.shift)) *
      base.inv_temperature;
  stats.center = log_mean + moved;
  stats.other = mean + moved;
  stats.inv_label = A(0);
  return stats;
}

// The same where only the normalisers were summed.
template <typename A>
AFM_HD RowStats<A> normaliser_stats(const StreamState<A>& state, A inv_temperature) {
  const Base<A> own = Base<A>::of(inv_temperature, state.max_s, state.max_t);
  RowStats<A> stats;
  stats.max_s = state.max_s;
  stats.max_t = state.max_t;
  stats.inv_zs = A(1) / state.zs;
  stats.inv_zt = A(1) / state.zt;
  stats.center = own.difference(state.max_s, state.max_t) + log_of(state.zs / state.zt);
  stats.value = A(0);
  stats.other = A(0);
  stats.inv_label = A(0);
  return stats;
}

}  // namespace afm
