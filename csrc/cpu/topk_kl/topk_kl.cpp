// The operators topk_kl_* on CPUs. See Note [Operator contract] in afm_kernels/ops.py.

#include "cpu/topk_kl/topk_kl.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "cpu/losses/losses.h"

namespace afm::cpu {

namespace {

struct TopkKlCall : LossCall {
  TopkKlParams params;
  bool overwrites = false;  // gradients go where the student's logits are

  TopkKlCall(const Tensor& student, const Tensor& log_probs, const Tensor& indices,
             const std::optional<Tensor>& log_tail, const std::optional<Tensor>& row_weight,
             double temperature, int64_t mode, double scale)
      : LossCall(student, log_probs, row_weight, /*same_classes=*/false) {
    using torch::headeronly::ScalarType;
    const Layout ids(indices);
    const int64_t kept = teacher_layout.sizes[teacher_layout.dims - 1];
    STD_TORCH_CHECK(
        ids.numel == rows * kept && indices.is_contiguous() && log_probs.is_contiguous(),
        "indices and log-probabilities differ in shape, or are not contiguous");
    STD_TORCH_CHECK(!log_tail || (log_tail->numel() == rows && log_tail->is_contiguous()),
                    "log_tail is not contiguous, of the rows' shape");
    params.classes = classes, params.kept = kept;
    params.indices = indices.data_ptr();
    params.indices_are_64_bits = indices.scalar_type() == ScalarType::Long;
    params.log_probs = log_probs.data_ptr(), params.log_probs_dtype = dtype_of(log_probs);
    params.mode = static_cast<TopkMode>(mode);
    if (log_tail && params.mode == TopkMode::kTail) params.log_tail = log_tail->data_ptr();
    params.temperature = temperature, params.scale = scale;
    params.row_weight = weights;
  }

  void run() {
    RowsBuilder rows_builder(layout);
    rows_builder.add(student, layout.strides, params.student);
    if (grad_student)
      rows_builder.add(*grad_student, Layout(*grad_student).strides, params.grad_student);
    rows_builder.finish(params.shape);
    params.stream = !overwrites && gradients_outgrow_caches();
    params.grad_loss = grad_loss, params.grad_loss_stride = grad_loss_stride;
    params.row_values = row_values();

    static const auto rows_float = AFM_KERNEL(topk_kl_rows_float);
    static const auto rows_double = AFM_KERNEL(topk_kl_rows_double);
    run_rows(is_double ? rows_double : rows_float, params, topk_kl_scratch(classes, params.kept));
  }
};

std::tuple<Tensor, Tensor> topk_kl_forward(Tensor student, Tensor log_probs, Tensor indices,
                                           std::optional<Tensor> log_tail,
                                           std::optional<Tensor> row_weight, double temperature,
                                           int64_t mode, int64_t reduction, double scale) {
  TopkKlCall call(student, log_probs, indices, log_tail, row_weight, temperature, mode, scale);
  call.want_loss(reduction);
  Tensor stats = call.new_stats(kTopkRowStats);
  call.params.row_stats = stats.data_ptr();
  call.run();
  return {call.take_loss(), std::move(stats)};
}

std::tuple<Tensor, Tensor> topk_kl_backward(Tensor grad_loss, Tensor student, Tensor log_probs,
                                            Tensor indices, std::optional<Tensor> log_tail,
                                            std::optional<Tensor> row_weight, Tensor row_stats,
                                            double temperature, int64_t mode, double scale,
                                            bool wrt_student, bool wrt_teacher) {
  STD_TORCH_CHECK(!wrt_teacher, "no gradient flows into stored log-probabilities");
  TopkKlCall call(student, log_probs, indices, log_tail, row_weight, temperature, mode, scale);
  call.params.row_stats = row_stats.data_ptr(), call.params.stats_are_given = true;
  call.give_grad_loss(grad_loss);
  call.want_gradients(wrt_student, false);
  call.run();
  return call.take_gradients();
}

std::tuple<Tensor, Tensor, Tensor> topk_kl_forward_grad(
    Tensor student, Tensor log_probs, Tensor indices, std::optional<Tensor> log_tail,
    std::optional<Tensor> row_weight, double temperature, int64_t mode, int64_t reduction,
    double scale, bool wrt_student, bool wrt_teacher) {
  STD_TORCH_CHECK(!wrt_teacher, "no gradient flows into stored log-probabilities");
  TopkKlCall call(student, log_probs, indices, log_tail, row_weight, temperature, mode, scale);
  call.want_loss(reduction);
  call.want_gradients(wrt_student, false);
  call.run();
  return std::tuple_cat(std::tuple<Tensor>(call.take_loss()), call.take_gradients());
}

Tensor topk_kl_forward_grad_out(Tensor student, Tensor log_probs, Tensor indices,
                                std::optional<Tensor> log_tail, std::optional<Tensor> row_weight,
                                double temperature, int64_t mode, int64_t reduction, double scale,
                                Tensor grad_student) {
  TopkKlCall call(student, log_probs, indices, log_tail, row_weight, temperature, mode, scale);
  call.want_loss(reduction);
  call.overwrites = are_one_view(grad_student, student);
  STD_TORCH_CHECK(is_like(grad_student, student) && !is_expanded(grad_student) &&
                      (call.overwrites || !overlap(grad_student, student)),
                  "the gradient is not like its logits, is expanded, or overlaps them in part");
  call.grad_student = grad_student;
  call.run();
  return call.take_loss();
}

}  // namespace
}  // namespace afm::cpu

STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CPU, m) {
  m.impl("topk_kl_forward", TORCH_BOX(&afm::cpu::topk_kl_forward));
  m.impl("topk_kl_backward", TORCH_BOX(&afm::cpu::topk_kl_backward));
  m.impl("topk_kl_forward_grad", TORCH_BOX(&afm::cpu::topk_kl_forward_grad));
  m.impl("topk_kl_forward_grad_out", TORCH_BOX(&afm::cpu::topk_kl_forward_grad_out));
}
