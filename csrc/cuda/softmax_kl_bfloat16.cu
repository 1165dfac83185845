// Kernels for bfloat16 logits.

#include "cuda/softmax_kl_launch.cuh"

namespace afm::cuda {

void launch_softmax_kl_bfloat16(Variant variant, const RowsProblem& problem, const Plan& plan,
                                void* stream) {
  launch_pair<BFloat16Pair, PairKind::kBFloat16>(variant, problem, plan, stream);
}

}  // namespace afm::cuda
