// Reductions over the lanes that share a row: part of a warp, a warp, or a block.

#pragma once

#include "common/row_state.h"
#include "cuda/platform.cuh"

namespace afm::cuda {

struct MaxOf {
  template <typename A>
  static __device__ __forceinline__ A apply(A a, A b) {
    return max_of(a, b);
  }
};

struct SumOf {
  template <typename A>
  static __device__ __forceinline__ A apply(A a, A b) {
    return a + b;
  }
};

// Reduces each of `values` over aligned groups of `lanes` lanes of a warp. Every lane gets the same
// bits: at each step two partners add the same two numbers. All 32 lanes have to take part.
template <int lanes, class Op, typename A, int count>
__device__ __forceinline__ void reduce_in_warp(A (&values)[count]) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = Op::apply(values[i], __shfl_xor_sync(kFullMask, values[i], offset));
    }
  }
}

// Reduces each of `values` over the block, for every thread, in a fixed order. `shared` has room
// for count values a warp and must not be in use by an earlier reduction: a kernel that reduces
// three times has three of them, which saves a barrier each.
template <class Op, typename A, int count>
__device__ __forceinline__ void reduce_in_block(A (&values)[count], A* shared) {
  reduce_in_warp<kWarp, Op>(values);
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < count; ++i) shared[(threadIdx.x / kWarp) * count + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = shared[i];
  for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = Op::apply(values[i], shared[warp * count + i]);
    }
  }
}

// Over `group` consecutive threads: up to a warp, or the whole block.
template <int group, class Op, typename A, int count>
__device__ __forceinline__ void reduce_in_group(A (&values)[count], A* shared) {
  if constexpr (group <= kWarp) {
    reduce_in_warp<group, Op>(values);
  } else {
    reduce_in_block<Op>(values, shared);
  }
}

}  // namespace afm::cuda
