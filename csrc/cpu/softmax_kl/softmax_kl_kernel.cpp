// The rows of KL, Jeffreys and JS, alone or with a cross-entropy (the distillation loss): short
// ones in lanes (lane_worker.h), others one after another (row_worker.h).

#include "cpu/softmax_kl/softmax_kl.h"

#include "cpu/softmax_kl/lane_worker.h"
#include "cpu/softmax_kl/row_worker.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <class T>
AFM_INLINE void run_rows(const SoftmaxKlParams& params, int64_t begin, int64_t end, void* scratch) {
  Worker<T> worker(params, scratch);
  T* extra = static_cast<T*>(scratch) + softmax_kl_row_scratch(params.classes);
  T* kept = extra + softmax_kl_block_scratch(params.classes);
  worker.direction_rows = reinterpret_cast<double*>(kept + 2 * ((params.classes + 15) / 16 * 16));
  if (LaneWorker<T>::serves(params)) return LaneWorker<T>{params, worker}.run(begin, end, extra);
  const RowSlot slots[] = {{params.student, worker.student, &worker.next_student, false},
                           {params.teacher, worker.teacher, &worker.next_teacher, false},
                           {params.grad_student, worker.grad_student, nullptr, true},
                           {params.grad_teacher, worker.grad_teacher, nullptr, true}};
  for_rows(params.shape, params.classes, slots, extra, begin, end, [&](int64_t i) {
    if (params.overwrites)
      worker.run_over_logits(i, kept);
    else
      params.log_scales == nullptr ? worker.run(i) : worker.run_direction(i, kept);
  });
  end_of_streams();
}

}  // namespace

void softmax_kl_rows_float(const SoftmaxKlParams& params, int64_t begin, int64_t end,
                           void* scratch) {
  run_rows<float>(params, begin, end, scratch);
}

void softmax_kl_rows_double(const SoftmaxKlParams& params, int64_t begin, int64_t end,
                            void* scratch) {
  run_rows<double>(params, begin, end, scratch);
}

}  // namespace afm::cpu::AFM_CAPABILITY
