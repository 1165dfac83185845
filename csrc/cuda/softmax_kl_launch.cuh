// Launches of one pair of dtypes; softmax_kl_<dtype>.cu instantiate it, one file each so that they
// compile side by side.

#pragma once

#include "cuda/softmax_kl_plan.h"
#include "cuda/softmax_kl_rows.cuh"
#include "cuda/softmax_kl_stream.cuh"

namespace afm::cuda {

template <class Pair, PairKind kKind, Variant kVariant>
struct Launcher {
  template <Tier kTier>
  static void rows(const RowsProblem& problem, const Plan& plan, Stream stream) {
    if constexpr (has_tier(kKind, kTier)) {
      constexpr TierShape kShape = tier_shape(kTier, sixteen_bit(kKind));
      launch(rows_kernel<Pair, kShape.group, kShape.vecs, kVariant>, plan.blocks, plan.threads,
             problem, stream);
    }
  }

  static void stream_rows(const RowsProblem& problem, const Plan& plan, Stream stream) {
    const bool gradients =
        problem.grad_student.data != nullptr || problem.grad_teacher.data != nullptr;
    const int64_t parts = problem.rows * plan.splits;
    if (problem.stats_in == nullptr && plan.splits == 1) {
      launch(stream_rows_kernel<Pair, kVariant>, problem.rows, Pair::kStreamThreads, problem,
             stream);
      return;
    }
    if (problem.stats_in == nullptr) {
      launch(stream_partial_kernel<Pair, kVariant>, parts, Pair::kStreamThreads, problem, stream);
      if constexpr (kVariant == Variant::kSymmetric) {
        launch(stream_terms_kernel<Pair>, parts, Pair::kStreamThreads, problem, stream);
      }
    }
    if (gradients) {
      launch(stream_finish_kernel<Pair, kVariant>, parts, Pair::kStreamThreads, problem, stream);
      if (plan.splits > 1) launch(stream_settle_kernel<Pair>, problem.rows, kWarp, problem, stream);
    } else {
      launch(stream_finish_kernel<Pair, kVariant>, problem.rows, kWarp, problem, stream);
    }
  }

  static void run(const RowsProblem& problem, const Plan& plan, Stream stream) {
    switch (plan.tier) {
      case Tier::kQuad:
        return rows<Tier::kQuad>(problem, plan, stream);
      case Tier::kOctet:
        return rows<Tier::kOctet>(problem, plan, stream);
      case Tier::kWarpShort:
        return rows<Tier::kWarpShort>(problem, plan, stream);
      case Tier::kWarpLong:
        return rows<Tier::kWarpLong>(problem, plan, stream);
      case Tier::kBlock:
        return rows<Tier::kBlock>(problem, plan, stream);
      case Tier::kWideBlock:
        return rows<Tier::kWideBlock>(problem, plan, stream);
      default:
        return stream_rows(problem, plan, stream);
    }
  }
};

// The three variants of a pair of dtypes.
template <class Pair, PairKind kKind>
void launch_pair(Variant variant, const RowsProblem& problem, const Plan& plan, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  switch (variant) {
    case Variant::kKl:
      return Launcher<Pair, kKind, Variant::kKl>::run(problem, plan, on);
    case Variant::kSymmetric:
      return Launcher<Pair, kKind, Variant::kSymmetric>::run(problem, plan, on);
    case Variant::kDistillation:
      return Launcher<Pair, kKind, Variant::kDistillation>::run(problem, plan, on);
  }
}

}  // namespace afm::cuda
