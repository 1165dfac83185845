#include "cuda/apgd_step.h"

#include "cuda/elementwise.cuh"
#include "cuda/reduce.cuh"

namespace afm::cuda {

namespace {

// Rows of a state's numbers and counts, as in the definition.
enum Number { kLossBest, kLossPrevious, kLossChecked, kStepSize };
enum Count { kImprovements, kReduced, kHit };

// What happens to an image.
struct Decision {
  bool better;  // the point is the best so far
  bool hit;     // it is kept as misclassified
  bool back;    // the best point, another one, takes its place
  double step_size;
};

template <typename T>
__device__ Decision decide(const ApgdProblem& problem, int64_t image) {
  T* numbers = static_cast<T*>(problem.numbers) + image;
  int32_t* counts = problem.counts + image;
  const auto number = [&](Number row) -> T& { return numbers[row * problem.images]; };
  const auto count = [&](Count row) -> int32_t& { return counts[row * problem.images]; };
  const T loss = static_cast<const T*>(problem.loss)[image];
  const bool wrong = problem.misclassified[image];
  Decision decision{problem.first || loss > number(kLossBest), problem.first || wrong, false, 0};
  if (problem.first) {
    number(kLossChecked) = loss;
  } else {
    count(kImprovements) += loss > number(kLossPrevious);
    number(kLossPrevious) = loss;
  }
  if (decision.better) number(kLossBest) = loss;
  if (wrong) count(kHit) = 1;
  if (problem.window > 0) {
    const bool is_stuck = count(kReduced) == 0 && number(kLossChecked) >= number(kLossBest);
    const bool reduces =
        count(kImprovements) <= problem.decrease * static_cast<double>(problem.window) || is_stuck;
    count(kReduced) = reduces;
    count(kImprovements) = 0;
    number(kLossChecked) = number(kLossBest);
    if (reduces) number(kStepSize) /= 2;
    decision.back = reduces && !decision.better;
  }
  decision.step_size = static_cast<double>(number(kStepSize));
  return decision;
}

// One thread books, for all of the block.
__device__ Decision decide_for_block(const ApgdProblem& problem, Decision* shared) {
  if (threadIdx.x == 0) {
    *shared =
        problem.exact ? decide<double>(problem, blockIdx.x) : decide<float>(problem, blockIdx.x);
  }
  __syncthreads();
  return *shared;
}

// Makes the copies that are due of a few elements.
template <typename A>
__device__ __forceinline__ void keep(const ApgdProblem& problem, const Decision& decision,
                                     int64_t first, int64_t end) {
  using E = Elementwise<A>;
  if (decision.better || decision.hit) {
    const auto point = E::load(problem.x_adv, first, end);
    if (decision.hit) E::store(problem.x_hit, first, end, point.raw);
    if (decision.better) {
      E::store(problem.x_best, first, end, point.raw);
      E::store(problem.grad_best, first, end, E::load(problem.grad, first, end).raw);
    }
  }
  if (decision.back) E::store(problem.x_adv, first, end, E::load(problem.x_best, first, end).raw);
}

template <typename A>
__device__ __forceinline__ A clipped(const ApgdProblem& problem, A value) {
  const A low = static_cast<A>(problem.clip_min), high = static_cast<A>(problem.clip_max);
  if (problem.has_min && value < low) value = low;
  if (problem.has_max && value > high) value = high;
  return value;
}

// Comparisons are written so that a NaN of `z` or x survives them.
template <typename A>
__device__ __forceinline__ A projected(const ApgdProblem& problem, A z, A x) {
  const A eps = static_cast<A>(problem.eps), low = x - eps, high = x + eps;
  if (z < low) z = low;
  if (z > high) z = high;
  z = clipped(problem, z);
  return x == x ? z : x;
}

// Where the two parts of a step lead.
template <typename A>
__device__ __forceinline__ A mixed(const ApgdProblem& problem, A point, A moved, A old) {
  const A carried = static_cast<A>(problem.carried);
  return point + (moved - point) * (1 - carried) + (point - old) * carried;
}

// What is left of a displacement of this length when it is in the ball.
__device__ __forceinline__ double shrink_of(double length, double eps) {
  return (length < eps ? length : eps) / (length + 1e-12);
}

constexpr int kL2Threads = 512;

}  // namespace

// A block an image, so that what is decided for it need not be known elsewhere.
template <typename A>
__global__ void __launch_bounds__(kElementwiseThreads) apgd_linf_kernel(const ApgdProblem problem) {
  using E = Elementwise<A>;
  __shared__ Decision shared_decision;
  const Decision decision = decide_for_block(problem, &shared_decision);
  const FlatView direction = decision.back ? problem.grad_best : problem.grad;
  const A step = static_cast<A>(decision.step_size);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * problem.sample;
  const int64_t end = begin + problem.sample;
  const int64_t stride = static_cast<int64_t>(kElementwiseThreads) * E::kN;
  for (int64_t first = begin + static_cast<int64_t>(threadIdx.x) * E::kN; first < end;
       first += stride) {
    keep<A>(problem, decision, first, end);
    const auto point = E::load(problem.x_adv, first, end);
    const auto grad = E::load(direction, first, end);
    const auto x = E::load(problem.x, first, end);
    const auto old = E::load(problem.x_old, first, end);
    A out[E::kN];
#pragma unroll
    for (int i = 0; i < E::kN; ++i) {
      const A move = grad.raw[i] > A(0) ? step : grad.raw[i] < A(0) ? -step : A(0);
      const A moved = projected<A>(problem, point.raw[i] + move, x.raw[i]);
      out[i] = projected<A>(problem, mixed<A>(problem, point.raw[i], moved, old.raw[i]), x.raw[i]);
    }
    E::store(problem.x_old, first, end, out);
  }
}

// In float64 throughout. A thread meets the same elements in every sweep.
__global__ void __launch_bounds__(kL2Threads) apgd_l2_kernel(const ApgdProblem problem) {
  using E = Elementwise<double>;
  constexpr int kWarps = kL2Threads / kWarp;
  __shared__ Decision shared_decision;
  __shared__ double shared_largest[kWarps], shared_sums[3 * kWarps], shared_mixed[kWarps];
  const Decision decision = decide_for_block(problem, &shared_decision);
  const FlatView direction = decision.back ? problem.grad_best : problem.grad;
  const double step = decision.step_size;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * problem.sample;
  const int64_t end = begin + problem.sample;
  const int64_t own = begin + static_cast<int64_t>(threadIdx.x) * E::kN;
  const int64_t stride = static_cast<int64_t>(kL2Threads) * E::kN;

  double largest = 1;  // float64 gradients are taken in units of it, so that squares neither
                       // overflow nor vanish
  if (problem.exact) {
    double most[1] = {0};
    for (int64_t first = own; first < end; first += stride) {
      const auto g = E::load(direction, first, end);
      for (int i = 0; i < E::kN; ++i) most[0] = max_of(most[0], abs_of(g.raw[i]));
    }
    reduce_in_block<MaxOf>(most, shared_largest);
    if (most[0] > 0 && is_finite(most[0])) largest = most[0];
  }
  double sums[3] = {0, 0, 0};
  for (int64_t first = own; first < end; first += stride) {
    keep<double>(problem, decision, first, end);
    const auto point = E::load(problem.x_adv, first, end);
    const auto g = E::load(direction, first, end);
    const auto x = E::load(problem.x, first, end);
    for (int i = 0; i < E::kN; ++i) {
      const double scaled = g.raw[i] / largest, away = point.raw[i] - x.raw[i];
      sums[0] += scaled * scaled;
      sums[1] += scaled * away;
      sums[2] += away * away;
    }
  }
  reduce_in_block<SumOf>(sums, shared_sums);
  const bool has_direction = sums[0] > 0 && is_finite(sums[0]);
  const double grad_length = ::sqrt(sums[0]);
  const double along = has_direction ? step / grad_length : 0;
  double squared = sums[2];
  if (has_direction) squared += 2 * step * (sums[1] / grad_length) + step * step;
  const double shrink = shrink_of(::sqrt(squared < 0 ? 0 : squared), problem.eps);

  const auto mixed_at = [&](double point, double g, double x, double old) {
    const double moved = has_direction ? point + along * (g / largest) : point;
    return mixed<double>(problem, point, clipped(problem, x + (moved - x) * shrink), old);
  };
  double squares[1] = {0};
  for (int64_t first = own; first < end; first += stride) {
    const auto point = E::load(problem.x_adv, first, end);
    const auto g = E::load(direction, first, end);
    const auto x = E::load(problem.x, first, end);
    const auto old = E::load(problem.x_old, first, end);
    for (int i = 0; i < E::kN; ++i) {
      if (first + i >= end) break;  // 0 need not be in the clip range
      const double away = mixed_at(point.raw[i], g.raw[i], x.raw[i], old.raw[i]) - x.raw[i];
      squares[0] += away * away;
    }
  }
  reduce_in_block<SumOf>(squares, shared_mixed);
  const double last_shrink = shrink_of(::sqrt(squares[0]), problem.eps);

  for (int64_t first = own; first < end; first += stride) {
    const auto point = E::load(problem.x_adv, first, end);
    const auto g = E::load(direction, first, end);
    const auto x = E::load(problem.x, first, end);
    const auto old = E::load(problem.x_old, first, end);
    double out[E::kN];
    for (int i = 0; i < E::kN; ++i) {
      const double away = mixed_at(point.raw[i], g.raw[i], x.raw[i], old.raw[i]) - x.raw[i];
      out[i] = clipped(problem, x.raw[i] + away * last_shrink);
    }
    E::store(problem.x_old, first, end, out);
  }
}

void launch_apgd_linf(const ApgdProblem& problem, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  if (problem.exact) {
    launch(apgd_linf_kernel<double>, problem.images, kElementwiseThreads, problem, on);
  } else {
    launch(apgd_linf_kernel<float>, problem.images, kElementwiseThreads, problem, on);
  }
}

void launch_apgd_l2(const ApgdProblem& problem, void* stream) {
  launch(apgd_l2_kernel, problem.images, kL2Threads, problem, static_cast<Stream>(stream));
}

}  // namespace afm::cuda
