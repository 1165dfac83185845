// Tensors as the kernels see them: plain structs, filled by the operators on the host.

#pragma once

#include <cstdint>

namespace afm::cuda {

enum class DType : int { kFloat16, kBFloat16, kFloat32, kFloat64 };

#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Leading dimensions that are left once those that lie one behind the other in every tensor are
// merged. Batches of rows have one, a channels-last image whose height was cropped has two.
constexpr int kMaxRowDims = 4;

// The rows of a tensor: base, dtype, and the stride of each leading dimension in elements. The
// class stride is 1. A null base: the tensor is absent.
struct RowsView {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t strides[kMaxRowDims] = {0, 0, 0, 0};
};

}  // namespace afm::cuda
