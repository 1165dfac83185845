// exp and its relatives on SIMD vectors, for kernel units.

#pragma once

#include "cpu/vec.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <class T>
struct Float;

template <>
struct Float<float> {
  using Bits = uint32_t;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float lowest = -3.402823466e38f, infinity = __builtin_inff();
  // 2^f = 1 + f * P(f) on |f| <= 1/2: relative error 9.4e-8 (Remez, fitted with the first
  // coefficient free).
  static constexpr float exp2_tail[] = {1.3264182991e-3f, 9.6719386908e-3f, 5.5507389122e-2f,
                                        2.4022235558e-1f, 6.9314697270e-1f};
  // exp(x) - 1 - x = x^2 * P(x) on |x| <= 1: relative error 9.2e-8 (Remez).
  static constexpr float excess[] = {2.4963990794e-5f, 2.0335250656e-4f, 1.3891435278e-3f,
                                     8.3308330986e-3f, 4.1666506288e-2f, 1.6666697994e-1f,
                                     5.0000001073e-1f};
  // artanh(z) = z + z^3 * P(z^2) on z^2 <= 0.22: relative error 5e-10 of artanh (Remez).
  static constexpr float artanh_tail[] = {1.5830867546e-1f, 6.3064763884e-2f, 1.1548246220e-1f,
                                          1.4251944437e-1f, 2.0001183498e-1f, 3.3333319625e-1f};
};

template <>
struct Float<double> {
  using Bits = uint64_t;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double lowest = -1.7976931348623157e308, infinity = __builtin_inf();
  // The Taylor series of (2^f - 1) / f: the term left out is below 4e-18.
  static constexpr double exp2_tail[] = {
      1.3691488853904128881e-12, 2.5678435993488205142e-11, 4.4455382718708114976e-10,
      7.0549116208011233299e-9,  1.0178086009239699728e-7,  1.3215486790144309489e-6,
      1.5252733804059840280e-5,  1.5403530393381609954e-4,  1.3333558146428443423e-3,
      9.6181291076284771620e-3,  5.5504108664821579953e-2,  2.4022650695910071233e-1,
      6.9314718055994530942e-1};
  // Relative error 4e-19 (Remez).
  static constexpr double excess[] = {
      4.799260978734459461e-14,  7.7549941105734359724e-13, 1.1471260336579726608e-11,
      1.6057398119544899656e-10, 2.0876744087226957007e-9,  2.5052121150931170078e-8,
      2.7557319333215759494e-7,  2.7557319171042131692e-6,  2.4801587301156552641e-5,
      1.9841269841382360275e-4,  1.3888888888889665416e-3,  8.3333333333332281332e-3,
      4.166666666666666153e-2,   1.6666666666666666950e-1,  5.0000000000000000005e-1};
  // The series: the term left out is below 1e-17.
  static constexpr double artanh_tail[] = {
      1.0 / 49, 1.0 / 47, 1.0 / 45, 1.0 / 43, 1.0 / 41, 1.0 / 39, 1.0 / 37, 1.0 / 35,
      1.0 / 33, 1.0 / 31, 1.0 / 29, 1.0 / 27, 1.0 / 25, 1.0 / 23, 1.0 / 21, 1.0 / 19,
      1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3};
};

template <class T, int n>
AFM_INLINE Vec<T> polynomial(const T (&coefficients)[n], Vec<T> x) {
  Vec<T> value(coefficients[0]);
#pragma GCC unroll 32
  for (int i = 1; i < n; ++i) value = fma(value, x, Vec<T>(coefficients[i]));
  return value;
}

// Float<T>::exp2_tail for an f in other units.
template <class T>
struct Exp2Tail {
  T coefficients[sizeof(Float<T>::exp2_tail) / sizeof(T)];
  constexpr explicit Exp2Tail(T unit) : coefficients{} {
    constexpr int kCount = sizeof(Float<T>::exp2_tail) / sizeof(T);
    T scale = T(1);
    for (int i = kCount - 1; i >= 0; --i)
      scale /= unit, coefficients[i] = Float<T>::exp2_tail[i] * scale;
  }
};

// Note [Exponentials]
// ~~~~~~~~~~~~~~~~~~~
// exp(v / T) = 2^n * 2^f, with n the integer nearest to v * log2(e) / T, and a polynomial for 2^f.
// A multiply-add finds n: it adds n and the exponent's bias, in units of the last place, to a
// number whose last place that is. Shifting the sum's bits leaves 2^n.
//
// This holds for n from -bias, which gives 0, to bias + 1, which gives inf. Beyond, v needs a
// bound; or a proof that there was nothing beyond, which is a bitwise or over all the sums: no
// processor has fewer ports for that than for a maximum. The number is 2, in which the unit is
// 2^-22, so that the sums of allowed n have the exponent of 2, a single bit, and eight bits at the
// end. Every other sum has a bit elsewhere: from 2 up to inf because it is larger, also as an
// integer; from 2 down to 0 in its exponent, subnormal numbers apart, which do not come of adding
// to 2; negative numbers in the sign, and NaN in the exponent. 0 itself comes of a v far below, and
// gives 0. (float's numbers; double has its own.)
//
// AVX-512 has an instruction that multiplies with 2^n for any n, and needs no proof.

// exp(v / temperature), the factor log2(e) / temperature folded into the reduction of the argument.
template <class T>
struct ScaledExp {
  using V = Vec<T>;
  static constexpr int kPlaces = Float<T>::mantissa_bits - 1;
#if AFM_CAPABILITY_AVX512
  static constexpr T kUnit = 1, kMagic = static_cast<T>(3LL << kPlaces) + Float<T>::bias;
#else
  static constexpr T kUnit = T(1) / static_cast<T>(1LL << kPlaces),
                     kMagic = T(2) + Float<T>::bias * kUnit;
#endif
  T to_log2;         // kUnit * log2(e) / temperature
  T floor, ceiling;  // below the one the result is 0, above the other inf
#if !AFM_CAPABILITY_AVX2 && !AFM_CAPABILITY_AVX512
  // temperature * ln(2) / kUnit in two parts: integer multiples of the first are exact.
  T step_high, step_low;
#endif

  explicit ScaledExp(double temperature) {
    constexpr double kLog2E = 1.44269504088896340736;
    to_log2 = static_cast<T>(kUnit * kLog2E / temperature);
    floor = static_cast<T>(-Float<T>::bias * static_cast<double>(kUnit) / to_log2);
    ceiling = static_cast<T>((Float<T>::bias + 1) * static_cast<double>(kUnit) / to_log2);
#if !AFM_CAPABILITY_AVX2 && !AFM_CAPABILITY_AVX512
    constexpr double kLn2 = 0.69314718055994530942, kSplit = sizeof(T) == 4 ? 1 << 10 : 1LL << 36;
    const double step = temperature * kLn2 / kUnit, exponent = __builtin_logb(step);
    const double unit = __builtin_ldexp(1.0, static_cast<int>(exponent)) / kSplit;
    step_high = static_cast<T>(__builtin_floor(step / unit) * unit);
    step_low = static_cast<T>(step - static_cast<double>(step_high));
#endif
  }

  // For v up to `ceiling`, about 88 * temperature. -inf and NaN give 0, and so does what would be
  // subnormal.
  AFM_MEMBER V operator()(V v) const {
    v = max(v, V(floor));
    return finish(v, shifted(v));
  }

  // Any v: what is too large gives inf.
  AFM_MEMBER V bounded(V v) const { return (*this)(min(v, V(ceiling))); }

#if AFM_CAPABILITY_AVX512
  // Without the bounds: what is too large for the range gives inf, and -inf and NaN, or a v so far
  // below 0 that the reduction fails, NaN or inf.
  static constexpr bool kOverflowShows = true;
  AFM_MEMBER V unbounded(V v) const {
    constexpr T kInteger = static_cast<T>(3LL << kPlaces);
    const V n = fma(v, V(to_log2), V(kInteger)) - V(kInteger), fraction = fms(v, V(to_log2), n);
    return times_power_of_2(power_of_2(fraction), n);
  }
  AFM_MEMBER V provable(V v, V&) const { return unbounded(v); }
  template <int n>
  AFM_MEMBER bool in_range(const V (&)[n]) const {
    return true;
  }
#else
  static constexpr bool kOverflowShows = false;
  AFM_MEMBER V unbounded(V v) const { return (*this)(v); }

  // As bounded() where in_range(sums) in the end; `sums` gathers the bits of all calls.
  AFM_MEMBER V provable(V v, V& sums) const {
    const V sum = shifted(v);
    sums = sums | sum;
    return finish(v, sum);
  }
  template <int n>
  AFM_MEMBER bool in_range(const V (&sums)[n]) const {
    using Bits = typename Float<T>::Bits;
    constexpr Bits kAllowed = Bits(1) << (8 * sizeof(T) - 2) | (2 * Float<T>::bias + 1);
    Bits lanes[n * V::width], all = 0;
    memcpy(lanes, sums, sizeof(lanes));
    for (const Bits lane : lanes) all |= lane;
    return (all & ~kAllowed) == 0;
  }
#endif

  template <bool kBounded>
  AFM_MEMBER V checked(V v, V& sums) const {
    if constexpr (kBounded) return bounded(v);
    return provable(v, sums);
  }

 private:
  AFM_MEMBER V shifted(V v) const { return fma(v, V(to_log2), V(kMagic)); }

  AFM_MEMBER static V power_of_2(V fraction) {
    constexpr Exp2Tail<T> kTail(kUnit);
    return fma(polynomial(kTail.coefficients, fraction), fraction, V(T(1)));
  }

  AFM_MEMBER V finish(V v, V sum) const {
    const V minus_n = V(kMagic) - sum;
#if AFM_CAPABILITY_AVX2 || AFM_CAPABILITY_AVX512
    const V fraction = fma(v, V(to_log2), minus_n);
#else
    // Without a fused multiply-add v * to_log2 would be rounded before the integer is taken off.
    const V fraction = fma(minus_n, V(step_low), fma(minus_n, V(step_high), v)) * V(to_log2);
#endif
    return power_of_2(fraction) * exponent_from_low_bits(sum);
  }
};

// exp(x) - 1 - x for |x| <= 1, without cancellation.
template <class T>
AFM_INLINE Vec<T> excess_of_exp(Vec<T> x) {
  return x * x * polynomial(Float<T>::excess, x);
}

// log(1 + y) for y > -1 with |log(1 + y)| <= 1: 2 artanh(z), z = y / (2 + y).
template <class T>
AFM_INLINE Vec<T> log1p(Vec<T> y) {
  const Vec<T> z = y / (Vec<T>(T(2)) + y);
  return fma(z, z * z * polynomial(Float<T>::artanh_tail, z * z), z) * Vec<T>(T(2));
}

// log(1 + y) - y for the same y: 2 z = y - y z takes the y off before anything is rounded.
template <class T>
AFM_INLINE Vec<T> log1p_minus(Vec<T> y) {
  const Vec<T> z = y / (Vec<T>(T(2)) + y), twice = z + z;
  return fma(twice, z * z * polynomial(Float<T>::artanh_tail, z * z), Vec<T>(T(0)) - y * z);
}

// The integer nearest to x, |x| below 2^22 (2^51 for double).
template <class T>
AFM_INLINE Vec<T> nearest_integer(Vec<T> x) {
  constexpr T kMagic = static_cast<T>(3LL << (Float<T>::mantissa_bits - 1));
  return (x + Vec<T>(kMagic)) - Vec<T>(kMagic);
}

// log(x) for normal x > 0.
template <class T>
AFM_INLINE Vec<T> log(Vec<T> x) {
  using V = Vec<T>;
  constexpr T kMagic = static_cast<T>((1LL << Float<T>::mantissa_bits) + Float<T>::bias);
  constexpr T kLn2 = static_cast<T>(0.69314718055994530942);
  return fma(exponent_to_low_bits(x) - V(kMagic), V(kLn2), log1p<T>(mantissa(x) - V(T(1))));
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
