// Auto-PGD's step of one image: what its kernel unit and its operator share. See Note [APGD step]
// in afm_kernels/reference/apgd_step.py.

#pragma once

#include <stdint.h>

#include "cpu/dispatch/kernel.h"
#include "cpu/layout/rows.h"

namespace afm::cpu {

struct ApgdParams {
  DType dtype;  // of the points
  DType grad_dtype;
  double eps;
  double clip_min;
  double clip_max;
  double carried;  // share of the last movement in this one
};

// Dense, all in one order.
struct ApgdImage {
  const void* at;    // the point that is left
  const void* grad;  // its gradient
  const void* x;
  void* old;  // where that point came from; the next one is written here
  double step_size;
};

// Elements [begin, end).
AFM_DECLARE_KERNEL(void, apgd_linf,
                   (const ApgdParams& params, const ApgdImage& image, int64_t begin, int64_t end))

// The whole image, of so many elements.
AFM_DECLARE_KERNEL(void, apgd_l2, (const ApgdParams& params, const ApgdImage& image, int64_t count))

}  // namespace afm::cpu
