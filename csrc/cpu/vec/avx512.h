// AVX-512 F, BW, DQ, VL. See Note [Instruction sets] in vec.h.

#pragma once

#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the "undefined" sources inside its own intrinsics for uninitialised variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "cpu/vec/registers.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// Suffix: of the intrinsics.
#define AFM_AVX512_REGISTERS(T, Register, MaskBits, suffix)                          \
  template <>                                                                        \
  struct Registers<T> {                                                              \
    AFM_X86_REGISTER(T, Register, _mm512, suffix)                                    \
    using Mask = MaskBits;                                                           \
    AFM_MEMBER static Mask first(int n) { return static_cast<Mask>((1u << n) - 1); } \
    AFM_MEMBER static Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); } \
    AFM_MEMBER static bool any(Mask m) { return m != 0; }                            \
    AFM_MEMBER static Lanes load(const T* p, int n, Lanes fill) {                    \
      return _mm512_mask_loadu_##suffix(fill, first(n), p);                          \
    }                                                                                \
    AFM_MEMBER static void store(T* p, int n, Lanes x) {                             \
      _mm512_mask_storeu_##suffix(p, first(n), x);                                   \
    }                                                                                \
    template <Order order>                                                           \
    AFM_MEMBER static Mask compare(Lanes a, Lanes b) {                               \
      return _mm512_cmp_##suffix##_mask(a, b, kX86Order[order]);                     \
    }                                                                                \
    AFM_MEMBER static Lanes select(Mask m, Lanes a, Lanes b) {                       \
      return _mm512_mask_blend_##suffix(m, b, a);                                    \
    }                                                                                \
    AFM_MEMBER static T sum(Lanes x) { return _mm512_reduce_add_##suffix(x); }       \
    AFM_MEMBER static T largest(Lanes x) { return _mm512_reduce_max_##suffix(x); }   \
    AFM_MEMBER static T smallest(Lanes x) { return _mm512_reduce_min_##suffix(x); }  \
    /* What no other set has. */                                                     \
    AFM_MEMBER static Lanes fms(Lanes a, Lanes b, Lanes c) {                         \
      return _mm512_fmsub_##suffix(a, b, c);                                         \
    }                                                                                \
    AFM_MEMBER static Lanes times_power_of_2(Lanes a, Lanes n) {                     \
      return _mm512_scalef_##suffix(a, n);                                           \
    }                                                                                \
  };

AFM_AVX512_REGISTERS(float, __m512, __mmask16, ps)
AFM_AVX512_REGISTERS(double, __m512d, __mmask8, pd)
#undef AFM_AVX512_REGISTERS

// In each lane, the entry of a table that the low bits of `index` say.
AFM_INLINE __m512 pick(const float (&table)[32], __m512 index) {
  return _mm512_permutex2var_ps(_mm512_load_ps(table), _mm512_castps_si512(index),
                                _mm512_load_ps(table + 16));
}
AFM_INLINE __m512d pick(const double (&table)[16], __m512d index) {
  return _mm512_permutex2var_pd(_mm512_load_pd(table), _mm512_castpd_si512(index),
                                _mm512_load_pd(table + 8));
}

// The upper 16 bits of every 32, and back.
alignas(64) constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                             23, 25, 27, 29, 31, 0,  0,  0,  0,  0,  0,
                                             0,  0,  0,  0,  0,  0,  0,  0,  0,  0};
alignas(64) constexpr uint16_t kToUpper[32] = {0, 0,  0, 1,  0, 2,  0, 3,  0, 4, 0,
                                               5, 0,  6, 0,  7, 0,  8, 0,  9, 0, 10,
                                               0, 11, 0, 12, 0, 13, 0, 14, 0, 15};

struct Half {
  using Halves = __m256i;
  typedef uint32_t Words __attribute__((vector_size(64)));
  AFM_MEMBER static Halves load(const void* p, int n) {
    return _mm256_maskz_loadu_epi16(Registers<float>::first(n), p);
  }
  AFM_MEMBER static void store(void* p, int n, Halves x) {
    _mm256_mask_storeu_epi16(p, Registers<float>::first(n), x);
  }
  AFM_MEMBER static void stream(void* p, Halves x) {
    _mm256_stream_si256(static_cast<__m256i*>(p), x);
  }
  AFM_MEMBER static Words widen(Halves x) { return (Words)_mm512_cvtepu16_epi32(x); }
  AFM_MEMBER static Words widen_to_upper(Halves x) {
    return (Words)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(kToUpper),
                                                 _mm512_castsi256_si512(x));
  }
  AFM_MEMBER static Halves lower(Words x) { return _mm512_cvtepi32_epi16((__m512i)x); }
  AFM_MEMBER static Halves upper(Words x) {
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(kUpper), (__m512i)x));
  }
  static constexpr bool kNarrowsPairs = false;
  AFM_MEMBER static Words join(Words lower, Words upper) {
    return (Words)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)lower, (__m512i)upper);
  }
  // As the other sets do it, with a mask an instruction less.
  AFM_MEMBER static Words rounded(Words x) {
    const __mmask16 odd = _mm512_test_epi32_mask((__m512i)x, _mm512_set1_epi32(0x10000));
    const __m512i half = (__m512i)(x + 0x7fff);
    return (Words)_mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  }
  AFM_MEMBER static __m512 from_float16(Halves x) { return _mm512_cvtph_ps(x); }
  AFM_MEMBER static Halves to_float16(__m512 x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

struct Parts {
  static constexpr int kCount = 4;
  using Part = __m128;
  AFM_MEMBER static __m512 first(Part part) { return _mm512_castps128_ps512(part); }
  template <int k>
  AFM_MEMBER static __m512 insert(__m512 x, Part part) {
    return _mm512_insertf32x4(x, part, k);
  }
  template <int k>
  AFM_MEMBER static Part extract(__m512 x) {
    return _mm512_extractf32x4_ps(x, k);
  }
};

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
