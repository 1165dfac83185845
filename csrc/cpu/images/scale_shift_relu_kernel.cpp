#include "cpu/images/scale_shift_relu_kernel.h"

#include "cpu/layout/blocks.h"

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

// A number of each channel along a run: where channels count, one after another, else one for all.
template <bool kCounts, class C>
struct ChannelNumbers {
  const C* values;
  Vec<C> first;
  explicit AFM_MEMBER ChannelNumbers(const C* from) : values(from), first(*from) {}
  template <class Access>
  AFM_MEMBER Vec<C> at(Access access, int64_t j) const {
    if constexpr (kCounts) return access.load(values + j, first);
    return first;
  }
};

// The loops. See Note [Elements as they lie].

template <bool kCounts, class C, class X>
AFM_LOOP void forward_run(X* out, const X* x, const X* residual, const C* scales, const C* shifts,
                          int64_t n, bool stream) {
  using V = Vec<C>;
  const ChannelNumbers<kCounts, C> scale(scales), shift(shifts);
  const V zero(C(0));
  const auto scaled = [&](auto access, int64_t j) AFM_STEP {
    return fma(access.load(x + j, zero), scale.at(access, j), shift.at(access, j));
  };
  const auto put_relu = [&](auto access, int64_t j, V y) AFM_STEP {
    access.store(out + j, max(zero, y));  // a NaN stays
  };
  if (residual == nullptr)
    sweep_out<V>(out, n, stream, [&](auto access, int64_t j, int) AFM_STEP {
      put_relu(access, j, scaled(access, j));
    });
  else
    sweep_out<V>(out, n, stream, [&](auto access, int64_t j, int) AFM_STEP {
      put_relu(access, j, scaled(access, j) + access.load(residual + j, zero));
    });
}

template <bool kCounts, class C, class X>
AFM_LOOP void backward_run(X* grad_x, X* grad_residual, const X* output, const X* grad,
                           const C* scales, int64_t n, bool stream) {
  using V = Vec<C>;
  const ChannelNumbers<kCounts, C> scale(scales);
  const V zero(C(0));
  const auto passed = [&](auto access, int64_t j) AFM_STEP {
    return select(access.load(output + j, zero) <= zero, zero, access.load(grad + j, zero));
  };
  const auto put_by_x = [&](auto access, int64_t j, V g)
                            AFM_STEP { access.store(grad_x + j, g * scale.at(access, j)); };
  if (grad_residual == nullptr)
    sweep_out<V>(grad_x, n, stream, [&](auto access, int64_t j, int) AFM_STEP {
      put_by_x(access, j, passed(access, j));
    });
  else if (grad_x == nullptr)
    sweep_out<V>(grad_residual, n, stream, [&](auto access, int64_t j, int) AFM_STEP {
      access.store(grad_residual + j, passed(access, j));
    });
  else
    sweep_out<V>(grad_x, n, stream, [&](auto access, int64_t j, int) AFM_STEP {
      const V g = passed(access, j);
      access.store(grad_residual + j, g), put_by_x(access, j, g);
    });
}

// Whether the loops run on the tensors themselves: no gaps between their elements, and one dtype.
template <class C, int N>
AFM_INLINE bool is_direct(const StridedLoop<N>& loop, DType dtype, DType other_dtype) {
  bool direct = dtype == other_dtype && is_computed_in<C>(dtype);
  for (int k = 0; k < N - 1; ++k) direct &= loop.strides[k][0] == 1;
  return direct;
}

// n elements of an operand from element `at` on; null where the operand is absent.
AFM_INLINE RowPointer run_of(const void* data, DType dtype, int64_t at, int64_t stride) {
  char* base = static_cast<char*>(const_cast<void*>(data));
  return {base == nullptr ? nullptr : base + at * element_size(dtype), dtype, stride};
}

template <class X>
AFM_INLINE X* element_at(void* data, int64_t at) {
  return data == nullptr ? nullptr : static_cast<X*>(data) + at;
}
template <class X>
AFM_INLINE const X* element_at(const void* data, int64_t at) {
  return data == nullptr ? nullptr : static_cast<const X*>(data) + at;
}

template <class C>
AFM_INLINE void forward(const ScaleShiftReluParams& p, int64_t begin, int64_t end) {
  using P = ScaleShiftReluParams;
  alignas(64) C scratch[3][kBlock];
  const auto& strides = p.loop.strides;
  const bool counts = strides[P::kChannel][0] != 0;
  const bool direct =
      is_direct<C>(p.loop, p.dtype, p.residual == nullptr ? p.dtype : p.residual_dtype);
  const bool stream = p.stream && direct;
  for_each_channel_block(
      p.loop, p.period, begin, end,
      [&](const int64_t* at, int64_t channel, int n) AFM_LAMBDA_INLINE {
        const C* scale = static_cast<const C*>(p.scale) + channel;
        const C* shift = static_cast<const C*>(p.shift) + channel;
        const auto run = [&](auto* out, const auto* x, const auto* residual) AFM_LAMBDA_INLINE {
          if (counts)
            forward_run<true>(out, x, residual, scale, shift, n, stream);
          else
            forward_run<false>(out, x, residual, scale, shift, n, stream);
        };
        if (direct) {
          return with_element<C>(p.dtype, [&](auto element) AFM_LAMBDA_INLINE {
            using X = decltype(element);
            run(element_at<X>(p.out, at[P::kOut]), element_at<X>(p.x, at[P::kX]),
                element_at<X>(p.residual, at[P::kResidual]));
          });
        }
        const auto block = [&](int k, const void* data, DType dtype) AFM_LAMBDA_INLINE {
          return run_of(data, dtype, at[k], strides[k][0]);
        };
        const RowPointer out = block(P::kOut, p.out, p.dtype);
        const RowPointer residual = block(P::kResidual, p.residual, p.residual_dtype);
        C* to = out.writable(0, scratch[P::kOut]);
        run(to, block(P::kX, p.x, p.dtype).read(0, n, scratch[P::kX]),
            residual.data == nullptr ? nullptr : residual.read(0, n, scratch[P::kResidual]));
        out.write(0, n, to);
      });
  end_of_streams();
}

template <class C>
AFM_INLINE void backward(const ScaleShiftReluBackwardParams& p, int64_t begin, int64_t end) {
  using P = ScaleShiftReluBackwardParams;
  alignas(64) C scratch[4][kBlock];
  const auto& strides = p.loop.strides;
  const bool counts = strides[P::kChannel][0] != 0;
  const bool direct = is_direct<C>(p.loop, p.dtype, p.grad_output_dtype);
  // One loop aligns the stores to both gradients.
  const bool alike = p.grad_x == nullptr || p.grad_residual == nullptr ||
                     (static_cast<char*>(p.grad_x) - static_cast<char*>(p.grad_residual)) % 64 == 0;
  const bool stream = p.stream && direct && alike;
  for_each_channel_block(
      p.loop, p.period, begin, end,
      [&](const int64_t* at, int64_t channel, int n) AFM_LAMBDA_INLINE {
        const C* scale = static_cast<const C*>(p.scale) + channel;
        const auto run = [&](auto* grad_x, auto* grad_residual, const auto* output,
                             const auto* grad) AFM_LAMBDA_INLINE {
          if (counts)
            backward_run<true>(grad_x, grad_residual, output, grad, scale, n, stream);
          else
            backward_run<false>(grad_x, grad_residual, output, grad, scale, n, stream);
        };
        if (direct) {
          return with_element<C>(p.dtype, [&](auto element) AFM_LAMBDA_INLINE {
            using X = decltype(element);
            run(element_at<X>(p.grad_x, at[P::kGradient]),
                element_at<X>(p.grad_residual, at[P::kGradient]),
                element_at<X>(p.output, at[P::kOutput]),
                element_at<X>(p.grad_output, at[P::kGradOutput]));
          });
        }
        const auto block = [&](int k, const void* data, DType dtype) AFM_LAMBDA_INLINE {
          return run_of(data, dtype, at[k], strides[k][0]);
        };
        const RowPointer gradients[] = {block(P::kGradient, p.grad_x, p.dtype),
                                        block(P::kGradient, p.grad_residual, p.dtype)};
        C* to[2];
        for (int i = 0; i < 2; ++i)
          to[i] = gradients[i].data == nullptr ? nullptr : gradients[i].writable(0, scratch[2 + i]);
        run(to[0], to[1], block(P::kOutput, p.output, p.dtype).read(0, n, scratch[0]),
            block(P::kGradOutput, p.grad_output, p.grad_output_dtype).read(0, n, scratch[1]));
        for (int i = 0; i < 2; ++i)
          if (to[i] != nullptr) gradients[i].write(0, n, to[i]);
      });
  end_of_streams();
}

}  // namespace

void scale_shift_relu_forward(const ScaleShiftReluParams& p, int64_t begin, int64_t end) {
  p.compute_double ? forward<double>(p, begin, end) : forward<float>(p, begin, end);
}

void scale_shift_relu_backward(const ScaleShiftReluBackwardParams& p, int64_t begin, int64_t end) {
  p.compute_double ? backward<double>(p, begin, end) : backward<float>(p, begin, end);
}

void read_vector(const void* source, DType dtype, int64_t stride, int64_t n, double* target) {
  const double* from = run_of(source, dtype, 0, stride).read(0, n, target);
  if (from != target) memcpy(target, from, static_cast<size_t>(n) * sizeof(double));
}

}  // namespace afm::cpu::AFM_CAPABILITY
