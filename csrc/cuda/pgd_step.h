// One projected gradient step, and the start of an attack; see Note [PGD step] in
// afm_kernels/reference/pgd_step.py.

#pragma once

#include <cstdint>

#include "cuda/elementwise.h"

namespace afm::cuda {

struct PgdProblem {
  // All in the same dense memory order, samples one behind the other.
  FlatView x_adv, direction, x, out;  // direction: the gradient, or the noise of a start
  int64_t count = 0;                  // elements
  int64_t sample = 0;                 // elements of a sample
  bool start = false;                 // the direction is taken as it is
  bool exact = false;                 // some tensor is float64
  double step_size = 0, eps = 0;
  bool has_min = false, has_max = false;
  double clip_min = 0, clip_max = 0;
};

void launch_pgd_linf(const PgdProblem& problem, void* stream);
void launch_pgd_l2(const PgdProblem& problem, void* stream);

}  // namespace afm::cuda
