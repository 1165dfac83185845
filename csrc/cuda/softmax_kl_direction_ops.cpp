// The operator softmax_kl_direction on CUDA tensors. Its contract is Note [Operator contract] in
// afm_kernels/ops.py.

#include <limits>
#include <tuple>

#include "cuda/row_tensors.h"
#include "cuda/softmax_kl_direction.h"

namespace afm::cuda {

std::tuple<Tensor, Tensor, Tensor> softmax_kl_direction(const Tensor& student,
                                                        const Tensor& teacher, double temperature,
                                                        bool wrt_student, bool wrt_teacher) {
  const bool exact = dtype_of(student) == DType::kFloat64 || dtype_of(teacher) == DType::kFloat64;
  std::vector<int64_t> row_sizes(student.dim() - 1);
  for (size_t dim = 0; dim < row_sizes.size(); ++dim) row_sizes[dim] = student.size(dim);
  Tensor log_scale = new_empty(student, row_sizes, exact ? ScalarType::Double : ScalarType::Float);
  Gradient grad_student = new_gradient(student, wrt_student);
  Gradient grad_teacher = new_gradient(teacher, wrt_teacher);
  DirectionProblem problem;
  problem.rows = rows_of(student);
  if (problem.rows == 0) return {grad_student.output, grad_teacher.output, log_scale};
  if (problem.rows > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("afm_kernels: " + std::to_string(problem.rows) +
                                " rows; softmax_kl_direction takes fewer than 2^31");
  }
  const Place place(student);
  const RowTensors kept = lay_out(problem, student, teacher, grad_student, grad_teacher);
  problem.temperature = temperature;
  problem.log_scale = log_scale.data_ptr();
  launch_softmax_kl_direction(exact, problem, place.stream());
  grad_student.finish();
  grad_teacher.finish();
  return {grad_student.output, grad_teacher.output, log_scale};
}

}  // namespace afm::cuda

AFM_CUDA_OPERATORS(m) {
  m.impl("softmax_kl_direction", TORCH_BOX(&afm::cuda::softmax_kl_direction));
}
