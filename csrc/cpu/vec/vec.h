// SIMD vectors of float and double for kernel units: one interface, the widest registers of the
// unit's instruction set.
//
// Vec<T> has `width` lanes and converts to and from memory; a Mask says which lanes. Everything has
// internal linkage, so that no instruction set's copy is linked into another's unit. See Note
// [Kernel units] in setup.py.
//
// max(x, bound) returns the bound where x is NaN, on every instruction set: callers that must keep
// a NaN say so.
//
// Note [Instruction sets]
// ~~~~~~~~~~~~~~~~~~~~~~~
// What is written once stands here. A set is a header beside this one, with what only its
// instructions can say, on registers instead of vectors:
//
//   Registers<T>   of float and double: Lanes and Mask; the first lanes from and to memory; fma,
//                  max, min, comparisons, select; sums and extremes across the lanes; zip_low and
//                  zip_high, which take lanes from two registers by turns, in every 128 bits
//   Half           Halves, a 16-bit number for each float, and Words, 32 bits for each: what moves
//                  numbers between the two, and float16
//   Parts          the 128-bit parts of a register of floats
//   pick           where vec_math.h takes exponentials from a table

#pragma once

#include <stdint.h>
#include <string.h>

#if AFM_CAPABILITY_AVX512
#include "cpu/vec/avx512.h"
#elif AFM_CAPABILITY_AVX2
#include "cpu/vec/avx2.h"
#else
#include "cpu/vec/portable.h"
#endif
#include "common/inline.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <class T>
struct Vec {
  using Set = Registers<T>;
  using Lanes = typename Set::Lanes;
  static constexpr int width = sizeof(Lanes) / sizeof(T);
  struct Mask {
    typename Set::Mask lanes;
  };
  Lanes v;

  Vec() = default;
  AFM_MEMBER Vec(Lanes x) : v(x) {}
  AFM_MEMBER Vec(T x) : v(x - Lanes{}) {}
  AFM_MEMBER static Mask first(int n) { return {Set::first(n)}; }
  AFM_MEMBER static Vec load(const T* p) { return load_register<Lanes>(p); }
  AFM_MEMBER static Vec load(const T* p, int n, Vec fill) { return Set::load(p, n, fill.v); }
  AFM_MEMBER void store(T* p) const { store_register(p, v); }
  AFM_MEMBER void store(T* p, int n) const { Set::store(p, n, v); }
  AFM_MEMBER void stream(T* p) const { Set::stream(p, v); }
  AFM_MEMBER T sum() const { return Set::sum(v); }
  AFM_MEMBER T max() const { return Set::largest(v); }
  AFM_MEMBER T min() const { return Set::smallest(v); }

  friend AFM_MEMBER Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend AFM_MEMBER Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend AFM_MEMBER Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend AFM_MEMBER Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend AFM_MEMBER Vec fma(Vec a, Vec b, Vec c) { return Set::fma(a.v, b.v, c.v); }
  friend AFM_MEMBER Vec max(Vec a, Vec bound) { return Set::max(a.v, bound.v); }
  friend AFM_MEMBER Vec min(Vec a, Vec bound) { return Set::min(a.v, bound.v); }
  friend AFM_MEMBER Mask operator<(Vec a, Vec b) {
    return {Set::template compare<kLess>(a.v, b.v)};
  }
  friend AFM_MEMBER Mask operator<=(Vec a, Vec b) {
    return {Set::template compare<kLessEqual>(a.v, b.v)};
  }
  friend AFM_MEMBER Mask operator==(Vec a, Vec b) {
    return {Set::template compare<kEqual>(a.v, b.v)};
  }
  friend AFM_MEMBER Vec select(Mask m, Vec a, Vec b) { return Set::select(m.lanes, a.v, b.v); }
  friend AFM_MEMBER Mask both(Mask a, Mask b) { return {Set::both(a.lanes, b.lanes)}; }
  friend AFM_MEMBER bool any(Mask m) { return Set::any(m.lanes); }
};

// The bits of a number.
template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  static constexpr int mantissa = 23;
  typedef uint32_t Lanes __attribute__((vector_size(sizeof(Vec<float>))));
};
template <>
struct BitsOf<double> {
  static constexpr int mantissa = 52;
  typedef uint64_t Lanes __attribute__((vector_size(sizeof(Vec<double>))));
};
template <class T>
AFM_INLINE typename BitsOf<T>::Lanes bits_of(Vec<T> x) {
  return (typename BitsOf<T>::Lanes)x.v;
}
template <class T>
AFM_INLINE Vec<T> of_bits(typename BitsOf<T>::Lanes bits) {
  return Vec<T>((decltype(Vec<T>::v))bits);
}
template <class T>
AFM_INLINE Vec<T> operator|(Vec<T> a, Vec<T> b) {
  return of_bits<T>(bits_of(a) | bits_of(b));
}
template <class T>
AFM_INLINE Vec<T> abs(Vec<T> x) {
  return of_bits<T>(bits_of(x) & ~bits_of(Vec<T>(T(-0.0))));
}
// 2^(the integer in the low bits of x, less the exponent's bias).
template <class T>
AFM_INLINE Vec<T> exponent_from_low_bits(Vec<T> x) {
  return of_bits<T>(bits_of(x) << BitsOf<T>::mantissa);
}
// The same where those bits are an integer in units of 2^-places, to a number whose bits are added.
template <int places, class T>
AFM_INLINE Vec<T> exponent_from_low_bits(Vec<T> x, Vec<T> added) {
  return of_bits<T>((bits_of(x) << (BitsOf<T>::mantissa - places)) + bits_of(added));
}
// And back, for x > 0: the biased exponent in the low bits of 2^23 (2^52 for double), and the
// mantissa in [1, 2).
template <class T>
AFM_INLINE Vec<T> exponent_to_low_bits(Vec<T> x) {
  constexpr T kMagic = static_cast<T>(1LL << BitsOf<T>::mantissa);
  return of_bits<T>((bits_of(x) >> BitsOf<T>::mantissa) | bits_of(Vec<T>(kMagic)));
}
template <class T>
AFM_INLINE Vec<T> mantissa(Vec<T> x) {
  using Bits = typename BitsOf<T>::Lanes;
  const Bits fraction = ((Bits{} + 1) << BitsOf<T>::mantissa) - 1;
  return of_bits<T>((bits_of(x) & fraction) | bits_of(Vec<T>(T(1))));
}

// 16-bit numbers in memory, float32 in registers. bfloat16 is rounded to nearest, ties to even; of
// a NaN that expects that its low 16 bits are not all ones, as of those that arithmetic makes.

// A bfloat16 in memory.
struct BFloat16 {
  uint16_t bits;
};

// A float16 in memory.
struct Float16 {
  uint16_t bits;
};

AFM_INLINE Vec<float> from_bfloat16(Half::Halves x) {
  return of_bits<float>(Half::widen_to_upper(x));
}
AFM_INLINE Half::Words rounded_to_bfloat16(Vec<float> x) { return Half::rounded(bits_of(x)); }
AFM_INLINE Half::Halves to_bfloat16(Vec<float> x) { return Half::upper(rounded_to_bfloat16(x)); }

AFM_INLINE Vec<float> load_bfloat16(const BFloat16* p) {
  return from_bfloat16(load_register<Half::Halves>(p));
}
AFM_INLINE Vec<float> load_bfloat16(const BFloat16* p, int n, Vec<float> fill) {
  return select(Vec<float>::first(n), from_bfloat16(Half::load(p, n)), fill);
}
AFM_INLINE void store_bfloat16(Vec<float> x, BFloat16* p) { store_register(p, to_bfloat16(x)); }
AFM_INLINE void store_bfloat16(Vec<float> x, BFloat16* p, int n) {
  Half::store(p, n, to_bfloat16(x));
}
AFM_INLINE void stream_bfloat16(Vec<float> x, BFloat16* p) { Half::stream(p, to_bfloat16(x)); }

// Two vectors in one call, which is cheaper where one instruction narrows both. (The set is a
// parameter so that what it lacks is not compiled; below, too.)
template <class Set = Half>
AFM_INLINE void store_bfloat16(Vec<float> x, Vec<float> y, BFloat16* p) {
  if constexpr (Set::kNarrowsPairs)
    store_register(p, Set::upper(rounded_to_bfloat16(x), rounded_to_bfloat16(y)));
  else
    store_bfloat16(x, p), store_bfloat16(y, p + Vec<float>::width);
}
template <class Set = Half>
AFM_INLINE void stream_bfloat16(Vec<float> x, Vec<float> y, BFloat16* p) {
  if constexpr (Set::kNarrowsPairs)
    of_bits<float>(Set::upper(rounded_to_bfloat16(x), rounded_to_bfloat16(y)))
        .stream(reinterpret_cast<float*>(p));
  else
    stream_bfloat16(x, p), stream_bfloat16(y, p + Vec<float>::width);
}

AFM_INLINE Vec<float> load_float16(const Float16* p) {
  return Half::from_float16(load_register<Half::Halves>(p));
}
AFM_INLINE Vec<float> load_float16(const Float16* p, int n, Vec<float> fill) {
  return select(Vec<float>::first(n), Vec<float>(Half::from_float16(Half::load(p, n))), fill);
}
AFM_INLINE void store_float16(Vec<float> x, Float16* p) {
  store_register(p, Half::to_float16(x.v));
}
AFM_INLINE void store_float16(Vec<float> x, Float16* p, int n) {
  Half::store(p, n, Half::to_float16(x.v));
}

// What transposes rows into lanes. See Note [Rows across lanes] in lane_tiles.h.

// 16 bytes of every fourth row: part k of the vector is of rows[4 * k].
template <class P = Parts>
AFM_INLINE Vec<float> load_parts(const char* const* rows, int64_t offset) {
  const auto part = [&](int k) AFM_LAMBDA_INLINE {
    return load_register<typename P::Part>(rows[4 * k] + offset);
  };
  auto x = P::first(part(0));
  if constexpr (P::kCount > 1) x = P::template insert<1>(x, part(1));
  if constexpr (P::kCount > 2) x = P::template insert<2>(x, part(2));
  if constexpr (P::kCount > 2) x = P::template insert<3>(x, part(3));
  return x;
}
template <class P = Parts>
AFM_INLINE void store_parts(Vec<float> x, char* const* rows, int64_t offset) {
  store_register(rows[0] + offset, P::template extract<0>(x.v));
  if constexpr (P::kCount > 1) store_register(rows[4] + offset, P::template extract<1>(x.v));
  if constexpr (P::kCount > 2) store_register(rows[8] + offset, P::template extract<2>(x.v));
  if constexpr (P::kCount > 2) store_register(rows[12] + offset, P::template extract<3>(x.v));
}
// Every part of the four vectors is a matrix of 4 x 4 lanes.
AFM_INLINE void transpose_parts(Vec<float>* x) {
  using Singles = Registers<float>;
  using Pairs = Registers<double>;
  const auto zip_low = [](auto p, auto q)
                           AFM_LAMBDA_INLINE { return (Pairs::Lanes)Singles::zip_low(p.v, q.v); };
  const auto zip_high = [](auto p, auto q)
                            AFM_LAMBDA_INLINE { return (Pairs::Lanes)Singles::zip_high(p.v, q.v); };
  const Pairs::Lanes a = zip_low(x[0], x[1]), b = zip_high(x[0], x[1]);
  const Pairs::Lanes c = zip_low(x[2], x[3]), d = zip_high(x[2], x[3]);
  x[0] = (Singles::Lanes)Pairs::zip_low(a, c), x[1] = (Singles::Lanes)Pairs::zip_high(a, c);
  x[2] = (Singles::Lanes)Pairs::zip_low(b, d), x[3] = (Singles::Lanes)Pairs::zip_high(b, d);
}
// A lane of `pairs` holds two 16-bit numbers, the lower one first.
AFM_INLINE void unpack_bfloat16(Vec<float> pairs, Vec<float>& first, Vec<float>& second) {
  first = of_bits<float>(bits_of(pairs) << 16);
  second = of_bits<float>(bits_of(pairs) & 0xffff0000);
}
AFM_INLINE void unpack_float16(Vec<float> pairs, Vec<float>& first, Vec<float>& second) {
  first = Half::from_float16(Half::lower(bits_of(pairs)));
  second = Half::from_float16(Half::upper(bits_of(pairs)));
}
AFM_INLINE Vec<float> pack_bfloat16(Vec<float> first, Vec<float> second) {
  return of_bits<float>(Half::join(rounded_to_bfloat16(first) >> 16, rounded_to_bfloat16(second)));
}
AFM_INLINE Vec<float> pack_float16(Vec<float> first, Vec<float> second) {
  return of_bits<float>(Half::widen(Half::to_float16(first.v)) |
                        Half::widen(Half::to_float16(second.v)) << 16);
}

// Whole cache lines, past the caches.
AFM_INLINE bool can_stream(const void* to, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0;
}
AFM_INLINE void stream_lines(void* to, const void* from, int64_t bytes) {
  constexpr int64_t kStep = Vec<float>::width;
  float* out = static_cast<float*>(to);
  const float* in = static_cast<const float*>(from);
  for (int64_t j = 0; j < bytes / 4; j += kStep) Vec<float>::load(in + j).stream(out + j);
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
