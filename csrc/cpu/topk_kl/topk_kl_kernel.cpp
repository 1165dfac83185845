// One row after another of KL from k kept classes and their tail: the sum over the classes that are
// not kept, then the few classes, then the gradient.
//
// Note [Kept classes by tile]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~
// The tail is summed over the classes that are not kept, in one pass over the row. A tile that
// holds kept classes is copied, they are taken out of the copy, and put to -inf there; which tile
// has which is known from one counting sort of the ids. So the loops over classes know nothing of
// kept ones, and what they cost hardly depends on how many there are.

#include "cpu/layout/row_tiles.h"
#include "cpu/topk_kl/few_classes.h"
#include "cpu/topk_kl/topk_kl.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

constexpr double kInfinity = __builtin_inf(), kNotANumber = __builtin_nan("");

// Columns of row_stats: of the classes that are not kept, in the accumulation type. What a backward
// finds there is what the forward went on with, so that gradients have the same bits either way.
enum Stat : int { kShift, kSum, kBroken };

// Of the classes that are not kept.
template <class T>
struct Rest {
  T shift = -Float<T>::infinity;  // their maximum
  T sum = T(0);                   // of exp((s - shift) / temperature), raised as RowExp raises it
  bool broken = false;            // one of them is NaN or +inf
};

// exp((s - shift) / T) over classes [0, n), in the first-level cache.
template <class T>
AFM_LOOP double sum_of_exponentials(const T* s, int64_t n, const RowExp<T>& row_exp, T row_shift) {
  using V = Vec<T>;
  const RowExp<T> exp = row_exp;
  const V shift(row_shift), excluded(-Float<T>::infinity);
  Accumulator<T> sum;
  sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    sum.add(u, exp(access.load(s + j, excluded) - shift));
  });
  return sum.sum();
}

// In two factors, where one would leave the range.
template <class T>
AFM_LOOP void scale_exponentials(const T* s, int64_t n, const RowExp<T>& row_exp, T row_shift,
                                 T row_factor, T row_lower, T* grad) {
  using V = Vec<T>;
  const RowExp<T> exp = row_exp;
  const V shift(row_shift), factor(row_factor), lower(row_lower);
  sweep<V>(0, n, [&](auto access, int64_t j, int) AFM_STEP {
    access.store(grad + j, exp(access.load(s + j, shift) - shift) * lower * factor);
  });
}

template <class T>
struct Worker {
  using V = Vec<T>;
  const TopkKlParams& params;
  const RowExp<T> exp;
  T *tile, *grad_tile;
  // Of the kept classes, by tile, and at the end their tail; `grad` in units of logits / T.
  double *student_few, *teacher_few, *p, *q, *grad;
  int64_t* at;
  int64_t* first_of_tile;  // the first of each tile's kept classes; one more: their number
  int64_t count = 0;       // of the kept classes
  RowPointer student, grad_student;  // the present row
  RowPointer next_student{};         // the row after it; null where there is none

  Worker(const TopkKlParams& params, void* scratch) : params(params), exp(params.temperature) {
    tile = static_cast<T*>(scratch), grad_tile = tile + kTile;
    double* numbers = reinterpret_cast<double*>(tile + 2 * kTile);
    const int64_t n = topk_kl_few(params.kept);
    student_few = numbers, teacher_few = numbers + n, p = numbers + 2 * n, q = numbers + 3 * n;
    grad = numbers + 4 * n;
    at = reinterpret_cast<int64_t*>(numbers + 5 * n);
    first_of_tile = at + n;
  }

  int64_t id(int64_t i, int64_t k) const {
    const int64_t place = i * params.kept + k;
    return params.indices_are_64_bits ? static_cast<const int64_t*>(params.indices)[place]
                                      : static_cast<const int32_t*>(params.indices)[place];
  }

  // Row i's kept classes by tile; false where one is no class. `teacher_few` is filled.
  bool sort_kept(int64_t i) {
    const int64_t tiles = topk_kl_tiles(params.classes);
    for (int64_t t = 0; t <= tiles; ++t) first_of_tile[t] = 0;
    bool fit = true;
    for (int64_t k = 0; k < params.kept; ++k) {
      const int64_t j = id(i, k);
      if (j >= 0 && j < params.classes)
        ++first_of_tile[j / kTile];
      else
        fit = fit && j == -1;
    }
    int64_t before = 0;
    for (int64_t t = 0; t <= tiles; ++t) {
      const int64_t here = first_of_tile[t];
      first_of_tile[t] = before, before += here;
    }
    count = before;
    const RowPointer log_probs = {static_cast<char*>(params.log_probs) +
                                      i * params.kept * element_size(params.log_probs_dtype),
                                  params.log_probs_dtype, 1};
    const double* log_p = log_probs.template read<double>(0, params.kept, p);
    for (int64_t k = 0; k < params.kept; ++k) {
      const int64_t j = id(i, k);
      if (j < 0 || j >= params.classes) continue;
      const int64_t place = first_of_tile[j / kTile]++;
      at[place] = j, teacher_few[place] = log_p[k];
    }
    for (int64_t t = tiles; t > 0; --t) first_of_tile[t] = first_of_tile[t - 1];
    first_of_tile[0] = 0;
    return fit;
  }

  T student_at(int64_t j) const {
    T buffer;
    return *student.at_class(j).read(0, 1, &buffer);
  }

  void read_kept() const {
    for (int64_t k = 0; k < count; ++k) student_few[k] = student_at(at[k]);
  }

  // In one pass over the row; `student_few` is filled on the way.
  Rest<T> sum_rest() const {
    double sum = 0, shift = -kInfinity;
    bool broken = false;
    for (int64_t j = 0, b = 0; j < params.classes; j += kTile, ++b) {
      const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
      const T* s = student.read(j, n, tile);
      if (first_of_tile[b] != first_of_tile[b + 1]) {
        if (s != tile) memcpy(tile, s, static_cast<size_t>(n) * sizeof(T)), s = tile;
        for (int64_t k = first_of_tile[b]; k < first_of_tile[b + 1]; ++k)
          student_few[k] = tile[at[k] - j];
        for (int64_t k = first_of_tile[b]; k < first_of_tile[b + 1]; ++k)
          tile[at[k] - j] = -Float<T>::infinity;
      }
      const double before = shift;
      classify(s, n, shift, broken);
      if (shift > before) sum *= __builtin_exp((before - shift) / params.temperature);
      if (shift > -kInfinity) sum += sum_of_exponentials(s, n, exp, static_cast<T>(shift));
    }
    return {static_cast<T>(shift), static_cast<T>(sum), broken};
  }

  void fill(T value) const {
    if (grad_student.data == nullptr) return;
    for (int64_t j = 0; j < params.classes; j += kTile) {
      const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
      T* out = grad_student.writable(j, grad_tile);
      for (int64_t i = 0; i < n; ++i) out[i] = value;
      grad_student.write(j, n, out);
    }
  }

  double weight_of(int64_t i) const {
    return params.row_weight == nullptr ? 1 : static_cast<const T*>(params.row_weight)[i];
  }

  double gradient_scale(int64_t i) const {
    const double scale = weight_of(i) * params.scale;
    if (params.grad_loss == nullptr) return scale;
    return scale * static_cast<const T*>(params.grad_loss)[params.grad_loss_stride * i];
  }

  void run(int64_t i) {
    const double weight = weight_of(i);
    if (weight == 0) {
      if (params.row_values != nullptr) params.row_values[i] = 0;
      return fill(T(0));
    }
    const bool fit = sort_kept(i), has_tail = params.mode != TopkMode::kBoth;
    Rest<T> rest;
    T* stats = params.row_stats == nullptr ? nullptr
                                           : static_cast<T*>(params.row_stats) + i * kTopkRowStats;
    if (params.stats_are_given) {
      rest = {stats[kShift], stats[kSum], stats[kBroken] != T(0)};
      read_kept();
    } else {
      if (has_tail)
        rest = sum_rest();
      else
        read_kept();
      if (stats != nullptr)
        stats[kShift] = rest.shift, stats[kSum] = rest.sum,
        stats[kBroken] = rest.broken ? T(1) : T(0);
    }
    double value = kNotANumber, mass = 1;
    RowKind kind = RowKind::kNan;
    if (fit && !rest.broken) {
      const FewClasses few = compare_few(i, rest);
      kind = few.kind, value = few.divergence;
      if (params.mode == TopkMode::kTruncate && kind == RowKind::kGeneral) {
        mass = __builtin_exp(few.log_mass);
        value = mass == 0 ? 0 : mass * (value + few.log_mass);
      }
      if (kind == RowKind::kGeneral && __builtin_isnan(value)) kind = RowKind::kNan;
    }
    if (params.row_values != nullptr) params.row_values[i] = value * weight * params.scale;
    if (grad_student.data == nullptr) return;
    if (kind != RowKind::kGeneral) return fill(static_cast<T>(kNotANumber));
    if (mass == 0) return fill(T(0));
    write_gradient(rest, gradient_scale(i) * mass / params.temperature);
  }

  // The kept classes and, where the mode has one, their tail; their gradients go to `grad`.
  FewClasses compare_few(int64_t i, const Rest<T>& rest) const {
    const bool has_tail = params.mode != TopkMode::kBoth;
    double top = has_tail ? static_cast<double>(rest.shift) : -kInfinity;
    for (int64_t k = 0; k < count; ++k) top = student_few[k] > top ? student_few[k] : top;
    for (int64_t k = 0; k < count; ++k)
      student_few[k] = (student_few[k] - top) / params.temperature;
    if (has_tail) {
      student_few[count] = rest.sum == T(0)
                               ? -kInfinity
                               : (static_cast<double>(rest.shift) - top) / params.temperature +
                                     __builtin_log(static_cast<double>(rest.sum)) - kLogRaise;
      teacher_few[count] =
          params.log_tail == nullptr ? -kInfinity : static_cast<const T*>(params.log_tail)[i];
    }
    FewClasses few = {student_few, teacher_few, count + (has_tail ? 1 : 0), p, q, grad};
    few.run();
    return few;
  }

  // Of logits / T times `scale`.
  void write_gradient(const Rest<T>& rest, double scale) const {
    const double of_tail =
        params.mode == TopkMode::kBoth || rest.sum == T(0) ? 0 : grad[count] * scale / rest.sum;
    const bool is_small = __builtin_fabs(of_tail) < kSmallFactor<T>;
    const T factor = static_cast<T>(is_small ? of_tail * kRaise : of_tail),
            lower = static_cast<T>(is_small ? 1 / kRaise : 1);
    const bool stream = params.stream && grad_student.stride == 1;
    const bool is_empty = of_tail == 0;  // as where there is no tail, whose shift is none then
    // Backwards: the end of a long row is what the caches still hold.
    for (int64_t b = topk_kl_tiles(params.classes) - 1; b >= 0; --b) {
      const int64_t j = b * kTile, n = params.classes - j < kTile ? params.classes - j : kTile;
      T* out = stream ? grad_tile : grad_student.writable(j, grad_tile);
      if (is_empty)
        for (int64_t c = 0; c < n; ++c) out[c] = T(0);
      else
        scale_exponentials(student.read(j, n, tile), n, exp, rest.shift, factor, lower, out);
      for (int64_t k = first_of_tile[b]; k < first_of_tile[b + 1]; ++k)
        out[at[k] - j] = static_cast<T>(grad[k] * scale);
      if (stream)
        stream_tile(j, n, out);
      else
        grad_student.write(j, n, out);
    }
  }

  void stream_tile(int64_t j, int64_t n, const T* out) const {
    // See Note [Lines ahead]; what fetches by itself keeps up with short rows.
    const char* at_hand = reinterpret_cast<const char*>(out);
    Lines next = {at_hand, at_hand, 0};
    if (params.classes > kTile / 2 && next_student.data != nullptr && next_student.stride == 1)
      next = {next_student.at(j), next_student.at(j), element_size(next_student.dtype)};
    if (grad_student.template is_native<T>())
      return stream_out(out, n, reinterpret_cast<T*>(grad_student.at(j)), next);
    if constexpr (sizeof(T) == 4) {
      if (element_size(grad_student.dtype) == 2) {
        uint16_t* narrow = reinterpret_cast<uint16_t*>(tile);
        const RowPointer staged = {reinterpret_cast<char*>(narrow), grad_student.dtype, 1};
        staged.write(0, n, out);
        return stream_out(narrow, n, reinterpret_cast<uint16_t*>(grad_student.at(j)), next);
      }
    }
    grad_student.write(j, n, out);
  }
};

template <class T>
AFM_INLINE void run_rows(const TopkKlParams& params, int64_t begin, int64_t end, void* scratch) {
  Worker<T> worker(params, scratch);
  T* blocks =
      reinterpret_cast<T*>(worker.first_of_tile + (topk_kl_tiles(params.classes) + 1 + 7) / 8 * 8);
  const RowSlot slots[] = {{params.student, worker.student, &worker.next_student, false},
                           {params.grad_student, worker.grad_student, nullptr, true}};
  for_rows(params.shape, params.classes, slots, blocks, begin, end,
           [&](int64_t i) { worker.run(i); });
  if (params.stream) end_of_streams();
}

}  // namespace

void topk_kl_rows_float(const TopkKlParams& params, int64_t begin, int64_t end, void* scratch) {
  run_rows<float>(params, begin, end, scratch);
}

void topk_kl_rows_double(const TopkKlParams& params, int64_t begin, int64_t end, void* scratch) {
  run_rows<double>(params, begin, end, scratch);
}

}  // namespace afm::cpu::AFM_CAPABILITY
