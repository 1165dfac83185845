// The projected gradient step: what its kernel units and its operators share. See Note [PGD step]
// in afm_kernels/reference/pgd_step.py.

#pragma once

#include <stdint.h>

#include "cpu/kernel.h"
#include "cpu/strided_loop.h"

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
};

// What l2 has to know of a sample, with d = x_adv - x and g = grad * grad_scale.
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
