// The softmax_kl and distillation kernels: what a call hands to its workers. See
// common/softmax_kl_math.h.

#pragma once

#include "common/softmax_kl_math.h"
#include "cpu/dispatch/kernel.h"
#include "cpu/layout/rows.h"

namespace afm::cpu {

// What a worker leaves for the backward of one row, kRowStats numbers of the accumulation type.
enum RowStat : int {
  kStatKind,          // RowKind; where the teacher is certain of a class, and kPeakKind times one
                      // more than the number of the class's group
  kStatStudentShift,  // the numbers of RowSummary, of such rows around the peak's x
  kStatTeacherShift,
  kStatStudent,  // student_sum; in near rows `a`
  kStatTeacherSum,
  kStatCentre,
  kStatMean,
  kStatLast,  // Jeffreys: student_mean; distillation: log-sum-exp of the student less its shift
};
constexpr int kRowStats = 8;
constexpr int64_t kPeakKind = 8;     // more than any RowKind
constexpr int64_t kPeakGroup = 256;  // classes; their number is exact in float up to 2^29 classes

struct CrossEntropyParams {
  const int64_t* labels = nullptr;  // null: no cross-entropy
  int64_t ignore_index = -100;
  double weight =
      0;  // of the cross-entropy; that of the divergence is SoftmaxKlParams::divergence_weight
  double label_smoothing = 0;
};

// Pointers that are null are absent. "Accumulation type": float, or double where either side is
// float64.
struct SoftmaxKlParams {
  RowShape shape;
  int64_t classes = 0;
  RowsOf student, teacher;
  RowsOf grad_student, grad_teacher;  // absent where not wanted

  Divergence divergence = Divergence::kKl;  // kReverseKl: the caller exchanges the sides instead
  double beta = 0.5, gamma = 0.5;  // JS: weights of p and q. The caller exchanges the sides so that
                                   // beta is no less than gamma
  double temperature = 1;
  double scale = 1;
  double divergence_weight = 1;  // 0: the term is not looked at
  CrossEntropyParams cross_entropy;

  const void* row_weight = nullptr;  // accumulation type, one a row
  const void* grad_loss =
      nullptr;  // accumulation type; grad_loss_stride 0: one for all, 1: one a row
  int64_t grad_loss_stride = 0;
  // Where grad_loss is absent: one for all that is expected. See Note [Expected gradients] in
  // afm_kernels/autograd/expected.py.
  double expected_grad_loss = 1;
  bool as_backward = false;  // the bits of a backward, which has row_stats instead of the sums

  // Present: the gradients are directions, and this is what they have been divided by.
  void* log_scales = nullptr;    // out, accumulation type, one a row
  double* row_values = nullptr;  // out: weighted loss of each row
  void* row_stats = nullptr;     // out of a forward, into a backward; accumulation type
  bool stats_are_given = false;  // a backward
  bool stream = false;           // gradients are too large to be worth keeping in the caches
  bool overwrites = false;       // gradients take the place of their logits
};

// Scratch memory that one worker needs, in elements of the accumulation type, 64-byte aligned: four
// tiles and four rows of what the first loop keeps for the second; and four blocks of 16 rows, of
// up to 4096 classes, see Note [Strided classes], or six tiles and a stage of up to 64 rows.
constexpr int64_t softmax_kl_row_scratch(int64_t classes) {
  return 4 * kTile + 4 * ((classes + 15) / 16 * 16);
}
constexpr int64_t softmax_kl_block_scratch(int64_t classes) {
  return classes <= kLaneClasses ? 7 * 64 * classes : block_scratch(classes, 4);
}
constexpr int64_t softmax_kl_scratch(int64_t classes) {
  return softmax_kl_row_scratch(classes) + softmax_kl_block_scratch(classes);
}
// Directions keep two rows more, and six of doubles, which are up to two elements each.
constexpr int64_t softmax_kl_direction_scratch(int64_t classes) {
  return softmax_kl_scratch(classes) + (2 + 2 * 6) * ((classes + 15) / 16 * 16);
}

// Logits that are overwritten are set aside, in two rows more.
constexpr int64_t softmax_kl_overwriting_scratch(int64_t classes) {
  return softmax_kl_scratch(classes) + 2 * ((classes + 15) / 16 * 16);
}

// Rows [begin, end). Rows do not depend on each other, so that any split among workers gives the
// same bits.
AFM_DECLARE_KERNEL(void, softmax_kl_rows_float,
                   (const SoftmaxKlParams& params, int64_t begin, int64_t end, void* scratch))
AFM_DECLARE_KERNEL(void, softmax_kl_rows_double,
                   (const SoftmaxKlParams& params, int64_t begin, int64_t end, void* scratch))

}  // namespace afm::cpu
