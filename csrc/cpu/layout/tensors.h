// From tensors to what kernels take: rows in memory, scratch memory, and outputs.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "cpu/layout/rows.h"

namespace afm::cpu {

using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor);

// Sizes and strides of up to RowsOf::kMaxDims dimensions, read once.
struct Layout {
  explicit Layout(const Tensor& tensor);

  int dims;
  const int64_t* sizes;    // the tensor's own
  const int64_t* strides;  // the tensor's own
  int64_t numel;

  bool is_dense() const;  // non-overlapping and dense: a permutation of a contiguous tensor
};

// What is asked of a tensor to write. See Note [Tensors to write] in afm_kernels/functional/out.py.
bool is_like(const Tensor& tensor, const Tensor& other);  // in shape and dtype
bool is_expanded(const Tensor& tensor);                   // elements share memory
bool overlap(const Tensor& a, const Tensor& b);           // address ranges do
bool are_one_view(const Tensor& a, const Tensor& b);      // of one shape, at one place

// Fills `rows` for tensors that share a shape (rows..., classes), and merges row dimensions where
// all strides allow.
class RowsBuilder {
 public:
  explicit RowsBuilder(const Layout& layout) : layout_(layout) {}

  // The tensor's dtype, data and strides go to `target`. All tensors before finish().
  void add(const Tensor& tensor, const int64_t* strides, RowsOf& target);
  void finish(RowShape& shape);

 private:
  static constexpr int kMaxTensors = 5;
  const Layout& layout_;
  RowsOf* targets_[kMaxTensors];
  int count_ = 0;
};

// New tensors.

// As torch.empty_like: strides of a dense tensor are kept, others are as torch infers them.
Tensor empty_like(const Tensor& tensor, const Layout& layout);
Tensor empty(int64_t dims, const int64_t* sizes, bool is_double);  // float64 or float32, contiguous
Tensor empty_channels_last(const int64_t (&sizes)[4]);             // float32, from (N, C, H, W)
Tensor nothing_like(const Tensor& tensor);                         // shape (0,)

// Memory for a worker's scratch, kept by its thread from call to call up to a few megabytes.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
  bool owned_;
};

}  // namespace afm::cpu
