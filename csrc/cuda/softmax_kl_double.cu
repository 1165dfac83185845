// Kernels for float64 logits.

#include "cuda/softmax_kl_launch.cuh"

namespace afm::cuda {

void launch_softmax_kl_double(Variant variant, const RowsProblem& problem, const Plan& plan,
                              void* stream) {
  launch_pair<DoublePair, PairKind::kDouble>(variant, problem, plan, stream);
}

}  // namespace afm::cuda
