// Kernels for float64 and another dtype.

#include "cuda/softmax_kl_launch.cuh"

namespace afm::cuda {

void launch_softmax_kl_mixed_double(Variant variant, const RowsProblem& problem, const Plan& plan,
                                    void* stream) {
  launch_pair<MixedDoublePair, PairKind::kMixedDouble>(variant, problem, plan, stream);
}

}  // namespace afm::cuda
