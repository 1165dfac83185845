// Kernels for float32 logits.

#include "cuda/softmax_kl_launch.cuh"

namespace afm::cuda {

void launch_softmax_kl_float(Variant variant, const RowsProblem& problem, const Plan& plan,
                             void* stream) {
  launch_pair<FloatPair, PairKind::kFloat>(variant, problem, plan, stream);
}

}  // namespace afm::cuda
