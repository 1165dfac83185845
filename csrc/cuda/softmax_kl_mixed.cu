// Kernels for two different dtypes up to float32.

#include "cuda/softmax_kl_launch.cuh"

namespace afm::cuda {

void launch_softmax_kl_mixed(Variant variant, const RowsProblem& problem, const Plan& plan,
                             void* stream) {
  launch_pair<MixedPair, PairKind::kMixed>(variant, problem, plan, stream);
}

}  // namespace afm::cuda
