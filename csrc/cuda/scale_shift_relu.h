// relu(x * scale[c] + shift[c] + residual) and its gradients.

#pragma once

#include <cstdint>

#include "cuda/elementwise.h"

namespace afm::cuda {

struct ScaleShiftReluProblem {
  // All tensors in the same dense memory order, in which the channel of element i is
  // (i / channel_stride) % channels: 1 for channels-last, height x width else.
  FlatView x, residual, out;                            // forward
  FlatView grad_output, output, grad_x, grad_residual;  // backward
  FlatView scale, shift;
  int64_t count = 0;
  int64_t channels = 0, channel_stride = 0;
  bool exact = false;  // some tensor is float64
};

void launch_scale_shift_relu_forward(const ScaleShiftReluProblem& problem, void* stream);
void launch_scale_shift_relu_backward(const ScaleShiftReluProblem& problem, void* stream);

}  // namespace afm::cuda
