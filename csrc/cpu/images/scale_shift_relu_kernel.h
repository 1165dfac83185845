// relu(x * scale[c] + shift[c] + residual): what its kernel units and its operators share.
//
// Note [Channels of a run]
// ~~~~~~~~~~~~~~~~~~~~~~~~
// Along a run (for_each_run) the channel stands still, as in contiguous (N, C, H, W), or counts up,
// as in channels-last. There a run would be one pixel, C elements, which may be few: where the
// operands are dense, the loop is one single run instead, and scale and shift are read modulo a
// period, a multiple of C long enough for a block.

#pragma once

#include <stdint.h>

#include "cpu/dispatch/kernel.h"
#include "cpu/layout/strided_loop.h"

namespace afm::cpu {

struct ScaleShiftReluParams {
  enum Operand { kOut, kX, kResidual, kChannel, kOperands };

  void* out;
  const void* x;
  const void* residual;  // or null
  DType dtype;           // of out and x
  DType residual_dtype;
  const void* scale;  // `period` elements of double if compute_double, else of float; shift too
  const void* shift;
  int64_t period;
  bool compute_double;
  bool stream;  // what is written is too large to be worth keeping in the caches
  // kChannel counts channels: stride 1 along dimension 1 of the tensors, 0 along the others
  StridedLoop<kOperands> loop;
};

struct ScaleShiftReluBackwardParams {
  enum Operand {
    kGradient,
    kOutput,
    kGradOutput,
    kChannel,
    kOperands
  };  // both gradients lie alike

  const void* output;
  const void* grad_output;
  void* grad_x;         // or null
  void* grad_residual;  // or null
  DType dtype;          // of output and both gradients
  DType grad_output_dtype;
  const void* scale;
  int64_t period;
  bool compute_double;
  bool stream;  // what is written is too large to be worth keeping in the caches
  StridedLoop<kOperands> loop;
};

// Elements [begin, end) of the loop.
AFM_DECLARE_KERNEL(void, scale_shift_relu_forward,
                   (const ScaleShiftReluParams& params, int64_t begin, int64_t end))
AFM_DECLARE_KERNEL(void, scale_shift_relu_backward,
                   (const ScaleShiftReluBackwardParams& params, int64_t begin, int64_t end))

// n elements as double.
AFM_DECLARE_KERNEL(void, read_vector,
                   (const void* source, DType dtype, int64_t stride, int64_t n, double* target))

}  // namespace afm::cpu
