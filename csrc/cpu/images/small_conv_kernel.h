// Convolution of small images with few channels, any stride: what its kernel unit and its operators
// share.
//
// Note [Convolution over images]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Where an image is 8x8 pixels, a library's convolution spends itself on borders and on finding
// enough pixels in a row. Here the rows of a matrix product are images: at one output pixel, the
// taps that fall inside the image are the same for all of them, and their input pixels lie one
// image apart. So
//
//   out[image][pixel][n] = sum over taps inside, channels k of x[image][pixel of tap][k]
//   w[tap][k][n]
//
// needs no zeros around the image, no copy and no case for a stride: the gradient by the input is
// the same sum over the taps (and output pixels) that read a pixel. What stands before and behind
// it in a network is in the epilogue: bias, residual, ReLU; another gradient to add, and the gate
// of the ReLU that made this convolution's input.
//
// The gradient of a first layer has one to four channels, no vector: there the lanes are the output
// channels, summed at the end.

#pragma once

#include <stdint.h>

#include "cpu/dispatch/kernel.h"

namespace afm::cpu {

struct SmallConvParams {
  static constexpr int kThin = 4;  // result channels of a gradient that are no vector
  static constexpr int kMaxTaps = 49;
  static constexpr int kImages = 8;  // images of a task

  float* out;      // (images, out_height, out_width, out_channels)
  const float* x;  // (images, height, width, channels): what is summed over
  const float*
      weight;  // [tap][channel][out channel]; thin: [tap][out channel][channel], the last dense
  const float* bias;      // (out_channels), or null
  const float* residual;  // like out, added; or null
  const float* gate;      // like out: where it is <= 0 the result is 0; or null
  bool relu;
  bool is_gradient;  // out is the gradient by the input of the convolution, and x the output's
  int64_t images, height, width, channels, out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width, stride, padding;
  int64_t weight_stride, tap_stride;  // weight_stride: of channel, or of out channel where thin

  bool thin() const { return is_gradient && out_channels <= kThin; }
};

// A row of output pixels of the images [first, first + kImages), as far as there are so many.
AFM_DECLARE_KERNEL(void, small_conv_row,
                   (const SmallConvParams& params, int64_t first, int64_t row))

}  // namespace afm::cpu
