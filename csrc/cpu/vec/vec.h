// SIMD vectors of float and double for kernel units: one interface, the widest registers of the
// unit's instruction set.
//
// Vec<T> has `width` lanes and converts to and from memory; a Mask says which lanes. Everything has
// internal linkage, so that no instruction set's copy is linked into another's unit. See Note
// [Kernel units] in setup.py.
//
// max(x, bound) returns the bound where x is NaN, on every instruction set: callers that must keep
// a NaN say so.

#pragma once

#include <stdint.h>
#include <string.h>

#if AFM_CAPABILITY_AVX512 || AFM_CAPABILITY_AVX2
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the "undefined" sources inside its own AVX-512 intrinsics for uninitialised
// variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "common/inline.h"
#include "cpu/vec/half.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <class T>
struct Vec;

// A bfloat16 in memory.
struct BFloat16 {
  uint16_t bits;
};

#if AFM_CAPABILITY_AVX512

// Suffix: of the intrinsics.
#define AFM_AVX512_VEC(T, Register, MaskBits, suffix)                                         \
  template <>                                                                                 \
  struct Vec<T> {                                                                             \
    static constexpr int width = sizeof(Register) / sizeof(T);                                \
    using Mask = MaskBits;                                                                    \
    Register v;                                                                               \
    Vec() = default;                                                                          \
    AFM_MEMBER Vec(Register x) : v(x) {}                                                      \
    AFM_MEMBER Vec(T x) : v(_mm512_set1_##suffix(x)) {}                                       \
    AFM_MEMBER static Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }          \
    AFM_MEMBER static Vec load(const T* p) { return _mm512_loadu_##suffix(p); }               \
    AFM_MEMBER static Vec load(const T* p, int n, Vec fill) {                                 \
      return _mm512_mask_loadu_##suffix(fill.v, first(n), p);                                 \
    }                                                                                         \
    AFM_MEMBER void store(T* p) const { _mm512_storeu_##suffix(p, v); }                       \
    AFM_MEMBER void store(T* p, int n) const { _mm512_mask_storeu_##suffix(p, first(n), v); } \
    AFM_MEMBER void stream(T* p) const { _mm512_stream_##suffix(p, v); }                      \
    AFM_MEMBER T sum() const { return _mm512_reduce_add_##suffix(v); }                        \
    AFM_MEMBER T max() const { return _mm512_reduce_max_##suffix(v); }                        \
    AFM_MEMBER T min() const { return _mm512_reduce_min_##suffix(v); }                        \
  };                                                                                          \
  AFM_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {                                       \
    return _mm512_fmadd_##suffix(a.v, b.v, c.v);                                              \
  }                                                                                           \
  AFM_INLINE Vec<T> fms(Vec<T> a, Vec<T> b, Vec<T> c) {                                       \
    return _mm512_fmsub_##suffix(a.v, b.v, c.v);                                              \
  }                                                                                           \
  AFM_INLINE Vec<T> times_power_of_2(Vec<T> a, Vec<T> n) {                                    \
    return _mm512_scalef_##suffix(a.v, n.v);                                                  \
  }                                                                                           \
  AFM_INLINE Vec<T> max(Vec<T> a, Vec<T> bound) { return _mm512_max_##suffix(a.v, bound.v); } \
  AFM_INLINE Vec<T> min(Vec<T> a, Vec<T> bound) { return _mm512_min_##suffix(a.v, bound.v); } \
  AFM_INLINE Vec<T> abs(Vec<T> a) { return _mm512_abs_##suffix(a.v); }                        \
  AFM_INLINE MaskBits operator<(Vec<T> a, Vec<T> b) {                                         \
    return _mm512_cmp_##suffix##_mask(a.v, b.v, _CMP_LT_OQ);                                  \
  }                                                                                           \
  AFM_INLINE MaskBits operator<=(Vec<T> a, Vec<T> b) {                                        \
    return _mm512_cmp_##suffix##_mask(a.v, b.v, _CMP_LE_OQ);                                  \
  }                                                                                           \
  AFM_INLINE MaskBits operator==(Vec<T> a, Vec<T> b) {                                        \
    return _mm512_cmp_##suffix##_mask(a.v, b.v, _CMP_EQ_OQ);                                  \
  }                                                                                           \
  AFM_INLINE Vec<T> select(MaskBits m, Vec<T> a, Vec<T> b) {                                  \
    return _mm512_mask_blend_##suffix(m, b.v, a.v);                                           \
  }                                                                                           \
  AFM_INLINE bool any(MaskBits m) { return m != 0; }                                          \
  AFM_INLINE MaskBits both(MaskBits a, MaskBits b) { return static_cast<MaskBits>(a & b); }

AFM_AVX512_VEC(float, __m512, __mmask16, ps)
AFM_AVX512_VEC(double, __m512d, __mmask8, pd)
#undef AFM_AVX512_VEC

// In each lane, the entry of a table that the low bits of `index` say.
AFM_INLINE Vec<float> pick(const float (&table)[32], Vec<float> index) {
  return _mm512_permutex2var_ps(_mm512_load_ps(table), _mm512_castps_si512(index.v),
                                _mm512_load_ps(table + 16));
}
AFM_INLINE Vec<double> pick(const double (&table)[16], Vec<double> index) {
  return _mm512_permutex2var_pd(_mm512_load_pd(table), _mm512_castpd_si512(index.v),
                                _mm512_load_pd(table + 8));
}

// bfloat16 in memory, float32 in registers. Stores round to nearest, ties to even; of a NaN they
// expect that its low 16 bits are not all ones, as of those that arithmetic makes. Two vectors in
// one call are cheaper than two calls.

// The words of a vector's even lanes, and of its odd ones.
alignas(64) constexpr uint16_t kUpperHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                   23, 25, 27, 29, 31, 0,  0,  0,  0,  0,  0,
                                                   0,  0,  0,  0,  0,  0,  0,  0,  0,  0};
alignas(64) constexpr uint16_t kToUpperHalves[32] = {0, 0,  0, 1,  0, 2,  0, 3,  0, 4, 0,
                                                     5, 0,  6, 0,  7, 0,  8, 0,  9, 0, 10,
                                                     0, 11, 0, 12, 0, 13, 0, 14, 0, 15};

AFM_INLINE Vec<float> widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(
      0xaaaaaaaa, _mm512_load_si512(kToUpperHalves), _mm512_castsi256_si512(x)));
}
// The upper half of each lane is the rounded number.
AFM_INLINE __m512i rounded_to_bfloat16(Vec<float> x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
}
AFM_INLINE __m256i narrow(Vec<float> x) {
  return _mm512_castsi512_si256(
      _mm512_permutexvar_epi16(_mm512_load_si512(kUpperHalves), rounded_to_bfloat16(x)));
}
AFM_INLINE Vec<float> load_bfloat16(const BFloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
AFM_INLINE Vec<float> load_bfloat16(const BFloat16* p, int n, Vec<float> fill) {
  const __mmask16 lanes = Vec<float>::first(n);
  return select(lanes, widen(_mm256_maskz_loadu_epi16(lanes, p)), fill);
}
AFM_INLINE void store_bfloat16(Vec<float> x, BFloat16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x));
}
AFM_INLINE void store_bfloat16(Vec<float> x, BFloat16* p, int n) {
  _mm256_mask_storeu_epi16(p, Vec<float>::first(n), narrow(x));
}
AFM_INLINE void stream_bfloat16(Vec<float> x, BFloat16* p) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(x));
}
AFM_INLINE void store_bfloat16(Vec<float> x, Vec<float> y, BFloat16* p) {
  store_bfloat16(x, p), store_bfloat16(y, p + Vec<float>::width);
}
AFM_INLINE void stream_bfloat16(Vec<float> x, Vec<float> y, BFloat16* p) {
  stream_bfloat16(x, p), stream_bfloat16(y, p + Vec<float>::width);
}

// What transposes rows into lanes. See Note [Rows across lanes] in lane_tiles.h.

// 16 bytes of every fourth row: part k of the vector is of rows[4 * k].
AFM_INLINE Vec<float> load_parts(const char* const* rows, int64_t offset) {
  const auto part = [&](int k) AFM_LAMBDA_INLINE {
    return _mm_loadu_ps(reinterpret_cast<const float*>(rows[4 * k] + offset));
  };
  const __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512(part(0)), part(1), 1);
  return _mm512_insertf32x4(_mm512_insertf32x4(low, part(2), 2), part(3), 3);
}
AFM_INLINE void store_parts(Vec<float> x, char* const* rows, int64_t offset) {
  const auto to = [&](int k)
                      AFM_LAMBDA_INLINE { return reinterpret_cast<float*>(rows[4 * k] + offset); };
  _mm_storeu_ps(to(0), _mm512_castps512_ps128(x.v));
  _mm_storeu_ps(to(1), _mm512_extractf32x4_ps(x.v, 1));
  _mm_storeu_ps(to(2), _mm512_extractf32x4_ps(x.v, 2));
  _mm_storeu_ps(to(3), _mm512_extractf32x4_ps(x.v, 3));
}
// Every part of the four vectors is a matrix of 4 x 4 lanes.
AFM_INLINE void transpose_parts(Vec<float>* x) {
  const __m512 a = _mm512_unpacklo_ps(x[0].v, x[1].v), b = _mm512_unpackhi_ps(x[0].v, x[1].v);
  const __m512 c = _mm512_unpacklo_ps(x[2].v, x[3].v), d = _mm512_unpackhi_ps(x[2].v, x[3].v);
  const auto low = [](__m512 p, __m512 q) AFM_LAMBDA_INLINE {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(p), _mm512_castps_pd(q)));
  };
  const auto high = [](__m512 p, __m512 q) AFM_LAMBDA_INLINE {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(p), _mm512_castps_pd(q)));
  };
  x[0] = low(a, c), x[1] = high(a, c), x[2] = low(b, d), x[3] = high(b, d);
}
// A lane of `pairs` holds two 16-bit numbers, the lower one first.
AFM_INLINE void unpack_bfloat16(Vec<float> pairs, Vec<float>& first, Vec<float>& second) {
  const __m512i bits = _mm512_castps_si512(pairs.v);
  first = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  second = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)));
}
AFM_INLINE void unpack_float16(Vec<float> pairs, Vec<float>& first, Vec<float>& second) {
  const __m512i bits = _mm512_castps_si512(pairs.v);
  first = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
  second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}
AFM_INLINE Vec<float> pack_bfloat16(Vec<float> first, Vec<float> second) {
  return _mm512_castsi512_ps(_mm512_mask_blend_epi16(
      0xaaaaaaaa, _mm512_srli_epi32(rounded_to_bfloat16(first), 16), rounded_to_bfloat16(second)));
}
AFM_INLINE __m256i to_halves(Vec<float> x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AFM_INLINE Vec<float> load_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
AFM_INLINE void store_float16(Vec<float> x, uint16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_halves(x));
}
AFM_INLINE Vec<float> pack_float16(Vec<float> first, Vec<float> second) {
  return _mm512_castsi512_ps(
      _mm512_or_si512(_mm512_cvtepu16_epi32(to_halves(first)),
                      _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_halves(second)), 16)));
}
#elif AFM_CAPABILITY_AVX2

// Read from the middle less n, as many ones as n.
alignas(64) constexpr int32_t kFirst32[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
alignas(64) constexpr int64_t kFirst64[8] = {-1, -1, -1, -1};

template <class F>
AFM_INLINE float reduce(__m256 v, const F& f) {
  __m128 a = f(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = f(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(f(a, _mm_movehdup_ps(a)));
}
template <class F>
AFM_INLINE double reduce(__m256d v, const F& f) {
  const __m128d a = f(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(f(a, _mm_unpackhi_pd(a, a)));
}

// Suffix: of the intrinsics. kFirst: one of the tables above.
#define AFM_AVX2_VEC(T, Register, suffix, kFirst)                                              \
  template <>                                                                                  \
  struct Vec<T> {                                                                              \
    static constexpr int width = sizeof(Register) / sizeof(T);                                 \
    struct Mask {                                                                              \
      Register m;                                                                              \
    };                                                                                         \
    Register v;                                                                                \
    Vec() = default;                                                                           \
    AFM_MEMBER Vec(Register x) : v(x) {}                                                       \
    AFM_MEMBER Vec(T x) : v(_mm256_set1_##suffix(x)) {}                                        \
    AFM_MEMBER static __m256i bits(int n) {                                                    \
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirst + width - n));         \
    }                                                                                          \
    AFM_MEMBER static Mask first(int n) { return {_mm256_castsi256_##suffix(bits(n))}; }       \
    AFM_MEMBER static Vec load(const T* p) { return _mm256_loadu_##suffix(p); }                \
    AFM_MEMBER static Vec load(const T* p, int n, Vec fill) {                                  \
      return _mm256_blendv_##suffix(fill.v, _mm256_maskload_##suffix(p, bits(n)), first(n).m); \
    }                                                                                          \
    AFM_MEMBER void store(T* p) const { _mm256_storeu_##suffix(p, v); }                        \
    AFM_MEMBER void store(T* p, int n) const { _mm256_maskstore_##suffix(p, bits(n), v); }     \
    AFM_MEMBER void stream(T* p) const { _mm256_stream_##suffix(p, v); }                       \
    AFM_MEMBER T sum() const {                                                                 \
      return reduce(v, [](auto a, auto b) { return _mm_add_##suffix(a, b); });                 \
    }                                                                                          \
    AFM_MEMBER T max() const {                                                                 \
      return reduce(v, [](auto a, auto b) { return _mm_max_##suffix(a, b); });                 \
    }                                                                                          \
    AFM_MEMBER T min() const {                                                                 \
      return reduce(v, [](auto a, auto b) { return _mm_min_##suffix(a, b); });                 \
    }                                                                                          \
  };                                                                                           \
  AFM_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {                                        \
    return _mm256_fmadd_##suffix(a.v, b.v, c.v);                                               \
  }                                                                                            \
  AFM_INLINE Vec<T> max(Vec<T> a, Vec<T> bound) { return _mm256_max_##suffix(a.v, bound.v); }  \
  AFM_INLINE Vec<T> min(Vec<T> a, Vec<T> bound) { return _mm256_min_##suffix(a.v, bound.v); }  \
  AFM_INLINE Vec<T> abs(Vec<T> a) {                                                            \
    return _mm256_andnot_##suffix(_mm256_set1_##suffix(-T(0)), a.v);                           \
  }                                                                                            \
  AFM_INLINE Vec<T>::Mask operator<(Vec<T> a, Vec<T> b) {                                      \
    return {_mm256_cmp_##suffix(a.v, b.v, _CMP_LT_OQ)};                                        \
  }                                                                                            \
  AFM_INLINE Vec<T>::Mask operator<=(Vec<T> a, Vec<T> b) {                                     \
    return {_mm256_cmp_##suffix(a.v, b.v, _CMP_LE_OQ)};                                        \
  }                                                                                            \
  AFM_INLINE Vec<T>::Mask operator==(Vec<T> a, Vec<T> b) {                                     \
    return {_mm256_cmp_##suffix(a.v, b.v, _CMP_EQ_OQ)};                                        \
  }                                                                                            \
  AFM_INLINE Vec<T> select(Vec<T>::Mask m, Vec<T> a, Vec<T> b) {                               \
    return _mm256_blendv_##suffix(b.v, a.v, m.m);                                              \
  }                                                                                            \
  AFM_INLINE bool any(Vec<T>::Mask m) { return _mm256_movemask_##suffix(m.m) != 0; }           \
  AFM_INLINE Vec<T>::Mask both(Vec<T>::Mask a, Vec<T>::Mask b) {                               \
    return {_mm256_and_##suffix(a.m, b.m)};                                                    \
  }

AFM_AVX2_VEC(float, __m256, ps, kFirst32)
AFM_AVX2_VEC(double, __m256d, pd, kFirst64)
#undef AFM_AVX2_VEC

// In each lane, the entry of a table that the low bits of `index` say.
AFM_INLINE Vec<float> pick(const uint32_t (&table)[8], Vec<float> index) {
  const __m256i entries = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
  return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(entries, _mm256_castps_si256(index.v)));
}

// bfloat16 in memory, float32 in registers, as above.

// Both halves of the vector see all eight numbers, which costs a load and nothing else, and each
// takes its four.
alignas(32) constexpr int8_t kToUpperHalves[32] = {-1, -1, 0,  1,  -1, -1, 2,  3,  -1, -1, 4,
                                                   5,  -1, -1, 6,  7,  -1, -1, 8,  9,  -1, -1,
                                                   10, 11, -1, -1, 12, 13, -1, -1, 14, 15};

AFM_INLINE Vec<float> widen(__m128i x) {
  return _mm256_castsi256_ps(
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(x),
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(kToUpperHalves))));
}
// The upper half of each lane is the rounded number.
AFM_INLINE __m256i rounded_to_bfloat16(Vec<float> x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
AFM_INLINE __m128i narrow(Vec<float> x) {
  const __m256i halves = _mm256_srli_epi32(rounded_to_bfloat16(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
AFM_INLINE __m256i narrow(Vec<float> x, Vec<float> y) {
  const __m256i mixed = _mm256_packus_epi32(_mm256_srli_epi32(rounded_to_bfloat16(x), 16),
                                            _mm256_srli_epi32(rounded_to_bfloat16(y), 16));
  return _mm256_permute4x64_epi64(mixed, 0xd8);
}
AFM_INLINE Vec<float> load_bfloat16(const BFloat16* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
AFM_INLINE Vec<float> load_bfloat16(const BFloat16* p, int n, Vec<float> fill) {
  alignas(16) uint16_t lanes[8] = {};
  memcpy(lanes, p, static_cast<size_t>(n) * 2);
  return select(Vec<float>::first(n),
                widen(_mm_load_si128(reinterpret_cast<const __m128i*>(lanes))), fill);
}
AFM_INLINE void store_bfloat16(Vec<float> x, BFloat16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x));
}
AFM_INLINE void store_bfloat16(Vec<float> x, BFloat16* p, int n) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), narrow(x));
  memcpy(p, lanes, static_cast<size_t>(n) * 2);
}
AFM_INLINE void stream_bfloat16(Vec<float> x, BFloat16* p) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(x));
}
AFM_INLINE void store_bfloat16(Vec<float> x, Vec<float> y, BFloat16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, y));
}
AFM_INLINE void stream_bfloat16(Vec<float> x, Vec<float> y, BFloat16* p) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(x, y));
}

// What transposes rows into lanes, as above.
AFM_INLINE Vec<float> load_parts(const char* const* rows, int64_t offset) {
  const __m128 low = _mm_loadu_ps(reinterpret_cast<const float*>(rows[0] + offset));
  const __m128 high = _mm_loadu_ps(reinterpret_cast<const float*>(rows[4] + offset));
  return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}
AFM_INLINE void store_parts(Vec<float> x, char* const* rows, int64_t offset) {
  _mm_storeu_ps(reinterpret_cast<float*>(rows[0] + offset), _mm256_castps256_ps128(x.v));
  _mm_storeu_ps(reinterpret_cast<float*>(rows[4] + offset), _mm256_extractf128_ps(x.v, 1));
}
AFM_INLINE void transpose_parts(Vec<float>* x) {
  const __m256 a = _mm256_unpacklo_ps(x[0].v, x[1].v), b = _mm256_unpackhi_ps(x[0].v, x[1].v);
  const __m256 c = _mm256_unpacklo_ps(x[2].v, x[3].v), d = _mm256_unpackhi_ps(x[2].v, x[3].v);
  x[0] = _mm256_shuffle_ps(a, c, 0x44), x[1] = _mm256_shuffle_ps(a, c, 0xee);
  x[2] = _mm256_shuffle_ps(b, d, 0x44), x[3] = _mm256_shuffle_ps(b, d, 0xee);
}
AFM_INLINE void unpack_bfloat16(Vec<float> pairs, Vec<float>& first, Vec<float>& second) {
  const __m256i bits = _mm256_castps_si256(pairs.v);
  first = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  second = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)));
}
AFM_INLINE Vec<float> from_low_halves(__m256i bits) {
  const __m128i halves =
      _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  return _mm256_cvtph_ps(halves);
}
AFM_INLINE void unpack_float16(Vec<float> pairs, Vec<float>& first, Vec<float>& second) {
  const __m256i bits = _mm256_castps_si256(pairs.v);
  first = from_low_halves(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff)));
  second = from_low_halves(_mm256_srli_epi32(bits, 16));
}
AFM_INLINE Vec<float> pack_bfloat16(Vec<float> first, Vec<float> second) {
  return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_srli_epi32(rounded_to_bfloat16(first), 16),
                                                rounded_to_bfloat16(second), 0xaa));
}
AFM_INLINE __m128i to_halves(Vec<float> x) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AFM_INLINE Vec<float> load_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
AFM_INLINE void store_float16(Vec<float> x, uint16_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_halves(x));
}
AFM_INLINE Vec<float> pack_float16(Vec<float> first, Vec<float> second) {
  return _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_cvtepu16_epi32(to_halves(first)),
                      _mm256_slli_epi32(_mm256_cvtepu16_epi32(to_halves(second)), 16)));
}
#else

// 128-bit vectors of the compiler's own vector extension: SSE2, NEON, or whatever the baseline has.
template <class T>
struct PortableLanes;
template <>
struct PortableLanes<float> {
  typedef float Lanes __attribute__((vector_size(16)));
  typedef int32_t Bits __attribute__((vector_size(16)));
};
template <>
struct PortableLanes<double> {
  typedef double Lanes __attribute__((vector_size(16)));
  typedef int64_t Bits __attribute__((vector_size(16)));
};

template <class T>
struct PortableVec {
  static constexpr int width = 16 / sizeof(T);
  using Lanes = typename PortableLanes<T>::Lanes;
  using BitLanes = typename PortableLanes<T>::Bits;
  struct Mask {
    BitLanes m;
  };
  Lanes v;
  PortableVec() = default;
  AFM_MEMBER PortableVec(Lanes x) : v(x) {}
  AFM_MEMBER PortableVec(T x) : v(x - Lanes{}) {}
  AFM_MEMBER static Mask first(int n) {
    BitLanes m;
    for (int i = 0; i < width; ++i) m[i] = i < n ? -1 : 0;
    return {m};
  }
  AFM_MEMBER static Lanes load_lanes(const T* p) {
    Lanes x;
    memcpy(&x, p, sizeof(x));
    return x;
  }
  AFM_MEMBER static Lanes load_lanes(const T* p, int n, Lanes fill) {
    for (int i = 0; i < n; ++i) fill[i] = p[i];
    return fill;
  }
  AFM_MEMBER void store(T* p) const { memcpy(p, &v, sizeof(v)); }
  AFM_MEMBER void store(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  AFM_MEMBER void stream(T* p) const { store(p); }
  AFM_MEMBER T sum() const {
    T s = v[0];
    for (int i = 1; i < width; ++i) s += v[i];
    return s;
  }
  AFM_MEMBER T max() const {
    T s = v[0];
    for (int i = 1; i < width; ++i) s = s > v[i] ? s : v[i];
    return s;
  }
  AFM_MEMBER T min() const {
    T s = v[0];
    for (int i = 1; i < width; ++i) s = s < v[i] ? s : v[i];
    return s;
  }
};

// clang-format off
#define AFM_PORTABLE_VEC(T)                                                                             \
  template <>                                                                                                 \
  struct Vec<T> : PortableVec<T> {                                                                      \
    using PortableVec<T>::PortableVec;                                                                  \
    Vec() = default;                                                                                          \
    AFM_MEMBER static Vec load(const T* p) { return Vec(load_lanes(p)); }                                     \
    AFM_MEMBER static Vec load(const T* p, int n, Vec fill) { return Vec(load_lanes(p, n, fill.v)); }         \
  };                                                                                                          \
  AFM_INLINE Vec<T> max(Vec<T> a, Vec<T> bound) { return Vec<T>(a.v > bound.v ? a.v : bound.v); }             \
  AFM_INLINE Vec<T> min(Vec<T> a, Vec<T> bound) { return Vec<T>(a.v < bound.v ? a.v : bound.v); }             \
  AFM_INLINE Vec<T> abs(Vec<T> a) { return Vec<T>(a.v < 0 ? -a.v : a.v); }                                    \
  AFM_INLINE Vec<T>::Mask operator<(Vec<T> a, Vec<T> b) { return {(Vec<T>::BitLanes)(a.v < b.v)}; }           \
  AFM_INLINE Vec<T>::Mask operator<=(Vec<T> a, Vec<T> b) { return {(Vec<T>::BitLanes)(a.v <= b.v)}; }         \
  AFM_INLINE Vec<T>::Mask operator==(Vec<T> a, Vec<T> b) { return {(Vec<T>::BitLanes)(a.v == b.v)}; }         \
  AFM_INLINE Vec<T> select(Vec<T>::Mask m, Vec<T> a, Vec<T> b) {                              \
    using Bits = Vec<T>::BitLanes;                                                            \
    return Vec<T>((Vec<T>::Lanes)(((Bits)a.v & m.m) | ((Bits)b.v & ~m.m)));                   \
  }       \
  AFM_INLINE Vec<T>::Mask both(Vec<T>::Mask a, Vec<T>::Mask b) { return {a.m & b.m}; }                        \
  AFM_INLINE bool any(Vec<T>::Mask m) {                                                                       \
    for (int i = 0; i < Vec<T>::width; ++i)                                                                   \
      if (m.m[i]) return true;                                                                                \
    return false;                                                                                             \
  }
AFM_PORTABLE_VEC(float)
AFM_PORTABLE_VEC(double)
#undef AFM_PORTABLE_VEC
// clang-format on

// Fused where every processor of the kind can.
#if defined(__aarch64__)
AFM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>(
      (Vec<float>::Lanes)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v));
}
AFM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>(
      (Vec<double>::Lanes)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v));
}
#else
AFM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>(a.v * b.v + c.v);
}
AFM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>(a.v * b.v + c.v);
}
#endif

// bfloat16 in memory, float32 in registers, as above.
typedef uint16_t PortableHalves __attribute__((vector_size(8)));
typedef uint32_t PortableWords __attribute__((vector_size(16)));
// The upper half of each lane is the rounded number.
AFM_INLINE PortableWords rounded_to_bfloat16(Vec<float> x) {
  const PortableWords bits = (PortableWords)x.v;
  return bits + 0x7fff + ((bits >> 16) & 1);
}
#if defined(__SSE2__)
AFM_INLINE Vec<float> load_bfloat16(const BFloat16* p) {
  const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return Vec<float>((Vec<float>::Lanes)_mm_unpacklo_epi16(_mm_setzero_si128(), halves));
}
// The eight numbers of two vectors.
AFM_INLINE __m128i narrow(Vec<float> x, Vec<float> y) {
  return _mm_packs_epi32(_mm_srai_epi32((__m128i)rounded_to_bfloat16(x), 16),
                         _mm_srai_epi32((__m128i)rounded_to_bfloat16(y), 16));
}
AFM_INLINE void store_bfloat16(Vec<float> x, Vec<float> y, BFloat16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, y));
}
AFM_INLINE void store_bfloat16(Vec<float> x, BFloat16* p) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow(x, x));
}
#else
AFM_INLINE Vec<float> load_bfloat16(const BFloat16* p) {
  PortableHalves halves;
  memcpy(&halves, p, sizeof(halves));
  return Vec<float>((Vec<float>::Lanes)(__builtin_convertvector(halves, PortableWords) << 16));
}
AFM_INLINE void store_bfloat16(Vec<float> x, BFloat16* p) {
  const PortableHalves halves =
      __builtin_convertvector(rounded_to_bfloat16(x) >> 16, PortableHalves);
  memcpy(p, &halves, sizeof(halves));
}
AFM_INLINE void store_bfloat16(Vec<float> x, Vec<float> y, BFloat16* p) {
  store_bfloat16(x, p), store_bfloat16(y, p + Vec<float>::width);
}
#endif
AFM_INLINE Vec<float> load_bfloat16(const BFloat16* p, int n, Vec<float> fill) {
  for (int i = 0; i < n; ++i) fill.v[i] = from_bfloat16(p[i].bits);
  return fill;
}
AFM_INLINE void store_bfloat16(Vec<float> x, BFloat16* p, int n) {
  for (int i = 0; i < n; ++i) p[i].bits = to_bfloat16(x.v[i]);
}
AFM_INLINE void stream_bfloat16(Vec<float> x, Vec<float> y, BFloat16* p) {
  store_bfloat16(x, y, p);
}
AFM_INLINE void stream_bfloat16(Vec<float> x, BFloat16* p) { store_bfloat16(x, p); }
AFM_INLINE Vec<float> load_float16(const uint16_t* p) {
  Vec<float> x;
  for (int i = 0; i < Vec<float>::width; ++i) x.v[i] = from_float16(p[i]);
  return x;
}
AFM_INLINE void store_float16(Vec<float> x, uint16_t* p) {
  for (int i = 0; i < Vec<float>::width; ++i) p[i] = to_float16(x.v[i]);
}

// What transposes rows into lanes, as above: one part.
AFM_INLINE Vec<float> load_parts(const char* const* rows, int64_t offset) {
  return Vec<float>::load(reinterpret_cast<const float*>(rows[0] + offset));
}
AFM_INLINE void store_parts(Vec<float> x, char* const* rows, int64_t offset) {
  x.store(reinterpret_cast<float*>(rows[0] + offset));
}
AFM_INLINE void transpose_parts(Vec<float>* x) {
  const Vec<float> from[4] = {x[0], x[1], x[2], x[3]};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) x[i].v[j] = from[j].v[i];
}
AFM_INLINE void unpack_bfloat16(Vec<float> pairs, Vec<float>& first, Vec<float>& second) {
  using Lanes = Vec<float>::Lanes;
  const PortableWords bits = (PortableWords)pairs.v;
  first = Vec<float>((Lanes)(bits << 16)), second = Vec<float>((Lanes)(bits & 0xffff0000));
}
AFM_INLINE void unpack_float16(Vec<float> pairs, Vec<float>& first, Vec<float>& second) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = bits_of_float(pairs.v[i]);
    first.v[i] = from_float16(static_cast<uint16_t>(bits & 0xffff));
    second.v[i] = from_float16(static_cast<uint16_t>(bits >> 16));
  }
}
AFM_INLINE Vec<float> pack_bfloat16(Vec<float> first, Vec<float> second) {
  return Vec<float>((Vec<float>::Lanes)(rounded_to_bfloat16(first) >> 16 |
                                        (rounded_to_bfloat16(second) & 0xffff0000)));
}
AFM_INLINE Vec<float> pack_float16(Vec<float> first, Vec<float> second) {
  Vec<float> pairs;
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = to_float16(first.v[i]), high = to_float16(second.v[i]);
    pairs.v[i] = float_of_bits(low | high << 16);
  }
  return pairs;
}

#endif

// What compilers know of any vector: arithmetic, and the bits of a number.
template <class T>
AFM_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v + b.v);
}
template <class T>
AFM_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v - b.v);
}
template <class T>
AFM_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v * b.v);
}
template <class T>
AFM_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v / b.v);
}

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
