// What the operators of the CUDA module share: tensors to views, and where to run.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/shim_check.h"
#include "cuda/device.h"
#include "cuda/tensors.h"

// The tests run this module's sources on the CPU, under a namespace of their own. See Note
// [Emulation] in platform.cuh.
#if defined(AFM_CUDA_EMULATION)
#define AFM_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(afm_kernels_emulated, CPU, m)
#else
#define AFM_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CUDA, m)
#endif

namespace afm::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Runs what follows on a tensor's device and on the stream that is current there.
class Place {
 public:
  explicit Place(const Tensor& tensor) : device_(tensor.get_device_index()) {
#if !defined(AFM_CUDA_EMULATION)
    // Most calls are on the current device already, and a guard costs an allocation.
    if (torch::stable::accelerator::getCurrentDeviceIndex() != device_) guard_.emplace(device_);
    AFM_SHIM_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
#endif
  }
  void* stream() const { return stream_; }
  int device() const { return device_; }

 private:
  int32_t device_;
  void* stream_ = nullptr;
#if !defined(AFM_CUDA_EMULATION)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      throw std::invalid_argument(
          "afm_kernels: the CUDA kernels take float16, bfloat16, float32 and float64 tensors");
  }
}

inline Tensor new_empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                                const std::vector<int64_t>& strides, ScalarType dtype) {
  int32_t device_type = 0;
  AFM_SHIM_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  AFM_SHIM_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) {
    strides[i - 2] = strides[i - 1] * (sizes[i - 1] > 1 ? sizes[i - 1] : 1);
  }
  return new_empty_strided(like, sizes, strides, dtype);
}

// Dimensions merged for a kernel that walks them by index: sizes, and each tensor's strides.
struct Walk {
  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides;  // by tensor
};

// Merges neighbouring dimensions among the first `dims` wherever every tensor allows it. `tensors`
// have the same sizes there. Dimensions of size 1 are dropped.
Walk merge_dimensions(const std::vector<const Tensor*>& tensors, int64_t dims);

}  // namespace afm::cuda
