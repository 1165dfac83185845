// The operators softmax_kl_* and distillation_* on CUDA tensors: outputs, workspaces and the choice
// of kernel. Their contract is Note [Operator contract] in afm_kernels/ops.py.

#include <cmath>
#include <limits>
#include <utility>

#include "cuda/row_tensors.h"
#include "cuda/softmax_kl.h"
#include "cuda/softmax_kl_plan.h"
#include "cuda/sum.h"

namespace afm::cuda {

using Launch = void(Variant, const RowsProblem&, const Plan&, void*);
Launch launch_softmax_kl_half, launch_softmax_kl_bfloat16, launch_softmax_kl_float,
    launch_softmax_kl_double, launch_softmax_kl_mixed, launch_softmax_kl_mixed_double;

namespace {

Launch* launch_of(PairKind kind) {
  switch (kind) {
    case PairKind::kHalf:
      return launch_softmax_kl_half;
    case PairKind::kBFloat16:
      return launch_softmax_kl_bfloat16;
    case PairKind::kFloat:
      return launch_softmax_kl_float;
    case PairKind::kDouble:
      return launch_softmax_kl_double;
    case PairKind::kMixed:
      return launch_softmax_kl_mixed;
    default:
      return launch_softmax_kl_mixed_double;
  }
}

PairKind kind_of(DType student, DType teacher) {
  if (student == teacher) {
    switch (student) {
      case DType::kFloat16:
        return PairKind::kHalf;
      case DType::kBFloat16:
        return PairKind::kBFloat16;
      case DType::kFloat32:
        return PairKind::kFloat;
      default:
        return PairKind::kDouble;
    }
  }
  const bool exact = student == DType::kFloat64 || teacher == DType::kFloat64;
  return exact ? PairKind::kMixedDouble : PairKind::kMixed;
}

// Everything an operator was called with; the result is assembled from `loss`, `stats` and
// `grad_*`.
struct Call {
  const Tensor& student;
  const Tensor& teacher;
  const std::optional<Tensor>& row_weight;
  RowsProblem problem;
  Variant variant = Variant::kKl;
  bool swapped = false;  // reverse KL: KL with the sides exchanged

  ScalarType accumulation() const {
    const bool exact = dtype_of(student) == DType::kFloat64 || dtype_of(teacher) == DType::kFloat64;
    return exact ? ScalarType::Double : ScalarType::Float;
  }
};

// By how many classes rows may start behind a 16-byte boundary: 0 where every row starts on one.
int head_of(const RowsView& view, int row_dims, int vector) {
  const int bytes = size_of(view.dtype);
  const int word = std::min(16, vector * bytes);
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % word == 0;
  for (int dim = 0; dim < row_dims; ++dim)
    aligned = aligned && view.strides[dim] * bytes % word == 0;
  return aligned ? 0 : vector - 1;
}

// Runs the kernels of a call. `loss`: rows' values, or with `sum` one number; absent: not wanted.
void run(Call& call, std::optional<Tensor> loss, bool sum, const Tensor* stats_in,
         Tensor* stats_out, Gradient& grad_student, Gradient& grad_teacher) {
  RowsProblem& problem = call.problem;
  const int64_t classes = call.student.size(call.student.dim() - 1);
  problem.rows = rows_of(call.student);
  if (problem.rows == 0) {
    if (loss && sum) torch::stable::zero_(*loss);
    return;
  }
  const Place place(call.student);

  const RowTensors kept = lay_out(problem, call.student, call.teacher, grad_student, grad_teacher);
  if (call.swapped) {
    std::swap(problem.student, problem.teacher);
    std::swap(problem.grad_student, problem.grad_teacher);
  }
  if (call.row_weight) problem.row_weight = call.row_weight->data_ptr();

  const PairKind kind = kind_of(problem.student.dtype, problem.teacher.dtype);
  const int head = head_of(problem.student, problem.row_dims, vector_of(kind));
  const Plan plan =
      plan_rows(kind, problem.rows, classes, head, sum, multiprocessors(place.device()));
  problem.splits = plan.splits;
  problem.sum = sum;
  const int64_t blocks = plan.tier == Tier::kStream ? problem.rows * plan.splits : plan.blocks;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("afm_kernels: " + std::to_string(problem.rows) + " rows of " +
                                std::to_string(classes) +
                                " classes; the CUDA kernels take fewer than 2^31 blocks of them");
  }

  const ScalarType accumulation = call.accumulation();
  std::optional<Tensor> partial_losses, partials, terms, others;
  if (loss) {
    problem.loss = loss->data_ptr();
    if (sum && plan.partial_losses > 1) {
      partial_losses = new_empty(call.student, {plan.partial_losses}, accumulation);
      problem.loss = partial_losses->data_ptr();
    }
  }
  if (stats_in != nullptr) problem.stats_in = stats_in->data_ptr();
  if (stats_out != nullptr) problem.stats_out = stats_out->data_ptr();
  if (plan.splits > 1 && stats_in == nullptr) {
    partials = new_empty(call.student, {problem.rows * plan.splits * kPartial}, accumulation);
    problem.partials = partials->data_ptr();
    if (call.variant == Variant::kSymmetric) {
      terms = new_empty(call.student, {problem.rows * plan.splits * kRowTerms}, accumulation);
      problem.terms = terms->data_ptr();
    }
  }
  if (plan.splits > 1 && (grad_student.wanted || grad_teacher.wanted)) {
    others = new_empty(call.student, {problem.rows * plan.splits * kOthers}, ScalarType::Double);
    problem.others = static_cast<double*>(others->data_ptr());
  }
  launch_of(kind)(call.variant, problem, plan, place.stream());
  if (partial_losses) {
    launch_sum(accumulation == ScalarType::Double,
               {partial_losses->data_ptr(), plan.partial_losses, loss->data_ptr()}, place.stream());
  }
  grad_student.finish();
  grad_teacher.finish();
}

Tensor new_loss(const Call& call, int64_t reduction) {
  std::vector<int64_t> sizes;
  if (reduction == 0) {
    for (int64_t dim = 0; dim + 1 < call.student.dim(); ++dim) {
      sizes.push_back(call.student.size(dim));
    }
  }
  return new_empty(call.student, sizes, call.accumulation());
}

Call divergence_call(const Tensor& student, const Tensor& teacher,
                     const std::optional<Tensor>& row_weight, double temperature,
                     int64_t divergence, double beta, double scale) {
  Call call{student, teacher, row_weight, {}};
  call.problem.divergence = static_cast<Divergence>(divergence);
  call.problem.temperature = temperature;
  call.problem.beta = beta;
  call.problem.gamma = 1 - beta;
  call.problem.scale = scale;
  call.swapped = call.problem.divergence == Divergence::kReverseKl;
  if (call.swapped) call.problem.divergence = Divergence::kKl;
  if (call.problem.divergence != Divergence::kKl) call.variant = Variant::kSymmetric;
  return call;
}

Call distillation_call(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                       const std::optional<Tensor>& row_weight, double temperature, double alpha,
                       double label_smoothing, int64_t ignore_index, double scale) {
  Call call{student, teacher, row_weight, {}};
  call.variant = Variant::kDistillation;
  call.problem.labels = static_cast<const int64_t*>(labels.data_ptr());
  call.problem.temperature = temperature;
  call.problem.alpha = alpha;
  call.problem.label_smoothing = label_smoothing;
  call.problem.ignore_index = ignore_index;
  call.problem.scale = scale;
  return call;
}

using Pair2 = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

Pair2 forward(Call call, int64_t reduction) {
  Tensor loss = new_loss(call, reduction);
  Tensor stats = new_empty(call.student, {rows_of(call.student), kRowStats}, call.accumulation());
  Gradient none_student, none_teacher;
  run(call, loss, reduction == 1, nullptr, &stats, none_student, none_teacher);
  return {loss, stats};
}

Pair2 backward(Call call, const Tensor& grad_loss, const Tensor& stats, bool wrt_student,
               bool wrt_teacher) {
  call.problem.grad_loss = grad_loss.data_ptr();
  call.problem.grad_loss_stride = grad_loss.dim() == 0 ? 0 : 1;
  Gradient grad_student = new_gradient(call.student, wrt_student);
  Gradient grad_teacher = new_gradient(call.teacher, wrt_teacher);
  if (wrt_student || wrt_teacher) {
    run(call, std::nullopt, false, &stats, nullptr, grad_student, grad_teacher);
  }
  return {grad_student.output, grad_teacher.output};
}

Triple forward_grad(Call call, int64_t reduction, bool wrt_student, bool wrt_teacher) {
  Tensor loss = new_loss(call, reduction);
  Gradient grad_student = new_gradient(call.student, wrt_student);
  Gradient grad_teacher = new_gradient(call.teacher, wrt_teacher);
  run(call, loss, reduction == 1, nullptr, nullptr, grad_student, grad_teacher);
  return {loss, grad_student.output, grad_teacher.output};
}

}  // namespace

Pair2 softmax_kl_forward(const Tensor& student, const Tensor& teacher,
                         const std::optional<Tensor>& row_weight, double temperature,
                         int64_t divergence, double beta, int64_t reduction, double scale) {
  return forward(
      divergence_call(student, teacher, row_weight, temperature, divergence, beta, scale),
      reduction);
}

Pair2 softmax_kl_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                          const std::optional<Tensor>& row_weight, const Tensor& row_stats,
                          double temperature, int64_t divergence, double beta, double scale,
                          bool wrt_student, bool wrt_teacher) {
  return backward(
      divergence_call(student, teacher, row_weight, temperature, divergence, beta, scale),
      grad_loss, row_stats, wrt_student, wrt_teacher);
}

Triple softmax_kl_forward_grad(const Tensor& student, const Tensor& teacher,
                               const std::optional<Tensor>& row_weight, double temperature,
                               int64_t divergence, double beta, int64_t reduction, double scale,
                               bool wrt_student, bool wrt_teacher) {
  return forward_grad(
      divergence_call(student, teacher, row_weight, temperature, divergence, beta, scale),
      reduction, wrt_student, wrt_teacher);
}

Pair2 softmax_kl_grad(const Tensor& student, const Tensor& teacher,
                      const std::optional<Tensor>& row_weight, double temperature,
                      int64_t divergence, double beta, double scale, bool wrt_student,
                      bool wrt_teacher) {
  Call call = divergence_call(student, teacher, row_weight, temperature, divergence, beta, scale);
  Gradient grad_student = new_gradient(student, wrt_student);
  Gradient grad_teacher = new_gradient(teacher, wrt_teacher);
  if (wrt_student || wrt_teacher) {
    run(call, std::nullopt, false, nullptr, nullptr, grad_student, grad_teacher);
  }
  return {grad_student.output, grad_teacher.output};
}

void softmax_kl_grad_out(const Tensor& student, const Tensor& teacher,
                         const std::optional<Tensor>& row_weight, double temperature,
                         int64_t divergence, double beta, double scale,
                         const std::optional<Tensor>& out_student,
                         const std::optional<Tensor>& out_teacher) {
  Call call = divergence_call(student, teacher, row_weight, temperature, divergence, beta, scale);
  Gradient grad_student, grad_teacher;
  if (out_student) grad_student = gradient_into(*out_student);
  if (out_teacher) grad_teacher = gradient_into(*out_teacher);
  if (out_student || out_teacher) {
    run(call, std::nullopt, false, nullptr, nullptr, grad_student, grad_teacher);
  }
}

Pair2 distillation_forward(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                           const std::optional<Tensor>& row_weight, double temperature,
                           double alpha, double label_smoothing, int64_t ignore_index,
                           int64_t reduction, double scale) {
  return forward(distillation_call(student, teacher, labels, row_weight, temperature, alpha,
                                   label_smoothing, ignore_index, scale),
                 reduction);
}

Pair2 distillation_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                            const Tensor& labels, const std::optional<Tensor>& row_weight,
                            const Tensor& row_stats, double temperature, double alpha,
                            double label_smoothing, int64_t ignore_index, double scale,
                            bool wrt_student, bool wrt_teacher) {
  return backward(distillation_call(student, teacher, labels, row_weight, temperature, alpha,
                                    label_smoothing, ignore_index, scale),
                  grad_loss, row_stats, wrt_student, wrt_teacher);
}

Triple distillation_forward_grad(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                                 const std::optional<Tensor>& row_weight, double temperature,
                                 double alpha, double label_smoothing, int64_t ignore_index,
                                 int64_t reduction, double scale, bool wrt_student,
                                 bool wrt_teacher) {
  return forward_grad(distillation_call(student, teacher, labels, row_weight, temperature, alpha,
                                        label_smoothing, ignore_index, scale),
                      reduction, wrt_student, wrt_teacher);
}

}  // namespace afm::cuda

AFM_CUDA_OPERATORS(m) {
  m.impl("softmax_kl_forward", TORCH_BOX(&afm::cuda::softmax_kl_forward));
  m.impl("softmax_kl_backward", TORCH_BOX(&afm::cuda::softmax_kl_backward));
  m.impl("softmax_kl_forward_grad", TORCH_BOX(&afm::cuda::softmax_kl_forward_grad));
  m.impl("softmax_kl_grad", TORCH_BOX(&afm::cuda::softmax_kl_grad));
  m.impl("softmax_kl_grad_out", TORCH_BOX(&afm::cuda::softmax_kl_grad_out));
  m.impl("distillation_forward", TORCH_BOX(&afm::cuda::distillation_forward));
  m.impl("distillation_backward", TORCH_BOX(&afm::cuda::distillation_backward));
  m.impl("distillation_forward_grad", TORCH_BOX(&afm::cuda::distillation_forward_grad));
}
