// Kernels for float16 logits.

#include "cuda/softmax_kl_launch.cuh"

namespace afm::cuda {

void launch_softmax_kl_half(Variant variant, const RowsProblem& problem, const Plan& plan,
                            void* stream) {
  launch_pair<HalfPair, PairKind::kHalf>(variant, problem, plan, stream);
}

}  // namespace afm::cuda
