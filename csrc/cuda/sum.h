// A deterministic sum; see Note [Summed losses].

#pragma once

#include <cstdint>

namespace afm::cuda {

constexpr int kSumThreads = 512;

struct SumProblem {
  const void* values;
  int64_t count;
  void* sum;
};

// Values and sum are float32, or float64.
void launch_sum(bool float64, const SumProblem& problem, void* stream);

}  // namespace afm::cuda
