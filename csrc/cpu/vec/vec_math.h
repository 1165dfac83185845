// exp and its relatives on SIMD vectors, for kernel units.

#pragma once

#include "cpu/vec/vec.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <class T>
struct Float;

template <>
struct Float<float> {
  using Bits = uint32_t;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float lowest = -3.402823466e38f, infinity = __builtin_inff();
  // 2^f = 1 + f * P(f) on |f| <= 2^-(table_bits + 1): relative error 5.3e-8, 2.5e-8 and 9.4e-8
  // (Remez, fitted with the first coefficient free). See Note [Exponentials].
#if AFM_CAPABILITY_AVX512
  static constexpr int table_bits = 5;
  static constexpr float exp2_tail[] = {2.4022649737e-1f, 6.9315733473e-1f};
#elif AFM_CAPABILITY_AVX2
  static constexpr int table_bits = 3;
  static constexpr float exp2_tail[] = {5.549621801e-2f, 2.4025764497e-1f, 6.9314721429e-1f};
#else
  static constexpr int table_bits = 0;
  static constexpr float exp2_tail[] = {1.3264182991e-3f, 9.6719386908e-3f, 5.5507389122e-2f,
                                        2.4022235558e-1f, 6.9314697270e-1f};
#endif
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
#if AFM_CAPABILITY_AVX512
  static constexpr int table_bits = 4;
  // Relative error 7e-18 (Remez).
  static constexpr double exp2_tail[] = {1.5404213034532112847e-4, 1.3333820746350379315e-3,
                                         9.6181291020317555614e-3, 5.5504108651904113026e-2,
                                         2.4022650695910167593e-1, 6.9314718055994689796e-1};
#else
  static constexpr int table_bits = 0;
  // The Taylor series of (2^f - 1) / f: the term left out is below 4e-18.
  static constexpr double exp2_tail[] = {
      1.3691488853904128881e-12, 2.5678435993488205142e-11, 4.4455382718708114976e-10,
      7.0549116208011233299e-9,  1.0178086009239699728e-7,  1.3215486790144309489e-6,
      1.5252733804059840280e-5,  1.5403530393381609954e-4,  1.3333558146428443423e-3,
      9.6181291076284771620e-3,  5.5504108664821579953e-2,  2.4022650695910071233e-1,
      6.9314718055994530942e-1};
#endif
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
// exp(v / T) = 2^n * 2^f, with n the multiple of 2^-table_bits nearest to v * log2(e) / T, and a
// polynomial for 2^f. A multiply-add finds n: it adds n to a number whose last place is such a
// multiple. The low bits of the sum are then n's fraction, which picks 2^fraction from a table that
// fits in registers: with 32 entries two multiply-adds are left of the polynomial, with 8 three,
// without a table five, which is what a processor without permutations across a register takes. (A
// table in memory would cost a gather.)
//
// AVX-512 multiplies with 2^n, for any n, in one instruction: overflow shows as inf.
//
// Elsewhere the sum also has the exponent's bias added to n, and shifting its bits leaves 2^n for
// n from -bias, which gives less than any normal number, to bias. Beyond, v needs a bound; or a
// proof that there was nothing beyond, which is a bitwise or over all the sums: no processor has
// fewer ports for that than for a maximum. The number is 2, whose last place is 2^-22, so that the
// sums of allowed n have the exponent of 2, a single bit, and eight bits and those of the table at
// the end. Every other sum has a bit elsewhere: from 2 up to inf because it is larger, also as an
// integer; from 2 down to 0 in its exponent, subnormal numbers apart, which do not come of adding
// to 2; negative numbers in the sign, and NaN in the exponent. 0 itself comes of a v far below, and
// gives 0. An n of bias + 1 is in the proof's range and gives inf or NaN. (float's numbers; double
// has its own.)

// 2^(k / 32)
constexpr double kPowersOf2[32] = {
    1.00000000000000000000, 1.02189714865411667823, 1.04427378242741384032, 1.06714040067682361817,
    1.09050773266525765921, 1.11438674259589253631, 1.13878863475669165370, 1.16372485877757751381,
    1.18920711500272106672, 1.21524735998046887812, 1.24185781207348404859, 1.26905095719173322255,
    1.29683955465100966593, 1.32523664315974129463, 1.35425554693689272830, 1.38390988196383195487,
    1.41421356237309504880, 1.44518080697704662004, 1.47682614593949931139, 1.50916442759342273977,
    1.54221082540794082361, 1.57598084510788648646, 1.61049033194925430818, 1.64575547815396484452,
    1.68179283050742908606, 1.71861929812247791563, 1.75625216037329948311, 1.79470907500310718643,
    1.83400808640934246349, 1.87416763411029990133, 1.91520656139714729387, 1.95714412417540026902};

#if AFM_CAPABILITY_AVX512
template <class T, int kDoublings>
struct Exp2Table {
  static constexpr int kCount = 1 << Float<T>::table_bits;
  alignas(64) T entries[kCount];
  constexpr Exp2Table() : entries{} {
    for (int k = 0; k < kCount; ++k)
      entries[k] = static_cast<T>(kPowersOf2[k * (32 / kCount)] * (1LL << kDoublings));
  }
};
#elif AFM_CAPABILITY_AVX2
// What 2^n's bits need to become those of 2^(n + k / 8), if k came into the mantissa with n.
struct Exp2Bits {
  alignas(32) uint32_t entries[8];
  constexpr Exp2Bits() : entries{} {
    for (uint32_t k = 0; k < 8; ++k) {
      const float power = static_cast<float>(kPowersOf2[4 * k]);
      entries[k] = static_cast<uint32_t>((power - 1) * (1 << 23)) - (k << 20);
    }
  }
};
#endif

// exp(v / temperature) * 2^kDoublings, the factor log2(e) / temperature folded into the reduction
// of the argument, and 2^kDoublings into what is added there.
template <class T, int kDoublings = 0>
struct ScaledExp {
  using V = Vec<T>;
  static constexpr int kSteps = 1 << Float<T>::table_bits;  // of n, in an octave
#if AFM_CAPABILITY_AVX512
  static constexpr T kOctave = 1,
                     kMagic = static_cast<T>((3LL << (Float<T>::mantissa_bits - 1)) / kSteps);
#else
  static constexpr T kOctave = T(kSteps) / static_cast<T>(1LL << (Float<T>::mantissa_bits - 1)),
                     kMagic = T(2) + (Float<T>::bias + kDoublings) * kOctave;
#endif
  T to_log2;  // kOctave * log2(e) / temperature
  T floor;    // below this the result is 0
#if !AFM_CAPABILITY_AVX512
  T ceiling;  // about (88 - 0.7 * kDoublings) * temperature: the largest v of a result in the range
#endif
#if !AFM_CAPABILITY_AVX2 && !AFM_CAPABILITY_AVX512
  // temperature * ln(2) / kOctave in two parts: integer multiples of the first are exact.
  T step_high, step_low;
#endif

  explicit ScaledExp(double temperature) {
    constexpr double kLog2E = 1.44269504088896340736;
    to_log2 = static_cast<T>(kOctave * kLog2E / temperature);
    floor = static_cast<T>(-(kLargest + kDoublings) * static_cast<double>(kOctave) / to_log2);
#if !AFM_CAPABILITY_AVX512
    ceiling = static_cast<T>((kLargest - kDoublings) * static_cast<double>(kOctave) / to_log2);
#endif
#if !AFM_CAPABILITY_AVX2 && !AFM_CAPABILITY_AVX512
    constexpr double kLn2 = 0.69314718055994530942, kSplit = sizeof(T) == 4 ? 1 << 10 : 1LL << 36;
    const double step = temperature * kLn2 / kOctave, exponent = __builtin_logb(step);
    const double unit = __builtin_ldexp(1.0, static_cast<int>(exponent)) / kSplit;
    step_high = static_cast<T>(__builtin_floor(step / unit) * unit);
    step_low = static_cast<T>(step - static_cast<double>(step_high));
#endif
  }

#if AFM_CAPABILITY_AVX512
  // What is too large for the range gives inf. -inf and NaN, or a v so far below 0 that the
  // reduction fails, give NaN or inf.
  static constexpr bool kOverflowShows = true;
  AFM_MEMBER V unbounded(V v) const {
    static constexpr Exp2Table<T, kDoublings> kTable;
    const V sum = fma(v, V(to_log2), V(kMagic)), n = sum - V(kMagic);
    const V fraction = Registers<T>::fms(v.v, V(to_log2).v, n.v);
    return Registers<T>::times_power_of_2(power_of_2(fraction, pick(kTable.entries, sum.v)).v, n.v);
  }

  // The same, but -inf and NaN give 0, and so does what would be subnormal.
  AFM_MEMBER V operator()(V v) const { return select(V(floor) <= v, unbounded(v), V(T(0))); }

  AFM_MEMBER V provable(V v, V&) const { return unbounded(v); }
  template <int n>
  AFM_MEMBER bool in_range(const V (&)[n]) const {
    return true;
  }
#else
  // For v up to `ceiling`. -inf and NaN give 0; what would be subnormal, something as small.
  AFM_MEMBER V operator()(V v) const {
    v = max(v, V(floor));
    return finish(v, shifted(v));
  }

  static constexpr bool kOverflowShows = false;
  AFM_MEMBER V unbounded(V v) const { return (*this)(v); }

  // Any v: what is too large gives the largest power of 2.
  AFM_MEMBER V bounded(V v) const { return (*this)(min(v, V(ceiling))); }

  // As operator() where in_range(sums) in the end; `sums` gathers the bits of all calls.
  AFM_MEMBER V provable(V v, V& sums) const {
    const V sum = shifted(v);
    sums = sums | sum;
    return finish(v, sum);
  }
  template <int n>
  AFM_MEMBER bool in_range(const V (&sums)[n]) const {
    using Bits = typename Float<T>::Bits;
    constexpr Bits kAllowed =
        (Bits(1) << (8 * sizeof(T) - 2)) | ((2 * Float<T>::bias + 2) * kSteps - 1);
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
  // 2^fraction, times `scale`.
  AFM_MEMBER static V power_of_2(V fraction, V scale) {
    constexpr Exp2Tail<T> kTail(kOctave);
    return fma(scale * fraction, polynomial(kTail.coefficients, fraction), scale);
  }

#if AFM_CAPABILITY_AVX512
  static constexpr double kLargest = Float<T>::bias - 1;  // n, of a normal number below 1
#else
  static constexpr double kLargest = Float<T>::bias;  // n
  AFM_MEMBER V shifted(V v) const { return fma(v, V(to_log2), V(kMagic)); }

  AFM_MEMBER V finish(V v, V sum) const {
    const V minus_n = V(kMagic) - sum;
#if AFM_CAPABILITY_AVX2
    const V fraction = fma(v, V(to_log2), minus_n);
#else
    // Without a fused multiply-add v * to_log2 would be rounded before n is taken off.
    const V fraction = fma(minus_n, V(step_low), fma(minus_n, V(step_high), v)) * V(to_log2);
#endif
    return power_of_2(fraction, scale_of(sum));
  }

  AFM_MEMBER static V scale_of(V sum) {
#if AFM_CAPABILITY_AVX2
    if constexpr (kSteps == 8) {
      static constexpr Exp2Bits kBits;
      return exponent_from_low_bits<3>(sum, V(pick(kBits.entries, sum.v)));
    }
#endif
    return exponent_from_low_bits(sum);
  }
#endif
};

// The exponentials of a row, relative to its maximum, and their sums are this many doublings larger
// than they say. So a class has all digits down to the smallest subnormal number that its
// probability, which a gradient is a multiple of, may be.
constexpr int kRaised = 24;
template <class T>
using RowExp = ScaledExp<T, kRaised>;
constexpr double kRaise = 1 << kRaised, kLogRaise = kRaised * 0.69314718055994530942;

// exp(x) - 1 - x for |x| <= 1, without cancellation.
template <class T>
AFM_INLINE Vec<T> excess_of_exp(Vec<T> x) {
  return x * x * polynomial(Float<T>::excess, x);
}

// log((1 + z) / (1 - z)) = 2 artanh(z), z = numerator / denominator with z^2 <= 0.22.
template <class T>
AFM_INLINE Vec<T> twice_artanh(Vec<T> numerator, Vec<T> denominator) {
  const Vec<T> z = numerator / denominator;
  return fma(z, z * z * polynomial(Float<T>::artanh_tail, z * z), z) * Vec<T>(T(2));
}

// log(1 + y) for y > -1 with |log(1 + y)| <= 1: 2 artanh(y / (2 + y)).
template <class T>
AFM_INLINE Vec<T> log1p(Vec<T> y) {
  return twice_artanh<T>(y, Vec<T>(T(2)) + y);
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

// x = 2^exponent * mantissa, mantissa in [1, 2), for normal x > 0.
template <class T>
AFM_INLINE Vec<T> exponent(Vec<T> x) {
  constexpr T kMagic = static_cast<T>((1LL << Float<T>::mantissa_bits) + Float<T>::bias);
  return exponent_to_low_bits(x) - Vec<T>(kMagic);
}
template <class T>
constexpr T kLn2 = static_cast<T>(0.69314718055994530942);

// log(x) for normal x > 0.
template <class T>
AFM_INLINE Vec<T> log(Vec<T> x) {
  using V = Vec<T>;
  return fma(exponent(x), V(kLn2<T>), log1p<T>(mantissa(x) - V(T(1))));
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
