#include "cuda/scale_shift_relu.h"

#include "cuda/elementwise.cuh"

namespace afm::cuda {

// The channels of consecutive elements: one division for the first, a comparison for each next.
struct ChannelWalk {
  int64_t channel, inside;

  static __device__ __forceinline__ ChannelWalk at(const ScaleShiftReluProblem& problem,
                                                   int64_t element) {
    ChannelWalk walk;
    if (problem.count <= 0x7fffffff) {  // 32-bit division takes a third of the time
      const unsigned stride = static_cast<unsigned>(problem.channel_stride);
      const unsigned block = static_cast<unsigned>(element) / stride;
      walk.inside = static_cast<unsigned>(element) - block * stride;
      walk.channel = block % static_cast<unsigned>(problem.channels);
    } else {
      const int64_t block = element / problem.channel_stride;
      walk.inside = element - block * problem.channel_stride;
      walk.channel = block % problem.channels;
    }
    return walk;
  }

  __device__ __forceinline__ void next(const ScaleShiftReluProblem& problem) {
    if (++inside == problem.channel_stride) {
      inside = 0;
      if (++channel == problem.channels) channel = 0;
    }
  }
};

template <typename A>
__device__ __forceinline__ A parameter(const FlatView& view, int64_t channel) {
  return Access<AnyOf<A>, 1>::element(view.data, view.dtype, static_cast<int>(channel), A(0));
}

template <typename A>
__global__ void __launch_bounds__(kElementwiseThreads)
    scale_shift_relu_forward_kernel(const ScaleShiftReluProblem problem) {
  using E = Elementwise<A>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * E::kN;
  if (first >= problem.count) return;
  const auto x = E::load(problem.x, first, problem.count);
  typename E::Values residual = {};
  if (problem.residual.data != nullptr) residual = E::load(problem.residual, first, problem.count);
  ChannelWalk walk = ChannelWalk::at(problem, first);
  A out[E::kN];
#pragma unroll
  for (int i = 0; i < E::kN; ++i) {
    const A scale = parameter<A>(problem.scale, walk.channel);
    const A shift = parameter<A>(problem.shift, walk.channel);
    const A value = (x.raw[i] * scale + shift) + residual.raw[i];
    out[i] = value <= A(0) ? A(0) : value;  // NaN stays
    walk.next(problem);
  }
  E::store(problem.out, first, problem.count, out);
}

template <typename A>
__global__ void __launch_bounds__(kElementwiseThreads)
    scale_shift_relu_backward_kernel(const ScaleShiftReluProblem problem) {
  using E = Elementwise<A>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * E::kN;
  if (first >= problem.count) return;
  const auto grad = E::load(problem.grad_output, first, problem.count);
  const auto output = E::load(problem.output, first, problem.count);
  ChannelWalk walk = ChannelWalk::at(problem, first);
  A to_x[E::kN], to_residual[E::kN];
#pragma unroll
  for (int i = 0; i < E::kN; ++i) {
    to_residual[i] = output.raw[i] <= A(0) ? A(0) : grad.raw[i];
    to_x[i] = to_residual[i] * parameter<A>(problem.scale, walk.channel);
    walk.next(problem);
  }
  if (problem.grad_x.data != nullptr) E::store(problem.grad_x, first, problem.count, to_x);
  if (problem.grad_residual.data != nullptr) {
    E::store(problem.grad_residual, first, problem.count, to_residual);
  }
}

namespace {

template <typename A>
int64_t blocks_of(const ScaleShiftReluProblem& problem) {
  const int64_t block = int64_t(kElementwiseThreads) * Elementwise<A>::kN;
  return (problem.count + block - 1) / block;
}

}  // namespace

void launch_scale_shift_relu_forward(const ScaleShiftReluProblem& problem, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  if (problem.exact) {
    launch(scale_shift_relu_forward_kernel<double>, blocks_of<double>(problem), kElementwiseThreads,
           problem, on);
  } else {
    launch(scale_shift_relu_forward_kernel<float>, blocks_of<float>(problem), kElementwiseThreads,
           problem, on);
  }
}

void launch_scale_shift_relu_backward(const ScaleShiftReluProblem& problem, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  if (problem.exact) {
    launch(scale_shift_relu_backward_kernel<double>, blocks_of<double>(problem),
           kElementwiseThreads, problem, on);
  } else {
    launch(scale_shift_relu_backward_kernel<float>, blocks_of<float>(problem), kElementwiseThreads,
           problem, on);
  }
}

}  // namespace afm::cuda
