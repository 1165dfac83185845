// Logits and their gradients as rows: what the operators hand to kernels that work row by row.

#pragma once

#include "cuda/operators.h"

namespace afm::cuda {

// The kernels count the classes of a row in 32 bits.
constexpr int64_t kMaxClasses = int64_t(1) << 30;

inline bool in_place(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) == 1;
}

inline int64_t rows_of(const Tensor& logits) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < logits.dim(); ++dim) rows *= logits.size(dim);
  return rows;
}

// A gradient as the kernels write it: the output itself, or a contiguous stand-in that is copied to
// an output whose class stride is not 1.
struct Gradient {
  Tensor output;
  Tensor written;
  bool wanted = false;
  bool stand_in = false;

  void write_aside() {
    std::vector<int64_t> sizes(output.dim());
    for (int64_t dim = 0; dim < output.dim(); ++dim) sizes[dim] = output.size(dim);
    written = new_empty(output, sizes, output.scalar_type());
    stand_in = true;
  }

  void finish() {
    if (wanted && stand_in) torch::stable::copy_(output, written);
  }
};

inline Gradient gradient_into(const Tensor& output) {
  Gradient gradient{output, output, true, false};
  if (!in_place(output)) gradient.write_aside();
  return gradient;
}

inline void set_view(RowsView& view, const Tensor& tensor, const std::vector<int64_t>& strides) {
  view.data = static_cast<char*>(tensor.data_ptr());
  view.dtype = dtype_of(tensor);
  for (size_t i = 0; i < strides.size(); ++i) view.strides[i] = strides[i];
}

inline Gradient new_gradient(const Tensor& logits, bool wanted) {
  if (!wanted) {
    Gradient gradient;
    gradient.output = new_empty(logits, {0}, logits.scalar_type());
    return gradient;
  }
  return gradient_into(torch::stable::empty_like(logits));
}

// The logits that a problem's views point into: the caller's, or copies of them.
struct RowTensors {
  Tensor student, teacher;
};

// Fills in where the rows of a problem lie: sizes, strides and views of both sides' logits and of
// the gradients that are wanted.
template <class Problem>
RowTensors lay_out(Problem& problem, const Tensor& given_student, const Tensor& given_teacher,
                   Gradient& grad_student, Gradient& grad_teacher) {
  const int64_t classes = given_student.size(given_student.dim() - 1);
  if (classes > kMaxClasses) {
    throw std::invalid_argument("afm_kernels: " + std::to_string(classes) +
                                " classes; the CUDA kernels take at most 2^30");
  }
  Tensor student =
      in_place(given_student) ? given_student : torch::stable::contiguous(given_student);
  Tensor teacher =
      in_place(given_teacher) ? given_teacher : torch::stable::contiguous(given_teacher);
  std::vector<const Tensor*> tensors = {&student, &teacher};
  if (grad_student.wanted) tensors.push_back(&grad_student.written);
  if (grad_teacher.wanted) tensors.push_back(&grad_teacher.written);
  Walk walk = merge_dimensions(tensors, student.dim() - 1);
  if (walk.sizes.size() > kMaxRowDims) {
    // Strides of five or more kinds: rare enough to copy.
    student = torch::stable::contiguous(student);
    teacher = torch::stable::contiguous(teacher);
    for (Gradient* gradient : {&grad_student, &grad_teacher}) {
      if (gradient->wanted && !gradient->written.is_contiguous()) gradient->write_aside();
    }
    walk = merge_dimensions(tensors, student.dim() - 1);
  }
  problem.classes = static_cast<int>(classes);
  problem.row_dims = static_cast<int>(std::max<size_t>(1, walk.sizes.size()));
  for (size_t i = 0; i < walk.sizes.size(); ++i) problem.row_sizes[i] = walk.sizes[i];
  set_view(problem.student, student, walk.strides[0]);
  set_view(problem.teacher, teacher, walk.strides[1]);
  size_t next = 2;
  if (grad_student.wanted)
    set_view(problem.grad_student, grad_student.written, walk.strides[next++]);
  if (grad_teacher.wanted)
    set_view(problem.grad_teacher, grad_teacher.written, walk.strides[next++]);
  return {student, teacher};
}

}  // namespace afm::cuda
