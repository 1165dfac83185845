// The operators of relu(x * scale[c] + shift[c] + residual). Definition:
// afm_kernels/reference/scale_shift_relu.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dispatch/dispatch.h"
#include "cpu/images/scale_shift_relu_kernel.h"
#include "cpu/layout/strided_loop_plan.h"

namespace afm::cpu {

namespace {

using torch::stable::Tensor;

// Elements below which a second thread costs more than it saves, by estimate.
constexpr int64_t kGrain = 16384;

// So that a period is no shorter than a kernel's block.
constexpr int64_t kMinPeriod = kBlock;

// A vector of C channels in the compute type, repeated to the length of a period.
class ChannelVector {
 public:
  ChannelVector(const Tensor& vector, int64_t period, bool as_double) : as_double_(as_double) {
    static const auto read = AFM_KERNEL(read_vector);
    const int64_t channels = vector.numel();
    doubles_.resize(period);
    read(vector.const_data_ptr(), dtype_of(vector), vector.dim() == 0 ? 1 : vector.stride(0),
         channels, doubles_.data());
    for (int64_t i = channels; i < period; ++i) doubles_[i] = doubles_[i - channels];
    if (!as_double) floats_.assign(doubles_.begin(), doubles_.end());
  }

  const void* data() const {
    return as_double_ ? static_cast<const void*>(doubles_.data()) : floats_.data();
  }

 private:
  const bool as_double_;
  std::vector<double> doubles_;
  std::vector<float> floats_;
};

// Makes a loop over dense channels-last operands a single run, and returns the period of its
// channels; otherwise the loop stays, and the period is the number of channels. See Note [Channels
// of a run].
template <int N>
int64_t merge_channels(StridedLoop<N>* loop, int64_t channels) {
  constexpr int kChannel = N - 1;
  if (loop->strides[kChannel][0] == 0 || channels == 1) return channels;
  bool dense = loop->ndim == 2;
  for (int k = 0; k < kChannel; ++k) dense &= loop->strides[k][1] == loop->strides[k][0] * channels;
  if (!dense) return channels;
  loop->ndim = 1;
  loop->sizes[0] *= loop->sizes[1];
  return channels * std::max<int64_t>(1, (kMinPeriod + channels - 1) / channels);
}

// The strides of the operand that counts channels.
std::vector<int64_t> channel_strides(int64_t ndim) {
  std::vector<int64_t> strides(ndim, 0);
  strides[1] = 1;
  return strides;
}

bool any_double(std::initializer_list<const Tensor*> tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor* tensor) {
    return tensor != nullptr && dtype_of(*tensor) == DType::kFloat64;
  });
}

}  // namespace

Tensor scale_shift_relu_forward_op(Tensor x, Tensor scale, Tensor shift,
                                   std::optional<Tensor> residual) {
  using P = ScaleShiftReluParams;
  Tensor out = torch::stable::empty_like(x);
  if (out.numel() == 0) return out;
  const Tensor* added = residual.has_value() ? &*residual : nullptr;
  const auto counter = channel_strides(x.dim());
  const int64_t* x_strides = x.strides().data();
  const std::array<const int64_t*, P::kOperands> strides = {
      out.strides().data(), x_strides, added == nullptr ? x_strides : added->strides().data(),
      counter.data()};
  P params{
      .out = out.mutable_data_ptr(),
      .x = x.const_data_ptr(),
      .residual = added == nullptr ? nullptr : added->const_data_ptr(),
      .dtype = dtype_of(x),
      .residual_dtype = added == nullptr ? DType::kFloat32 : dtype_of(*added),
      .scale = nullptr,
      .shift = nullptr,
      .period = 0,
      .compute_double = any_double({&x, &scale, &shift, added}),
      .stream = outgrows_caches(out.numel() * out.element_size()),
      .loop = plan_loop<P::kOperands>(x.sizes().data(), x.dim(), strides),
  };
  params.period = merge_channels(&params.loop, scale.numel());
  const ChannelVector scales(scale, params.period, params.compute_double);
  const ChannelVector shifts(shift, params.period, params.compute_double);
  params.scale = scales.data();
  params.shift = shifts.data();
  static const auto kernel = AFM_KERNEL(scale_shift_relu_forward);
  parallel_for(0, params.loop.numel, kGrain,
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> scale_shift_relu_backward_op(Tensor grad_output, Tensor output,
                                                        Tensor scale, bool wrt_x,
                                                        bool wrt_residual) {
  using P = ScaleShiftReluBackwardParams;
  const auto gradient = [&](bool wanted) {
    return wanted ? torch::stable::empty_like(output) : torch::stable::new_empty(output, {0});
  };
  Tensor grad_x = gradient(wrt_x), grad_residual = gradient(wrt_residual);
  if (output.numel() == 0 || !(wrt_x || wrt_residual)) return {grad_x, grad_residual};
  const auto counter = channel_strides(output.dim());
  const int64_t* output_strides = output.strides().data();
  const std::array<const int64_t*, P::kOperands> strides = {
      wrt_x ? grad_x.strides().data() : grad_residual.strides().data(), output_strides,
      grad_output.strides().data(), counter.data()};
  P params{
      .output = output.const_data_ptr(),
      .grad_output = grad_output.const_data_ptr(),
      .grad_x = wrt_x ? grad_x.mutable_data_ptr() : nullptr,
      .grad_residual = wrt_residual ? grad_residual.mutable_data_ptr() : nullptr,
      .dtype = dtype_of(output),
      .grad_output_dtype = dtype_of(grad_output),
      .scale = nullptr,
      .period = 0,
      .compute_double = any_double({&grad_output, &output, &scale}),
      .stream = outgrows_caches(((wrt_x ? 1 : 0) + (wrt_residual ? 1 : 0)) * output.numel() *
                                output.element_size()),
      .loop = plan_loop<P::kOperands>(output.sizes().data(), output.dim(), strides),
  };
  params.period = merge_channels(&params.loop, scale.numel());
  const ChannelVector scales(scale, params.period, params.compute_double);
  params.scale = scales.data();
  static const auto kernel = AFM_KERNEL(scale_shift_relu_backward);
  parallel_for(0, params.loop.numel, kGrain,
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return {grad_x, grad_residual};
}

}  // namespace afm::cpu

STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CPU, m) {
  m.impl("scale_shift_relu_forward", TORCH_BOX(&afm::cpu::scale_shift_relu_forward_op));
  m.impl("scale_shift_relu_backward", TORCH_BOX(&afm::cpu::scale_shift_relu_backward_op));
}
