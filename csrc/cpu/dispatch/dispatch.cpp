#include "cpu/dispatch/dispatch.h"

#include <cstdlib>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace afm::cpu {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

#if defined(__x86_64__)

// The register files that the operating system saves on a context switch (XCR0): without them the
// instructions that CPUID advertises would fault, or lose their registers.
uint64_t enabled_state() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool has_all(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

Capability best_capability() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Capability::kPortable;
  if (!has_all(ecx, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C)) return Capability::kPortable;
  const uint64_t state = enabled_state();
  constexpr uint64_t kSseAvx = 0x6, kAvx512State = 0xe0;
  if (!has_all(state, kSseAvx)) return Capability::kPortable;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Capability::kPortable;
  if (!has_all(ebx, bit_AVX2 | bit_BMI | bit_BMI2)) return Capability::kPortable;
  const bool avx512 =
      has_all(ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL);
  return avx512 && has_all(state, kAvx512State) ? Capability::kAvx512 : Capability::kAvx2;
}

#else

Capability best_capability() { return Capability::kPortable; }

#endif

Capability choose_capability() {
  const Capability best = best_capability();
  const char* asked = std::getenv("AFM_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') return best;
  for (int i = 0; i < 3; ++i) {
    if (std::string(asked) != kNames[i]) continue;
    STD_TORCH_CHECK(i <= static_cast<int>(best), "AFM_CPU_CAPABILITY is ", asked,
                    ", but this machine runs no more than ", capability_name(best));
    return static_cast<Capability>(i);
  }
  STD_TORCH_CHECK(false, "AFM_CPU_CAPABILITY is '", asked, "'; allowed: portable, avx2, avx512");
}

bool forked_child = false;

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
#endif

}  // namespace

Capability capability() {
  static const Capability chosen = choose_capability();
  return chosen;
}

const char* capability_name(Capability capability) { return kNames[static_cast<int>(capability)]; }

bool in_forked_child() { return forked_child; }

}  // namespace afm::cpu
