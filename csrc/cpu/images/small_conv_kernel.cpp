#include "cpu/images/small_conv_kernel.h"

#include "cpu/vec/vec.h"

namespace afm::cpu::AFM_CAPABILITY {

namespace {

using P = SmallConvParams;
using V = Vec<float>;

constexpr int kWidth = V::width;

// Images whose sums are in registers at once, beside two vectors of channels: 16 of the 32
// registers of AVX-512, 8 of the 16 of others.
#if AFM_CAPABILITY_AVX512
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
static_assert(P::kImages % kRows == 0, "a task is cut into whole groups");

// A tap that falls inside: where its pixel and its weights begin.
struct Tap {
  int64_t x, weight;
};

// The taps between pixel (row, column) of the result and the pixels of x.
AFM_INLINE int taps_of(const P& p, int64_t row, int64_t column, Tap* taps) {
  int count = 0;
  for (int64_t i = 0; i < p.kernel_height; ++i) {
    for (int64_t j = 0; j < p.kernel_width; ++j) {
      int64_t y, x;
      if (p.is_gradient) {
        const int64_t up = row + p.padding - i, left = column + p.padding - j;
        if (up < 0 || left < 0 || up % p.stride != 0 || left % p.stride != 0) continue;
        y = up / p.stride, x = left / p.stride;
      } else {
        y = row * p.stride - p.padding + i, x = column * p.stride - p.padding + j;
        if (y < 0 || x < 0) continue;
      }
      if (y >= p.height || x >= p.width) continue;
      taps[count++] = {(y * p.width + x) * p.channels, (i * p.kernel_width + j) * p.tap_stride};
    }
  }
  return count;
}

// As many lanes as there are channels left: all, but for the last vector of a row of channels.
template <bool kWhole>
AFM_INLINE V load(const float* p, int lanes) {
  return kWhole ? V::load(p) : V::load(p, lanes, V(0.0f));
}

template <bool kWhole>
AFM_INLINE void finish(const P& p, int64_t offset, V value, int lanes) {
  if (p.residual != nullptr) value = value + load<kWhole>(p.residual + offset, lanes);
  // A NaN fails the comparisons and stays.
  if (p.relu) value = select(value <= V(0.0f), V(0.0f), value);
  if (p.gate != nullptr)
    value = select(load<kWhole>(p.gate + offset, lanes) <= V(0.0f), V(0.0f), value);
  if (kWhole)
    value.store(p.out + offset);
  else
    value.store(p.out + offset, lanes);
}

// One pixel of kCount images, from x and out of the first of them, at kWhole vectors of channels
// and, where kPart, some lanes of another.
template <int kCount, int kWhole, bool kPart>
AFM_INLINE void pixel(const P& p, const Tap* taps, int count, int64_t first_x, int64_t first_out,
                      int64_t channel, int lanes) {
  constexpr int kVectors = kWhole + kPart;
  const int64_t x_stride = p.height * p.width * p.channels;
  const int64_t out_stride = p.out_height * p.out_width * p.out_channels;
  const auto vectors = [lanes](const float* from, V* to) AFM_LAMBDA_INLINE {
    for (int i = 0; i < kWhole; ++i) to[i] = V::load(from + i * kWidth);
    if (kPart) to[kVectors - 1] = load<false>(from + kWhole * kWidth, lanes);
  };
  V sum[kCount][kVectors], w[kVectors];
  for (int i = 0; i < kVectors; ++i) w[i] = V(0.0f);
  if (p.bias != nullptr) vectors(p.bias + channel, w);
  for (int r = 0; r < kCount; ++r)
    for (int i = 0; i < kVectors; ++i) sum[r][i] = w[i];
  for (int t = 0; t < count; ++t) {
    const float* x = p.x + first_x + taps[t].x;
    const float* weight = p.weight + taps[t].weight + channel;
    for (int64_t k = 0; k < p.channels; ++k, weight += p.weight_stride) {
      vectors(weight, w);
      for (int r = 0; r < kCount; ++r)
        for (int i = 0; i < kVectors; ++i) sum[r][i] = fma(V(x[r * x_stride + k]), w[i], sum[r][i]);
    }
  }
  for (int r = 0; r < kCount; ++r) {
    const int64_t offset = first_out + r * out_stride + channel;
    for (int i = 0; i < kWhole; ++i) finish<true>(p, offset + i * kWidth, sum[r][i], kWidth);
    if (kPart) finish<false>(p, offset + kWhole * kWidth, sum[r][kVectors - 1], lanes);
  }
}

template <bool kWhole, int kCount, int kOut>
AFM_INLINE void thin_sum(const P& p, const float* x, const float* weight, int64_t x_stride,
                         int lanes, V (&sum)[kCount][kOut]) {
  V w[kOut];
  for (int n = 0; n < kOut; ++n) w[n] = load<kWhole>(weight + n * p.weight_stride, lanes);
  for (int r = 0; r < kCount; ++r) {
    const V value = load<kWhole>(x + r * x_stride, lanes);
    for (int n = 0; n < kOut; ++n) sum[r][n] = fma(value, w[n], sum[r][n]);
  }
}

// The same with kOut channels of the result, and lanes across those of x.
template <int kCount, int kOut>
AFM_INLINE void thin_pixel(const P& p, const Tap* taps, int count, int64_t first_x,
                           int64_t first_out) {
  const int64_t x_stride = p.height * p.width * p.channels;
  const int64_t out_stride = p.out_height * p.out_width * p.out_channels;
  V sum[kCount][kOut];
  for (int r = 0; r < kCount; ++r)
    for (int n = 0; n < kOut; ++n) sum[r][n] = V(0.0f);
  for (int t = 0; t < count; ++t) {
    const float* x = p.x + first_x + taps[t].x;
    const float* weight = p.weight + taps[t].weight;
    int64_t k = 0;
    for (; k + kWidth <= p.channels; k += kWidth)
      thin_sum<true, kCount, kOut>(p, x + k, weight + k, x_stride, kWidth, sum);
    if (k < p.channels)
      thin_sum<false, kCount, kOut>(p, x + k, weight + k, x_stride,
                                    static_cast<int>(p.channels - k), sum);
  }
  for (int r = 0; r < kCount; ++r)
    for (int n = 0; n < kOut; ++n) {
      const int64_t offset = first_out + r * out_stride + n;
      float value = sum[r][n].sum();
      if (p.residual != nullptr) value += p.residual[offset];
      if (p.gate != nullptr && p.gate[offset] <= 0.0f) value = 0.0f;
      p.out[offset] = value;
    }
}

template <int kCount, int kWhole, bool kPart>
AFM_INLINE void row_of_images(const P& p, int64_t first, int64_t row, int64_t channel,
                              int lanes = 0) {
  const int64_t first_x = first * p.height * p.width * p.channels;
  for (int64_t column = 0; column < p.out_width; ++column) {
    Tap taps[P::kMaxTaps];
    const int count = taps_of(p, row, column, taps);
    const int64_t out = ((first * p.out_height + row) * p.out_width + column) * p.out_channels;
    pixel<kCount, kWhole, kPart>(p, taps, count, first_x, out, channel, lanes);
  }
}

template <int kCount>
AFM_INLINE void thin_row_of_images(const P& p, int64_t first, int64_t row) {
  const int64_t first_x = first * p.height * p.width * p.channels;
  for (int64_t column = 0; column < p.out_width; ++column) {
    Tap taps[P::kMaxTaps];
    const int count = taps_of(p, row, column, taps);
    const int64_t out = ((first * p.out_height + row) * p.out_width + column) * p.out_channels;
    switch (p.out_channels) {
      case 1:
        thin_pixel<kCount, 1>(p, taps, count, first_x, out);
        break;
      case 2:
        thin_pixel<kCount, 2>(p, taps, count, first_x, out);
        break;
      case 3:
        thin_pixel<kCount, 3>(p, taps, count, first_x, out);
        break;
      default:
        thin_pixel<kCount, 4>(p, taps, count, first_x, out);
    }
  }
}

template <int kCount>
AFM_INLINE void images(const P& p, int64_t first, int64_t row) {
  if (p.thin()) return thin_row_of_images<kCount>(p, first, row);
  int64_t channel = 0;
  for (; channel + 2 * kWidth <= p.out_channels; channel += 2 * kWidth)
    row_of_images<kCount, 2, false>(p, first, row, channel);
  const int rest = static_cast<int>(p.out_channels - channel);
  if (rest > kWidth)
    row_of_images<kCount, 1, true>(p, first, row, channel, rest - kWidth);
  else if (rest == kWidth)
    row_of_images<kCount, 1, false>(p, first, row, channel);
  else if (rest > 0)
    row_of_images<kCount, 0, true>(p, first, row, channel, rest);
}

}  // namespace

void small_conv_row(const P& p, int64_t first, int64_t row) {
  const int64_t end = first + P::kImages < p.images ? first + P::kImages : p.images;
  for (; first + kRows <= end; first += kRows) images<kRows>(p, first, row);
  for (; first < end; ++first) images<1>(p, first, row);
}

}  // namespace afm::cpu::AFM_CAPABILITY
