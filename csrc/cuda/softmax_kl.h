// Divergences between softmaxes and the distillation loss on a GPU: what the operators ask of the
// kernels. Reverse KL is KL with student and teacher exchanged, and arrives here as that.

#pragma once

#include <cstdint>

#include "common/row_state.h"
#include "cuda/tensors.h"

namespace afm::cuda {

// kKl: KL. kSymmetric: Jeffreys and JS. kDistillation: KL and cross-entropy.
enum class Variant : int { kKl, kSymmetric, kDistillation };

struct RowsProblem {
  RowsView student, teacher;
  RowsView grad_student, grad_teacher;  // absent where not asked for

  int64_t rows = 0;
  int classes = 0;
  int row_dims = 1;
  int64_t row_sizes[kMaxRowDims] = {0, 0, 0, 0};

  const void* row_weight = nullptr;  // one a row, or absent
  const void* grad_loss = nullptr;   // absent: 1
  int grad_loss_stride = 0;          // 0: one for all rows; 1: one a row

  // Where the loss goes: the rows' values, or (sum) one partial sum a block. Absent: not wanted.
  void* loss = nullptr;
  bool sum = false;

  const void* stats_in = nullptr;  // from a forward: nothing is reduced again
  void* stats_out = nullptr;

  // Streaming: how many blocks share a row, and what they leave for each other.
  int splits = 1;
  void* partials = nullptr;  // rows x splits x kPartial
  void* terms = nullptr;     // rows x splits x kRowTerms, kSymmetric only
  double* others = nullptr;  // rows x splits x kOthers, where gradients are wanted

  Divergence divergence = Divergence::kKl;
  double temperature = 1, scale = 1;
  double beta = 0.5, gamma = 0.5;  // of JS

  const int64_t* labels = nullptr;  // kDistillation
  int64_t ignore_index = -100;
  double alpha = 1, label_smoothing = 0;
};

constexpr int kRowStats = 8;  // ROW_STATS of afm_kernels/ops.py
constexpr int kPartial = 10;  // scalars of a split, see softmax_kl_stream.cuh
constexpr int kOthers = 4;    // likewise: sums and columns of its gradients

}  // namespace afm::cuda
