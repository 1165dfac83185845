// What the registers of every instruction set have in common; avx512.h, avx2.h and portable.h fill
// in the rest. See Note [Instruction sets] in vec.h.

#pragma once

#include <stdint.h>
#include <string.h>

#if AFM_CAPABILITY_AVX512 || AFM_CAPABILITY_AVX2
#include <immintrin.h>
#endif

#include "common/inline.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// What an instruction set does with a register of float or double, and with its lanes.
template <class T>
struct Registers;

enum Order { kLess, kLessEqual, kEqual };

// A register from memory of any alignment, and back.
template <class Register>
struct __attribute__((packed, may_alias)) Unaligned {
  Register value;
};
template <class Register>
AFM_INLINE Register load_register(const void* p) {
  return static_cast<const Unaligned<Register>*>(p)->value;
}
template <class Register>
AFM_INLINE void store_register(void* p, Register x) {
  static_cast<Unaligned<Register>*>(p)->value = x;
}

// The first n numbers of a register of 16-bit ones, where no instruction moves so many.
template <class Halves>
AFM_INLINE Halves first_halves(const void* p, int n) {
  Halves x{};
  memcpy(&x, p, static_cast<size_t>(n) * 2);
  return x;
}
template <class Halves>
AFM_INLINE void store_first_halves(void* p, int n, Halves x) {
  memcpy(p, &x, static_cast<size_t>(n) * 2);
}

// What x86 calls by one name at every size. Its max and min give the second of two numbers where
// one is NaN.
#if AFM_CAPABILITY_AVX512 || AFM_CAPABILITY_AVX2
constexpr int kX86Order[] = {_CMP_LT_OQ, _CMP_LE_OQ, _CMP_EQ_OQ};
#define AFM_X86_REGISTER(T, Register, prefix, suffix)                                            \
  using Lanes = Register;                                                                        \
  AFM_MEMBER static Lanes fma(Lanes a, Lanes b, Lanes c) {                                       \
    return prefix##_fmadd_##suffix(a, b, c);                                                     \
  }                                                                                              \
  AFM_MEMBER static Lanes max(Lanes a, Lanes bound) { return prefix##_max_##suffix(a, bound); }  \
  AFM_MEMBER static Lanes min(Lanes a, Lanes bound) { return prefix##_min_##suffix(a, bound); }  \
  AFM_MEMBER static void stream(T* p, Lanes x) { prefix##_stream_##suffix(p, x); }               \
  AFM_MEMBER static Lanes zip_low(Lanes a, Lanes b) { return prefix##_unpacklo_##suffix(a, b); } \
  AFM_MEMBER static Lanes zip_high(Lanes a, Lanes b) { return prefix##_unpackhi_##suffix(a, b); }
#endif

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
