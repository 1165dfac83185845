// A loop over the elements of several tensors of one shape and any strides, for elementwise
// kernels. For kernel units: no torch, no standard library, nothing with external linkage.
// strided_loop_plan.h fills one in from tensors.

#pragma once

#include <stdint.h>

#include "common/inline.h"
#include "cpu/layout/dtype.h"

namespace afm::cpu {

constexpr int kMaxDims = 64;  // torch's own limit

// Elements that an operand without a loop of its own is brought to hand at a time: four operands in
// double are 16 KiB. See Note [Elements as they lie] in blocks.h.
constexpr int kBlock = 512;

// N operands; operand 0 is the output. Dimension 0 is the innermost, the one where the output's
// stride is smallest; adjacent dimensions that every operand walks in one stride are merged into
// one. Strides in elements.
template <int N>
struct StridedLoop {
  int ndim;
  int64_t numel;
  int64_t sizes[kMaxDims];
  int64_t strides[N][kMaxDims];
};

namespace {

// Calls f(offsets, n) for the runs along dimension 0 that make up the elements [begin, end), in the
// loop's order. offsets: elements from each operand's base to the first of the run; n: length of
// the run.
template <int N, class F>
AFM_INLINE void for_each_run(const StridedLoop<N>& loop, int64_t begin, int64_t end, const F& f) {
  int64_t index[kMaxDims];
  int64_t offsets[N] = {};
  int64_t rest = begin;
  for (int d = 0; d < loop.ndim; ++d) {
    index[d] = rest % loop.sizes[d];
    rest /= loop.sizes[d];
    for (int k = 0; k < N; ++k) offsets[k] += index[d] * loop.strides[k][d];
  }
  int64_t left = end - begin;
  while (left > 0) {
    int64_t n = loop.sizes[0] - index[0];
    if (n > left) n = left;
    f(static_cast<const int64_t*>(offsets), n);
    left -= n;
    if (left <= 0) break;
    for (int k = 0; k < N; ++k) offsets[k] -= index[0] * loop.strides[k][0];
    index[0] = 0;
    for (int d = 1; d < loop.ndim; ++d) {
      for (int k = 0; k < N; ++k) offsets[k] += loop.strides[k][d];
      if (++index[d] < loop.sizes[d]) break;
      for (int k = 0; k < N; ++k) offsets[k] -= index[d] * loop.strides[k][d];
      index[d] = 0;
    }
  }
}

}  // namespace

}  // namespace afm::cpu
