// The sum of a few thousand partial losses: one block, the same order every time.
//
// Note [Summed losses]
// ~~~~~~~~~~~~~~~~~~~~
// A kernel leaves one number a block, and a second launch adds them up. The alternative, a counter
// that lets the last block do it, has to be zeroed by somebody: per call that is a launch of its
// own, and one counter for all calls breaks as soon as two streams or two graphs run at once.

#include "common/row_state.h"
#include "cuda/reduce.cuh"
#include "cuda/softmax_kl.h"
#include "cuda/sum.h"

namespace afm::cuda {

template <typename A>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const SumProblem problem) {
  __shared__ double shared[kSumThreads / kWarp];
  const A* from = static_cast<const A*>(problem.values);
  double total[1] = {0};
  for (int64_t i = threadIdx.x; i < problem.count; i += kSumThreads) {
    total[0] += static_cast<double>(from[i]);
  }
  reduce_in_block<SumOf>(total, shared);
  if (threadIdx.x == 0) static_cast<A*>(problem.sum)[0] = static_cast<A>(total[0]);
}

void launch_sum(bool float64, const SumProblem& problem, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  if (float64) {
    launch(sum_kernel<double>, 1, kSumThreads, problem, on);
  } else {
    launch(sum_kernel<float>, 1, kSumThreads, problem, on);
  }
}

}  // namespace afm::cuda
