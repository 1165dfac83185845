// The operators of the projected gradient step. Definition: afm_kernels/reference/pgd_step.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/dispatch/dispatch.h"
#include "cpu/images/pgd_step_kernel.h"
#include "cpu/layout/strided_loop_plan.h"

namespace afm::cpu {

namespace {

using torch::stable::Tensor;

constexpr int64_t kLinf = 0;  // index into ops.NORMS

// Elements below which a second thread costs more than it saves, by estimate.
constexpr int64_t kGrain = 16384;
// Elements that one partial sum of an l2 norm covers, whoever computes it. Three operands of it fit
// the second-level cache.
constexpr int64_t kChunk = 16384;

constexpr int kOperands = PgdParams::kOperands;

void run_linf(const PgdParams& params) {
  static const auto kernel = AFM_KERNEL(pgd_linf);
  parallel_for(0, params.loop.numel, kGrain,
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

// How a sample moves: out = x + (x_adv + along * (grad * grad_scale) - x) * shrink.
struct Move {
  double along;
  double grad_scale;
  double shrink;
};

class L2Step {
 public:
  // `sums_params`: `params` with a loop that is independent of how `out` lies, as the order of
  // additions has to be.
  L2Step(const PgdParams& params, const PgdParams& sums_params, int64_t samples,
         const std::array<int64_t, kOperands>& sample_strides)
      : params_(params),
        sums_params_(sums_params),
        samples_(samples),
        sample_strides_(sample_strides),
        chunks_((params.loop.numel + kChunk - 1) / kChunk) {}

  void run() const {
    const int64_t numel = params_.loop.numel;
    if (samples_ >= 4 * num_threads() || numel <= kChunk) {
      // A sample is still in the cache when it is written.
      const int64_t grain = (kGrain + numel - 1) / numel;
      parallel_for(0, samples_, grain, [&](int64_t begin, int64_t end) {
        for (int64_t sample = begin; sample < end; ++sample) {
          PgdSums sums{0, 0, 0};
          for (int64_t chunk = 0; chunk < chunks_; ++chunk) add(&sums, chunk_sums(sample, chunk));
          const Move move = move_of(sample, sums);
          for (int64_t chunk = 0; chunk < chunks_; ++chunk) apply(sample, chunk, move);
        }
      });
      return;
    }
    // Few large samples: threads share them. The same partial sums are added in the same order.
    std::vector<PgdSums> partial(samples_ * chunks_);
    parallel_for(0, samples_ * chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) partial[i] = chunk_sums(i / chunks_, i % chunks_);
    });
    std::vector<Move> moves(samples_);
    for (int64_t sample = 0; sample < samples_; ++sample) {
      PgdSums sums{0, 0, 0};
      for (int64_t chunk = 0; chunk < chunks_; ++chunk)
        add(&sums, partial[sample * chunks_ + chunk]);
      moves[sample] = move_of(sample, sums);
    }
    parallel_for(0, samples_ * chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) apply(i / chunks_, i % chunks_, moves[i / chunks_]);
    });
  }

 private:
  static void add(PgdSums* sums, const PgdSums& more) {
    sums->gg += more.gg;
    sums->dg += more.dg;
    sums->dd += more.dd;
  }

  std::array<int64_t, kOperands> offsets(int64_t sample) const {
    std::array<int64_t, kOperands> result;
    for (int k = 0; k < kOperands; ++k) result[k] = sample * sample_strides_[k];
    return result;
  }

  int64_t chunk_end(int64_t chunk) const {
    return std::min((chunk + 1) * kChunk, params_.loop.numel);
  }

  PgdSums chunk_sums(int64_t sample, int64_t chunk) const {
    static const auto kernel = AFM_KERNEL(pgd_l2_sums);
    return kernel(sums_params_, offsets(sample).data(), chunk * kChunk, chunk_end(chunk));
  }

  PgdSums double_sums(int64_t sample, double grad_scale) const {
    static const auto kernel = AFM_KERNEL(pgd_l2_double_sums);
    return kernel(sums_params_, offsets(sample).data(), 0, params_.loop.numel, grad_scale);
  }

  void apply(int64_t sample, int64_t chunk, const Move& move) const {
    static const auto kernel = AFM_KERNEL(pgd_l2_apply);
    kernel(params_, offsets(sample).data(), chunk * kChunk, chunk_end(chunk), move.along,
           move.grad_scale, move.shrink);
  }

  bool is_start() const { return params_.x_adv == nullptr; }

  // How far a sample moves.
  double reach_of(const PgdSums& sums) const {
    return is_start() ? params_.step_size * std::sqrt(sums.gg) : params_.step_size;
  }

  // With u = grad / ||grad||, the squared length of d + reach * u follows from the sums alone.
  double squared_length(const PgdSums& sums) const {
    const double reach = reach_of(sums), along_d = is_start() ? 0 : sums.dg / std::sqrt(sums.gg);
    return sums.dd + 2 * reach * along_d + reach * reach;
  }

  // Whether sums of float squares have the digits that a float result needs. See Note [Sums of an
  // l2 step]. NaN: they do not.
  bool hold(const PgdSums& sums) const {
    // Each square is off by half the smallest float, 2^-149, or by its rounding.
    const double least = 0x1p-120 * static_cast<double>(params_.loop.numel), most = 0x1p120;
    if (!(sums.gg > least && sums.gg < most && sums.dd < most && params_.eps * params_.eps > least))
      return false;
    // A step back by nearly all that a sample was off leaves little but roundings.
    const double reach = reach_of(sums);
    return 8 * squared_length(sums) > sums.dd + reach * reach;
  }

  Move move_of(int64_t sample, PgdSums sums) const {
    double grad_scale = 1;
    if (!hold(sums)) sums = double_sums(sample, 1);
    if (!is_start() && !(sums.gg > 1e-280 && sums.gg < 1e280)) {
      static const auto grad_max = AFM_KERNEL(pgd_grad_max);
      const double largest = grad_max(params_, offsets(sample).data(), 0, params_.loop.numel);
      if (largest == 0) return {0, 1, shrink_of(sums.dd)};
      grad_scale = std::isfinite(largest) ? std::ldexp(1.0, -std::max(std::ilogb(largest), -1022))
                                          : std::numeric_limits<double>::quiet_NaN();
      sums = double_sums(sample, grad_scale);
    }
    return {is_start() ? params_.step_size : params_.step_size / std::sqrt(sums.gg), grad_scale,
            shrink_of(squared_length(sums))};
  }

  double shrink_of(double squared_length) const {
    const double length = std::sqrt(squared_length < 0 ? 0 : squared_length);
    return length <= params_.eps ? 1 : params_.eps / length;
  }

  const PgdParams& params_;
  const PgdParams& sums_params_;
  const int64_t samples_;
  const std::array<int64_t, kOperands> sample_strides_;
  const int64_t chunks_;
};

void run(Tensor& out, const Tensor* x_adv, const Tensor& grad, const Tensor& x, double step_size,
         double eps, int64_t norm, std::optional<double> clip_min, std::optional<double> clip_max) {
  if (out.numel() == 0) return;
  const Tensor& from = x_adv == nullptr ? x : *x_adv;
  const std::array<const int64_t*, kOperands> strides = {
      out.strides().data(), from.strides().data(), grad.strides().data(), x.strides().data()};
  const int64_t* sizes = out.sizes().data();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const void* to = out.const_data_ptr();
  const bool in_place =
      to == from.const_data_ptr() || to == grad.const_data_ptr() || to == x.const_data_ptr();
  const PgdParams params{
      .out = out.mutable_data_ptr(),
      .x_adv = x_adv == nullptr ? nullptr : x_adv->const_data_ptr(),
      .grad = grad.const_data_ptr(),
      .x = x.const_data_ptr(),
      .dtype = dtype_of(x),
      .grad_dtype = dtype_of(grad),
      .loop = plan_loop<kOperands>(sizes, out.dim(), strides, norm == kLinf ? 0 : 1),
      .step_size = step_size,
      .eps = eps,
      .clip_min = clip_min.value_or(-kInfinity),
      .clip_max = clip_max.value_or(kInfinity),
      .stream = outgrows_caches(out.numel() * out.element_size()) && !in_place,
  };
  if (norm == kLinf) {
    run_linf(params);
  } else {
    std::array<int64_t, kOperands> sample_strides;
    for (int k = 0; k < kOperands; ++k) sample_strides[k] = strides[k][0];
    PgdParams sums_params = params;
    auto sums_strides = strides;
    sums_strides[PgdParams::kOut] = strides[PgdParams::kXAdv];
    sums_params.loop = plan_loop<kOperands>(sizes, out.dim(), sums_strides, 1);
    L2Step(params, sums_params, sizes[0], sample_strides).run();
  }
}

}  // namespace

void pgd_step_out(Tensor x_adv, Tensor grad, Tensor x, double step_size, double eps, int64_t norm,
                  std::optional<double> clip_min, std::optional<double> clip_max, Tensor out) {
  // See Note [Tensors to write] in afm_kernels/functional/out.py.
  bool can_be_written = !is_expanded(out);
  for (const Tensor* input : {&x_adv, &grad, &x})
    can_be_written = can_be_written && (!overlap(out, *input) || are_one_view(out, *input));
  STD_TORCH_CHECK(can_be_written, "out is expanded, or overlaps an input that it is not itself");
  run(out, &x_adv, grad, x, step_size, eps, norm, clip_min, clip_max);
}

Tensor pgd_step(Tensor x_adv, Tensor grad, Tensor x, double step_size, double eps, int64_t norm,
                std::optional<double> clip_min, std::optional<double> clip_max) {
  Tensor out = torch::stable::empty_like(x_adv);
  run(out, &x_adv, grad, x, step_size, eps, norm, clip_min, clip_max);
  return out;
}

Tensor pgd_start(Tensor x, Tensor noise, double noise_scale, double eps, int64_t norm,
                 std::optional<double> clip_min, std::optional<double> clip_max) {
  Tensor out = torch::stable::empty_like(x);
  run(out, nullptr, noise, x, noise_scale, eps, norm, clip_min, clip_max);
  return out;
}

}  // namespace afm::cpu

STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CPU, m) {
  m.impl("pgd_step", TORCH_BOX(&afm::cpu::pgd_step));
  m.impl("pgd_step_out", TORCH_BOX(&afm::cpu::pgd_step_out));
  m.impl("pgd_start", TORCH_BOX(&afm::cpu::pgd_start));
}
