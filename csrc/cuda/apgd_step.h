// Auto-PGD's step; see Note [APGD step] in afm_kernels/reference/apgd_step.py.

#pragma once

#include <cstdint>

#include "cuda/elementwise.h"

namespace afm::cuda {

struct ApgdProblem {
  // All in the same dense memory order, images one behind the other.
  FlatView x_adv, x_old, x_best, grad_best, x_hit, grad, x;
  void* numbers = nullptr;    // 4 by images, as `loss` float64 where `exact`, else float32
  int32_t* counts = nullptr;  // 3 by images
  const void* loss = nullptr;
  const bool* misclassified = nullptr;
  int64_t images = 0;
  int64_t sample = 0;  // elements of an image
  bool exact = false;  // some tensor is float64
  double eps = 0, carried = 0, decrease = 0;
  int64_t window = 0;
  bool first = false;
  bool has_min = false, has_max = false;
  double clip_min = 0, clip_max = 0;
};

void launch_apgd_linf(const ApgdProblem& problem, void* stream);
void launch_apgd_l2(const ApgdProblem& problem, void* stream);

}  // namespace afm::cuda
