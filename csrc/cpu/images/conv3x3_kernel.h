// 3x3 convolution, stride 1, padding 1, by Winograd's minimal filtering: what its kernel unit and
// its operators share.
//
// Note [Winograd convolution]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~
// F(4x4, 3x3) of Lavin and Gray (arXiv 1509.09308): an output tile of 4x4 pixels comes from 6x6
// input pixels through 36 products for each pair of channels, where the definition takes 144. With
// the transforms B, G and A below, for tile t, input channel k and output channel n,
//
//   V[p][t][k] = (B^T x B)[p]      U[p][k][n] = (G w G^T)[p]      M[p] = V[p] U[p]      y = A^T M A
//
// and the 36 M[p] are ordinary matrix products. A thread takes a block of tiles through all four
// steps: V for the block, then for each panel of output channels U in slices of input channels, M,
// and the epilogue. U and M stay in its second-level cache, V too up to 128 channels.
//
// On AVX-512 the products run at nine tenths of the matrix rate and take two thirds of the time.
// The transforms are bound by their stores, each to a line that the first-level cache has lost: V
// an eighth of the time at 128 channels, y and U a tenth each. U is made anew for each block; 36
// stored numbers for 9 weights would be read from memory, and would have to follow the weights.
//
// The gradient by the input is the same convolution of the output's gradient, with input and output
// channels of the weight exchanged and its taps in reverse.
//
// Interpolation points are 0, +-a, +-b and infinity, a = 5/8, b = 3/2. At 128 channels their
// largest rounding error is a third of that of the textbook's 1 and 2; from 16 to 512 channels it
// is two to three times oneDNN's direct convolution's, 1e-6 to 5e-6 of the largest value.

#pragma once

#include <stdint.h>

#include "cpu/dispatch/kernel.h"

namespace afm::cpu {

struct Conv3x3Params {
  static constexpr int kTile = 4;       // output pixels a side
  static constexpr int kPatch = 6;      // input pixels a side
  static constexpr int kPoints = 36;    // kPatch * kPatch
  static constexpr int kRowGroup = 8;   // tiles of a block are a multiple of this
  static constexpr int kSlice = 64;     // input channels of a slice of U
  static constexpr int kChannels = 16;  // numbers of channels are multiples of this
  static constexpr int kPanel = 32;     // output channels of a panel, at most
  static constexpr int kLine = 16;      // floats of a cache line
  // Floats between one point's U, V or M and the next one's: an odd number of lines, or all 36
  // would share a set of the first-level cache. U's is a constant, so that its 36 stores need no
  // address arithmetic.
  static constexpr int kPointU = kSlice * kPanel + kLine;

  float* out;             // (images, height, width, out_channels)
  const float* x;         // (images, height, width, in_channels)
  const float* gate;      // like x: x counts as 0 where this is <= 0; or null
  const float* weight;    // [in channel][tap][out channel], the last dense
  const float* bias;      // (out_channels), or null
  const float* residual;  // like out, added; or null
  const float* out_gate;  // like out: where it is <= 0 the result is 0; or null
  bool relu;
  bool reverse_taps;
  int64_t weight_stride, tap_stride;
  int64_t images, height, width, in_channels, out_channels;
  int64_t tile_rows, tile_columns;  // of an image
  int64_t block;                    // tiles of a block, a multiple of kRowGroup

  int64_t tiles() const { return images * tile_rows * tile_columns; }
  int64_t v_stride() const { return block * in_channels + kLine; }
  int64_t m_stride() const { return block * kPanel + kLine; }
  int64_t scratch_floats() const {
    return kPoints * (v_stride() + kPointU + m_stride()) + in_channels;
  }
};

// Tiles [block * index, block * (index + 1)) and output channels [begin, end).
AFM_DECLARE_KERNEL(void, conv3x3_block,
                   (const Conv3x3Params& params, int64_t index, int64_t begin, int64_t end,
                    float* scratch))

}  // namespace afm::cpu
