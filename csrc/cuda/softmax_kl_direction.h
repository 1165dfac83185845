// The direction of KL's gradients on a GPU: what the operator asks of the kernel.

#pragma once

#include <cstdint>

#include "cuda/tensors.h"

namespace afm::cuda {

struct DirectionProblem {
  RowsView student, teacher;
  RowsView grad_student, grad_teacher;  // absent where not asked for
  void* log_scale = nullptr;            // accumulation dtype, one a row

  int64_t rows = 0;
  int classes = 0;
  int row_dims = 1;
  int64_t row_sizes[kMaxRowDims] = {0, 0, 0, 0};
  double temperature = 1;
};

// Threads that share a row: a warp, or for more classes than this a block.
constexpr int kDirectionWarpClasses = 1024;
constexpr int kDirectionThreads = 256;

void launch_softmax_kl_direction(bool exact, const DirectionProblem& problem, void* stream);

}  // namespace afm::cuda
