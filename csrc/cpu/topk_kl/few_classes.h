// KL between two distributions over a few classes, from logits of either side that are only known
// up to a constant, in double precision. For kernel units. See Note [Centred KL], and Note [Hard
// rows].

#pragma once

#include "cpu/losses/kl_sweeps.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// Above this KL the plain sum has all its digits.
constexpr double kCentredBelow = 1;
// Up to this |x|, exp(x) - 1 is taken by its own function rather than as a difference.
constexpr double kSmallDifference = 0.5;

struct FewClasses {
  const double *student, *teacher;  // n each; -inf: excluded
  int64_t n;
  double *p, *q, *grad;  // out, n each; grad: of the KL by the student's logits, q - p

  RowKind kind = RowKind::kNan;
  double divergence = __builtin_nan("");
  double log_mass = -__builtin_inf();  // log of the sum of exp(teacher)

  AFM_MEMBER void run() {
    const double infinity = __builtin_inf();
    double student_top = -infinity, teacher_top = -infinity;
    bool broken = false;
    classify(student, n, student_top, broken), classify(teacher, n, teacher_top, broken);
    if (broken || student_top == -infinity) return;
    kind = RowKind::kGeneral;  // as far as the student goes
    if (teacher_top == -infinity) return;
    const double log_zs = softmax(student, student_top, q);
    const double log_zt = softmax(teacher, teacher_top, p);
    log_mass = log_zt;
    divergence = 0;
    double mean = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (teacher[i] == -infinity) continue;
      if (student[i] == -infinity) {
        kind = RowKind::kInfinite, divergence = infinity;
        return;
      }
      const double d = student[i] - teacher[i];
      mean += p[i] * d;
      divergence += p[i] * ((teacher[i] - log_zt) - (student[i] - log_zs));
    }
    if (divergence < kCentredBelow)
      centre(mean, log_zt);
    else
      for (int64_t i = 0; i < n; ++i) grad[i] = q[i] - p[i];
    settle_peak();
  }

 private:
  // Returns the log of the sum of exp(logits).
  AFM_MEMBER double softmax(const double* logits, double top, double* probabilities) const {
    using V = Vec<double>;
    const ScaledExp<double> exp(1);
    const V shift(top);
    Accumulator<double> total;
    sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
      const V e = access.or_zero(exp(access.load(logits + j, shift) - shift));
      total.add(u, e), access.store(probabilities + j, e);
    });
    const double sum = total.sum(), inverse = 1 / sum;
    for (int64_t i = 0; i < n; ++i) probabilities[i] *= inverse;
    return top + __builtin_log(sum);
  }

  // Around the mean of d = student - teacher: nothing is lost where the two nearly agree. Far off,
  // p * exp(x) is taken as one exponential, which is a probability of the student's but for a
  // factor near 1.
  AFM_MEMBER void centre(double mean, double log_zt) {
    const double infinity = __builtin_inf();
    double rest = 0, excess = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (student[i] == -infinity) continue;
      if (teacher[i] == -infinity) {
        excess += __builtin_exp(student[i] - mean - log_zt);
        continue;
      }
      const double x = student[i] - teacher[i] - mean;
      rest += p[i] * x;
      excess += x <= kNearLimit && x >= -kNearLimit
                    ? p[i] * excess_of_exp<double>(Vec<double>(x)).max()
                    : __builtin_exp(student[i] - mean - log_zt) - p[i] - p[i] * x;
    }
    const double divergence_around = near_kl(rest, excess);
    divergence = divergence_around > 0 ? divergence_around : 0;
    const double log_ratio = __builtin_log1p(rest + excess);
    for (int64_t i = 0; i < n; ++i) {
      const double delta = student[i] - teacher[i] - mean - log_ratio;  // log(q / p)
      grad[i] = delta < kSmallDifference && delta > -kSmallDifference
                    ? p[i] * __builtin_expm1(delta)
                    : q[i] - p[i];
    }
  }

  // See Note [Certain rows].
  AFM_MEMBER void settle_peak() const {
    double others = 0;
    int64_t peak = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (q[i] > 0.5)
        peak = i;
      else
        others += grad[i];
    }
    if (peak >= 0) grad[peak] = -others;
  }
};

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
