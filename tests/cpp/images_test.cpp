// The image kernels without PyTorch (pgd_step, apgd_step, scale_shift_relu, conv3x3), as
// losses_test.cpp does the losses: every buffer is an allocation of its exact size, what lies
// between its elements keeps its sentinels, and values are compared with plain double-precision
// formulas.
//
//   images_test portable|avx2|avx512

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/images/apgd_step_kernel.h"
#include "cpu/images/conv3x3_kernel.h"
#include "cpu/images/pgd_step_kernel.h"
#include "cpu/images/scale_shift_relu_kernel.h"

using namespace afm;
using namespace afm::cpu;

namespace {

struct Kernels {
  decltype(&portable::apgd_linf) apgd_linf;
  decltype(&portable::apgd_l2) apgd_l2;
  decltype(&portable::conv3x3_block) conv3x3_block;
  decltype(&portable::pgd_linf) pgd_linf;
  decltype(&portable::pgd_l2_sums) pgd_l2_sums;
  decltype(&portable::pgd_l2_double_sums) pgd_l2_double_sums;
  decltype(&portable::pgd_l2_apply) pgd_l2_apply;
  decltype(&portable::pgd_grad_max) pgd_grad_max;
  decltype(&portable::scale_shift_relu_forward) forward;
  decltype(&portable::scale_shift_relu_backward) backward;
};

// Elements `stride` apart, in a block of exactly as many bytes as they need, `misalign` elements
// off the allocator's alignment.
struct Elements {
  DType dtype;
  int64_t count, stride, misalign;
  std::vector<char> bytes;

  Elements(DType dtype, int64_t count, int64_t stride, int64_t misalign)
      : dtype(dtype),
        count(count),
        stride(stride),
        misalign(misalign),
        bytes(static_cast<size_t>((misalign + (count - 1) * stride + 1) * bytes_of(dtype)),
              kSentinel) {
    bytes.shrink_to_fit();
  }
  Elements(const Elements& shape, double centre, double spread, Random& random)
      : Elements(shape.dtype, shape.count, shape.stride, shape.misalign) {
    for (int64_t i = 0; i < count; ++i) encode(centre + spread * random.normal(), at(i), dtype);
  }

  char* at(int64_t i) { return bytes.data() + (misalign + i * stride) * bytes_of(dtype); }
  double get(int64_t i) { return decode(at(i), dtype); }
  bool gaps_are_whole() {
    std::vector<char> used(bytes.size(), 0);
    for (int64_t i = 0; i < count; ++i)
      std::fill_n(used.begin() + (at(i) - bytes.data()), bytes_of(dtype), 1);
    for (size_t k = 0; k < bytes.size(); ++k)
      if (!used[k] && bytes[k] != kSentinel) return false;
    return true;
  }
};

// One rounding of the result, and a few of what it was made of.
double tolerance(DType dtype) {
  return dtype == DType::kBFloat16  ? 0x1p-8
         : dtype == DType::kFloat16 ? 0x1p-10
         : dtype == DType::kFloat32 ? 1e-6
                                    : 1e-13;
}

void expect_close(Elements& got, int64_t i, double wanted, double size, const char* what) {
  const double allowed = tolerance(got.dtype) * (std::fabs(wanted) + size * 1e-3) + 1e-7;
  expect(std::fabs(got.get(i) - wanted) <= allowed,
         std::string(what) + ": element " + std::to_string(i) + " of " + std::to_string(got.count) +
             ", dtype " + std::to_string(static_cast<int>(got.dtype)));
}

template <int N>
StridedLoop<N> line(int64_t count, int64_t stride) {
  StridedLoop<N> loop{};
  loop.ndim = 1, loop.numel = loop.sizes[0] = count;
  for (int k = 0; k < N; ++k) loop.strides[k][0] = stride;
  return loop;
}

double clamp(double x, double low, double high) { return std::fmin(std::fmax(x, low), high); }

void test_pgd_step(const Kernels& kernels, const Elements& shape, DType grad_dtype, bool in_place) {
  Random random;
  Elements x(shape, 0.5, 0.3, random), x_adv(shape, 0.5, 0.3, random), out(shape);
  const Elements grad_shape(grad_dtype, shape.count, shape.stride, shape.misalign);
  Elements grad(grad_shape, 0, 1e-3, random);
  Elements& target = in_place ? x_adv : out;
  std::vector<double> from(static_cast<size_t>(shape.count));
  for (int64_t i = 0; i < shape.count; ++i) from[static_cast<size_t>(i)] = x_adv.get(i);
  PgdParams params{};
  params.out = target.at(0), params.x_adv = x_adv.at(0), params.grad = grad.at(0);
  params.x = x.at(0), params.dtype = shape.dtype, params.grad_dtype = grad_dtype;
  params.loop = line<PgdParams::kOperands>(shape.count, shape.stride);
  params.step_size = 0.25, params.eps = 0.5, params.clip_min = 0, params.clip_max = 1;
  params.stream = !in_place;
  const int64_t half = shape.count / 2;
  kernels.pgd_linf(params, half, shape.count), kernels.pgd_linf(params, 0, half);
  for (int64_t i = 0; i < shape.count; ++i) {
    const double g = grad.get(i), d = g > 0 ? 0.25 : g < 0 ? -0.25 : g, pixel = x.get(i);
    const double moved = clamp(from[static_cast<size_t>(i)] + d, pixel - 0.5, pixel + 0.5);
    expect_close(target, i, clamp(moved, 0, 1), 1, "pgd_linf");
  }
  expect(target.gaps_are_whole(), "pgd_linf: sentinels");

  const int64_t none[PgdParams::kOperands] = {};
  for (int64_t i = 0; i < shape.count; ++i) from[static_cast<size_t>(i)] = x_adv.get(i);
  double gg = 0, dg = 0, dd = 0, largest = 0;
  for (int64_t i = 0; i < shape.count; ++i) {
    const double g = grad.get(i), d = from[static_cast<size_t>(i)] - x.get(i);
    gg += g * g, dg += d * g, dd += d * d, largest = std::fmax(largest, std::fabs(g));
  }
  const auto expect_sums = [&](const PgdSums& sums, double scale, double allowed) {
    const double gg_scaled = scale * scale * gg, size = std::sqrt(gg_scaled * dd);
    expect(std::fabs(sums.gg - gg_scaled) <= allowed * gg_scaled &&
               std::fabs(sums.dd - dd) <= allowed * dd &&
               std::fabs(sums.dg - scale * dg) <= allowed * size,
           "pgd_l2_sums, allowed " + std::to_string(allowed));
  };
  expect_sums(kernels.pgd_l2_sums(params, none, 0, shape.count), 1, 1e-6);
  expect_sums(kernels.pgd_l2_double_sums(params, none, 0, shape.count, 8), 8, 1e-13);
  expect(kernels.pgd_grad_max(params, none, 0, shape.count) == largest, "pgd_grad_max");
  for (double shrink : {1.0, 0.5}) {
    for (int64_t i = 0; i < shape.count; ++i) from[static_cast<size_t>(i)] = x_adv.get(i);
    kernels.pgd_l2_apply(params, none, 0, shape.count, 100, 1, shrink);
    for (int64_t i = 0; i < shape.count; ++i) {
      const double pixel = x.get(i), moved = from[static_cast<size_t>(i)] + 100 * grad.get(i);
      expect_close(target, i, clamp(pixel + (moved - pixel) * shrink, 0, 1), 1, "pgd_l2_apply");
    }
  }
  expect(target.gaps_are_whole(), "pgd_l2_apply: sentinels");
}

void test_apgd_step(const Kernels& kernels, const Elements& shape, DType grad_dtype) {
  Random random;
  Elements x(shape, 0.5, 0.3, random), at(shape, 0.5, 0.3, random), old(shape, 0.5, 0.3, random);
  const Elements grad_shape(grad_dtype, shape.count, 1, shape.misalign);
  Elements grad(grad_shape, 0, 1e-3, random);
  const ApgdParams params{shape.dtype, grad_dtype, 0.5, 0, 1, 0.25};
  const ApgdImage image{at.at(0), grad.at(0), x.at(0), old.at(0), 0.25};
  const int64_t count = shape.count;
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) squares += grad.get(i) * grad.get(i);
  for (bool linf : {true, false}) {
    const auto project = [&](const std::vector<double>& z) {
      std::vector<double> result(z.size());
      double length = 0;
      for (int64_t i = 0; i < count; ++i) length += std::pow(z[i] - x.get(i), 2);
      const double shrink = std::fmin(1, 0.5 / std::sqrt(length));
      for (int64_t i = 0; i < count; ++i) {
        const double pixel = x.get(i), d = z[i] - pixel;
        result[i] = clamp(pixel + (linf ? clamp(d, -0.5, 0.5) : d * shrink), 0, 1);
      }
      return result;
    };
    std::vector<double> from(static_cast<size_t>(count)), mixed(from);
    for (int64_t i = 0; i < count; ++i) {
      const double g = grad.get(i);
      const double direction = linf ? (g > 0) - (g < 0) : g / std::sqrt(squares);
      from[i] = at.get(i) + 0.25 * direction;
    }
    const std::vector<double> moved = project(from);
    for (int64_t i = 0; i < count; ++i)
      mixed[i] = at.get(i) + 0.75 * (moved[i] - at.get(i)) + 0.25 * (at.get(i) - old.get(i));
    const std::vector<double> next = project(mixed);
    if (linf)
      kernels.apgd_linf(params, image, count / 2, count),
          kernels.apgd_linf(params, image, 0, count / 2);
    else
      kernels.apgd_l2(params, image, count);
    for (int64_t i = 0; i < count; ++i)
      expect_close(old, i, next[i], 1, linf ? "apgd_linf" : "apgd_l2");
    expect(old.gaps_are_whole(), "apgd_step: sentinels");
  }
}

// `channels`: 0 where the channel stands still along the run.
void test_scale_shift_relu(const Kernels& kernels, const Elements& shape, DType other_dtype,
                           int64_t channels, bool stream) {
  using P = ScaleShiftReluParams;
  using B = ScaleShiftReluBackwardParams;
  Random random;
  const bool is_double = shape.dtype == DType::kFloat64 || other_dtype == DType::kFloat64;
  const int64_t period = channels == 0 ? 1 : channels;
  const Elements vector(is_double ? DType::kFloat64 : DType::kFloat32, period, 1, 0);
  Elements scale(vector, 0, 1, random), shift(vector, 0, 1, random);
  const Elements other_shape(other_dtype, shape.count, shape.stride, shape.misalign);
  Elements x(shape, 0, 1, random), residual(other_shape, 0, 1, random), out(shape);
  const int64_t half = shape.count / 2;
  for (bool added : {false, true}) {
    P params{};
    params.out = out.at(0), params.x = x.at(0), params.residual = added ? residual.at(0) : nullptr;
    params.dtype = shape.dtype, params.residual_dtype = other_dtype;
    params.scale = scale.at(0), params.shift = shift.at(0), params.period = period;
    params.compute_double = is_double, params.stream = stream;
    params.loop = line<P::kOperands>(shape.count, shape.stride);
    params.loop.strides[P::kChannel][0] = channels == 0 ? 0 : 1;
    kernels.forward(params, half, shape.count), kernels.forward(params, 0, half);
    for (int64_t i = 0; i < shape.count; ++i) {
      const double sum =
          x.get(i) * scale.get(i % period) + shift.get(i % period) + (added ? residual.get(i) : 0);
      expect_close(out, i, std::fmax(sum, 0), 1e3, "scale_shift_relu");
    }
  }
  expect(out.gaps_are_whole(), "scale_shift_relu: sentinels");

  Elements grad_x(shape), grad_residual(shape);
  B params{};
  params.output = out.at(0), params.grad_output = residual.at(0);
  params.grad_x = grad_x.at(0), params.grad_residual = grad_residual.at(0);
  params.dtype = shape.dtype, params.grad_output_dtype = other_dtype;
  params.scale = scale.at(0), params.period = period, params.compute_double = is_double;
  params.stream = stream;
  params.loop = line<B::kOperands>(shape.count, shape.stride);
  params.loop.strides[B::kChannel][0] = channels == 0 ? 0 : 1;
  kernels.backward(params, half, shape.count), kernels.backward(params, 0, half);
  for (int64_t i = 0; i < shape.count; ++i) {
    const double grad = out.get(i) <= 0 ? 0 : residual.get(i);
    expect_close(grad_residual, i, grad, 1e3, "scale_shift_relu by the residual");
    expect_close(grad_x, i, grad * scale.get(i % period), 1e3, "scale_shift_relu by x");
  }
  expect(grad_x.gaps_are_whole() && grad_residual.gaps_are_whole(),
         "scale_shift_relu by x: sentinels");
}

struct Convolution {
  int64_t images, height, width, in_channels, out_channels;
  bool gated, biased, added, relu, reversed;
};

// The output channels from `split` on are another call's, and untouched by the first.
void test_conv3x3(const Kernels& kernels, const Convolution& c, int64_t block, int64_t split) {
  using P = Conv3x3Params;
  Random random;
  const auto fill = [&](int64_t count) {
    Elements elements(DType::kFloat32, count, 1, 0);
    return Elements(elements, 0, 1, random);
  };
  const int64_t pixels = c.images * c.height * c.width, gap = 3;  // between the rows of the weight
  const int64_t tap_stride = c.out_channels + gap, weight_stride = 9 * tap_stride + gap;
  Elements x = fill(pixels * c.in_channels), gate = fill(pixels * c.in_channels);
  Elements weight = fill((c.in_channels - 1) * weight_stride + 8 * tap_stride + c.out_channels);
  Elements bias = fill(c.out_channels), residual = fill(pixels * c.out_channels);
  Elements out(DType::kFloat32, pixels * c.out_channels, 1, 0);
  const auto floats = [](Elements& e, bool is_there) {
    return is_there ? reinterpret_cast<float*>(e.at(0)) : nullptr;
  };
  P params{};
  params.out = floats(out, true), params.x = floats(x, true), params.gate = floats(gate, c.gated);
  params.weight = floats(weight, true), params.bias = floats(bias, c.biased);
  params.residual = floats(residual, c.added), params.relu = c.relu;
  params.reverse_taps = c.reversed;
  params.weight_stride = weight_stride, params.tap_stride = tap_stride;
  params.images = c.images, params.height = c.height, params.width = c.width;
  params.in_channels = c.in_channels, params.out_channels = c.out_channels;
  params.tile_rows = (c.height + P::kTile - 1) / P::kTile;
  params.tile_columns = (c.width + P::kTile - 1) / P::kTile;
  params.block = block;
  ScratchBlock scratch(params.scratch_floats() * 4);
  const int64_t blocks = (params.tiles() + block - 1) / block;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < blocks && begin < end; ++i)
      kernels.conv3x3_block(params, i, begin, end, static_cast<float*>(scratch.data));
  };
  run(0, split);
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t n = split; n < c.out_channels; ++n)
      for (int k = 0; k < 4; ++k)
        expect(out.at(i * c.out_channels + n)[k] == kSentinel, "conv3x3: another call's channel");
  run(split, c.out_channels);

  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t column = i % c.width, row = i / c.width % c.height;
    for (int64_t n = 0; n < c.out_channels; ++n) {
      double sum = c.biased ? bias.get(n) : 0, size = 0;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t dy = tap / 3 - 1, dx = tap % 3 - 1;
        if (row + dy < 0 || row + dy >= c.height || column + dx < 0 || column + dx >= c.width)
          continue;
        const int64_t from = (i + dy * c.width + dx) * c.in_channels;
        const int64_t place = (c.reversed ? 8 - tap : tap) * tap_stride + n;
        for (int64_t k = 0; k < c.in_channels; ++k) {
          const double value = c.gated && gate.get(from + k) <= 0 ? 0 : x.get(from + k);
          const double product = value * weight.get(k * weight_stride + place);
          sum += product, size += std::fabs(product);
        }
      }
      if (c.added) sum += residual.get(i * c.out_channels + n);
      if (c.relu) sum = std::fmax(sum, 0);
      expect(std::fabs(out.get(i * c.out_channels + n) - sum) <= 2e-6 * size + 1e-5,
             "conv3x3: " + std::to_string(c.images) + " x " + std::to_string(c.height) + " x " +
                 std::to_string(c.width) + ", channels " + std::to_string(c.in_channels) + " to " +
                 std::to_string(c.out_channels) + ", pixel " + std::to_string(i) + ", channel " +
                 std::to_string(n));
    }
  }
}

void test_all(const Kernels& kernels) {
  constexpr DType f32 = DType::kFloat32, f64 = DType::kFloat64, f16 = DType::kFloat16,
                  bf16 = DType::kBFloat16;
  const DType pairs[][2] = {{f32, f32},  {f64, f64},  {bf16, bf16}, {f16, f16},
                            {f32, bf16}, {bf16, f32}, {f16, f64}};
  // One vector and its neighbours, and a block of elements and more.
  for (const auto& pair : pairs)
    for (int64_t count : {1, 3, 8, 15, 16, 17, 33, 64, 511, 512, 513, 1300})
      for (int64_t stride : {1, 2}) {
        const Elements shape(pair[0], count, stride, count % 3);
        test_pgd_step(kernels, shape, pair[1], false), test_pgd_step(kernels, shape, pair[1], true);
        if (stride == 1) test_apgd_step(kernels, shape, pair[1]);
        for (bool stream : {false, true}) {
          test_scale_shift_relu(kernels, shape, pair[1], 0, stream);
          if (stride == 1) test_scale_shift_relu(kernels, shape, pair[1], 520, stream);
        }
      }

  // Whole tiles and parts of them; slices of input channels, panels of output channels.
  const int64_t sizes[][3] = {{1, 1, 1}, {1, 4, 4}, {2, 5, 3}, {1, 9, 8}, {3, 4, 7}};
  const int64_t channels[][2] = {{16, 16}, {48, 32}, {64, 48}, {80, 96}};
  int option = 0;
  for (const auto& size : sizes)
    for (const auto& channel : channels) {
      ++option;
      const Convolution c{size[0],        size[1],         size[2],         channel[0],
                          channel[1],     option % 2 == 0, option % 3 != 0, option % 5 < 2,
                          option % 4 < 2, option % 2 == 0};
      const int64_t split = channel[1] > Conv3x3Params::kPanel ? Conv3x3Params::kPanel : channel[1];
      test_conv3x3(kernels, c, option % 3 == 0 ? 16 : 8, split);
    }
}

}  // namespace

int main(int argc, char** argv) {
#define AFM_KERNELS_OF(NAME)              \
  Kernels{NAME::apgd_linf,                \
          NAME::apgd_l2,                  \
          NAME::conv3x3_block,            \
          NAME::pgd_linf,                 \
          NAME::pgd_l2_sums,              \
          NAME::pgd_l2_double_sums,       \
          NAME::pgd_l2_apply,             \
          NAME::pgd_grad_max,             \
          NAME::scale_shift_relu_forward, \
          NAME::scale_shift_relu_backward}
  AFM_RUN_CAPABILITY(argc, argv, test_all, AFM_KERNELS_OF)
}
