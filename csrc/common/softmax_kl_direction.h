// The direction of KL's gradients, row by row: the gradients divided by a factor of the row's own,
// so that they survive where both sides are certain. Scalar code that CPU and GPU share. The
// mathematics is Note [Direction of a row] in afm_kernels/reference/softmax_kl_direction.py; the
// names are those of the note.
//
// A row takes six passes, each of which needs what the one before has reduced: the maxima
// (DirectionTops), the student's logit of the teacher's largest class, the largest logits of the
// classes that differ, the sums (DirectionSums), the largest entry, and the entries themselves.
// Logits come in divided by 4.

#pragma once

#include <cmath>

#include "common/row_state.h"

namespace afm {

AFM_HD float exp_of(float x) { return ::expf(x); }
AFM_HD double exp_of(double x) { return ::exp(x); }
AFM_HD float scaled_by_power(float x, int power) { return ::ldexpf(x, power); }
AFM_HD double scaled_by_power(double x, int power) { return ::ldexp(x, power); }

// The power with x = m 2^power, 1/2 <= m < 1; x is positive and finite.
AFM_HD int power_of(float x) {
  int power;
  ::frexpf(x, &power);
  return power;
}
AFM_HD int power_of(double x) {
  int power;
  ::frexp(x, &power);
  return power;
}

constexpr double kLogitUnit = 0.25;  // so that no difference of four logits overflows

// x - y, and what rounding took from it: the two-sum of Knuth.
template <typename A>
struct Difference {
  A rounded, rest;
  static AFM_HD Difference of(A x, A y) {
    Difference d;
    d.rounded = x - y;
    const A of_x = d.rounded + y;
    d.rest = (x - of_x) - (y - (of_x - d.rounded));
    return d;
  }
};

// (x - top_x) - (y - top_y), rounded as if once.
template <typename A>
AFM_HD A apart(A x, A y, A top_x, A top_y) {
  const Difference<A> left = Difference<A>::of(x, top_x), right = Difference<A>::of(y, top_y);
  const Difference<A> whole = Difference<A>::of(left.rounded, right.rounded);
  return whole.rounded + (whole.rest + (left.rest - right.rest));
}

// First pass.
template <typename A>
struct DirectionTops {
  A s, t;
  bool lost;  // some logit is NaN or inf, or the student alone excludes a class

  static AFM_HD DirectionTops empty() { return {-infinity<A>(), -infinity<A>(), false}; }
  AFM_HD void add(A s_j, A t_j) {
    s = s_j > s ? s_j : s;
    t = t_j > t ? t_j : t;
    lost = lost || !(s_j < infinity<A>()) || !(t_j < infinity<A>()) || excludes(s_j, t_j);
  }
  AFM_HD bool has_gradient() const { return !lost && s > -infinity<A>() && t > -infinity<A>(); }
};

// Fourth pass, over R: sums over the classes that stay, and over those that differ.
template <typename A>
struct DirectionSums {
  A staying, student, teacher, gap, slope;
};
constexpr int kDirectionSums = 5;

// One class: its exponentials, over exp(R) if it differs.
template <typename A>
struct DirectionClass {
  A delta, slope, e_s, e_t;
  bool differs;
};

template <typename A>
struct DirectionEntry {
  A student, teacher;
};

template <typename A>
struct DirectionRow {
  A unit;  // of the differences: 4/T
  bool wants_student;
  A top_s, top_t, peak_s;  // maxima; the student's logit of the teacher's largest class
  A far_s, far_t;          // largest logits of the classes that differ
  A lift_s, lift_t;        // their exponents over R
  A exponent, unscaled;    // R, exp(R)
  A inv_zs, inv_zt, gap, slope;
  A log_ratio, mean;  // c, r

  static AFM_HD DirectionRow of(A temperature, const DirectionTops<A>& tops, A peak_s,
                                bool wants_student) {
    DirectionRow row = {};
    row.unit = A(1 / kLogitUnit) / temperature;
    row.wants_student = wants_student;
    row.top_s = wants_student ? tops.s : peak_s;
    row.top_t = tops.t;
    row.peak_s = peak_s;
    return row;
  }

  // 0 for a class that stays or that neither side has, infinite where the teacher excludes it.
  AFM_HD A delta_of(A s, A t) const {
    if (t == -infinity<A>()) {
      return wants_student && s > -infinity<A>() ? infinity<A>() : A(0);
    }
    return apart(s, t, top_s, top_t) * unit;
  }

  // The same from the teacher's largest class on.
  AFM_HD A slope_of(A s, A t, A delta) const {
    if (peak_s == top_s || t == -infinity<A>()) return delta;
    return apart(s, t, peak_s, top_t) * unit;
  }

  // Third pass: far_s and far_t are the maxima of the logits of classes for which this is true.
  AFM_HD bool differs(A s, A t) const { return delta_of(s, t) != A(0); }

  AFM_HD void set_far(A s, A t) {
    far_s = s;
    far_t = t;
    // How much closer to its maximum the student is than the teacher; `t` may be -inf, or both are.
    A ahead = t == -infinity<A>() ? infinity<A>() : apart(s, t, top_s, top_t) * unit;
    if (!wants_student) ahead = -infinity<A>();
    lift_s = ahead < A(0) ? ahead : A(0);
    lift_t = ahead > A(0) ? -ahead : A(0);
    exponent = (ahead > A(0) ? s - top_s : t - top_t) * unit;
    unscaled = exp_of(exponent);
  }

  AFM_HD DirectionClass<A> class_of(A s, A t) const {
    DirectionClass<A> c;
    c.delta = delta_of(s, t);
    c.slope = slope_of(s, t, c.delta);
    c.differs = c.delta != A(0);
    if (!c.differs) {
      // Excluded by the teacher, and of no interest: exp(-inf).
      c.e_t = exp_of((t - top_t) * unit);
      c.e_s = A(0);
      return c;
    }
    c.e_s = wants_student ? exp_of((s - far_s) * unit + lift_s) : A(0);
    c.e_t = t == -infinity<A>() ? A(0) : exp_of((t - far_t) * unit + lift_t);
    return c;
  }

  static AFM_HD void add(DirectionSums<A>& sums, const DirectionClass<A>& c) {
    // A term of weight 0 counts 0, however far the class is.
    sums.slope += c.e_t > A(0) ? c.e_t * c.slope : A(0);
    if (!c.differs) {
      sums.staying += c.e_t;
      return;
    }
    sums.student += c.e_s;
    sums.teacher += c.e_t;
    const bool near = abs_of(c.delta) < series_limit<A>();
    sums.gap += near ? c.e_t * expm1_of(c.delta) : c.e_s - c.e_t;
  }

  AFM_HD void set_sums(const DirectionSums<A>& sums) {
    inv_zs = A(1) / (sums.staying + unscaled * sums.student);
    inv_zt = A(1) / (sums.staying + unscaled * sums.teacher);
    gap = sums.gap;
    slope = sums.slope;
    const A excess = unscaled * gap * inv_zt;
    log_ratio = abs_of(excess) < series_limit<A>() ? log1p_of(excess) : log_of(inv_zt / inv_zs);
    mean = unscaled * slope * inv_zt;
  }

  AFM_HD DirectionEntry<A> entry_of(A s, A t) const {
    const DirectionClass<A> c = class_of(s, t);
    DirectionEntry<A> entry;
    const A p = c.e_t * inv_zt;
    if (!c.differs) {
      entry.student = -p * (gap * inv_zs);
      entry.teacher = p > A(0) ? -p * (c.slope - slope * inv_zt) : A(0);
      return entry;
    }
    const A y = c.delta - log_ratio;
    entry.student = abs_of(y) < series_limit<A>() ? p * expm1_of(y) : c.e_s * inv_zs - p;
    entry.teacher = p > A(0) ? -p * (c.slope - mean) : A(0);
    return entry;
  }

  // The log of what the entries are to be multiplied with to be the gradients, once the largest of
  // those wanted has been brought below 1 by 2^-power.
  AFM_HD A log_scale(int power, A temperature) const {
    return exponent + (static_cast<A>(power) * A(0.69314718055994530942) - log_of(temperature));
  }
};

}  // namespace afm
