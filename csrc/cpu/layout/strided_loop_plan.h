// Fills in a StridedLoop from tensors.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

#include "cpu/layout/strided_loop.h"
#include "cpu/layout/tensors.h"

namespace afm::cpu {

// The dimensions [first_dim, ndim) of operands with these sizes and strides, ordered and merged.
template <int N>
StridedLoop<N> plan_loop(const int64_t* sizes, int64_t ndim,
                         const std::array<const int64_t*, N>& strides, int64_t first_dim = 0) {
  StridedLoop<N> loop;
  loop.ndim = 0;
  loop.numel = 1;
  STD_TORCH_CHECK(ndim <= kMaxDims, "a tensor has ", ndim, " dimensions; at most ", kMaxDims,
                  " are allowed");
  for (int64_t d = ndim - 1; d >= first_dim; --d) {
    loop.numel *= sizes[d];
    if (sizes[d] == 1) continue;
    // Insertion by the output's stride; few dimensions, mostly in order already.
    int at = loop.ndim++;
    for (; at > 0 && loop.strides[0][at - 1] > strides[0][d]; --at) {
      loop.sizes[at] = loop.sizes[at - 1];
      for (int k = 0; k < N; ++k) loop.strides[k][at] = loop.strides[k][at - 1];
    }
    loop.sizes[at] = sizes[d];
    for (int k = 0; k < N; ++k) loop.strides[k][at] = strides[k][d];
  }
  if (loop.ndim == 0) {
    loop.ndim = 1;
    loop.sizes[0] = 1;
    for (int k = 0; k < N; ++k) loop.strides[k][0] = 1;
  }
  int last = 0;
  for (int d = 1; d < loop.ndim; ++d) {
    bool merges = true;
    for (int k = 0; k < N; ++k)
      merges &= loop.strides[k][d] == loop.strides[k][last] * loop.sizes[last];
    if (merges) {
      loop.sizes[last] *= loop.sizes[d];
    } else {
      ++last;
      loop.sizes[last] = loop.sizes[d];
      for (int k = 0; k < N; ++k) loop.strides[k][last] = loop.strides[k][d];
    }
  }
  loop.ndim = last + 1;
  return loop;
}

}  // namespace afm::cpu
