// AFM_INLINE: a function of a header that CPU kernel units and CUDA sources share.
//
// `static` matters as much as `inline`: a CPU kernel unit is compiled once for each instruction
// set, and the linker must never merge the copies. See Note [Kernel units] in setup.py.

#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define AFM_INLINE static __host__ __device__ __forceinline__
#else
#define AFM_INLINE static inline __attribute__((always_inline))
#endif

// The same for member functions, which have internal linkage through their class in an anonymous
// namespace.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define AFM_MEMBER __host__ __device__ __forceinline__
#else
#define AFM_MEMBER inline __attribute__((always_inline))
#endif

// A lambda whose loop is worth vectorising in its caller.
#define AFM_LAMBDA_INLINE __attribute__((always_inline))
