// Where kernels run: on a GPU, or lane by lane on the CPU for the tests.
//
// Note [Emulation]
// ~~~~~~~~~~~~~~~~
// tests/afm_kernels/cuda_emulator compiles these very sources with a C++ compiler and
// AFM_CUDA_EMULATION: every thread of a block is a fiber, shuffles and barriers are rendezvous that
// fail when a lane is missing, and threads run in a random order between them. So the indexing, the
// collectives and the mathematics are tested where there is no GPU. What a kernel may use is
// therefore what the emulator offers: threadIdx, blockIdx, blockDim, gridDim, static __shared__
// arrays, __syncthreads, __shfl_xor_sync, __any_sync, and the functions of this file.

#pragma once

#if defined(AFM_CUDA_EMULATION)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace afm::cuda {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

// Makes the compiler forget what it has derived from `words`. Without it the exponentials of one
// pass over a row are kept in registers for the next, until nothing else fits.
template <int count>
__device__ __forceinline__ void forget_derived(unsigned* words) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+r"(words[i]));
#endif
}

#if defined(AFM_CUDA_EMULATION)

using Stream = void*;

template <typename Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, const Params& params, Stream) {
  emulation::run(kernel, blocks, threads, params);
}

#else

using Stream = cudaStream_t;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("afm_kernels: CUDA error: ") + cudaGetErrorString(error));
  }
}

// A grid has at most 2^31 - 1 blocks; the callers' plans stay below.
template <typename Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, const Params& params,
            Stream stream) {
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(threads), arguments, 0, stream));
}

#endif

}  // namespace afm::cuda
