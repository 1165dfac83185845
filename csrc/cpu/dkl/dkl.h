// The decoupled KL kernel: what a call hands to its workers.
//
//     alpha CE(softmax(t / T), s / T) + beta / 4 sum_jk w_j w_k ((t_j - t_k) - (s_j - s_k))^2
//
// Note [Decoupled KL in O(C)]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~
// With d = t - s, W = sum of w and mu = sum of w d / W, the double sum is beta / 2 * W * sum of w
// (d - mu)^2, and its gradient beta W w (d - mu) by t, minus that by s. ((sum of w)(sum of w d^2) -
// (sum of w d)^2 is the same number, but has lost every digit in float32 by d = 1e-4.) Weights are
// softmax(t / weight_temperature), or given; they and the probabilities of the first term are
// constants to the gradients.
//
// Hard rows: as KL. A class of weight 0, or at -inf on both sides, has no part in the second term;
// a class of positive weight at -inf on one side makes the row +inf and its gradients NaN.

#pragma once

#include "cpu/dispatch/kernel.h"
#include "cpu/layout/rows.h"

namespace afm::cpu {

constexpr int kDklRowStats = 8;

struct DklParams {
  RowShape shape;
  int64_t classes = 0;
  RowsOf student, teacher;
  RowsOf class_weight;  // accumulation type; absent: softmax(teacher / weight_temperature)
  RowsOf grad_student, grad_teacher;  // absent where not wanted

  double temperature = 1, weight_temperature = 1;
  double alpha = 1, beta = 1;  // a term of factor 0 is not looked at
  double scale = 1;
  bool symmetric = false;  // whether the second term's gradient reaches the student

  const void* row_weight = nullptr;  // accumulation type, one a row
  const void* grad_loss =
      nullptr;  // accumulation type; grad_loss_stride 0: one for all, 1: one a row
  int64_t grad_loss_stride = 0;

  double* row_values = nullptr;  // out: weighted loss of each row
  void* row_stats = nullptr;     // out of a forward, into a backward; accumulation type
  bool stats_are_given = false;  // a backward
};

// Scratch memory that one worker needs, in elements of the accumulation type, 64-byte aligned: five
// tiles; and a block for each tensor, or the tiles and the stage of short rows, of up to 64 rows.
constexpr int64_t dkl_block_scratch(int64_t classes) {
  return classes <= kLaneClasses ? 7 * 64 * classes : block_scratch(classes, 5);
}
constexpr int64_t dkl_scratch(int64_t classes) { return 5 * kTile + dkl_block_scratch(classes); }

AFM_DECLARE_KERNEL(void, dkl_rows_float,
                   (const DklParams& params, int64_t begin, int64_t end, void* scratch))
AFM_DECLARE_KERNEL(void, dkl_rows_double,
                   (const DklParams& params, int64_t begin, int64_t end, void* scratch))

}  // namespace afm::cpu
