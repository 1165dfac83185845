// float16 and bfloat16 in plain code, for kernel units: what the vectors' own instructions do not
// cover.

#pragma once

#include <stdint.h>
#include <string.h>

#include "common/inline.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <class To, class From>
AFM_INLINE To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

AFM_INLINE float from_bfloat16(uint16_t half) {
  return reinterpret<float>(static_cast<uint32_t>(half) << 16);
}

// To nearest, ties to even. NaN becomes the quiet one.
AFM_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = reinterpret<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// For a number, or the lanes of a vector: a float16 in the low bits of an unsigned 32-bit integer,
// and a float32.
template <class Float, class Bits>
AFM_INLINE Float float_of_float16(Bits half) {
  const Bits sign = (half & 0x8000) << 16, magnitude = (half & 0x7fff) << 13;
  // 2^112 moves float16's exponents, subnormal ones too, to where float32 keeps them.
  const Bits finite = reinterpret<Bits>(reinterpret<Float>(magnitude) * 0x1p112f);
  return reinterpret<Float>((magnitude >= 0x0f800000 ? magnitude + 0x70000000 : finite) | sign);
}

// To nearest, ties to even.
template <class Bits, class Float>
AFM_INLINE Bits float16_of_float(Float x) {
  const Bits bits = reinterpret<Bits>(x), magnitude = bits & 0x7fffffff;
  // Normal: round in the integer. Subnormal: adding 1/2 makes the adder round at 2^-24, float16's
  // last place.
  const Bits normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Bits subnormal = reinterpret<Bits>(reinterpret<Float>(magnitude) + 0.5f) - 0x3f000000;
  Bits half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : half;  // rounds to 65536 or more
  half = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : half;
  return half | ((bits >> 16) & 0x8000);
}

AFM_INLINE float from_float16(uint16_t half) {
  return float_of_float16<float>(static_cast<uint32_t>(half));
}
AFM_INLINE uint16_t to_float16(float x) {
  return static_cast<uint16_t>(float16_of_float<uint32_t>(x));
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
