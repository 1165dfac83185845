// The operator of Auto-PGD's step. Definition: afm_kernels/reference/apgd_step.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/dispatch/dispatch.h"
#include "cpu/images/apgd_step_kernel.h"
#include "cpu/layout/tensors.h"

namespace afm::cpu {

namespace {

constexpr int64_t kLinf = 0;  // index into ops.NORMS

// Elements below which a second thread costs more than it saves, by estimate.
constexpr int64_t kGrain = 16384;
// Elements of a linf image that are copied and moved before the next ones are looked at: all that
// is touched of them fits the second-level cache.
constexpr int64_t kChunk = 8192;

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

struct Rule {
  double decrease;
  int64_t window;
  bool first;
};

template <class T>
std::vector<Decision> decide(T* numbers, int32_t* counts, const T* losses,
                             const bool* misclassified, int64_t images, const Rule& rule) {
  std::vector<Decision> decisions(images);
  for (int64_t i = 0; i < images; ++i) {
    const auto number = [&](Number row) -> T& { return numbers[row * images + i]; };
    const auto count = [&](Count row) -> int32_t& { return counts[row * images + i]; };
    Decision& decision = decisions[i];
    const T loss = losses[i];
    decision.better = rule.first || loss > number(kLossBest);
    decision.hit = rule.first || misclassified[i];
    decision.back = false;
    if (rule.first) {
      number(kLossChecked) = loss;
    } else {
      count(kImprovements) += loss > number(kLossPrevious);
      number(kLossPrevious) = loss;
    }
    if (decision.better) number(kLossBest) = loss;
    if (misclassified[i]) count(kHit) = 1;
    if (rule.window > 0) {
      const bool is_stuck = count(kReduced) == 0 && number(kLossChecked) >= number(kLossBest);
      const bool reduces =
          count(kImprovements) <= rule.decrease * static_cast<double>(rule.window) || is_stuck;
      count(kReduced) = reduces, count(kImprovements) = 0;
      number(kLossChecked) = number(kLossBest);
      if (reduces) number(kStepSize) /= 2;
      decision.back = reduces && !decision.better;
    }
    decision.step_size = static_cast<double>(number(kStepSize));
  }
  return decisions;
}

// The images of a call.
struct Images {
  char *x_adv, *x_old, *x_best, *grad_best, *x_hit;
  const char *grad, *x;
  int64_t size, grad_size;  // bytes of an element
};

// Elements [begin, end) of all, of one image.
void copy(const Images& to, const Decision& decision, int64_t begin, int64_t end) {
  const int64_t at = begin * to.size, bytes = (end - begin) * to.size;
  const int64_t grad_at = begin * to.grad_size, grad_bytes = (end - begin) * to.grad_size;
  if (decision.better) {
    std::memcpy(to.x_best + at, to.x_adv + at, bytes);
    std::memcpy(to.grad_best + grad_at, to.grad + grad_at, grad_bytes);
  }
  if (decision.hit) std::memcpy(to.x_hit + at, to.x_adv + at, bytes);
  if (decision.back) std::memcpy(to.x_adv + at, to.x_best + at, bytes);
}

void run(const ApgdParams& params, const Images& images, const std::vector<Decision>& decisions,
         int64_t sample, int64_t norm) {
  static const auto linf = AFM_KERNEL(apgd_linf);
  static const auto l2 = AFM_KERNEL(apgd_l2);
  const auto image_of = [&](int64_t i) {
    const Decision& decision = decisions[i];
    const int64_t at = i * sample * images.size, grad_at = i * sample * images.grad_size;
    return ApgdImage{images.x_adv + at, (decision.back ? images.grad_best : images.grad) + grad_at,
                     images.x + at, images.x_old + at, decision.step_size};
  };
  // Threads share large images of linf, which are few.
  const int64_t chunk = norm == kLinf ? std::min(sample, kChunk) : sample;
  const int64_t chunks = (sample + chunk - 1) / chunk;
  const int64_t grain = std::max<int64_t>(1, kGrain / chunk);
  const int64_t total = static_cast<int64_t>(decisions.size()) * chunks;
  parallel_for(0, total, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t i = k / chunks, begin = k % chunks * chunk,
                    end = std::min(begin + chunk, sample);
      copy(images, decisions[i], i * sample + begin, i * sample + end);
      const ApgdImage image = image_of(i);
      norm == kLinf ? linf(params, image, begin, end) : l2(params, image, sample);
    }
  });
}

}  // namespace

void apgd_step(Tensor x_adv, Tensor x_old, Tensor x_best, Tensor grad_best, Tensor x_hit,
               Tensor numbers, Tensor counts, Tensor grad, Tensor x, Tensor loss,
               Tensor misclassified, double eps, int64_t norm, std::optional<double> clip_min,
               std::optional<double> clip_max, double momentum, double decrease, int64_t window,
               bool first) {
  // See Note [Tensors to write] in afm_kernels/functional/out.py.
  const Tensor* tensors[] = {&x_adv,  &x_old, &x_best, &grad_best, &x_hit,        &numbers,
                             &counts, &grad,  &x,      &loss,      &misclassified};
  constexpr int kWritten = 7;
  bool can_be_written = true;
  for (int i = 0; i < kWritten; ++i) {
    can_be_written = can_be_written && !is_expanded(*tensors[i]);
    for (size_t j = i + 1; j < std::size(tensors); ++j)
      can_be_written = can_be_written && !overlap(*tensors[i], *tensors[j]);
  }
  STD_TORCH_CHECK(can_be_written, "a tensor of the state is expanded, or overlaps another one");
  if (x.numel() == 0) return;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const ApgdParams params{
      .dtype = dtype_of(x),
      .grad_dtype = dtype_of(grad),
      .eps = eps,
      .clip_min = clip_min.value_or(-kInfinity),
      .clip_max = clip_max.value_or(kInfinity),
      .carried = first ? 0 : momentum,
  };
  const auto written = [](Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); };
  const auto read = [](const Tensor& tensor) {
    return static_cast<const char*>(tensor.const_data_ptr());
  };
  const Images images{written(x_adv),
                      written(x_old),
                      written(x_best),
                      written(grad_best),
                      written(x_hit),
                      read(grad),
                      read(x),
                      static_cast<int64_t>(x.element_size()),
                      static_cast<int64_t>(grad.element_size())};
  const int64_t count = x.size(0);
  const Rule rule{decrease, window, first};
  const auto* flags = static_cast<const bool*>(misclassified.const_data_ptr());
  auto* counters = static_cast<int32_t*>(counts.mutable_data_ptr());
  const auto decisions =
      dtype_of(numbers) == DType::kFloat64
          ? decide(static_cast<double*>(numbers.mutable_data_ptr()), counters,
                   static_cast<const double*>(loss.const_data_ptr()), flags, count, rule)
          : decide(static_cast<float*>(numbers.mutable_data_ptr()), counters,
                   static_cast<const float*>(loss.const_data_ptr()), flags, count, rule);
  run(params, images, decisions, x.numel() / count, norm);
}

}  // namespace afm::cpu

STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CPU, m) {
  m.impl("apgd_step", TORCH_BOX(&afm::cpu::apgd_step));
}
