// Which kernel serves which shape: the one table of it.
//
//   tier          threads a row   classes, float32     16-bit           other dtypes
//   kQuad                4        up to 16             up to 32         -
//   kOctet               8        up to 64             up to 128        -
//   kWarpShort          32        up to 256            up to 512        up to 256
//   kWarpLong           32        up to 1024           up to 1024       -
//   kBlock             256        up to 4096           up to 8192       up to 4096
//   kWideBlock         256        up to 8192           up to 12288      -
//   kStream            512        above
//
// (float64 holds half as many.) Rows that do not start at a multiple of 16 bytes lose up to one
// vector of classes; see Note [Aligned body]. The bounds are what fits in registers without
// spilling, which is proved; that they are the fastest is not: see docs/gpu-resources-cuda.md.

#pragma once

#include <algorithm>
#include <cstdint>

namespace afm::cuda {

enum class Tier : int { kQuad, kOctet, kWarpShort, kWarpLong, kBlock, kWideBlock, kStream };
constexpr int kTiers = 7;

// Dtypes of student and teacher. The last two read any dtype, class by class of dtype at run time.
enum class PairKind : int { kHalf, kBFloat16, kFloat, kDouble, kMixed, kMixedDouble };

struct TierShape {
  int group;  // threads a row
  int vecs;   // vectors a thread
};

// Vectors of 16 bytes hold 8 classes of 16 bits, 4 of float32: a thread of kWarpLong holds 32.
constexpr TierShape tier_shape(Tier tier, bool sixteen_bit) {
  switch (tier) {
    case Tier::kQuad:
      return {4, 1};
    case Tier::kOctet:
      return {8, 2};
    case Tier::kWarpShort:
      return {32, 2};
    case Tier::kWarpLong:
      return {32, sixteen_bit ? 4 : 8};
    case Tier::kBlock:
      return {256, 4};
    case Tier::kWideBlock:
      return {256, sixteen_bit ? 6 : 8};
    default:
      return {512, 0};
  }
}

constexpr bool sixteen_bit(PairKind kind) {
  return kind == PairKind::kHalf || kind == PairKind::kBFloat16;
}

// Float64 and mixed dtypes are served, not tuned: fewer kernels to compile.
constexpr bool has_tier(PairKind kind, Tier tier) {
  const bool every = sixteen_bit(kind) || kind == PairKind::kFloat;
  return every || tier == Tier::kWarpShort || tier == Tier::kBlock || tier == Tier::kStream;
}

constexpr int vector_of(PairKind kind) {
  return sixteen_bit(kind)                                             ? 8
         : kind == PairKind::kDouble || kind == PairKind::kMixedDouble ? 2
                                                                       : 4;
}

constexpr int kMaxSplits = 256;
constexpr int kStreamBlock = 512;

struct Plan {
  Tier tier;
  int threads;             // of a block
  int64_t blocks;          // of a kernel that takes whole rows
  int splits;              // kStream: blocks a row
  int64_t partial_losses;  // what a summed loss is left as by the last kernel but one
};

// rows >= 1. `head`: the most classes by which a row starts behind a 16-byte boundary.
inline Plan plan_rows(PairKind kind, int64_t rows, int64_t classes, int head, bool sum,
                      int multiprocessors) {
  const int n = vector_of(kind);
  const int64_t vectors = (classes + head + n - 1) / n;
  Plan plan = {Tier::kStream, kStreamBlock, rows, 1, rows};
  for (int index = 0; index < kTiers - 1; ++index) {
    const Tier tier = static_cast<Tier>(index);
    const TierShape shape = tier_shape(tier, sixteen_bit(kind));
    if (!has_tier(kind, tier) || vectors > int64_t(shape.group) * shape.vecs) continue;
    plan.tier = tier;
    plan.threads = shape.group > 32 ? shape.group : 256;
    // One block, no second launch to add blocks up.
    if (shape.group == 4 && sum && rows * 4 > 256 && rows * 4 <= 512) plan.threads = 512;
    const int64_t rows_a_block = plan.threads / shape.group;
    plan.blocks = (rows + rows_a_block - 1) / rows_a_block;
    plan.partial_losses = plan.blocks;
    return plan;
  }
  // Two blocks a multiprocessor keep it busy; a block wants two vectors a thread to be worth it.
  if (rows < 2 * int64_t(multiprocessors)) {
    const int64_t wanted = (2 * int64_t(multiprocessors) + rows - 1) / rows;
    const int64_t useful = std::max<int64_t>(1, vectors / (2 * kStreamBlock));
    plan.splits = static_cast<int>(std::min({wanted, useful, int64_t(kMaxSplits)}));
  }
  return plan;
}

}  // namespace afm::cuda
