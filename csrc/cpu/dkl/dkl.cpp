// The operators dkl_* on CPUs. See Note [Operator contract] in afm_kernels/ops.py.

#include "cpu/dkl/dkl.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "cpu/losses/losses.h"

namespace afm::cpu {

namespace {

struct DklCall : LossCall {
  DklParams params;
  const std::optional<Tensor>& class_weight;

  DklCall(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& class_weight,
          const std::optional<Tensor>& row_weight, double temperature, double weight_temperature,
          double alpha, double beta, double scale)
      : LossCall(student, teacher, row_weight), class_weight(class_weight) {
    params.classes = classes;
    params.temperature = temperature, params.weight_temperature = weight_temperature;
    params.alpha = alpha, params.beta = beta, params.scale = scale;
    params.row_weight = weights;
  }

  void run() {
    RowsBuilder rows_builder(layout);
    rows_builder.add(student, layout.strides, params.student);
    rows_builder.add(teacher, teacher_layout.strides, params.teacher);
    if (class_weight)
      rows_builder.add(*class_weight, Layout(*class_weight).strides, params.class_weight);
    if (grad_student)
      rows_builder.add(*grad_student, Layout(*grad_student).strides, params.grad_student);
    if (grad_teacher)
      rows_builder.add(*grad_teacher, Layout(*grad_teacher).strides, params.grad_teacher);
    rows_builder.finish(params.shape);
    params.grad_loss = grad_loss, params.grad_loss_stride = grad_loss_stride;
    params.row_values = row_values();

    static const auto dkl_float = AFM_KERNEL(dkl_rows_float);
    static const auto dkl_double = AFM_KERNEL(dkl_rows_double);
    run_rows(is_double ? dkl_double : dkl_float, params, dkl_scratch(classes));
  }
};

std::tuple<Tensor, Tensor> dkl_forward(Tensor student, Tensor teacher,
                                       std::optional<Tensor> class_weight,
                                       std::optional<Tensor> row_weight, double temperature,
                                       double weight_temperature, double alpha, double beta,
                                       int64_t reduction, double scale) {
  DklCall call(student, teacher, class_weight, row_weight, temperature, weight_temperature, alpha,
               beta, scale);
  call.want_loss(reduction);
  Tensor stats = call.new_stats(kDklRowStats);
  call.params.row_stats = stats.data_ptr();
  call.run();
  return {call.take_loss(), std::move(stats)};
}

std::tuple<Tensor, Tensor> dkl_backward(Tensor grad_loss, Tensor student, Tensor teacher,
                                        std::optional<Tensor> class_weight,
                                        std::optional<Tensor> row_weight, Tensor row_stats,
                                        double temperature, double weight_temperature, double alpha,
                                        double beta, bool symmetric, double scale, bool wrt_student,
                                        bool wrt_teacher) {
  DklCall call(student, teacher, class_weight, row_weight, temperature, weight_temperature, alpha,
               beta, scale);
  call.params.symmetric = symmetric;
  call.params.row_stats = row_stats.data_ptr(), call.params.stats_are_given = true;
  call.give_grad_loss(grad_loss);
  call.want_gradients(wrt_student, wrt_teacher);
  call.run();
  return call.take_gradients();
}

std::tuple<Tensor, Tensor, Tensor> dkl_forward_grad(Tensor student, Tensor teacher,
                                                    std::optional<Tensor> class_weight,
                                                    std::optional<Tensor> row_weight,
                                                    double temperature, double weight_temperature,
                                                    double alpha, double beta, bool symmetric,
                                                    int64_t reduction, double scale,
                                                    bool wrt_student, bool wrt_teacher) {
  DklCall call(student, teacher, class_weight, row_weight, temperature, weight_temperature, alpha,
               beta, scale);
  call.params.symmetric = symmetric;
  call.want_loss(reduction);
  call.want_gradients(wrt_student, wrt_teacher);
  call.run();
  return std::tuple_cat(std::tuple<Tensor>(call.take_loss()), call.take_gradients());
}

}  // namespace
}  // namespace afm::cpu

STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CPU, m) {
  m.impl("dkl_forward", TORCH_BOX(&afm::cpu::dkl_forward));
  m.impl("dkl_backward", TORCH_BOX(&afm::cpu::dkl_backward));
  m.impl("dkl_forward_grad", TORCH_BOX(&afm::cpu::dkl_forward_grad));
}
