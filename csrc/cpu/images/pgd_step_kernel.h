// The projected gradient step: what its kernel units and its operators share. See Note [PGD step]
// in afm_kernels/reference/pgd_step.py.

#pragma once

#include <stdint.h>

#include "cpu/dispatch/kernel.h"
#include "cpu/layout/strided_loop.h"

namespace afm::cpu {

struct PgdParams {
  enum Operand { kOut, kXAdv, kGrad, kX, kOperands };

  void* out;
  const void* x_adv;  // null at the start of an attack: x itself
  const void* grad;   // or the noise of the start
  const void* x;
  DType dtype;  // of out, x_adv and x
  DType grad_dtype;
  StridedLoop<kOperands> loop;  // linf: the whole tensor; l2: one sample
  double step_size;             // or noise_scale
  double eps;
  double clip_min;
  double clip_max;
  bool stream;  // `out` is too large to be worth keeping in the caches, and no other operand
};

// What l2 has to know of a sample, with d = x_adv - x and g = grad * grad_scale.
//
// Note [Sums of an l2 step]
// ~~~~~~~~~~~~~~~~~~~~~~~~~
// Squares of small gradients vanish in float, and sums of many thousands of them lose digits; in
// double they took as long as the rest of a step of 16-bit images. So squares are summed in float a
// few dozen at a time, and those sums in double, which is as exact as a float result needs. Where
// it turns out not to be (L2Step::hold), sums are taken again in double, and where that is too
// narrow in turn, as for some float64 gradients, with the gradient scaled by a power of two.
struct PgdSums {
  double gg;
  double dg;
  double dd;
};

// Elements [begin, end) of the loop.
AFM_DECLARE_KERNEL(void, pgd_linf, (const PgdParams& params, int64_t begin, int64_t end))

// Elements [begin, end) of the sample whose first element lies at these offsets. The result depends
// on nothing else, so that sums over fixed ranges do not depend on the number of threads.
AFM_DECLARE_KERNEL(PgdSums, pgd_l2_sums,
                   (const PgdParams& params, const int64_t* sample_offsets, int64_t begin,
                    int64_t end))
AFM_DECLARE_KERNEL(PgdSums, pgd_l2_double_sums,
                   (const PgdParams& params, const int64_t* sample_offsets, int64_t begin,
                    int64_t end, double grad_scale))

// x + (x_adv + along * (grad * grad_scale) - x) * shrink, clipped; without the detour over x where
// shrink is 1.
AFM_DECLARE_KERNEL(void, pgd_l2_apply,
                   (const PgdParams& params, const int64_t* sample_offsets, int64_t begin,
                    int64_t end, double along, double grad_scale, double shrink))

// The largest |grad| of the elements, NaN if one of them is.
AFM_DECLARE_KERNEL(double, pgd_grad_max,
                   (const PgdParams& params, const int64_t* sample_offsets, int64_t begin,
                    int64_t end))

}  // namespace afm::cpu
