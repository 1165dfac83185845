// Which instruction set serves this process, and the thread pool: what every CPU op is built on.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "cpu/dispatch/kernel.h"

namespace afm::cpu {

// In ascending order; names as in setup.py.
enum class Capability : int { kPortable, kAvx2, kAvx512 };

// The best this processor and operating system run, or what AFM_CPU_CAPABILITY asks for; decided at
// the first call. Throws where AFM_CPU_CAPABILITY names something unknown or beyond the machine.
Capability capability();
const char* capability_name(Capability capability);

template <class Function>
Function* select(Function* portable, [[maybe_unused]] Function* avx2 = nullptr,
                 [[maybe_unused]] Function* avx512 = nullptr) {
  switch (capability()) {
    case Capability::kAvx512:
      return avx512;
    case Capability::kAvx2:
      return avx2;
    default:
      return portable;
  }
}

// Whether this process was forked from one that had this module loaded. See Note [Threads and
// fork].
bool in_forked_child();

// Threads that parallel_for may use: 1 in a forked child.
inline int64_t num_threads() { return in_forked_child() ? 1 : torch::stable::get_num_threads(); }

// Note [Threads and fork]
// ~~~~~~~~~~~~~~~~~~~~~~~
// Work runs on PyTorch's own pool, so torch.set_num_threads governs it. A forked child inherits the
// pool's locks but not its threads, and would wait for them for ever; it runs everything serially.
//
// Calls f(first, last) on ranges that cover [begin, end), none shorter than grain but the last.
// Ranges depend on the number of threads: where a result must not, f has to be independent for each
// index.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= grain || in_forked_child()) {
    f(begin, end);
  } else {
    torch::stable::parallel_for(begin, end, grain, f);
  }
}

// Whether results of so many bytes are better stored past the caches: a store that goes through
// them reads its line first, and most of what is written has left them again before anyone looks.
// From 8 MiB on that pays, whoever reads the results next (measured with 32 MiB of cache).
constexpr bool outgrows_caches(int64_t bytes) { return bytes > 8 << 20; }

}  // namespace afm::cpu
