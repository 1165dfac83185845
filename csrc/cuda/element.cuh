// Elements in memory: the four dtypes, and vectors of them that are read and written in 128 bits
// where the address allows.

#pragma once

#include "common/row_state.h"
#include "cuda/platform.cuh"
#include "cuda/tensors.h"

namespace afm::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ double to_float(double x) { return x; }

template <typename T>
struct Convert {
  template <typename A>
  static __device__ __forceinline__ T from(A x) {
    return static_cast<T>(x);
  }
};
template <>
struct Convert<__half> {
  static __device__ __forceinline__ __half from(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ __half from(double x) { return __double2half(x); }
};
template <>
struct Convert<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ __nv_bfloat16 from(double x) { return __double2bfloat16(x); }
};

// Unsigned words that a vector of `bytes` is moved in.
template <int bytes>
struct Words;
template <>
struct Words<16> {
  using type = uint4;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<4> {
  using type = unsigned;
};
template <>
struct Words<2> {
  using type = unsigned short;
};

// N consecutive elements of a row, in registers.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Chunk {
  static constexpr int kBytes = N * sizeof(T);
  static constexpr int kWord = kBytes < 16 ? kBytes : 16;
  using Word = typename Words<kWord>::type;

  T raw[N];

  template <typename A>
  __device__ __forceinline__ A get(int i) const {
    return static_cast<A>(to_float(raw[i]));
  }

  // `from` is a multiple of kWord bytes.
  __device__ __forceinline__ void load_aligned(const T* from) {
    const Word* source = reinterpret_cast<const Word*>(from);
    Word* target = reinterpret_cast<Word*>(raw);
#pragma unroll
    for (int w = 0; w < kBytes / kWord; ++w) target[w] = source[w];
  }

  // Read as the last use: first to leave the caches.
  __device__ __forceinline__ void store_aligned(T* to) const {
    const Word* source = reinterpret_cast<const Word*>(raw);
    Word* target = reinterpret_cast<Word*>(to);
#pragma unroll
    for (int w = 0; w < kBytes / kWord; ++w) __stcs(target + w, source[w]);
  }

  // Elements column .. column + N - 1 of a row of `classes`; those outside read as `outside`.
  __device__ __forceinline__ void load(const T* row, int column, int classes, bool aligned,
                                       float outside) {
    if (aligned && column >= 0 && column + N <= classes) {
      load_aligned(row + column);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int j = column + i;
        raw[i] = j >= 0 && j < classes ? row[j] : Convert<T>::from(outside);
      }
    }
  }

  __device__ __forceinline__ void store(T* row, int column, int classes, bool aligned) const {
    if (aligned && column >= 0 && column + N <= classes) {
      store_aligned(row + column);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int j = column + i;
        if (j >= 0 && j < classes) row[j] = raw[i];
      }
    }
  }
};

// A dtype known at run time only; its elements are held in A.
template <typename A>
struct AnyOf {};

template <typename A, int N>
struct Chunk<AnyOf<A>, N> {
  A raw[N];

  template <typename B>
  __device__ __forceinline__ B get(int i) const {
    return static_cast<B>(raw[i]);
  }
};

// Reading and writing rows of T at `row`, whatever T is.
template <typename T, int N>
struct Access {
  static __device__ __forceinline__ int element_bytes(DType) { return sizeof(T); }

  static __device__ __forceinline__ Chunk<T, N> load(const char* row, DType, int column,
                                                     int classes, bool aligned, float outside) {
    Chunk<T, N> chunk;
    chunk.load(reinterpret_cast<const T*>(row), column, classes, aligned, outside);
    return chunk;
  }

  template <typename A>
  static __device__ __forceinline__ void store(char* row, DType, int column, int classes,
                                               bool aligned, const A (&values)[N]) {
    Chunk<T, N> chunk;
#pragma unroll
    for (int i = 0; i < N; ++i) chunk.raw[i] = Convert<T>::from(values[i]);
    chunk.store(reinterpret_cast<T*>(row), column, classes, aligned);
  }

  template <typename A>
  static __device__ __forceinline__ void store_element(char* row, DType, int column, A value) {
    reinterpret_cast<T*>(row)[column] = Convert<T>::from(value);
  }

  static __device__ __forceinline__ float element(const char* row, DType, int column, float) {
    return to_float(reinterpret_cast<const T*>(row)[column]);
  }
  static __device__ __forceinline__ double element(const char* row, DType, int column, double) {
    return static_cast<double>(to_float(reinterpret_cast<const T*>(row)[column]));
  }
};

template <typename A, int N>
struct Access<AnyOf<A>, N> {
  static __device__ __forceinline__ int element_bytes(DType dtype) { return size_of(dtype); }

  template <typename T>
  static __device__ __forceinline__ Chunk<AnyOf<A>, N> load_as(const char* row, int column,
                                                               int classes, bool aligned,
                                                               float outside) {
    const Chunk<T, N> typed =
        Access<T, N>::load(row, DType::kFloat32, column, classes, aligned, outside);
    Chunk<AnyOf<A>, N> chunk;
#pragma unroll
    for (int i = 0; i < N; ++i) chunk.raw[i] = typed.template get<A>(i);
    return chunk;
  }

  static __device__ __forceinline__ Chunk<AnyOf<A>, N> load(const char* row, DType dtype,
                                                            int column, int classes, bool aligned,
                                                            float outside) {
    switch (dtype) {
      case DType::kFloat16:
        return load_as<__half>(row, column, classes, aligned, outside);
      case DType::kBFloat16:
        return load_as<__nv_bfloat16>(row, column, classes, aligned, outside);
      case DType::kFloat32:
        return load_as<float>(row, column, classes, aligned, outside);
      default:
        return load_as<A>(row, column, classes, aligned, outside);
    }
  }

  static __device__ __forceinline__ void store(char* row, DType dtype, int column, int classes,
                                               bool aligned, const A (&values)[N]) {
    switch (dtype) {
      case DType::kFloat16:
        return Access<__half, N>::store(row, dtype, column, classes, aligned, values);
      case DType::kBFloat16:
        return Access<__nv_bfloat16, N>::store(row, dtype, column, classes, aligned, values);
      case DType::kFloat32:
        return Access<float, N>::store(row, dtype, column, classes, aligned, values);
      default:
        return Access<A, N>::store(row, dtype, column, classes, aligned, values);
    }
  }

  static __device__ __forceinline__ void store_element(char* row, DType dtype, int column,
                                                       A value) {
    switch (dtype) {
      case DType::kFloat16:
        return Access<__half, N>::store_element(row, dtype, column, value);
      case DType::kBFloat16:
        return Access<__nv_bfloat16, N>::store_element(row, dtype, column, value);
      case DType::kFloat32:
        return Access<float, N>::store_element(row, dtype, column, value);
      default:
        return Access<A, N>::store_element(row, dtype, column, value);
    }
  }

  static __device__ __forceinline__ A element(const char* row, DType dtype, int column, A) {
    switch (dtype) {
      case DType::kFloat16:
        return to_float(reinterpret_cast<const __half*>(row)[column]);
      case DType::kBFloat16:
        return to_float(reinterpret_cast<const __nv_bfloat16*>(row)[column]);
      case DType::kFloat32:
        return static_cast<A>(reinterpret_cast<const float*>(row)[column]);
      default:
        return reinterpret_cast<const A*>(row)[column];
    }
  }
};

}  // namespace afm::cuda
