// What the loss operators have in common: their inputs and outputs, the reduction, and the split
// among threads.

#pragma once

#include <optional>
#include <tuple>

#include "cpu/dispatch/dispatch.h"
#include "cpu/layout/tensors.h"

namespace afm::cpu {

struct LossCall {
  const Tensor& student;
  const Tensor& teacher;
  const Layout layout, teacher_layout;
  const int64_t classes, rows;
  const bool is_double;  // the accumulation type
  const void* const weights;

  std::optional<Tensor> grad_student, grad_teacher;
  const void* grad_loss = nullptr;
  int64_t grad_loss_stride = 0;

  // same_classes: whether the teacher has the student's classes, or but their rows.
  LossCall(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& row_weight,
           bool same_classes = true);
  ~LossCall();
  LossCall(const LossCall&) = delete;
  LossCall& operator=(const LossCall&) = delete;

  void want_loss(int64_t reduction);  // an index into REDUCTIONS of afm_kernels/ops.py
  void want_gradients(bool wrt_student, bool wrt_teacher);
  // Gradients into tensors of the caller's. See Note [Tensors to write] in
  // afm_kernels/functional/out.py.
  void put_gradients(std::optional<Tensor> to_student, std::optional<Tensor> to_teacher);
  void give_grad_loss(const Tensor& tensor);
  Tensor new_stats(int64_t columns) const;
  Tensor new_row_numbers() const;                 // accumulation type, of the rows' shape
  double* row_values() const { return values_; }  // null where no loss is wanted

  Tensor take_loss();
  std::tuple<Tensor, Tensor> take_gradients();

  // Whether the gradients are so large that they will have left the caches before anyone reads
  // them.
  // Of 16-bit gradients too as float32, in which the loops keep what they are made of.
  bool gradients_outgrow_caches() const;

  // Runs kernel(params, begin, end, scratch) over all rows, on the threads that are worth it.
  template <class Kernel, class Params>
  void run_rows(Kernel* kernel, const Params& params, int64_t scratch_elements) const {
    parallel_for(0, rows, grain(), [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_elements * (is_double ? 8 : 4));
      kernel(params, begin, end, scratch.get());
    });
  }

 private:
  int64_t grain() const;

  static constexpr int64_t kFewRows = 512;
  double few_values_[kFewRows];
  double* values_ = nullptr;
  int64_t reduction_ = 0;
};

}  // namespace afm::cpu
