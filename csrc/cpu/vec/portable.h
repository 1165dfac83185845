// 128-bit registers in the compiler's own vector extension: SSE2, NEON, or whatever the baseline
// has. See Note [Instruction sets] in vec.h.

#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/vec/half.h"
#include "cpu/vec/registers.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <class T>
struct Lanes128;
template <>
struct Lanes128<float> {
  typedef float Lanes __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
};
template <>
struct Lanes128<double> {
  typedef double Lanes __attribute__((vector_size(16)));
  typedef int64_t Mask __attribute__((vector_size(16)));
};

template <class T>
struct Registers {
  using Lanes = typename Lanes128<T>::Lanes;
  using Mask = typename Lanes128<T>::Mask;
  static constexpr int kLanes = sizeof(Lanes) / sizeof(T);
  AFM_MEMBER static Mask first(int n) {
    Mask m;
    for (int i = 0; i < kLanes; ++i) m[i] = i < n ? -1 : 0;
    return m;
  }
  AFM_MEMBER static Mask both(Mask a, Mask b) { return a & b; }
  AFM_MEMBER static bool any(Mask m) {
    for (int i = 0; i < kLanes; ++i)
      if (m[i]) return true;
    return false;
  }
  AFM_MEMBER static Lanes load(const T* p, int n, Lanes fill) {
    for (int i = 0; i < n; ++i) fill[i] = p[i];
    return fill;
  }
  AFM_MEMBER static void store(T* p, int n, Lanes x) {
    for (int i = 0; i < n; ++i) p[i] = x[i];
  }
  AFM_MEMBER static void stream(T* p, Lanes x) { store_register(p, x); }
  template <Order order>
  AFM_MEMBER static Mask compare(Lanes a, Lanes b) {
    if constexpr (order == kLess) return (Mask)(a < b);
    if constexpr (order == kLessEqual) return (Mask)(a <= b);
    return (Mask)(a == b);
  }
  AFM_MEMBER static Lanes select(Mask m, Lanes a, Lanes b) {
    return (Lanes)(((Mask)a & m) | ((Mask)b & ~m));
  }
  // Fused where every processor of the kind can.
  AFM_MEMBER static Lanes fma(Lanes a, Lanes b, Lanes c) {
#if defined(__aarch64__)
    if constexpr (sizeof(T) == 4)
      return (Lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    else
      return (Lanes)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
  }
  AFM_MEMBER static Lanes max(Lanes a, Lanes bound) { return a > bound ? a : bound; }
  AFM_MEMBER static Lanes min(Lanes a, Lanes bound) { return a < bound ? a : bound; }
  AFM_MEMBER static T sum(Lanes x) {
    T s = x[0];
    for (int i = 1; i < kLanes; ++i) s += x[i];
    return s;
  }
  AFM_MEMBER static T largest(Lanes x) {
    T s = x[0];
    for (int i = 1; i < kLanes; ++i) s = s > x[i] ? s : x[i];
    return s;
  }
  AFM_MEMBER static T smallest(Lanes x) {
    T s = x[0];
    for (int i = 1; i < kLanes; ++i) s = s < x[i] ? s : x[i];
    return s;
  }
  AFM_MEMBER static Lanes zip_low(Lanes a, Lanes b) {
    if constexpr (sizeof(T) == 4)
      return Lanes{a[0], b[0], a[1], b[1]};
    else
      return Lanes{a[0], b[0]};
  }
  AFM_MEMBER static Lanes zip_high(Lanes a, Lanes b) {
    if constexpr (sizeof(T) == 4)
      return Lanes{a[2], b[2], a[3], b[3]};
    else
      return Lanes{a[1], b[1]};
  }
};

struct Half {
  typedef uint16_t Halves __attribute__((vector_size(8)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  AFM_MEMBER static Halves load(const void* p, int n) { return first_halves<Halves>(p, n); }
  AFM_MEMBER static void store(void* p, int n, Halves x) { store_first_halves(p, n, x); }
  AFM_MEMBER static void stream(void* p, Halves x) { store_register(p, x); }
#if defined(__SSE2__)
  // GCC 12 takes three times as many instructions for its own conversions.
  AFM_MEMBER static Words widen(Halves x) {
    return (Words)_mm_unpacklo_epi16(as_register(x), _mm_setzero_si128());
  }
  AFM_MEMBER static Words widen_to_upper(Halves x) {
    return (Words)_mm_unpacklo_epi16(_mm_setzero_si128(), as_register(x));
  }
  AFM_MEMBER static Halves upper(Words x) { return (Halves)((Pair)upper(x, x))[0]; }
  static constexpr bool kNarrowsPairs = true;
  AFM_MEMBER static Words upper(Words x, Words y) {
    return (Words)_mm_packs_epi32(_mm_srai_epi32((__m128i)x, 16), _mm_srai_epi32((__m128i)y, 16));
  }
#else
  AFM_MEMBER static Words widen(Halves x) { return __builtin_convertvector(x, Words); }
  AFM_MEMBER static Words widen_to_upper(Halves x) { return widen(x) << 16; }
  AFM_MEMBER static Halves upper(Words x) { return __builtin_convertvector(x >> 16, Halves); }
  static constexpr bool kNarrowsPairs = false;
#endif
  AFM_MEMBER static Halves lower(Words x) { return upper(x << 16); }
  AFM_MEMBER static Words join(Words lower, Words upper) { return lower | (upper & 0xffff0000); }
  AFM_MEMBER static Words rounded(Words x) { return x + 0x7fff + ((x >> 16) & 1); }
  AFM_MEMBER static Registers<float>::Lanes from_float16(Halves x) {
    return float_of_float16<Registers<float>::Lanes>(widen(x));
  }
  AFM_MEMBER static Halves to_float16(Registers<float>::Lanes x) {
    return lower(float16_of_float<Words>(x));
  }

#if defined(__SSE2__)
 private:
  typedef long long Pair __attribute__((vector_size(16)));
  AFM_MEMBER static __m128i as_register(Halves x) { return (__m128i)Pair{(long long)x, 0}; }
#endif
};

struct Parts {
  static constexpr int kCount = 1;
  using Part = Registers<float>::Lanes;
  AFM_MEMBER static Part first(Part part) { return part; }
  template <int k>
  AFM_MEMBER static Part extract(Part x) {
    return x;
  }
};

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
