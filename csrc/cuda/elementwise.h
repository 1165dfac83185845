// A tensor in memory order.

#pragma once

#include "cuda/tensors.h"

namespace afm::cuda {

// A null base: absent.
struct FlatView {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
};

}  // namespace afm::cuda
