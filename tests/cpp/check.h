// What the kernels' test programs share: checks, inputs, the storage of every dtype, and the choice
// of an instruction set.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/layout/dtype.h"

namespace afm::cpu {

inline int failures = 0, checks = 0;

// What memory that nobody may write holds.
constexpr char kSentinel = static_cast<char>(0xa5);

inline void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

// A fixed sequence: the same inputs in every run.
struct Random {
  uint64_t state = 1;
  double uniform() {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<double>(state >> 11) / 9007199254740992.0;
  }
  double normal() {
    return std::sqrt(-2 * std::log(uniform() + 1e-300)) * std::cos(6.283185307179586 * uniform());
  }
};

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Conversions written a second time, and slowly, to check the kernels' own.
inline double decode(const char* p, DType dtype) {
  if (dtype == DType::kFloat64) {
    double x;
    std::memcpy(&x, p, 8);
    return x;
  }
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, p, 2);
  if (dtype == DType::kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  const double sign = h & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign *
         (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

inline void encode(double x, char* p, DType dtype) {
  const float f = static_cast<float>(x);
  if (dtype == DType::kFloat64) {
    std::memcpy(p, &x, 8);
  } else if (dtype == DType::kFloat32) {
    std::memcpy(p, &f, 4);
  } else if (dtype == DType::kBFloat16) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t h = static_cast<uint16_t>(bits >> 16);
    std::memcpy(p, &h, 2);
  } else {  // towards zero; logits need no better
    uint16_t h = std::signbit(x) ? 0x8000 : 0;
    const double m = std::fabs(x);
    if (std::isinf(m)) {
      h |= 0x7c00;
    } else if (m >= std::ldexp(1, -14)) {
      int exponent;
      const double fraction = std::frexp(m, &exponent);
      h |= static_cast<uint16_t>(((exponent + 14) << 10) +
                                 static_cast<int>((fraction * 2 - 1) * 1024));
    }
    std::memcpy(p, &h, 2);
  }
}

// Scratch of exactly so many bytes, 64-byte aligned as the kernels are promised.
struct ScratchBlock {
  explicit ScratchBlock(int64_t bytes) {
    if (posix_memalign(&data, 64, static_cast<size_t>(bytes)) != 0) std::abort();
  }
  ~ScratchBlock() { std::free(data); }
  ScratchBlock(const ScratchBlock&) = delete;
  ScratchBlock& operator=(const ScratchBlock&) = delete;
  void* data = nullptr;
};

inline int report(const std::string& capability) {
  std::printf("%s: %d checks, %d failures\n", capability.c_str(), checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace afm::cpu

// The body of main: TEST(KERNELS_OF(capability)) for the one that the command line names, or 77
// where this machine has it not.
#if defined(__x86_64__)
#define AFM_RUN_X86(NAME, SUPPORTED, TEST, KERNELS_OF) \
  if (capability == #NAME && (SUPPORTED)) {            \
    TEST(KERNELS_OF(NAME));                            \
    return report(capability);                         \
  }
#else
#define AFM_RUN_X86(NAME, SUPPORTED, TEST, KERNELS_OF)
#endif
#define AFM_RUN_CAPABILITY(ARGC, ARGV, TEST, KERNELS_OF)                                        \
  const std::string capability = (ARGC) > 1 ? (ARGV)[1] : "portable";                           \
  if (capability == "portable") {                                                               \
    TEST(KERNELS_OF(portable));                                                                 \
    return report(capability);                                                                  \
  }                                                                                             \
  AFM_RUN_X86(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), TEST,      \
              KERNELS_OF)                                                                       \
  AFM_RUN_X86(avx512, __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"), \
              TEST, KERNELS_OF)                                                                 \
  std::printf("this machine does not run %s\n", capability.c_str());                            \
  return 77;
