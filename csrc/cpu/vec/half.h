// float16 and bfloat16 in plain code, for kernel units: what the vectors' own instructions do not
// cover.

#pragma once

#include <stdint.h>
#include <string.h>

#include "common/inline.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

AFM_INLINE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

AFM_INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

AFM_INLINE float from_bfloat16(uint16_t half) {
  return float_of_bits(static_cast<uint32_t>(half) << 16);
}

// To nearest, ties to even. NaN becomes the quiet one.
AFM_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

AFM_INLINE float from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  // 2^112 moves float16's exponents, subnormal ones too, to where float32 keeps them.
  const float finite = float_of_bits(magnitude) * 0x1p112f;
  const float value = magnitude >= 0x0f800000 ? float_of_bits(magnitude + 0x70000000) : finite;
  return float_of_bits(bits_of_float(value) | sign);
}

// To nearest, ties to even.
AFM_INLINE uint16_t to_float16(float x) {
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffff;
  const uint32_t sign = (bits >> 16) & 0x8000;
  // Normal: round in the integer. Subnormal: adding 1/2 makes the adder round at 2^-24, float16's
  // last place.
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // rounds to 65536 or more
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return static_cast<uint16_t>(half | sign);
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
