// Elementwise kernels see their operands as short blocks of the compute type (float or double): a
// block of that type and unit stride is used where it lies, any other is converted through a
// scratch buffer that stays in the first-level cache. So a kernel is one loop over float or double,
// whatever the dtypes and strides. For kernel units.
//
// Note [bfloat16 as it lies]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~
// On the way through a scratch buffer every element is loaded and stored once more. For bfloat16
// that took as long as the arithmetic wherever the images lie in a cache. Its conversions are a few
// integer operations, which the compiler vectorises with the loop itself: to_float on what is read,
// from_float on what is written. So loops are written with those, and where all operands are
// bfloat16 without gaps they run on the tensors.

#pragma once

#include <stdint.h>
#include <string.h>

#if AFM_CAPABILITY_AVX2 || AFM_CAPABILITY_AVX512
#include <immintrin.h>
#endif

#include "common/inline.h"
#include "cpu/strided_loop.h"

// The arrays of a loop do not overlap, or coincide: x_adv and out of an in-place step.
#define AFM_INDEPENDENT _Pragma("GCC ivdep")

namespace afm::cpu {

namespace {

constexpr int kBlock = 512;  // elements: four operands of it in double are 16 KiB

template <class T>
AFM_INLINE T from_bits32(uint32_t bits) {
  T value;
  static_assert(sizeof(value) == sizeof(bits));
  memcpy(&value, &bits, sizeof(value));
  return value;
}

AFM_INLINE uint32_t to_bits32(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

AFM_INLINE float to_float(BFloat16 value) {
  return from_bits32<float>(static_cast<uint32_t>(value.bits) << 16);
}

// Exponent and mantissa are shifted into place; a multiplication by 2^112 then corrects the
// exponent's bias and normalises subnormals. Infinities and NaNs get the exponent they had lost.
AFM_INLINE float to_float(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const float scaled = from_bits32<float>(magnitude << 13) * from_bits32<float>(0x77800000u);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return from_bits32<float>(to_bits32(scaled) | special | sign);
}

// Both round to nearest, ties to even.
AFM_INLINE void from_float(float value, BFloat16* out) {
  const uint32_t bits = to_bits32(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

AFM_INLINE void from_float(float value, Half* out) {
  const uint32_t bits = to_bits32(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: next to 0.5, floats are spaced as subnormal halves are.
  const uint32_t subnormal = to_bits32(from_bits32<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  out->bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

AFM_INLINE float to_float(float value) { return value; }
AFM_INLINE double to_float(double value) { return value; }
AFM_INLINE void from_float(float value, float* out) { *out = value; }
AFM_INLINE void from_float(double value, double* out) { *out = value; }
AFM_INLINE void from_float(double value, float* out) { *out = static_cast<float>(value); }
AFM_INLINE void from_float(double value, Half* out) { from_float(static_cast<float>(value), out); }
AFM_INLINE void from_float(double value, BFloat16* out) {
  from_float(static_cast<float>(value), out);
}

template <class T, class C>
AFM_INLINE void read(const T* source, int64_t stride, int n, C* target) {
  if (stride == 1) {
    AFM_INDEPENDENT
    for (int i = 0; i < n; ++i) target[i] = static_cast<C>(to_float(source[i]));
  } else {
    for (int i = 0; i < n; ++i) target[i] = static_cast<C>(to_float(source[i * stride]));
  }
}

template <class T, class C>
AFM_INLINE void write(const C* source, int64_t stride, int n, T* target) {
  if (stride == 1) {
    AFM_INDEPENDENT
    for (int i = 0; i < n; ++i) from_float(source[i], target + i);
  } else {
    for (int i = 0; i < n; ++i) from_float(source[i], target + i * stride);
  }
}

#if AFM_CAPABILITY_AVX512

AFM_INLINE void read(const Half* source, int64_t stride, int n, float* target) {
  int i = 0;
  for (; stride == 1 && i + 16 <= n; i += 16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
    _mm512_storeu_ps(target + i, _mm512_cvtph_ps(halves));
  }
  for (; i < n; ++i) target[i] = to_float(source[i * stride]);
}

AFM_INLINE void write(const float* source, int64_t stride, int n, Half* target) {
  int i = 0;
  for (; stride == 1 && i + 16 <= n; i += 16) {
    const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), halves);
  }
  for (; i < n; ++i) from_float(source[i], target + i * stride);
}

#elif AFM_CAPABILITY_AVX2

AFM_INLINE void read(const Half* source, int64_t stride, int n, float* target) {
  int i = 0;
  for (; stride == 1 && i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(halves));
  }
  for (; i < n; ++i) target[i] = to_float(source[i * stride]);
}

AFM_INLINE void write(const float* source, int64_t stride, int n, Half* target) {
  int i = 0;
  for (; stride == 1 && i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), halves);
  }
  for (; i < n; ++i) from_float(source[i], target + i * stride);
}

#endif

// An operand: base + offset is the first element of a run of this stride, both in elements.
struct Source {
  const void* base;
  DType dtype;
};

struct Target {
  void* base;
  DType dtype;
};

template <class C>
AFM_INLINE constexpr DType compute_dtype() {
  return sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32;
}

// n elements (n <= kBlock) as compute type: where they lie, or in scratch.
template <class C>
AFM_INLINE const C* load_block(Source source, int64_t offset, int64_t stride, int n, C* scratch) {
  if (source.dtype == compute_dtype<C>() && stride == 1)
    return static_cast<const C*>(source.base) + offset;
  switch (source.dtype) {
    case DType::kFloat64:
      read(static_cast<const double*>(source.base) + offset, stride, n, scratch);
      break;
    case DType::kFloat32:
      read(static_cast<const float*>(source.base) + offset, stride, n, scratch);
      break;
    case DType::kFloat16:
      read(static_cast<const Half*>(source.base) + offset, stride, n, scratch);
      break;
    case DType::kBFloat16:
      read(static_cast<const BFloat16*>(source.base) + offset, stride, n, scratch);
      break;
  }
  return scratch;
}

// Where a kernel puts n elements: in the output itself, or in scratch, which store_block then
// converts.
template <class C>
AFM_INLINE C* place_block(Target target, int64_t offset, int64_t stride, C* scratch) {
  return target.dtype == compute_dtype<C>() && stride == 1 ? static_cast<C*>(target.base) + offset
                                                           : scratch;
}

template <class C>
AFM_INLINE void store_block(Target target, int64_t offset, int64_t stride, int n, const C* block,
                            const C* scratch) {
  if (block != scratch) return;
  switch (target.dtype) {
    case DType::kFloat64:
      write(scratch, stride, n, static_cast<double*>(target.base) + offset);
      break;
    case DType::kFloat32:
      write(scratch, stride, n, static_cast<float*>(target.base) + offset);
      break;
    case DType::kFloat16:
      write(scratch, stride, n, static_cast<Half*>(target.base) + offset);
      break;
    case DType::kBFloat16:
      write(scratch, stride, n, static_cast<BFloat16*>(target.base) + offset);
      break;
  }
}

}  // namespace

}  // namespace afm::cpu
