// The operators of 3x3 convolution in float32. Definition: afm_kernels/reference/conv3x3.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "cpu/dispatch/dispatch.h"
#include "cpu/images/conv3x3_kernel.h"
#include "cpu/images/images.h"
#include "cpu/layout/tensors.h"

namespace afm::cpu {

namespace {

using P = Conv3x3Params;

// Multiplications below which a second thread costs more than it saves, by estimate.
constexpr int64_t kSerial = 1 << 20;

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

// `t` must be an image as large as `like`, with `channels`.
void check_like(const char* name, const Tensor& t, const Tensor& like, int64_t channels) {
  check_image_of(name, t, {like.size(0), channels, like.size(2), like.size(3)});
}

// How the work is cut: blocks of tiles small enough for the caches and as many for each thread;
// where tiles are few, the output channels of a block go to several threads.
struct Plan {
  Plan(int64_t tiles, int64_t in_channels, int64_t out_channels, int64_t threads) {
    const int64_t most = std::clamp<int64_t>(kBlockFloats / in_channels, 16, 64);
    const int64_t rounds = divide_up(tiles, threads * most);
    block = round_up(divide_up(tiles, threads * rounds), P::kRowGroup);
    if (block < kWorthwhile)
      block = std::min(round_up(most, P::kRowGroup), round_up(tiles, P::kRowGroup));
    blocks = divide_up(tiles, block);
    const int64_t panels = divide_up(out_channels, P::kPanel);
    splits = std::min(divide_up(threads, blocks), panels);
    channels = divide_up(panels, splits) * P::kPanel;
  }

  // V of a block in floats for each of the 36 points, and the tiles that pay for making U; both
  // from 64 channels at 32x32 to 512 at 4x4 on AVX-512 with 2 MB of second-level cache. The V of
  // 512 channels is twice as large as that cache and is read ahead of its use; making U for half
  // as many tiles costs a tenth more.
  static constexpr int64_t kBlockFloats = 32768;
  static constexpr int64_t kWorthwhile = 32;

  int64_t block, blocks;     // tiles of a block; blocks
  int64_t splits, channels;  // tasks of a block; output channels of each
};

// x convolved with a weight of which `in` and `out` are the dimensions of input and output
// channels.
Tensor convolve(const Tensor& x, const Tensor& weight, int in, int out, Conv3x3Params params) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      dtype_of(weight) == DType::kFloat32 && weight.size(in) == x.size(1),
                  "weight must be float32 and of shape (out, in, 3, 3) with the image's channels");
  STD_TORCH_CHECK(weight.stride(out) == 1 && weight.stride(2) == 3 * weight.stride(3),
                  "weight must be dense along dimension ", out, " and have its taps in order");
  const int64_t out_channels = weight.size(out);
  STD_TORCH_CHECK(out_channels % P::kChannels == 0, "weight has size ", out_channels,
                  " in dimension ", out, "; allowed: multiples of ", P::kChannels);
  Tensor result = empty_channels_last({x.size(0), out_channels, x.size(2), x.size(3)});
  params.out = static_cast<float*>(result.mutable_data_ptr());
  params.x = static_cast<const float*>(x.const_data_ptr());
  params.weight = static_cast<const float*>(weight.const_data_ptr());
  params.weight_stride = weight.stride(in), params.tap_stride = weight.stride(3);
  params.images = x.size(0), params.in_channels = x.size(1), params.out_channels = out_channels;
  params.height = x.size(2), params.width = x.size(3);
  params.tile_rows = divide_up(params.height, P::kTile);
  params.tile_columns = divide_up(params.width, P::kTile);
  const int64_t tiles = params.tiles();
  if (tiles == 0) return result;
  const bool serial = P::kPoints * tiles * params.in_channels * out_channels < kSerial;
  const Plan plan(tiles, params.in_channels, out_channels, serial ? 1 : num_threads());
  params.block = plan.block;
  static const auto kernel = AFM_KERNEL(conv3x3_block);
  parallel_for(0, plan.blocks * plan.splits, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(params.scratch_floats() * static_cast<int64_t>(sizeof(float)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task % plan.splits * plan.channels;
      kernel(params, task / plan.splits, channel, std::min(channel + plan.channels, out_channels),
             static_cast<float*>(scratch.get()));
    }
  });
  return result;
}

Tensor conv3x3_forward_op(Tensor x, Tensor weight, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, bool relu) {
  check_image("x", x, P::kChannels);
  STD_TORCH_CHECK(!bias || (dtype_of(*bias) == DType::kFloat32 && bias->is_contiguous() &&
                            bias->numel() == weight.size(0)),
                  "bias must be float32 and contiguous, one for each output channel");
  if (residual) check_like("residual", *residual, x, weight.size(0));
  Conv3x3Params params{};
  params.bias = floats(bias), params.residual = floats(residual), params.relu = relu;
  return convolve(x, weight, 1, 0, params);
}

Tensor conv3x3_input_grad_op(Tensor grad_output, std::optional<Tensor> output, Tensor weight,
                             std::optional<Tensor> added, std::optional<Tensor> input) {
  check_image("grad_output", grad_output, P::kChannels);
  if (output) check_like("output", *output, grad_output, grad_output.size(1));
  if (added) check_like("added", *added, grad_output, weight.size(1));
  if (input) check_like("input", *input, grad_output, weight.size(1));
  Conv3x3Params params{};
  params.gate = floats(output), params.residual = floats(added), params.out_gate = floats(input);
  params.reverse_taps = true;
  return convolve(grad_output, weight, 0, 1, params);
}

}  // namespace

}  // namespace afm::cpu

STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CPU, m) {
  m.impl("conv3x3_forward", TORCH_BOX(&afm::cpu::conv3x3_forward_op));
  m.impl("conv3x3_input_grad", TORCH_BOX(&afm::cpu::conv3x3_input_grad_op));
}
