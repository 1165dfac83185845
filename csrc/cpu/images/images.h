// What the convolutions ask of their images.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "cpu/layout/tensors.h"

namespace afm::cpu {

inline const float* floats(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// Its channels must be a multiple of `channels`.
inline void check_image(const char* name, const Tensor& t, int64_t channels = 1) {
  STD_TORCH_CHECK(t.dim() == 4 && dtype_of(t) == DType::kFloat32, name,
                  " must be a float32 image (N, C, H, W)");
  STD_TORCH_CHECK(t.size(1) % channels == 0, name, " has ", t.size(1),
                  " channels; allowed: multiples of ", channels);
  int64_t stride = 1;
  for (const int d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == stride, name,
                    " must be dense in channels-last order");
    stride *= t.size(d);
  }
}

// `t` must be an image of these sizes (N, C, H, W).
inline void check_image_of(const char* name, const Tensor& t, const int64_t (&sizes)[4]) {
  check_image(name, t);
  STD_TORCH_CHECK(t.size(0) == sizes[0] && t.size(1) == sizes[1] && t.size(2) == sizes[2] &&
                      t.size(3) == sizes[3],
                  name, " must have the shape (", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ",
                  sizes[3], ")");
}

}  // namespace afm::cpu
