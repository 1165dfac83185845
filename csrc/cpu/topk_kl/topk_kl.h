// KL from a teacher of whom k classes are known, and the mass of all others: what a call hands to
// its workers. The mathematics: Note [K classes and a tail] in afm_kernels/reference/topk_kl.py.

#pragma once

#include "cpu/dispatch/kernel.h"
#include "cpu/layout/rows.h"

namespace afm::cpu {

// The index into TOPK_MODES of afm_kernels/ops.py.
enum class TopkMode : int { kTail, kRenormalise, kBoth, kTruncate };

constexpr int kTopkRowStats = 8;

struct TopkKlParams {
  RowShape shape;
  int64_t classes = 0;
  RowsOf student;
  RowsOf grad_student;  // absent where not wanted; may be the student's own memory

  // The teacher's, contiguous: (rows, kept), and one tail a row.
  int64_t kept = 0;
  const void* indices = nullptr;
  bool indices_are_64_bits = true;
  void* log_probs = nullptr;
  DType log_probs_dtype = DType::kFloat32;
  const void* log_tail = nullptr;  // accumulation type; absent but for TopkMode::kTail
  TopkMode mode = TopkMode::kTail;

  double temperature = 1, scale = 1;
  bool stream = false;  // whether gradients are stored past the caches

  const void* row_weight = nullptr;  // accumulation type, one a row
  const void* grad_loss =
      nullptr;  // accumulation type; grad_loss_stride 0: one for all, 1: one a row
  int64_t grad_loss_stride = 0;

  double* row_values = nullptr;  // out: weighted loss of each row
  void* row_stats = nullptr;     // out of a forward, into a backward; accumulation type
  bool stats_are_given = false;  // a backward
};

// Scratch memory that one worker needs, in elements of the accumulation type, 64-byte aligned: two
// tiles; eight bytes for each of six numbers of the kept classes and their tail; where each tile's
// kept classes begin; and a block for each tensor.
constexpr int64_t topk_kl_few(int64_t kept) { return (kept + 1 + 7) / 8 * 8; }
constexpr int64_t topk_kl_tiles(int64_t classes) { return (classes + kTile - 1) / kTile; }
constexpr int64_t topk_kl_scratch(int64_t classes, int64_t kept) {
  return 2 * kTile + 2 * (6 * topk_kl_few(kept) + (topk_kl_tiles(classes) + 1 + 7) / 8 * 8) +
         block_scratch(classes, 2);
}

AFM_DECLARE_KERNEL(void, topk_kl_rows_float,
                   (const TopkKlParams& params, int64_t begin, int64_t end, void* scratch))
AFM_DECLARE_KERNEL(void, topk_kl_rows_double,
                   (const TopkKlParams& params, int64_t begin, int64_t end, void* scratch))

}  // namespace afm::cpu
