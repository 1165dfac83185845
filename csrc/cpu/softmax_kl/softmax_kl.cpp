// The operators softmax_kl_* and distillation_* on CPUs. See Note [Operator contract] in
// afm_kernels/ops.py.

#include "cpu/softmax_kl/softmax_kl.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "cpu/dispatch/dispatch.h"
#include "cpu/losses/losses.h"
#include "cpu/layout/tensors.h"

namespace afm::cpu {

namespace {

// The call that all operators are variants of.
struct SoftmaxKlCall : LossCall {
  SoftmaxKlParams params;

  SoftmaxKlCall(const Tensor& student, const Tensor& teacher,
                const std::optional<Tensor>& row_weight, double temperature, int64_t divergence,
                double beta, double scale)
      : LossCall(student, teacher, row_weight) {
    params.divergence = static_cast<Divergence>(divergence);
    params.beta = beta, params.gamma = 1 - beta;
    params.temperature = temperature;
    params.scale = scale;
    params.classes = classes;
    params.row_weight = weights;
  }

  void add_labels(const Tensor& labels, double alpha, double label_smoothing,
                  int64_t ignore_index) {
    CrossEntropyParams& ce = params.cross_entropy;
    params.divergence_weight = alpha * params.temperature * params.temperature;
    ce.weight = 1 - alpha;
    ce.label_smoothing = label_smoothing;
    ce.ignore_index = ignore_index;
    ce.labels = static_cast<const int64_t*>(labels.data_ptr());
    if (ce.weight == 0) return;
    for (int64_t i = 0; i < rows; ++i)
      STD_TORCH_CHECK(ce.labels[i] == ignore_index || (ce.labels[i] >= 0 && ce.labels[i] < classes),
                      "labels[", i, "] is ", ce.labels[i], "; allowed: 0 to ", classes - 1,
                      ", or ignore_index (", ignore_index, ")");
  }

  void run() {
    // KL(q || p) is KL(p || q) with the sides exchanged; JS is itself with the weights exchanged
    // too.
    const bool is_js = params.divergence == Divergence::kJs;
    const bool exchanged =
        is_js ? params.beta < params.gamma : params.divergence == Divergence::kReverseKl;
    if (exchanged && is_js) std::swap(params.beta, params.gamma);
    if (exchanged && !is_js) params.divergence = Divergence::kKl;
    RowsBuilder rows_builder(layout);
    rows_builder.add(student, layout.strides, exchanged ? params.teacher : params.student);
    rows_builder.add(teacher, teacher_layout.strides, exchanged ? params.student : params.teacher);
    if (grad_student)
      rows_builder.add(*grad_student, Layout(*grad_student).strides,
                       exchanged ? params.grad_teacher : params.grad_student);
    if (grad_teacher)
      rows_builder.add(*grad_teacher, Layout(*grad_teacher).strides,
                       exchanged ? params.grad_student : params.grad_teacher);
    rows_builder.finish(params.shape);
    params.stream =
        params.log_scales == nullptr && !params.overwrites && gradients_outgrow_caches();
    params.grad_loss = grad_loss, params.grad_loss_stride = grad_loss_stride;
    params.row_values = row_values();

    static const auto kl_float = AFM_KERNEL(softmax_kl_rows_float);
    static const auto kl_double = AFM_KERNEL(softmax_kl_rows_double);
    run_rows(is_double ? kl_double : kl_float, params,
             params.overwrites              ? softmax_kl_overwriting_scratch(classes)
             : params.log_scales != nullptr ? softmax_kl_direction_scratch(classes)
                                            : softmax_kl_scratch(classes));
  }
};

// Softmax KL.

std::tuple<Tensor, Tensor> softmax_kl_forward(Tensor student, Tensor teacher,
                                              std::optional<Tensor> row_weight, double temperature,
                                              int64_t divergence, double beta, int64_t reduction,
                                              double scale) {
  SoftmaxKlCall call(student, teacher, row_weight, temperature, divergence, beta, scale);
  call.want_loss(reduction);
  Tensor stats = call.new_stats(kRowStats);
  call.params.row_stats = stats.data_ptr();
  call.run();
  return {call.take_loss(), std::move(stats)};
}

std::tuple<Tensor, Tensor> softmax_kl_backward(Tensor grad_loss, Tensor student, Tensor teacher,
                                               std::optional<Tensor> row_weight, Tensor row_stats,
                                               double temperature, int64_t divergence, double beta,
                                               double scale, bool wrt_student, bool wrt_teacher) {
  SoftmaxKlCall call(student, teacher, row_weight, temperature, divergence, beta, scale);
  call.params.row_stats = row_stats.data_ptr(), call.params.stats_are_given = true;
  call.give_grad_loss(grad_loss);
  call.want_gradients(wrt_student, wrt_teacher);
  call.run();
  return call.take_gradients();
}

std::tuple<Tensor, Tensor, Tensor> softmax_kl_forward_grad(Tensor student, Tensor teacher,
                                                           std::optional<Tensor> row_weight,
                                                           double temperature, int64_t divergence,
                                                           double beta, int64_t reduction,
                                                           double scale, bool wrt_student,
                                                           bool wrt_teacher) {
  SoftmaxKlCall call(student, teacher, row_weight, temperature, divergence, beta, scale);
  call.want_loss(reduction);
  call.want_gradients(wrt_student, wrt_teacher);
  call.run();
  return std::tuple_cat(std::tuple<Tensor>(call.take_loss()), call.take_gradients());
}

std::tuple<Tensor, Tensor, Tensor> softmax_kl_forward_backward(Tensor student, Tensor teacher,
                                                               std::optional<Tensor> row_weight,
                                                               double temperature,
                                                               int64_t divergence, double beta,
                                                               double scale, double grad_loss,
                                                               bool wrt_student, bool wrt_teacher) {
  SoftmaxKlCall call(student, teacher, row_weight, temperature, divergence, beta, scale);
  call.params.expected_grad_loss = grad_loss, call.params.as_backward = true;
  call.want_loss(/*reduction=*/1);
  call.want_gradients(wrt_student, wrt_teacher);
  call.run();
  return std::tuple_cat(std::tuple<Tensor>(call.take_loss()), call.take_gradients());
}

std::tuple<Tensor, Tensor> softmax_kl_grad(Tensor student, Tensor teacher,
                                           std::optional<Tensor> row_weight, double temperature,
                                           int64_t divergence, double beta, double scale,
                                           bool wrt_student, bool wrt_teacher) {
  SoftmaxKlCall call(student, teacher, row_weight, temperature, divergence, beta, scale);
  call.want_gradients(wrt_student, wrt_teacher);
  call.run();
  return call.take_gradients();
}

void softmax_kl_grad_out(Tensor student, Tensor teacher, std::optional<Tensor> row_weight,
                         double temperature, int64_t divergence, double beta, double scale,
                         std::optional<Tensor> grad_student, std::optional<Tensor> grad_teacher) {
  SoftmaxKlCall call(student, teacher, row_weight, temperature, divergence, beta, scale);
  call.put_gradients(std::move(grad_student), std::move(grad_teacher));
  call.run();
}

std::tuple<Tensor, Tensor, Tensor> softmax_kl_direction(Tensor student, Tensor teacher,
                                                        double temperature, bool wrt_student,
                                                        bool wrt_teacher) {
  SoftmaxKlCall call(student, teacher, std::nullopt, temperature,
                     static_cast<int64_t>(Divergence::kKl), 0.5, 1);
  call.want_gradients(wrt_student, wrt_teacher);
  Tensor log_scale = call.new_row_numbers();
  call.params.log_scales = log_scale.data_ptr();
  call.run();
  return std::tuple_cat(call.take_gradients(), std::tuple<Tensor>(std::move(log_scale)));
}

// Distillation: (1 - alpha) * cross-entropy + alpha * T^2 * KL.

constexpr auto kKl = static_cast<int64_t>(Divergence::kKl);

std::tuple<Tensor, Tensor> distillation_forward(Tensor student, Tensor teacher, Tensor labels,
                                                std::optional<Tensor> row_weight,
                                                double temperature, double alpha,
                                                double label_smoothing, int64_t ignore_index,
                                                int64_t reduction, double scale) {
  SoftmaxKlCall call(student, teacher, row_weight, temperature, kKl, 0.5, scale);
  call.add_labels(labels, alpha, label_smoothing, ignore_index);
  call.want_loss(reduction);
  Tensor stats = call.new_stats(kRowStats);
  call.params.row_stats = stats.data_ptr();
  call.run();
  return {call.take_loss(), std::move(stats)};
}

std::tuple<Tensor, Tensor> distillation_backward(Tensor grad_loss, Tensor student, Tensor teacher,
                                                 Tensor labels, std::optional<Tensor> row_weight,
                                                 Tensor row_stats, double temperature, double alpha,
                                                 double label_smoothing, int64_t ignore_index,
                                                 double scale, bool wrt_student, bool wrt_teacher) {
  SoftmaxKlCall call(student, teacher, row_weight, temperature, kKl, 0.5, scale);
  call.add_labels(labels, alpha, label_smoothing, ignore_index);
  call.params.row_stats = row_stats.data_ptr(), call.params.stats_are_given = true;
  call.give_grad_loss(grad_loss);
  call.want_gradients(wrt_student, wrt_teacher);
  call.run();
  return call.take_gradients();
}

std::tuple<Tensor, Tensor, Tensor> distillation_forward_grad(
    Tensor student, Tensor teacher, Tensor labels, std::optional<Tensor> row_weight,
    double temperature, double alpha, double label_smoothing, int64_t ignore_index,
    int64_t reduction, double scale, bool wrt_student, bool wrt_teacher) {
  SoftmaxKlCall call(student, teacher, row_weight, temperature, kKl, 0.5, scale);
  call.add_labels(labels, alpha, label_smoothing, ignore_index);
  call.want_loss(reduction);
  call.want_gradients(wrt_student, wrt_teacher);
  call.run();
  return std::tuple_cat(std::tuple<Tensor>(call.take_loss()), call.take_gradients());
}

// Row values of a divergence, a cross-entropy or both; gradients overwrite their logits.

Tensor linear_kl_rows(Tensor student, Tensor teacher, std::optional<Tensor> labels,
                      std::optional<Tensor> row_weight, double temperature, int64_t divergence,
                      double beta, double divergence_weight, double label_weight,
                      double label_smoothing, int64_t ignore_index, double scale, bool wrt_student,
                      bool wrt_teacher) {
  // Labels are the student's, which other divergences may exchange with the teacher.
  SoftmaxKlCall call(student, teacher, row_weight, temperature, labels ? kKl : divergence, beta,
                     scale);
  if (labels) {
    STD_TORCH_CHECK(divergence == kKl || divergence_weight == 0,
                    "labels go with kl only, or with no divergence");
    call.add_labels(*labels, 0, label_smoothing, ignore_index);
    call.params.cross_entropy.weight = label_weight;
  }
  call.params.divergence_weight = divergence_weight;
  STD_TORCH_CHECK(
      (!wrt_student || !is_expanded(student)) && (!wrt_teacher || !is_expanded(teacher)),
      "logits to overwrite are expanded");
  const bool looks_at_both = divergence_weight != 0 || wrt_teacher;
  STD_TORCH_CHECK(!(wrt_student || wrt_teacher) || !looks_at_both || !overlap(student, teacher),
                  "logits to overwrite overlap the others in memory");
  if (wrt_student) call.grad_student = student;
  if (wrt_teacher) call.grad_teacher = teacher;
  call.params.overwrites = wrt_student || wrt_teacher;
  call.want_loss(/*reduction=*/0);
  call.run();
  return call.take_loss();
}

}  // namespace
}  // namespace afm::cpu

STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CPU, m) {
  m.impl("softmax_kl_forward", TORCH_BOX(&afm::cpu::softmax_kl_forward));
  m.impl("softmax_kl_backward", TORCH_BOX(&afm::cpu::softmax_kl_backward));
  m.impl("softmax_kl_forward_grad", TORCH_BOX(&afm::cpu::softmax_kl_forward_grad));
  m.impl("softmax_kl_forward_backward", TORCH_BOX(&afm::cpu::softmax_kl_forward_backward));
  m.impl("softmax_kl_grad", TORCH_BOX(&afm::cpu::softmax_kl_grad));
  m.impl("softmax_kl_grad_out", TORCH_BOX(&afm::cpu::softmax_kl_grad_out));
  m.impl("softmax_kl_direction", TORCH_BOX(&afm::cpu::softmax_kl_direction));
  m.impl("linear_kl_rows", TORCH_BOX(&afm::cpu::linear_kl_rows));
  m.impl("distillation_forward", TORCH_BOX(&afm::cpu::distillation_forward));
  m.impl("distillation_backward", TORCH_BOX(&afm::cpu::distillation_backward));
  m.impl("distillation_forward_grad", TORCH_BOX(&afm::cpu::distillation_forward_grad));
}
