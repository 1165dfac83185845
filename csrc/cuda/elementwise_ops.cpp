// The operators pgd_step, pgd_start, apgd_step and scale_shift_relu on CUDA tensors.

#include <array>

#include "cuda/apgd_step.h"
#include "cuda/operators.h"
#include "cuda/pgd_step.h"
#include "cuda/scale_shift_relu.h"

namespace afm::cuda {

namespace {

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}

// Whether the elements fill a block of memory without gaps or overlaps, the first dimension
// outermost: contiguous, channels-last, and other orders of the inner dimensions.
bool dense_by_sample(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> inner;  // stride, size
  for (int64_t dim = 1; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1) inner.emplace_back(tensor.stride(dim), tensor.size(dim));
  }
  std::sort(inner.begin(), inner.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : inner) {
    if (stride != expected) return false;
    expected *= size;
  }
  return tensor.dim() == 0 || tensor.size(0) <= 1 || tensor.stride(0) == expected;
}

// Inputs in the memory order of an output: themselves where they are in it, else copies.
class InOrderOf {
 public:
  explicit InOrderOf(const Tensor& output) : output_(output), direct_(dense_by_sample(output)) {
    if (!direct_) {
      std::vector<int64_t> sizes(output.dim());
      for (int64_t dim = 0; dim < output.dim(); ++dim) sizes[dim] = output.size(dim);
      written_ = new_empty(output, sizes, output.scalar_type());
    } else {
      written_ = output;
    }
  }

  Tensor input(const Tensor& tensor) const {
    if (same_strides(tensor, *written_)) return tensor;
    // A copy in the order of the output, the dtype its own.
    std::vector<int64_t> sizes(tensor.dim()), strides(tensor.dim());
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      sizes[dim] = tensor.size(dim);
      strides[dim] = written_->stride(dim);
    }
    Tensor copy = new_empty_strided(tensor, sizes, strides, tensor.scalar_type());
    torch::stable::copy_(copy, tensor);
    return copy;
  }

  const Tensor& written() const { return *written_; }

  void finish() {
    if (!direct_) torch::stable::copy_(output_, *written_);
  }

 private:
  Tensor output_;
  std::optional<Tensor> written_;
  bool direct_;
};

FlatView view_of(const Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()), dtype_of(tensor)};
}

bool is_float64(const Tensor& tensor) { return dtype_of(tensor) == DType::kFloat64; }

constexpr int64_t kLinf = 0;  // an index into NORMS of afm_kernels/ops.py

void run_pgd(const Tensor& x_adv, const Tensor& direction, const Tensor& x, double step_size,
             double eps, int64_t norm, std::optional<double> clip_min,
             std::optional<double> clip_max, bool start, const Tensor& out) {
  if (out.numel() == 0) return;
  const Place place(out);
  InOrderOf order(out);
  const Tensor x_adv_in = order.input(x_adv), direction_in = order.input(direction),
               x_in = order.input(x);
  PgdProblem problem;
  problem.x_adv = view_of(x_adv_in);
  problem.direction = view_of(direction_in);
  problem.x = view_of(x_in);
  problem.out = view_of(order.written());
  problem.count = out.numel();
  problem.sample = out.dim() == 0 ? 1 : out.numel() / out.size(0);
  problem.start = start;
  problem.exact = is_float64(x_adv) || is_float64(direction) || is_float64(x);
  problem.step_size = step_size;
  problem.eps = eps;
  problem.has_min = clip_min.has_value();
  problem.has_max = clip_max.has_value();
  problem.clip_min = clip_min.value_or(0);
  problem.clip_max = clip_max.value_or(0);
  if (norm == kLinf) {
    launch_pgd_linf(problem, place.stream());
  } else {
    launch_pgd_l2(problem, place.stream());
  }
  order.finish();
}

}  // namespace

Tensor pgd_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size,
                double eps, int64_t norm, std::optional<double> clip_min,
                std::optional<double> clip_max) {
  const Tensor out = torch::stable::empty_like(x_adv);
  run_pgd(x_adv, grad, x, step_size, eps, norm, clip_min, clip_max, false, out);
  return out;
}

void pgd_step_out(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size,
                  double eps, int64_t norm, std::optional<double> clip_min,
                  std::optional<double> clip_max, const Tensor& out) {
  run_pgd(x_adv, grad, x, step_size, eps, norm, clip_min, clip_max, false, out);
}

Tensor pgd_start(const Tensor& x, const Tensor& noise, double noise_scale, double eps, int64_t norm,
                 std::optional<double> clip_min, std::optional<double> clip_max) {
  const Tensor out = torch::stable::empty_like(x);
  run_pgd(x, noise, x, noise_scale, eps, norm, clip_min, clip_max, true, out);
  return out;
}

void apgd_step(const Tensor& x_adv, const Tensor& x_old, const Tensor& x_best,
               const Tensor& grad_best, const Tensor& x_hit, const Tensor& numbers,
               const Tensor& counts, const Tensor& grad, const Tensor& x, const Tensor& loss,
               const Tensor& misclassified, double eps, int64_t norm,
               std::optional<double> clip_min, std::optional<double> clip_max, double momentum,
               double decrease, int64_t window, bool first) {
  if (x.numel() == 0) return;
  const Place place(x);
  ApgdProblem problem;
  problem.x_adv = view_of(x_adv);
  problem.x_old = view_of(x_old);
  problem.x_best = view_of(x_best);
  problem.grad_best = view_of(grad_best);
  problem.x_hit = view_of(x_hit);
  problem.grad = view_of(grad);
  problem.x = view_of(x);
  problem.numbers = numbers.data_ptr();
  problem.counts = static_cast<int32_t*>(counts.data_ptr());
  problem.loss = loss.data_ptr();
  problem.misclassified = static_cast<const bool*>(misclassified.data_ptr());
  problem.images = x.size(0);
  problem.sample = x.numel() / x.size(0);
  problem.exact = is_float64(x) || is_float64(grad);
  problem.eps = eps;
  problem.carried = first ? 0 : momentum;
  problem.decrease = decrease;
  problem.window = window;
  problem.first = first;
  problem.has_min = clip_min.has_value();
  problem.has_max = clip_max.has_value();
  problem.clip_min = clip_min.value_or(0);
  problem.clip_max = clip_max.value_or(0);
  if (norm == kLinf) {
    launch_apgd_linf(problem, place.stream());
  } else {
    launch_apgd_l2(problem, place.stream());
  }
}

namespace {

void set_channels(ScaleShiftReluProblem& problem, const Tensor& written) {
  problem.count = written.numel();
  problem.channels = written.size(1);
  problem.channel_stride = problem.channels > 1 ? written.stride(1) : problem.count;
}

}  // namespace

Tensor scale_shift_relu_forward(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                const std::optional<Tensor>& residual) {
  const Tensor out = torch::stable::empty_like(x);
  if (out.numel() == 0) return out;
  const Place place(x);
  InOrderOf order(out);
  const Tensor x_in = order.input(x);
  const Tensor scale_in = torch::stable::contiguous(scale);
  const Tensor shift_in = torch::stable::contiguous(shift);
  ScaleShiftReluProblem problem;
  std::optional<Tensor> residual_in;
  if (residual) {
    residual_in = order.input(*residual);
    problem.residual = view_of(*residual_in);
  }
  problem.x = view_of(x_in);
  problem.scale = view_of(scale_in);
  problem.shift = view_of(shift_in);
  problem.out = view_of(order.written());
  problem.exact = is_float64(x) || is_float64(scale) || is_float64(shift) ||
                  (residual && is_float64(*residual));
  set_channels(problem, order.written());
  launch_scale_shift_relu_forward(problem, place.stream());
  order.finish();
  return out;
}

std::tuple<Tensor, Tensor> scale_shift_relu_backward(const Tensor& grad_output,
                                                     const Tensor& output, const Tensor& scale,
                                                     bool wrt_x, bool wrt_residual) {
  const auto result = [&](bool wanted) {
    return wanted ? torch::stable::empty_like(output)
                  : new_empty(output, {0}, output.scalar_type());
  };
  const Tensor grad_x = result(wrt_x), grad_residual = result(wrt_residual);
  if (output.numel() == 0 || !(wrt_x || wrt_residual)) return {grad_x, grad_residual};
  const Place place(output);
  // Both results are like `output`, so they share an order.
  InOrderOf order(wrt_x ? grad_x : grad_residual);
  std::optional<InOrderOf> second;
  if (wrt_x && wrt_residual) second.emplace(grad_residual);
  const Tensor grad_in = order.input(grad_output), output_in = order.input(output);
  const Tensor scale_in = torch::stable::contiguous(scale);
  ScaleShiftReluProblem problem;
  problem.grad_output = view_of(grad_in);
  problem.output = view_of(output_in);
  problem.scale = view_of(scale_in);
  if (wrt_x) problem.grad_x = view_of(order.written());
  if (wrt_residual) problem.grad_residual = view_of((second ? *second : order).written());
  problem.exact = is_float64(grad_output) || is_float64(output) || is_float64(scale);
  set_channels(problem, order.written());
  launch_scale_shift_relu_backward(problem, place.stream());
  order.finish();
  if (second) second->finish();
  return {grad_x, grad_residual};
}

}  // namespace afm::cuda

AFM_CUDA_OPERATORS(m) {
  m.impl("pgd_step", TORCH_BOX(&afm::cuda::pgd_step));
  m.impl("pgd_step_out", TORCH_BOX(&afm::cuda::pgd_step_out));
  m.impl("pgd_start", TORCH_BOX(&afm::cuda::pgd_start));
  m.impl("apgd_step", TORCH_BOX(&afm::cuda::apgd_step));
  m.impl("scale_shift_relu_forward", TORCH_BOX(&afm::cuda::scale_shift_relu_forward));
  m.impl("scale_shift_relu_backward", TORCH_BOX(&afm::cuda::scale_shift_relu_backward));
}
