#include "cpu/images/conv3x3_kernel.h"

#include "cpu/vec/vec.h"

namespace afm::cpu::AFM_CAPABILITY {

namespace {

using P = Conv3x3Params;
using V = Vec<float>;

constexpr int kWidth = V::width;

// Tiles whose products are summed in registers at once, beside two vectors of output channels: 16
// sums of the 32 registers of AVX-512, 8 of the 16 of others.
#if AFM_CAPABILITY_AVX512
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
static_assert(P::kRowGroup % kRows == 0, "a block is cut into whole groups");

// The points 0, +-a, +-b and infinity. See Note [Winograd convolution].
constexpr double a = 0.625, b = 1.5;
constexpr double aa = a * a, bb = b * b;

AFM_INLINE V scaled(double factor, V x) { return V(static_cast<float>(factor)) * x; }
AFM_INLINE V add_scaled(V x, double factor, V y) {
  return fma(V(static_cast<float>(factor)), y, x);
}

// One dimension of B^T: values at the points of the polynomials that pick one point each.
AFM_INLINE void input_transform(const V (&d)[6], V (&t)[6]) {
  t[0] = add_scaled(add_scaled(d[4], -(aa + bb), d[2]), aa * bb, d[0]);
  const V even_a = add_scaled(d[4], -bb, d[2]), odd_a = add_scaled(d[3], -bb, d[1]);
  t[1] = add_scaled(even_a, a, odd_a);
  t[2] = add_scaled(even_a, -a, odd_a);
  const V even_b = add_scaled(d[4], -aa, d[2]), odd_b = add_scaled(d[3], -aa, d[1]);
  t[3] = add_scaled(even_b, b, odd_b);
  t[4] = add_scaled(even_b, -b, odd_b);
  t[5] = add_scaled(add_scaled(d[5], -(aa + bb), d[3]), aa * bb, d[1]);
}

// One dimension of G: the filter's polynomial at the points, over the product of their distances.
AFM_INLINE void weight_transform(const V (&g)[3], V (&t)[6]) {
  constexpr double at_a = 1 / (2 * aa * (aa - bb)), at_b = 1 / (2 * bb * (bb - aa));
  t[0] = scaled(1 / (aa * bb), g[0]);
  const V even_a = add_scaled(scaled(at_a, g[0]), at_a * aa, g[2]);
  t[1] = add_scaled(even_a, at_a * a, g[1]);
  t[2] = add_scaled(even_a, -at_a * a, g[1]);
  const V even_b = add_scaled(scaled(at_b, g[0]), at_b * bb, g[2]);
  t[3] = add_scaled(even_b, at_b * b, g[1]);
  t[4] = add_scaled(even_b, -at_b * b, g[1]);
  t[5] = g[2];
}

// One dimension of A^T: powers of the points.
AFM_INLINE void output_transform(const V (&m)[6], V (&y)[4]) {
  const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + even_a + even_b;
  y[1] = add_scaled(scaled(a, odd_a), b, odd_b);
  y[2] = add_scaled(scaled(aa, even_a), bb, even_b);
  y[3] = add_scaled(add_scaled(m[5], a * aa, odd_a), b * bb, odd_b);
}

// A tile's place: its image's offset in pixels, and its first row and column.
struct Place {
  int64_t image, row, column;
};

AFM_INLINE Place place_of(const P& p, int64_t tile) {
  const int64_t per_image = p.tile_rows * p.tile_columns;
  const int64_t within = tile % per_image;
  return {tile / per_image * p.height * p.width, within / p.tile_columns * P::kTile,
          within % p.tile_columns * P::kTile};
}

// V[point][chunk of kWidth channels][tile][kWidth] of the block's tiles. Padding, and what a last
// block lacks, is read from `zeros`.
template <bool kGated>
AFM_INLINE void transform_inputs(const P& p, int64_t first_tile, const float* zeros, float* v) {
  const int64_t tiles = p.tiles();
  for (int64_t tile = 0; tile < p.block; ++tile) {
    const float* source[P::kPoints];
    const float* gate[P::kPoints];
    const bool exists = first_tile + tile < tiles;
    const Place place = place_of(p, exists ? first_tile + tile : 0);
    for (int i = 0; i < P::kPatch; ++i) {
      const int64_t row = place.row + i - 1;
      for (int j = 0; j < P::kPatch; ++j) {
        const int64_t column = place.column + j - 1;
        const bool inside = exists && row >= 0 && row < p.height && column >= 0 && column < p.width;
        const int64_t offset = (place.image + row * p.width + column) * p.in_channels;
        source[i * P::kPatch + j] = inside ? p.x + offset : zeros;
        if (kGated) gate[i * P::kPatch + j] = inside ? p.gate + offset : zeros;
      }
    }
    for (int64_t channel = 0; channel < p.in_channels; channel += kWidth) {
      V columns[P::kPatch][P::kPatch];  // after the transform along rows
      for (int j = 0; j < P::kPatch; ++j) {
        V d[P::kPatch], t[P::kPatch];
        for (int i = 0; i < P::kPatch; ++i) {
          d[i] = V::load(source[i * P::kPatch + j] + channel);
          if (kGated)
            d[i] = select(V::load(gate[i * P::kPatch + j] + channel) <= V(0.0f), V(0.0f), d[i]);
        }
        input_transform(d, t);
        for (int i = 0; i < P::kPatch; ++i) columns[i][j] = t[i];
      }
      float* target = v + (channel * p.block + tile * kWidth);
      for (int i = 0; i < P::kPatch; ++i) {
        V t[P::kPatch];
        input_transform(columns[i], t);
        for (int j = 0; j < P::kPatch; ++j) t[j].store(target + (i * P::kPatch + j) * p.v_stride());
      }
    }
  }
}

// U[point][input channel][kVectors * kWidth] of a slice of input channels and a panel of output
// channels.
template <int kVectors>
AFM_INLINE void transform_weights(const P& p, int64_t first_in, int64_t slice, int64_t first_out,
                                  float* u) {
  constexpr int kPanel = kVectors * kWidth;
  const int64_t tap_stride = p.reverse_taps ? -p.tap_stride : p.tap_stride;
  const float* first_tap = p.weight + (p.reverse_taps ? 8 * p.tap_stride : 0);
  for (int64_t k = 0; k < slice; ++k) {
    const float* weight = first_tap + (first_in + k) * p.weight_stride + first_out;
    for (int vector = 0; vector < kVectors; ++vector) {
      V columns[P::kPatch][3];
      for (int j = 0; j < 3; ++j) {
        V g[3], t[P::kPatch];
        for (int i = 0; i < 3; ++i)
          g[i] = V::load(weight + (3 * i + j) * tap_stride + vector * kWidth);
        weight_transform(g, t);
        for (int i = 0; i < P::kPatch; ++i) columns[i][j] = t[i];
      }
      for (int i = 0; i < P::kPatch; ++i) {
        V t[P::kPatch];
        weight_transform(columns[i], t);
        for (int j = 0; j < P::kPatch; ++j)
          t[j].store(u + (i * P::kPatch + j) * P::kPointU + k * kPanel + vector * kWidth);
      }
    }
  }
}

// M += V U for a group of tiles at one point, over a slice of input channels. The next group's V,
// from the second-level cache, is asked for meanwhile.
template <int kVectors>
AFM_INLINE void multiply(const float* v, int64_t chunk_stride, const float* u, int64_t slice,
                         bool first, float* m) {
  constexpr int kPanel = kVectors * kWidth;
  constexpr int kGroupLines = kRows * kWidth / P::kLine;
  V sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i)
      sum[r][i] = first ? V(0.0f) : V::load(m + r * kPanel + i * kWidth);
  for (int64_t chunk = 0; chunk < slice; chunk += kWidth, v += chunk_stride) {
    for (int k = 0; k < kWidth; ++k, u += kPanel) {
      if (k < kGroupLines) __builtin_prefetch(v + kRows * kWidth + k * P::kLine);
      V weight[kVectors];
      for (int i = 0; i < kVectors; ++i) weight[i] = V::load(u + i * kWidth);
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kVectors; ++i)
          sum[r][i] = fma(V(v[r * kWidth + k]), weight[i], sum[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVectors; ++i) sum[r][i].store(m + r * kPanel + i * kWidth);
}

// y = A^T M A + bias + residual, ReLU, for one vector of output channels of one tile.
AFM_INLINE void transform_output(const P& p, const Place& place, int64_t channel, const float* m,
                                 int64_t m_stride) {
  V rows[P::kTile][P::kPatch];
  for (int j = 0; j < P::kPatch; ++j) {
    V t[P::kPatch], y[P::kTile];
    for (int i = 0; i < P::kPatch; ++i) t[i] = V::load(m + (i * P::kPatch + j) * m_stride);
    output_transform(t, y);
    for (int i = 0; i < P::kTile; ++i) rows[i][j] = y[i];
  }
  const V bias = p.bias == nullptr ? V(0.0f) : V::load(p.bias + channel);
  for (int i = 0; i < P::kTile && place.row + i < p.height; ++i) {
    V y[P::kTile];
    output_transform(rows[i], y);
    const int64_t pixel = place.image + (place.row + i) * p.width + place.column;
    for (int j = 0; j < P::kTile && place.column + j < p.width; ++j) {
      const int64_t offset = (pixel + j) * p.out_channels + channel;
      V value = y[j] + bias;
      if (p.residual != nullptr) value = value + V::load(p.residual + offset);
      // A NaN fails the comparisons and stays.
      if (p.relu) value = select(value <= V(0.0f), V(0.0f), value);
      if (p.out_gate != nullptr)
        value = select(V::load(p.out_gate + offset) <= V(0.0f), V(0.0f), value);
      value.store(p.out + offset);
    }
  }
}

template <int kVectors>
AFM_INLINE void panel(const P& p, int64_t first_tile, int64_t first_out, const float* v, float* u,
                      float* m) {
  constexpr int kPanel = kVectors * kWidth;
  const int64_t m_stride = p.m_stride();
  for (int64_t first_in = 0; first_in < p.in_channels; first_in += P::kSlice) {
    const int64_t rest = p.in_channels - first_in;
    const int64_t slice = rest < P::kSlice ? rest : P::kSlice;
    transform_weights<kVectors>(p, first_in, slice, first_out, u);
    for (int point = 0; point < P::kPoints; ++point)
      for (int64_t tile = 0; tile < p.block; tile += kRows)
        multiply<kVectors>(v + point * p.v_stride() + first_in * p.block + tile * kWidth,
                           p.block * kWidth, u + point * P::kPointU, slice, first_in == 0,
                           m + point * m_stride + tile * kPanel);
  }
  for (int64_t tile = 0; tile < p.block && first_tile + tile < p.tiles(); ++tile) {
    const Place place = place_of(p, first_tile + tile);
    for (int i = 0; i < kVectors; ++i)
      transform_output(p, place, first_out + i * kWidth, m + tile * kPanel + i * kWidth, m_stride);
  }
}

}  // namespace

void conv3x3_block(const Conv3x3Params& p, int64_t index, int64_t begin, int64_t end,
                   float* scratch) {
  float* v = scratch;
  float* u = v + P::kPoints * p.v_stride();
  float* m = u + P::kPoints * P::kPointU;
  float* zeros = m + P::kPoints * p.m_stride();
  memset(zeros, 0, p.in_channels * sizeof(float));
  const int64_t first_tile = index * p.block;
  if (p.gate != nullptr)
    transform_inputs<true>(p, first_tile, zeros, v);
  else
    transform_inputs<false>(p, first_tile, zeros, v);
  int64_t channel = begin;
  for (; channel + 2 * kWidth <= end; channel += 2 * kWidth)
    panel<2>(p, first_tile, channel, v, u, m);
  for (; channel < end; channel += kWidth) panel<1>(p, first_tile, channel, v, u, m);
}

}  // namespace afm::cpu::AFM_CAPABILITY
