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

// A channel's number for each element of a run, or one for all.
template <class C>
struct EachChannel {
  const C* values;
  AFM_MEMBER C operator[](int64_t i) const { return values[i]; }
};
template <class C>
struct OneChannel {
  C value;
  AFM_MEMBER C operator[](int64_t) const { return value; }
};

// The loops, over blocks of compute type or bfloat16 as it lies.

template <class X, class R, class Channel>
AFM_INLINE void forward_run(X* out, const X* x, const R* residual, Channel scale, Channel shift,
                            int n) {
  if (residual == nullptr) {
    AFM_INDEPENDENT
    for (int i = 0; i < n; ++i) from_float(relu(to_float(x[i]) * scale[i] + shift[i]), out + i);
  } else {
    AFM_INDEPENDENT
    for (int i = 0; i < n; ++i)
      from_float(relu(to_float(x[i]) * scale[i] + shift[i] + to_float(residual[i])), out + i);
  }
}

template <class X, class G, class Channel>
AFM_INLINE void backward_x_run(X* grad_x, const X* output, const G* grad, Channel scale, int n) {
  AFM_INDEPENDENT
  for (int i = 0; i < n; ++i)
    from_float(to_float(output[i]) <= 0 ? 0 : to_float(grad[i]) * scale[i], grad_x + i);
}

template <class X, class G>
AFM_INLINE void backward_residual_run(X* grad_residual, const X* output, const G* grad, int n) {
  AFM_INDEPENDENT
  for (int i = 0; i < n; ++i)
    from_float(to_float(output[i]) <= 0 ? 0 : to_float(grad[i]), grad_residual + i);
}

template <class C>
AFM_INLINE void forward(const ScaleShiftReluParams& p, int64_t begin, int64_t end) {
  using P = ScaleShiftReluParams;
  alignas(64) C scratch[3][kBlock];
  const auto& strides = p.loop.strides;
  const bool counts = strides[P::kChannel][0] != 0;
  bool is_direct = sizeof(C) == 4 && p.dtype == DType::kBFloat16 &&
                   (p.residual == nullptr || p.residual_dtype == DType::kBFloat16);
  for (int k = 0; k < P::kChannel; ++k) is_direct &= strides[k][0] == 1;
  const Target target{p.out, p.dtype};
  for_each_channel_block(
      p.loop, p.period, begin, end,
      [&](const int64_t* at, int64_t channel, int n) AFM_LAMBDA_INLINE {
        const C* scale = static_cast<const C*>(p.scale) + channel;
        const C* shift = static_cast<const C*>(p.shift) + channel;
        const auto run = [&](auto* out, const auto* x, const auto* residual) AFM_LAMBDA_INLINE {
          if (counts)
            forward_run(out, x, residual, EachChannel<C>{scale}, EachChannel<C>{shift}, n);
          else
            forward_run(out, x, residual, OneChannel<C>{*scale}, OneChannel<C>{*shift}, n);
        };
        if constexpr (sizeof(C) == 4) {
          if (is_direct) {
            const auto* residual = static_cast<const BFloat16*>(p.residual);
            return run(static_cast<BFloat16*>(p.out) + at[P::kOut],
                       static_cast<const BFloat16*>(p.x) + at[P::kX],
                       residual == nullptr ? residual : residual + at[P::kResidual]);
          }
        }
        const C* x = load_block(Source{p.x, p.dtype}, at[P::kX], strides[P::kX][0], n, scratch[1]);
        C* out = place_block(target, at[P::kOut], strides[P::kOut][0], scratch[0]);
        const C* residual = nullptr;
        if (p.residual != nullptr)
          residual = load_block(Source{p.residual, p.residual_dtype}, at[P::kResidual],
                                strides[P::kResidual][0], n, scratch[2]);
        run(out, x, residual);
        store_block(target, at[P::kOut], strides[P::kOut][0], n, out, scratch[0]);
      });
}

template <class C>
AFM_INLINE void backward(const ScaleShiftReluBackwardParams& p, int64_t begin, int64_t end) {
  using P = ScaleShiftReluBackwardParams;
  alignas(64) C scratch[4][kBlock];
  const auto& strides = p.loop.strides;
  const bool counts = strides[P::kChannel][0] != 0;
  bool is_direct =
      sizeof(C) == 4 && p.dtype == DType::kBFloat16 && p.grad_output_dtype == DType::kBFloat16;
  for (int k = 0; k < P::kChannel; ++k) is_direct &= strides[k][0] == 1;
  const Target grad_x_target{p.grad_x, p.dtype}, grad_residual_target{p.grad_residual, p.dtype};
  for_each_channel_block(
      p.loop, p.period, begin, end,
      [&](const int64_t* at, int64_t channel, int n) AFM_LAMBDA_INLINE {
        const C* scale = static_cast<const C*>(p.scale) + channel;
        const auto by_x = [&](auto* to, const auto* output, const auto* grad) AFM_LAMBDA_INLINE {
          if (counts)
            backward_x_run(to, output, grad, EachChannel<C>{scale}, n);
          else
            backward_x_run(to, output, grad, OneChannel<C>{*scale}, n);
        };
        const int64_t to = at[P::kGradient], to_stride = strides[P::kGradient][0];
        if constexpr (sizeof(C) == 4) {
          if (is_direct) {
            const auto* output = static_cast<const BFloat16*>(p.output) + at[P::kOutput];
            const auto* grad = static_cast<const BFloat16*>(p.grad_output) + at[P::kGradOutput];
            if (p.grad_x != nullptr) by_x(static_cast<BFloat16*>(p.grad_x) + to, output, grad);
            if (p.grad_residual != nullptr)
              backward_residual_run(static_cast<BFloat16*>(p.grad_residual) + to, output, grad, n);
            return;
          }
        }
        const C* output = load_block(Source{p.output, p.dtype}, at[P::kOutput],
                                     strides[P::kOutput][0], n, scratch[0]);
        const C* grad = load_block(Source{p.grad_output, p.grad_output_dtype}, at[P::kGradOutput],
                                   strides[P::kGradOutput][0], n, scratch[1]);
        if (p.grad_x != nullptr) {
          C* grad_x = place_block(grad_x_target, to, to_stride, scratch[2]);
          by_x(grad_x, output, grad);
          store_block(grad_x_target, to, to_stride, n, grad_x, scratch[2]);
        }
        if (p.grad_residual != nullptr) {
          C* grad_residual = place_block(grad_residual_target, to, to_stride, scratch[3]);
          backward_residual_run(grad_residual, output, grad, n);
          store_block(grad_residual_target, to, to_stride, n, grad_residual, scratch[3]);
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
