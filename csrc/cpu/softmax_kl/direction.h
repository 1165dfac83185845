// What turns a row's gradients into its direction: ordinary ones are scaled, those of certain rows
// are made again from the logits. See common/softmax_kl_direction.h.

#pragma once

#include "common/softmax_kl_direction.h"
#include "cpu/layout/row_tiles.h"
#include "cpu/vec/sweep.h"
#include "cpu/vec/vec_math.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// Gradients whose largest entry is at least this have kept their digits, but for 6 of 24 bits at
// worst: what a probability near 1 is short of is at least 1/64. The rest takes longer, in double
// precision.
constexpr double kOrdinaryDirection = 0x1p-6;

// 2^power with 2^-power * largest in [1/2, 1), of ordinary rows. By their bits: a row of ten
// classes takes no longer than two calls of the library.
template <class T>
struct OrdinaryScale {
  bool exists;
  T factor;  // 2^-power
  double log_scale;

  explicit AFM_MEMBER OrdinaryScale(T largest) {
    using Bits = typename Float<T>::Bits;
    constexpr int kMantissa = Float<T>::mantissa_bits, kBias = Float<T>::bias;
    exists = largest >= static_cast<T>(kOrdinaryDirection) && largest < T(0x1p100);
    Bits bits;
    __builtin_memcpy(&bits, &largest, sizeof(T));
    const int power = exists ? static_cast<int>(bits >> kMantissa) - (kBias - 1) : 0;
    bits = static_cast<Bits>(kBias - power) << kMantissa;
    __builtin_memcpy(&factor, &bits, sizeof(T));
    log_scale = power * 0.69314718055994530942;
  }
};

template <class T>
AFM_LOOP T largest_entry(const T* row, int64_t n) {
  Accumulator<T> largest;
  sweep<Vec<T>>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    largest.take_max(u, abs(access.load(row + j, Vec<T>(T(0)))));
  });
  return largest.largest();
}

template <class T>
AFM_LOOP void scale_row(const T* row, int64_t n, T factor, T* to) {
  sweep<Vec<T>>(0, n, [&](auto access, int64_t j, int) AFM_STEP {
    access.store(to + j, access.load(row + j, Vec<T>(T(0))) * Vec<T>(factor));
  });
}

// exp(x) - 1 for |x| < 1/2, by its series to the last digit of double.
AFM_INLINE Vec<double> expm1_near(Vec<double> x) {
  static constexpr double kFactorials[] = {1.0,
                                           1.0 / 2,
                                           1.0 / 6,
                                           1.0 / 24,
                                           1.0 / 120,
                                           1.0 / 720,
                                           1.0 / 5040,
                                           1.0 / 40320,
                                           1.0 / 362880,
                                           1.0 / 3628800,
                                           1.0 / 39916800,
                                           1.0 / 479001600,
                                           1.0 / 6227020800,
                                           1.0 / 87178291200,
                                           1.0 / 1307674368000};
  Vec<double> series(kFactorials[14]);
  for (int n = 13; n >= 0; --n) series = fma(series, x, Vec<double>(kFactorials[n]));
  return series * x;
}

// A row of a call: logits, and where its directions go (absent where not wanted).
template <class T>
struct DirectionJob {
  static constexpr int kRows = 6;  // of doubles, that a job takes

  RowPointer student, teacher, grad_student, grad_teacher;
  int64_t classes;
  double temperature;
  double* kept;  // kRows rows, `pitch` apart
  int64_t pitch;

  double* row_of(int k) const { return kept + k * pitch; }

  // The logits over 4, as doubles.
  void read(const RowPointer& logits, double* to) const {
    T tile[64];
    for (int64_t j = 0; j < classes; j += 64) {
      const int64_t n = classes - j < 64 ? classes - j : 64;
      const T* from = logits.read(j, n, tile);
      for (int64_t i = 0; i < n; ++i) to[j + i] = from[i] * kLogitUnit;
    }
  }

  // entry(j) for every class j.
  template <class F>
  void write(const RowPointer& grad, const F& entry) const {
    T tile[64];
    for (int64_t j = 0; j < classes && grad.data != nullptr; j += 64) {
      const int64_t n = classes - j < 64 ? classes - j : 64;
      T* to = grad.writable(j, tile);
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(entry(j + i));
      grad.write(j, n, to);
    }
  }

  double fill(double value, double log_scale) const {
    write(grad_student, [=](int64_t) { return value; });
    write(grad_teacher, [=](int64_t) { return value; });
    return log_scale;
  }

  // From the logits alone, in double precision. Returns the row's log_scale.
  __attribute__((noinline)) double run() const {
    using V = Vec<double>;
    constexpr double kInfinity = __builtin_inf(), kNotANumber = __builtin_nan("");
    // Stands for the infinite delta of a class without probability: times 0 it is 0.
    constexpr double kFar = 0x1p1000;
    const bool wants_student = grad_student.data != nullptr;
    double *s = row_of(0), *t = row_of(1), *delta = row_of(2), *e_s = row_of(3), *e_t = row_of(4);
    read(student, s), read(teacher, t);

    auto tops = DirectionTops<double>::empty();
    for (int64_t j = 0; j < classes; ++j) tops.add(s[j], t[j]);
    if (!tops.has_gradient()) return fill(kNotANumber, kNotANumber);
    double peak_s = -kInfinity;
    for (int64_t j = 0; j < classes; ++j)
      if (t[j] == tops.t && s[j] > peak_s) peak_s = s[j];

    auto row = DirectionRow<double>::of(temperature, tops, peak_s, wants_student);
    double* slope = row.peak_s == row.top_s ? delta : row_of(5);
    const V zero(0.0), none(-kInfinity), unit(row.unit), top_t(row.top_t);
    Accumulator<double> largest_s(-kInfinity), largest_t(-kInfinity);
    sweep<V>(0, classes, [&](auto access, int64_t j, int u) AFM_STEP {
      const V s_j = access.load(s + j, none), t_j = access.load(t + j, none);
      const auto no_t = t_j == none;
      const V alone = wants_student ? select(s_j == none, zero, V(kFar)) : zero;
      const V d = select(no_t, alone, apart(s_j, t_j, V(row.top_s), top_t) * unit);
      const auto stays = d == zero;
      largest_s.take_max(u, select(stays, none, s_j));
      largest_t.take_max(u, select(stays, none, t_j));
      access.store(delta + j, d);
      if (slope != delta)
        access.store(slope + j, select(no_t, zero, apart(s_j, t_j, V(peak_s), top_t) * unit));
    });
    const double far_s = largest_s.largest(), far_t = largest_t.largest();
    if (far_s == -kInfinity) return fill(0, -kInfinity);  // no class differs
    row.set_far(far_s, far_t);

    // Exponentials and sums. (Where the teacher has none of the classes that differ, all are 0.)
    const ScaledExp<double> exp(1);
    const V limit(series_limit<double>()), from_s(row.far_s),
        from_t(far_t == -kInfinity ? 0 : far_t), lift_s(row.lift_s), lift_t(row.lift_t);
    Accumulator<double> staying, student_sum, teacher_sum, gap, slopes;
    sweep<V>(0, classes, [&](auto access, int64_t j, int u) AFM_STEP {
      const V s_j = access.load(s + j, none), t_j = access.load(t + j, none),
              d = access.load(delta + j, zero);
      const auto stays = d == zero;
      const V t_exp = exp(select(stays, (t_j - top_t) * unit, fma(t_j - from_t, unit, lift_t)));
      const V s_exp =
          wants_student ? select(stays, zero, exp(fma(s_j - from_s, unit, lift_s))) : zero;
      const V moving = select(stays, zero, t_exp);
      const V far_gap = s_exp - moving, near_gap = moving * expm1_near(d);
      staying.add(u, select(stays, t_exp, zero));
      student_sum.add(u, s_exp), teacher_sum.add(u, moving);
      slopes.add_product(u, t_exp, access.load(slope + j, zero));
      gap.add(u, select(abs(d) < limit, near_gap, far_gap));
      access.store(e_s + j, s_exp), access.store(e_t + j, t_exp);
    });
    row.set_sums({staying.sum(), student_sum.sum(), teacher_sum.sum(), gap.sum(), slopes.sum()});

    // Entries, which take the exponentials' place, and the largest.
    const V inv_zs(row.inv_zs), inv_zt(row.inv_zt), log_ratio(row.log_ratio), mean(row.mean),
        shared_s(-row.gap * row.inv_zs), stay_mean(row.slope * row.inv_zt);
    Accumulator<double> largest;
    sweep<V>(0, classes, [&](auto access, int64_t j, int u) AFM_STEP {
      const V d = access.load(delta + j, zero), p = access.load(e_t + j, zero) * inv_zt,
              q = access.load(e_s + j, zero) * inv_zs, y = d - log_ratio;
      const auto stays = d == zero;
      const V moved = select(abs(y) < limit, p * expm1_near(y), q - p);
      const V to_student = select(stays, p * shared_s, moved);
      const V to_teacher = p * (select(stays, stay_mean, mean) - access.load(slope + j, zero));
      if (wants_student) largest.take_max(u, abs(to_student));
      if (grad_teacher.data) largest.take_max(u, abs(to_teacher));
      access.store(e_s + j, to_student), access.store(e_t + j, to_teacher);
    });
    const double most = largest.largest();
    if (most == 0) return fill(0, -kInfinity);
    const int power = power_of(most);
    // In two steps: one factor alone may leave the range.
    const double once = scaled_by_power(1.0, -(power / 2)),
                 twice = scaled_by_power(1.0, power / 2 - power);
    write(grad_student, [=](int64_t j) { return e_s[j] * once * twice; });
    write(grad_teacher, [=](int64_t j) { return e_t[j] * once * twice; });
    return row.log_scale(power, temperature);
  }
};

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
