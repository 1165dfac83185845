// The operators of convolution of small images in float32. Definition:
// afm_kernels/reference/small_conv.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/dispatch/dispatch.h"
#include "cpu/images/small_conv_kernel.h"
#include "cpu/images/images.h"
#include "cpu/layout/tensors.h"

namespace afm::cpu {

namespace {

using P = SmallConvParams;

// Multiplications below which a second thread costs more than it saves, by estimate.
constexpr int64_t kSerial = 1 << 18;

// What both operators have in common: the weight, whose taps are in order, and the geometry.
void set_weight(P& p, const Tensor& weight, int dense, const char* along, int64_t stride,
                int64_t padding) {
  STD_TORCH_CHECK(weight.dim() == 4 && dtype_of(weight) == DType::kFloat32,
                  "weight must be float32 and of shape (out, in, height, width)");
  STD_TORCH_CHECK((weight.stride(dense) == 1 || weight.size(dense) == 1) &&
                      weight.stride(2) == weight.size(3) * weight.stride(3),
                  "weight must be dense along its ", along, " channels and have its taps in order");
  STD_TORCH_CHECK(weight.size(2) * weight.size(3) <= P::kMaxTaps, "weight has ",
                  weight.size(2) * weight.size(3), " taps; allowed: at most ", P::kMaxTaps);
  STD_TORCH_CHECK(stride >= 1 && padding >= 0,
                  "stride must be at least 1 and padding at least 0, got ", stride, " and ",
                  padding);
  p.weight = static_cast<const float*>(weight.const_data_ptr());
  p.weight_stride = weight.stride(1 - dense), p.tap_stride = weight.stride(3);
  p.kernel_height = weight.size(2), p.kernel_width = weight.size(3);
  p.stride = stride, p.padding = padding;
}

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return (size + 2 * padding - kernel) / stride + 1;
}

Tensor run(P& p, const Tensor& x) {
  Tensor result = empty_channels_last({p.images, p.out_channels, p.out_height, p.out_width});
  p.out = static_cast<float*>(result.mutable_data_ptr());
  p.x = static_cast<const float*>(x.const_data_ptr());
  const int64_t groups = (p.images + P::kImages - 1) / P::kImages;
  const int64_t tasks = groups * p.out_height;
  const int64_t work = p.images * p.out_height * p.out_width * p.out_channels * p.channels *
                       p.kernel_height * p.kernel_width;
  static const auto kernel = AFM_KERNEL(small_conv_row);
  parallel_for(0, tasks, work < kSerial ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      kernel(p, task / p.out_height * P::kImages, task % p.out_height);
  });
  return result;
}

Tensor small_conv_forward_op(Tensor x, Tensor weight, std::optional<Tensor> bias,
                             std::optional<Tensor> residual, bool relu, int64_t stride,
                             int64_t padding) {
  check_image("x", x);
  P p{};
  set_weight(p, weight, 0, "output", stride, padding);
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "weight is for ", weight.size(1),
                  " channels, and x has ", x.size(1));
  STD_TORCH_CHECK(!bias || (dtype_of(*bias) == DType::kFloat32 && bias->is_contiguous() &&
                            bias->numel() == weight.size(0)),
                  "bias must be float32 and contiguous, one for each output channel");
  p.images = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.out_channels = weight.size(0);
  STD_TORCH_CHECK(
      p.height + 2 * padding >= p.kernel_height && p.width + 2 * padding >= p.kernel_width,
      "x is smaller than the weight");
  p.out_height = out_size(p.height, p.kernel_height, stride, padding);
  p.out_width = out_size(p.width, p.kernel_width, stride, padding);
  if (residual)
    check_image_of("residual", *residual, {p.images, p.out_channels, p.out_height, p.out_width});
  p.bias = floats(bias), p.residual = floats(residual), p.relu = relu;
  return run(p, x);
}

Tensor small_conv_input_grad_op(Tensor grad_output, Tensor weight, std::optional<Tensor> added,
                                std::optional<Tensor> input, int64_t height, int64_t width,
                                int64_t stride, int64_t padding) {
  check_image("grad_output", grad_output);
  const int64_t in_channels = weight.dim() == 4 ? weight.size(1) : 0;
  const bool thin = in_channels <= P::kThin;
  P p{};
  set_weight(p, weight, thin ? 0 : 1, thin ? "output" : "input", stride, padding);
  STD_TORCH_CHECK(weight.size(0) == grad_output.size(1), "weight is for ", weight.size(0),
                  " channels, and grad_output has ", grad_output.size(1));
  p.images = grad_output.size(0), p.channels = grad_output.size(1);
  p.height = grad_output.size(2), p.width = grad_output.size(3);
  p.out_channels = in_channels, p.out_height = height, p.out_width = width;
  STD_TORCH_CHECK(height + 2 * padding >= p.kernel_height &&
                      width + 2 * padding >= p.kernel_width &&
                      out_size(height, p.kernel_height, stride, padding) == p.height &&
                      out_size(width, p.kernel_width, stride, padding) == p.width,
                  "grad_output of ", p.height, " x ", p.width, " does not belong to an input of ",
                  height, " x ", width);
  const int64_t sizes[] = {p.images, in_channels, height, width};
  if (added) check_image_of("added", *added, sizes);
  if (input) check_image_of("input", *input, sizes);
  p.residual = floats(added), p.gate = floats(input), p.is_gradient = true;
  return run(p, grad_output);
}

}  // namespace

}  // namespace afm::cpu

STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CPU, m) {
  m.impl("small_conv_forward", TORCH_BOX(&afm::cpu::small_conv_forward_op));
  m.impl("small_conv_input_grad", TORCH_BOX(&afm::cpu::small_conv_input_grad_op));
}
