#include "cuda/pgd_step.h"

#include "cuda/elementwise.cuh"
#include "cuda/reduce.cuh"

namespace afm::cuda {

namespace {

constexpr int kL2Threads = 512;

template <typename A>
__device__ __forceinline__ A clipped(const PgdProblem& problem, A value) {
  const A low = static_cast<A>(problem.clip_min), high = static_cast<A>(problem.clip_max);
  if (problem.has_min && value < low) value = low;
  if (problem.has_max && value > high) value = high;
  return value;
}

}  // namespace

// linf: every element by itself. Comparisons are written so that a NaN of any input survives them.
template <typename A>
__global__ void __launch_bounds__(kElementwiseThreads) pgd_linf_kernel(const PgdProblem problem) {
  using E = Elementwise<A>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * E::kN;
  if (first >= problem.count) return;
  const auto x_adv = E::load(problem.x_adv, first, problem.count);
  const auto direction = E::load(problem.direction, first, problem.count);
  const auto x = E::load(problem.x, first, problem.count);
  const A step = static_cast<A>(problem.step_size), eps = static_cast<A>(problem.eps);
  A out[E::kN];
#pragma unroll
  for (int i = 0; i < E::kN; ++i) {
    const A d = direction.raw[i];
    // sign(0) = 0 and sign(NaN) = NaN.
    const A sign = d > A(0) ? A(1) : d < A(0) ? A(-1) : d;
    A value = x_adv.raw[i] + step * (problem.start ? d : sign);
    const A low = x.raw[i] - eps, high = x.raw[i] + eps;
    if (value < low) value = low;
    if (value > high) value = high;
    value = clipped(problem, value);
    out[i] = x.raw[i] == x.raw[i] ? value : x.raw[i];
  }
  E::store(problem.out, first, problem.count, out);
}

// l2: a block a sample, in float64 throughout. A sample is read up to four times, from the caches
// after the first: length of the direction (twice where float64 squares might overflow), length of
// the displacement, and the result.
__global__ void __launch_bounds__(kL2Threads) pgd_l2_kernel(const PgdProblem problem) {
  using E = Elementwise<double>;
  constexpr int kWarps = kL2Threads / kWarp;
  __shared__ double shared_largest[kWarps], shared_length[kWarps], shared_moved[kWarps];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * problem.sample;
  const int64_t end = begin + problem.sample;
  const int64_t own = begin + static_cast<int64_t>(threadIdx.x) * E::kN;
  const int64_t stride = static_cast<int64_t>(kL2Threads) * E::kN;

  double factor = problem.step_size;  // of the direction over `largest`
  double largest = 1;
  const auto scaled = [&](double g) { return problem.exact ? g / largest : g; };
  if (!problem.start) {
    if (problem.exact) {
      double most[1] = {0};
      for (int64_t first = own; first < end; first += stride) {
        const auto g = E::load(problem.direction, first, end);
        for (int i = 0; i < E::kN; ++i) most[0] = max_of(most[0], abs_of(g.raw[i]));
      }
      reduce_in_block<MaxOf>(most, shared_largest);
      if (most[0] > 0) largest = most[0];
    }
    double squares[1] = {0};
    for (int64_t first = own; first < end; first += stride) {
      const auto g = E::load(problem.direction, first, end);
      for (int i = 0; i < E::kN; ++i) {
        squares[0] += scaled(g.raw[i]) * scaled(g.raw[i]);
      }
    }
    reduce_in_block<SumOf>(squares, shared_length);
    const double length = ::sqrt(squares[0]);
    // No direction: nothing is moved. An infinite or NaN gradient: the sample is NaN.
    factor = length == 0         ? 0
             : is_finite(length) ? problem.step_size / length
                                 : not_a_number<double>();
  }

  double squares[1] = {0};
  for (int64_t first = own; first < end; first += stride) {
    const auto x_adv = E::load(problem.x_adv, first, end);
    const auto g = E::load(problem.direction, first, end);
    const auto x = E::load(problem.x, first, end);
    for (int i = 0; i < E::kN; ++i) {
      const double delta = (x_adv.raw[i] + factor * scaled(g.raw[i])) - x.raw[i];
      squares[0] += delta * delta;
    }
  }
  reduce_in_block<SumOf>(squares, shared_moved);
  const double length = ::sqrt(squares[0]);
  const bool outside = !(length <= problem.eps);  // a NaN anywhere makes the sample NaN
  const double shrink = problem.eps / length;

  for (int64_t first = own; first < end; first += stride) {
    const auto x_adv = E::load(problem.x_adv, first, end);
    const auto g = E::load(problem.direction, first, end);
    const auto x = E::load(problem.x, first, end);
    double out[E::kN];
    for (int i = 0; i < E::kN; ++i) {
      const double moved = x_adv.raw[i] + factor * scaled(g.raw[i]);
      out[i] = clipped(problem, outside ? x.raw[i] + (moved - x.raw[i]) * shrink : moved);
    }
    E::store(problem.out, first, end, out);
  }
}

void launch_pgd_linf(const PgdProblem& problem, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  const auto blocks = [&](int elements) {
    const int64_t block = int64_t(kElementwiseThreads) * elements;
    return (problem.count + block - 1) / block;
  };
  if (problem.exact) {
    launch(pgd_linf_kernel<double>, blocks(Elementwise<double>::kN), kElementwiseThreads, problem,
           on);
  } else {
    launch(pgd_linf_kernel<float>, blocks(Elementwise<float>::kN), kElementwiseThreads, problem,
           on);
  }
}

void launch_pgd_l2(const PgdProblem& problem, void* stream) {
  launch(pgd_l2_kernel, problem.count / problem.sample, kL2Threads, problem,
         static_cast<Stream>(stream));
}

}  // namespace afm::cuda
