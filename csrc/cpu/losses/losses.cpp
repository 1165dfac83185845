#include "cpu/losses/losses.h"

#include <algorithm>
#include <utility>

namespace afm::cpu {

namespace {

// Up to this many classes in all one thread does the work. Measured from 4 to 1024 rows with a
// second thread that has just worked for someone else and is still awake, as between two layers of
// a network: on two threads 8000 classes take as long or 5 to 10 % less, 16000 up to a sixth less,
// 32000 a sixth to a quarter less. (Waking one that sleeps costs more than a call of this size.)
constexpr int64_t kClassesPerThread = 8192;

int64_t rows_of(const Layout& layout) {
  int64_t rows = 1;
  for (int d = 0; d < layout.dims - 1; ++d) rows *= layout.sizes[d];
  return rows;
}

bool is_float64(const Tensor& tensor) { return dtype_of(tensor) == DType::kFloat64; }

// Before anything is read from them: callers in a hurry leave these checks to the operator. See
// Note [Calls like one before] in afm_kernels/functional/loss.py.
const Tensor& checked(const Tensor& student, const Tensor& teacher, bool same_classes) {
  const Layout a(student), b(teacher);
  STD_TORCH_CHECK(student.is_cpu() && teacher.is_cpu(), "logits are not on the CPU");
  STD_TORCH_CHECK(a.dims > 0 && a.dims == b.dims &&
                      std::equal(a.sizes, a.sizes + a.dims - (same_classes ? 0 : 1), b.sizes),
                  "student and teacher differ in shape, or have no class dimension");
  STD_TORCH_CHECK(a.sizes[a.dims - 1] > 0, "the class dimension is empty");
  return student;
}

}  // namespace

LossCall::LossCall(const Tensor& student, const Tensor& teacher,
                   const std::optional<Tensor>& row_weight, bool same_classes)
    : student(checked(student, teacher, same_classes)),
      teacher(teacher),
      layout(student),
      teacher_layout(teacher),
      classes(layout.sizes[layout.dims - 1]),
      rows(rows_of(layout)),
      is_double(is_float64(student) || is_float64(teacher)),
      weights(row_weight.has_value() ? row_weight->data_ptr() : nullptr) {}

LossCall::~LossCall() {
  if (values_ != few_values_) delete[] values_;
}

void LossCall::want_loss(int64_t reduction) {
  reduction_ = reduction;
  values_ = rows <= kFewRows ? few_values_ : new double[static_cast<size_t>(rows)];
}

void LossCall::want_gradients(bool wrt_student, bool wrt_teacher) {
  if (wrt_student) grad_student = empty_like(student, layout);
  if (wrt_teacher) grad_teacher = empty_like(teacher, teacher_layout);
}

void LossCall::put_gradients(std::optional<Tensor> to_student, std::optional<Tensor> to_teacher) {
  grad_student = std::move(to_student), grad_teacher = std::move(to_teacher);
  const auto fits = [this](const std::optional<Tensor>& grad, const Tensor& logits) {
    return !grad || (is_like(*grad, logits) && !is_expanded(*grad) && !overlap(*grad, student) &&
                     !overlap(*grad, teacher));
  };
  STD_TORCH_CHECK(fits(grad_student, student) && fits(grad_teacher, teacher),
                  "a gradient is not like its logits, is expanded, or overlaps logits in memory");
  STD_TORCH_CHECK(!grad_student || !grad_teacher || !overlap(*grad_student, *grad_teacher),
                  "the gradients overlap in memory");
}

void LossCall::give_grad_loss(const Tensor& tensor) {
  grad_loss = tensor.data_ptr();
  grad_loss_stride = tensor.dim() == 0 ? 0 : 1;
}

Tensor LossCall::new_stats(int64_t columns) const {
  const int64_t sizes[] = {rows, columns};
  return empty(2, sizes, is_double);
}

Tensor LossCall::new_row_numbers() const { return empty(layout.dims - 1, layout.sizes, is_double); }

namespace {

// In double precision and in an order of its own, so that threads do not show in the result: eight
// sums, since one would wait for its last addition at every row.
double sum_of(const double* values, int64_t n) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; ++k) sums[k] += values[i + k];
  double sum = 0;
  for (; i < n; ++i) sum += values[i];
  for (int k = 0; k < kSums; ++k) sum += sums[k];
  return sum;
}

}  // namespace

Tensor LossCall::take_loss() {
  Tensor loss = empty(reduction_ == 0 ? layout.dims - 1 : 0, layout.sizes, is_double);
  void* data = loss.data_ptr();
  if (reduction_ == 0) {
    for (int64_t i = 0; i < rows; ++i) {
      if (is_double)
        static_cast<double*>(data)[i] = values_[i];
      else
        static_cast<float*>(data)[i] = static_cast<float>(values_[i]);
    }
    return loss;
  }
  const double sum = sum_of(values_, rows);
  if (is_double)
    *static_cast<double*>(data) = sum;
  else
    *static_cast<float*>(data) = static_cast<float>(sum);
  return loss;
}

std::tuple<Tensor, Tensor> LossCall::take_gradients() {
  return {grad_student ? *std::move(grad_student) : nothing_like(student),
          grad_teacher ? *std::move(grad_teacher) : nothing_like(teacher)};
}

bool LossCall::gradients_outgrow_caches() const {
  const int64_t sides = (grad_student ? 1 : 0) + (grad_teacher ? 1 : 0);
  return outgrows_caches(sides * layout.numel * (is_double ? 8 : 4));
}

int64_t LossCall::grain() const {
  return std::max<int64_t>(1, kClassesPerThread / std::max<int64_t>(1, classes));
}

}  // namespace afm::cpu
