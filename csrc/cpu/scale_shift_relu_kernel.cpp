#include "cpu/scale_shift_relu_kernel.h"

#include "cpu/blocks.h"

namespace afm::cpu::AFM_CAPABILITY {

namespace {

// Calls f(at, channel, n) for blocks of n <= kBlock elements that make up [begin, end): each
// operand's offset, and the channel of the first element in the vectors. See Note [Channels of a
// run].
template <int N, class F>
AFM_INLINE void for_each_channel_block(const StridedLoop<N>& loop, int64_t period, int64_t begin,
                                       int64_t end, const F& f) {
  constexpr int kChannel = N - 1;
  const bool counts = loop.strides[kChannel][0] != 0;
  for_each_run(loop, begin, end, [&](const int64_t* offsets, int64_t length) AFM_LAMBDA_INLINE {
    int64_t at[N];
    for (int k = 0; k < N; ++k) at[k] = offsets[k];
    int64_t channel = counts ? offsets[kChannel] % period : offsets[kChannel];
    while (length > 0) {
      int64_t n = length < kBlock ? length : kBlock;
      if (counts && period - channel < n) n = period - channel;
      f(static_cast<const int64_t*>(at), channel, static_cast<int>(n));
      for (int k = 0; k < N; ++k) at[k] += n * loop.strides[k][0];
      length -= n;
      if (counts) channel = channel + n == period ? 0 : channel + n;
    }
  });
}

// A NaN fails the comparison and stays.
template <class C>
AFM_INLINE C relu(C value) {
  return value < 0 ? 0 : value;
}

template <class C>
AFM_INLINE void forward(const ScaleShiftReluParams& p, int64_t begin, int64_t end) {
  using P = ScaleShiftReluParams;
  alignas(64) C scratch[3][kBlock];
  const int64_t out_stride = p.loop.strides[P::kOut][0];
  const int64_t x_stride = p.loop.strides[P::kX][0];
  const int64_t residual_stride = p.loop.strides[P::kResidual][0];
  const bool counts = p.loop.strides[P::kChannel][0] != 0;
  const Target target{p.out, p.dtype};
  for_each_channel_block(
      p.loop, p.period, begin, end,
      [&](const int64_t* at, int64_t channel, int n) AFM_LAMBDA_INLINE {
        const C* scale = static_cast<const C*>(p.scale) + channel;
        const C* shift = static_cast<const C*>(p.shift) + channel;
        const C* x = load_block(Source{p.x, p.dtype}, at[P::kX], x_stride, n, scratch[1]);
        C* out = place_block(target, at[P::kOut], out_stride, scratch[0]);
        if (p.residual == nullptr) {
          if (counts) {
            AFM_INDEPENDENT
            for (int i = 0; i < n; ++i) out[i] = relu(x[i] * scale[i] + shift[i]);
          } else {
            const C a = *scale, b = *shift;
            AFM_INDEPENDENT
            for (int i = 0; i < n; ++i) out[i] = relu(x[i] * a + b);
          }
        } else {
          const C* residual = load_block(Source{p.residual, p.residual_dtype}, at[P::kResidual],
                                         residual_stride, n, scratch[2]);
          if (counts) {
            AFM_INDEPENDENT
            for (int i = 0; i < n; ++i) out[i] = relu(x[i] * scale[i] + shift[i] + residual[i]);
          } else {
            const C a = *scale, b = *shift;
            AFM_INDEPENDENT
            for (int i = 0; i < n; ++i) out[i] = relu(x[i] * a + b + residual[i]);
          }
        }
        store_block(target, at[P::kOut], out_stride, n, out, scratch[0]);
      });
}

template <class C>
AFM_INLINE void backward(const ScaleShiftReluBackwardParams& p, int64_t begin, int64_t end) {
  using P = ScaleShiftReluBackwardParams;
  alignas(64) C scratch[4][kBlock];
  const auto& strides = p.loop.strides;
  const bool counts = strides[P::kChannel][0] != 0;
  const Target grad_x_target{p.grad_x, p.dtype}, grad_residual_target{p.grad_residual, p.dtype};
  for_each_channel_block(
      p.loop, p.period, begin, end,
      [&](const int64_t* at, int64_t channel, int n) AFM_LAMBDA_INLINE {
        const C* scale = static_cast<const C*>(p.scale) + channel;
        const C* output = load_block(Source{p.output, p.dtype}, at[P::kOutput],
                                     strides[P::kOutput][0], n, scratch[0]);
        const C* grad = load_block(Source{p.grad_output, p.grad_output_dtype}, at[P::kGradOutput],
                                   strides[P::kGradOutput][0], n, scratch[1]);
        if (p.grad_x != nullptr) {
          C* grad_x =
              place_block(grad_x_target, at[P::kGradient], strides[P::kGradient][0], scratch[2]);
          if (counts) {
            AFM_INDEPENDENT
            for (int i = 0; i < n; ++i) grad_x[i] = output[i] <= 0 ? 0 : grad[i] * scale[i];
          } else {
            const C a = *scale;
            AFM_INDEPENDENT
            for (int i = 0; i < n; ++i) grad_x[i] = output[i] <= 0 ? 0 : grad[i] * a;
          }
          store_block(grad_x_target, at[P::kGradient], strides[P::kGradient][0], n, grad_x,
                      scratch[2]);
        }
        if (p.grad_residual != nullptr) {
          C* grad_residual = place_block(grad_residual_target, at[P::kGradient],
                                         strides[P::kGradient][0], scratch[3]);
          AFM_INDEPENDENT
          for (int i = 0; i < n; ++i) grad_residual[i] = output[i] <= 0 ? 0 : grad[i];
          store_block(grad_residual_target, at[P::kGradient], strides[P::kGradient][0], n,
                      grad_residual, scratch[3]);
        }
      });
}

}  // namespace

void scale_shift_relu_forward(const ScaleShiftReluParams& p, int64_t begin, int64_t end) {
  p.compute_double ? forward<double>(p, begin, end) : forward<float>(p, begin, end);
}

void scale_shift_relu_backward(const ScaleShiftReluBackwardParams& p, int64_t begin, int64_t end) {
  p.compute_double ? backward<double>(p, begin, end) : backward<float>(p, begin, end);
}

void read_vector(const void* source, DType dtype, int64_t stride, int64_t n, double* target) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int m = static_cast<int>(n - i < kBlock ? n - i : kBlock);
    const double* block = load_block(Source{source, dtype}, i * stride, stride, m, target + i);
    if (block != target + i) memcpy(target + i, block, m * sizeof(double));
  }
}

}  // namespace afm::cpu::AFM_CAPABILITY
