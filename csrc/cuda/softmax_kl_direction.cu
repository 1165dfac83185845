// The direction of KL's gradients. A row takes six passes of a few reductions each, see
// common/softmax_kl_direction.h, and is read again in every one of them: it comes from the caches,
// and the exponentials of certain rows cost more than that.

#include "cuda/softmax_kl_direction.h"

#include "common/softmax_kl_direction.h"
#include "cuda/element.cuh"
#include "cuda/reduce.cuh"

namespace afm::cuda {

namespace {

struct DirectionPlace {
  char *student, *teacher, *grad_student, *grad_teacher;
};

__device__ __forceinline__ DirectionPlace place_of(const DirectionProblem& problem, int64_t row) {
  int64_t student = 0, teacher = 0, grad_student = 0, grad_teacher = 0;
  for (int dim = problem.row_dims - 1; dim >= 0; --dim) {
    const int64_t index = dim > 0 ? row % problem.row_sizes[dim] : row;
    if (dim > 0) row /= problem.row_sizes[dim];
    student += index * problem.student.strides[dim];
    teacher += index * problem.teacher.strides[dim];
    grad_student += index * problem.grad_student.strides[dim];
    grad_teacher += index * problem.grad_teacher.strides[dim];
  }
  const int student_bytes = size_of(problem.student.dtype);
  const int teacher_bytes = size_of(problem.teacher.dtype);
  return {problem.student.data + student * student_bytes,
          problem.teacher.data + teacher * teacher_bytes,
          problem.grad_student.data + grad_student * student_bytes,
          problem.grad_teacher.data + grad_teacher * teacher_bytes};
}

template <typename A>
__device__ __forceinline__ A logit(const RowsView& view, const char* row, int column) {
  return Access<AnyOf<A>, 1>::element(row, view.dtype, column, A(0)) * A(kLogitUnit);
}

template <typename A>
__device__ __forceinline__ void write(const RowsView& view, char* row, int column, int classes,
                                      A value) {
  if (view.data == nullptr) return;
  const A values[1] = {value};
  Access<AnyOf<A>, 1>::store(row, view.dtype, column, classes, false, values);
}

template <typename A, int kGroup>
__global__ void __launch_bounds__(kDirectionThreads, 2)
    direction_kernel(const DirectionProblem problem) {
  constexpr int kWarps = kDirectionThreads / kWarp;
  __shared__ A shared_tops[3 * kWarps], shared_peak[kWarps], shared_far[3 * kWarps],
      shared_sums[kDirectionSums * kWarps], shared_largest[kWarps];
  const int lane = threadIdx.x % kGroup;
  const int64_t asked =
      static_cast<int64_t>(blockIdx.x) * (kDirectionThreads / kGroup) + threadIdx.x / kGroup;
  // Threads beyond the last row compute it again, for the shuffles' sake, and write nothing.
  const bool mine = asked < problem.rows;
  const int64_t row_index = mine ? asked : problem.rows - 1;
  const DirectionPlace place = place_of(problem, row_index);
  const bool wants_student = problem.grad_student.data != nullptr;
  const bool wants_teacher = problem.grad_teacher.data != nullptr;
  const A temperature = static_cast<A>(problem.temperature);
  const auto student = [&](int j) { return logit<A>(problem.student, place.student, j); };
  const auto teacher = [&](int j) { return logit<A>(problem.teacher, place.teacher, j); };

  DirectionTops<A> tops = DirectionTops<A>::empty();
  for (int j = lane; j < problem.classes; j += kGroup) tops.add(student(j), teacher(j));
  A all_tops[3] = {tops.s, tops.t, tops.lost ? A(1) : A(0)};
  reduce_in_group<kGroup, MaxOf>(all_tops, shared_tops);
  tops.s = all_tops[0];
  tops.t = all_tops[1];
  tops.lost = all_tops[2] > A(0);
  A peak[1] = {-infinity<A>()};
  for (int j = lane; j < problem.classes; j += kGroup) {
    if (teacher(j) == tops.t) peak[0] = max_of(peak[0], student(j));
  }
  reduce_in_group<kGroup, MaxOf>(peak, shared_peak);

  DirectionRow<A> row = DirectionRow<A>::of(temperature, tops, peak[0], wants_student);
  A far[3] = {-infinity<A>(), -infinity<A>(), A(0)};
  for (int j = lane; j < problem.classes; j += kGroup) {
    const A s = student(j), t = teacher(j);
    if (row.differs(s, t)) {
      far[0] = max_of(far[0], s);
      far[1] = max_of(far[1], t);
      far[2] = A(1);
    }
  }
  reduce_in_group<kGroup, MaxOf>(far, shared_far);
  row.set_far(far[0], far[1]);

  DirectionSums<A> sums = {A(0), A(0), A(0), A(0), A(0)};
  for (int j = lane; j < problem.classes; j += kGroup) {
    row.add(sums, row.class_of(student(j), teacher(j)));
  }
  A totals[kDirectionSums] = {sums.staying, sums.student, sums.teacher, sums.gap, sums.slope};
  reduce_in_group<kGroup, SumOf>(totals, shared_sums);
  row.set_sums({totals[0], totals[1], totals[2], totals[3], totals[4]});

  A largest[1] = {A(0)};
  for (int j = lane; j < problem.classes; j += kGroup) {
    const DirectionEntry<A> entry = row.entry_of(student(j), teacher(j));
    if (wants_student) largest[0] = max_of(largest[0], abs_of(entry.student));
    if (wants_teacher) largest[0] = max_of(largest[0], abs_of(entry.teacher));
  }
  reduce_in_group<kGroup, MaxOf>(largest, shared_largest);

  if (!mine) return;
  // Without a class that differs all is NaN that was made of its exponents, and 0 in truth.
  const bool lost = !tops.has_gradient(), zero = !(far[2] > A(0)) || !(largest[0] > A(0));
  const int power = lost || zero ? 0 : power_of(largest[0]);
  if (lane == 0) {
    static_cast<A*>(problem.log_scale)[row_index] = lost   ? not_a_number<A>()
                                                    : zero ? -infinity<A>()
                                                           : row.log_scale(power, temperature);
  }
  for (int j = lane; j < problem.classes; j += kGroup) {
    DirectionEntry<A> entry = {A(0), A(0)};
    if (lost) {
      entry.student = entry.teacher = not_a_number<A>();
    } else if (!zero) {
      entry = row.entry_of(student(j), teacher(j));
      entry.student = scaled_by_power(entry.student, -power);
      entry.teacher = scaled_by_power(entry.teacher, -power);
    }
    write(problem.grad_student, place.grad_student, j, problem.classes, entry.student);
    write(problem.grad_teacher, place.grad_teacher, j, problem.classes, entry.teacher);
  }
}

template <typename A>
void launch_direction(const DirectionProblem& problem, Stream stream) {
  if (problem.classes <= kDirectionWarpClasses) {
    constexpr int kRows = kDirectionThreads / kWarp;
    launch(direction_kernel<A, kWarp>, (problem.rows + kRows - 1) / kRows, kDirectionThreads,
           problem, stream);
  } else {
    launch(direction_kernel<A, kDirectionThreads>, problem.rows, kDirectionThreads, problem,
           stream);
  }
}

}  // namespace

void launch_softmax_kl_direction(bool exact, const DirectionProblem& problem, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  exact ? launch_direction<double>(problem, on) : launch_direction<float>(problem, on);
}

}  // namespace afm::cuda
