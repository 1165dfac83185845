#include "cuda/operators.h"

namespace afm::cuda {

Walk merge_dimensions(const std::vector<const Tensor*>& tensors, int64_t dims) {
  Walk walk;
  walk.strides.resize(tensors.size());
  for (int64_t dim = 0; dim < dims; ++dim) {
    const int64_t size = tensors[0]->size(dim);
    if (size == 1) continue;
    bool merges = !walk.sizes.empty();
    for (size_t i = 0; merges && i < tensors.size(); ++i) {
      merges = walk.strides[i].back() == tensors[i]->stride(dim) * size;
    }
    if (merges) {
      walk.sizes.back() *= size;
      for (size_t i = 0; i < tensors.size(); ++i) walk.strides[i].back() = tensors[i]->stride(dim);
    } else {
      walk.sizes.push_back(size);
      for (size_t i = 0; i < tensors.size(); ++i) {
        walk.strides[i].push_back(tensors[i]->stride(dim));
      }
    }
  }
  return walk;
}

}  // namespace afm::cuda
