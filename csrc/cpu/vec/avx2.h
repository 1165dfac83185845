// AVX2 with FMA and F16C. See Note [Instruction sets] in vec.h.

#pragma once

#include <immintrin.h>

#include "cpu/vec/registers.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

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
#define AFM_AVX2_REGISTERS(T, Register, suffix, kFirst)                                \
  template <>                                                                          \
  struct Registers<T> {                                                                \
    AFM_X86_REGISTER(T, Register, _mm256, suffix)                                      \
    using Mask = Register;                                                             \
    AFM_MEMBER static __m256i bits(int n) {                                            \
      return load_register<__m256i>(kFirst + sizeof(Register) / sizeof(T) - n);        \
    }                                                                                  \
    AFM_MEMBER static Mask first(int n) { return _mm256_castsi256_##suffix(bits(n)); } \
    AFM_MEMBER static Mask both(Mask a, Mask b) { return _mm256_and_##suffix(a, b); }  \
    AFM_MEMBER static bool any(Mask m) { return _mm256_movemask_##suffix(m) != 0; }    \
    AFM_MEMBER static Lanes load(const T* p, int n, Lanes fill) {                      \
      return select(first(n), _mm256_maskload_##suffix(p, bits(n)), fill);             \
    }                                                                                  \
    AFM_MEMBER static void store(T* p, int n, Lanes x) {                               \
      _mm256_maskstore_##suffix(p, bits(n), x);                                        \
    }                                                                                  \
    template <Order order>                                                             \
    AFM_MEMBER static Mask compare(Lanes a, Lanes b) {                                 \
      return _mm256_cmp_##suffix(a, b, kX86Order[order]);                              \
    }                                                                                  \
    AFM_MEMBER static Lanes select(Mask m, Lanes a, Lanes b) {                         \
      return _mm256_blendv_##suffix(b, a, m);                                          \
    }                                                                                  \
    AFM_MEMBER static T sum(Lanes x) {                                                 \
      return reduce(x, [](auto a, auto b) { return _mm_add_##suffix(a, b); });         \
    }                                                                                  \
    AFM_MEMBER static T largest(Lanes x) {                                             \
      return reduce(x, [](auto a, auto b) { return _mm_max_##suffix(a, b); });         \
    }                                                                                  \
    AFM_MEMBER static T smallest(Lanes x) {                                            \
      return reduce(x, [](auto a, auto b) { return _mm_min_##suffix(a, b); });         \
    }                                                                                  \
  };

AFM_AVX2_REGISTERS(float, __m256, ps, kFirst32)
AFM_AVX2_REGISTERS(double, __m256d, pd, kFirst64)
#undef AFM_AVX2_REGISTERS

// In each lane, the entry of a table that the low bits of `index` say.
AFM_INLINE __m256 pick(const uint32_t (&table)[8], __m256 index) {
  const __m256i entries = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
  return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(entries, _mm256_castps_si256(index)));
}

// Both halves of the vector see all eight numbers, which costs a load and nothing else, and each
// takes its four.
alignas(32) constexpr int8_t kToUpper[32] = {-1, -1, 0,  1,  -1, -1, 2,  3,  -1, -1, 4,
                                             5,  -1, -1, 6,  7,  -1, -1, 8,  9,  -1, -1,
                                             10, 11, -1, -1, 12, 13, -1, -1, 14, 15};

struct Half {
  using Halves = __m128i;
  typedef uint32_t Words __attribute__((vector_size(32)));
  AFM_MEMBER static Halves load(const void* p, int n) { return first_halves<Halves>(p, n); }
  AFM_MEMBER static void store(void* p, int n, Halves x) { store_first_halves(p, n, x); }
  AFM_MEMBER static void stream(void* p, Halves x) {
    _mm_stream_si128(static_cast<__m128i*>(p), x);
  }
  AFM_MEMBER static Words widen(Halves x) { return (Words)_mm256_cvtepu16_epi32(x); }
  AFM_MEMBER static Words widen_to_upper(Halves x) {
    return (Words)_mm256_shuffle_epi8(
        _mm256_broadcastsi128_si256(x),
        _mm256_load_si256(reinterpret_cast<const __m256i*>(kToUpper)));
  }
  AFM_MEMBER static Halves lower(Words x) { return narrow(x & 0xffff); }
  AFM_MEMBER static Halves upper(Words x) { return narrow(x >> 16); }
  static constexpr bool kNarrowsPairs = true;
  AFM_MEMBER static Words upper(Words x, Words y) {
    const __m256i mixed = _mm256_packus_epi32(shifted(x), shifted(y));
    return (Words)_mm256_permute4x64_epi64(mixed, 0xd8);
  }
  AFM_MEMBER static Words join(Words lower, Words upper) {
    return (Words)_mm256_blend_epi16((__m256i)lower, (__m256i)upper, 0xaa);
  }
  AFM_MEMBER static Words rounded(Words x) {
    const __m256i odd = _mm256_and_si256(shifted(x), _mm256_set1_epi32(1));
    return (Words)_mm256_add_epi32(_mm256_add_epi32((__m256i)x, _mm256_set1_epi32(0x7fff)), odd);
  }
  AFM_MEMBER static __m256 from_float16(Halves x) { return _mm256_cvtph_ps(x); }
  AFM_MEMBER static Halves to_float16(__m256 x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

 private:
  // Where the compiler sees the shift, gradients in bfloat16 take 2 % more instructions: GCC 12
  // then has other constants than these wait in memory.
  AFM_MEMBER static __m256i shifted(Words x) { return _mm256_srli_epi32((__m256i)x, 16); }
  // Of numbers below 2^16.
  AFM_MEMBER static Halves narrow(Words x) {
    return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x),
                            _mm256_extracti128_si256((__m256i)x, 1));
  }
};

struct Parts {
  static constexpr int kCount = 2;
  using Part = __m128;
  AFM_MEMBER static __m256 first(Part part) { return _mm256_castps128_ps256(part); }
  template <int k>
  AFM_MEMBER static __m256 insert(__m256 x, Part part) {
    return _mm256_insertf128_ps(x, part, k);
  }
  template <int k>
  AFM_MEMBER static Part extract(__m256 x) {
    return _mm256_extractf128_ps(x, k);
  }
};

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
