// Tensors that are walked in memory order, of any dtype: 8 elements a thread, moved in 128 bits
// where the address allows (16-bit and float32 elements; float64 goes by 2).

#pragma once

#include "cuda/element.cuh"
#include "cuda/elementwise.h"

namespace afm::cuda {

constexpr int kElementwiseThreads = 256;

template <typename A>
struct Elementwise {
  static constexpr int kN = sizeof(A) == 8 ? 2 : 8;
  using At = Access<AnyOf<A>, kN>;
  using Values = Chunk<AnyOf<A>, kN>;

  static __device__ __forceinline__ bool aligned(const char* data, DType dtype) {
    const int word = kN * size_of(dtype) < 16 ? kN * size_of(dtype) : 16;
    return reinterpret_cast<uintptr_t>(data) % word == 0;
  }

  // Elements [first, first + kN) of a tensor; those at or beyond `count` read as 0.
  static __device__ __forceinline__ Values load(const FlatView& view, int64_t first,
                                                int64_t count) {
    const int64_t left = count - first;
    const char* data = view.data + first * size_of(view.dtype);
    return At::load(data, view.dtype, 0, left < kN ? static_cast<int>(left) : kN,
                    aligned(data, view.dtype), 0.f);
  }

  static __device__ __forceinline__ void store(const FlatView& view, int64_t first, int64_t count,
                                               const A (&values)[kN]) {
    const int64_t left = count - first;
    char* data = view.data + first * size_of(view.dtype);
    At::store(data, view.dtype, 0, left < kN ? static_cast<int>(left) : kN,
              aligned(data, view.dtype), values);
  }
};

}  // namespace afm::cuda
