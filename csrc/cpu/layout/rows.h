// Rows of logits in memory, as kernels see them. Plain data: no torch, no standard library, so that
// kernel units and the sanitizer tests may include it.

#pragma once

#include <stdint.h>

#include "cpu/layout/dtype.h"

namespace afm::cpu {

// Classes of a row that are worked on at a time: two tiles of logits, two of exponentials and two
// of gradients are 48 KiB in float32, about a first-level cache.
constexpr int64_t kTile = 2048;

// Rows of up to this many classes are worked on side by side. See Note [Rows across lanes].
constexpr int64_t kLaneClasses = 128;

// Rows that are transposed at a time, see Note [Strided classes] in row_tiles.h, and the scratch
// memory that takes, in elements, for so many tensors. Rows of more than 4096 classes are left
// where they lie.
constexpr int64_t kBlockRows = 16;
constexpr int64_t block_scratch(int64_t classes, int tensors) {
  return classes <= 4096 ? tensors * kBlockRows * classes : 0;
}

// One tensor of shape (rows..., classes). Strides are in elements; the row dimensions are those of
// RowShape.
struct RowsOf {
  static constexpr int kMaxDims = 64;  // PyTorch's own limit

  void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  int64_t class_stride = 1;
  int64_t row_strides[kMaxDims];  // outermost first
};

// The row dimensions all tensors of a call share, merged where every tensor's strides allow it.
struct RowShape {
  int dims = 1;
  int64_t sizes[RowsOf::kMaxDims];
};

}  // namespace afm::cpu
