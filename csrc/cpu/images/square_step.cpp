// The operator of Square Attack's step. Definition: afm_kernels/reference/square_step.py.
// It moves elements and computes nothing with them, so that there is no kernel unit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <iterator>
#include <limits>

#include "cpu/dispatch/dispatch.h"
#include "cpu/layout/tensors.h"

namespace afm::cpu {

namespace {

// Elements below which a second thread costs more than it saves, by estimate.
constexpr int64_t kGrain = 16384;

struct Image {
  int64_t channels, height, width;
  int64_t image_stride, channel_stride, row_stride, column_stride;
};

struct Square {
  int64_t top, left, side;
};

// f(offset) at the start of each row of a square, in one channel.
template <class F>
void for_each_row(const Image& image, const Square& square, int64_t channel, const F& f) {
  for (int64_t row = square.top; row < square.top + square.side; ++row)
    f(channel * image.channel_stride + row * image.row_stride + square.left * image.column_stride);
}

template <class E>
void copy_row(E* to, const E* from, const Image& image, int64_t side) {
  if (image.column_stride == 1) {
    std::copy_n(from, side, to);
  } else {
    for (int64_t i = 0; i < side; ++i) to[i * image.column_stride] = from[i * image.column_stride];
  }
}

// Of one image.
template <class E>
struct Points {
  E *x_adv, *x_best;
  const E *high, *low;
};

template <class E>
void step(const Points<E>& points, const Image& image, bool better, const Square& last,
          const Square& next, const bool* is_high) {
  E* const to = better ? points.x_best : points.x_adv;
  const E* const from = better ? points.x_adv : points.x_best;
  for (int64_t c = 0; c < image.channels; ++c) {
    for_each_row(image, last, c,
                 [&](int64_t at) { copy_row(to + at, from + at, image, last.side); });
    const E* const edge = is_high[c] ? points.high : points.low;
    for_each_row(image, next, c,
                 [&](int64_t at) { copy_row(points.x_adv + at, edge + at, image, next.side); });
  }
}

template <class Z>
double margin_of(const Z* logits, int64_t classes, int64_t label) {
  double other = -std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < classes; ++k) {
    if (k == label) continue;
    if (logits[k] != logits[k]) return std::numeric_limits<double>::quiet_NaN();
    other = std::max(other, static_cast<double>(logits[k]));
  }
  return static_cast<double>(logits[label]) - other;
}

struct Arguments {
  void *x_adv, *x_best;
  const void *high, *low, *logits;
  double* margin;
  const int64_t *labels, *last_corners, *corners;
  const bool* is_high;
  int64_t images, classes, last_side, side;
  bool double_logits;
};

template <class E>
void run(const Arguments& a, const Image& image) {
  const int64_t touched = image.channels * (a.last_side * a.last_side + a.side * a.side);
  const int64_t grain = std::max<int64_t>(1, kGrain / (touched + a.classes));
  parallel_for(0, a.images, grain, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      const double found = a.double_logits
                               ? margin_of(static_cast<const double*>(a.logits) + i * a.classes,
                                           a.classes, a.labels[i])
                               : margin_of(static_cast<const float*>(a.logits) + i * a.classes,
                                           a.classes, a.labels[i]);
      const bool better = found < a.margin[i] && a.margin[i] > 0;
      if (better) a.margin[i] = found;
      const int64_t at = i * image.image_stride;
      const Points<E> points{static_cast<E*>(a.x_adv) + at, static_cast<E*>(a.x_best) + at,
                             static_cast<const E*>(a.high) + at, static_cast<const E*>(a.low) + at};
      step(points, image, better,
           Square{a.last_corners[2 * i], a.last_corners[2 * i + 1], a.last_side},
           Square{a.corners[2 * i], a.corners[2 * i + 1], a.side}, a.is_high + i * image.channels);
    }
  });
}

void check_indices(const Arguments& a, const Image& image) {
  const auto fits = [&](const int64_t* corner, int64_t side) {
    return corner[0] >= 0 && corner[0] <= image.height - side && corner[1] >= 0 &&
           corner[1] <= image.width - side;
  };
  for (int64_t i = 0; i < a.images; ++i) {
    STD_TORCH_CHECK(a.labels[i] >= 0 && a.labels[i] < a.classes, "labels holds ", a.labels[i],
                    "; allowed: 0 to ", a.classes - 1);
    STD_TORCH_CHECK(fits(a.last_corners + 2 * i, a.last_side) && fits(a.corners + 2 * i, a.side),
                    "corners: a square of image ", i, " does not lie within the image");
  }
}

}  // namespace

void square_step(Tensor x_adv, Tensor x_best, Tensor margin, Tensor logits, Tensor labels,
                 Tensor high, Tensor low, Tensor last_corners, Tensor corners, Tensor is_high,
                 int64_t last_side, int64_t side) {
  // See Note [Tensors to write] in afm_kernels/functional/out.py.
  const Tensor* tensors[] = {&x_adv, &x_best, &margin,       &logits,  &labels,
                             &high,  &low,    &last_corners, &corners, &is_high};
  constexpr int kWritten = 3;
  bool can_be_written = true;
  for (int i = 0; i < kWritten; ++i) {
    can_be_written = can_be_written && !is_expanded(*tensors[i]);
    for (size_t j = i + 1; j < std::size(tensors); ++j)
      can_be_written = can_be_written && !overlap(*tensors[i], *tensors[j]);
  }
  STD_TORCH_CHECK(can_be_written, "a tensor of the state is expanded, or overlaps another one");
  if (x_adv.numel() == 0) return;
  const Layout layout(x_adv);
  const Image image{layout.sizes[1],   layout.sizes[2],   layout.sizes[3],  layout.strides[0],
                    layout.strides[1], layout.strides[2], layout.strides[3]};
  const auto indices = [](const Tensor& tensor) {
    return static_cast<const int64_t*>(tensor.const_data_ptr());
  };
  const Arguments arguments{
      .x_adv = x_adv.mutable_data_ptr(),
      .x_best = x_best.mutable_data_ptr(),
      .high = high.const_data_ptr(),
      .low = low.const_data_ptr(),
      .logits = logits.const_data_ptr(),
      .margin = static_cast<double*>(margin.mutable_data_ptr()),
      .labels = indices(labels),
      .last_corners = indices(last_corners),
      .corners = indices(corners),
      .is_high = static_cast<const bool*>(is_high.const_data_ptr()),
      .images = layout.sizes[0],
      .classes = logits.size(1),
      .last_side = last_side,
      .side = side,
      .double_logits = dtype_of(logits) == DType::kFloat64,
  };
  check_indices(arguments, image);
  switch (x_adv.element_size()) {
    case 2:
      return run<uint16_t>(arguments, image);
    case 4:
      return run<uint32_t>(arguments, image);
    default:
      return run<uint64_t>(arguments, image);
  }
}

}  // namespace afm::cpu

STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CPU, m) {
  m.impl("square_step", TORCH_BOX(&afm::cpu::square_step));
}
