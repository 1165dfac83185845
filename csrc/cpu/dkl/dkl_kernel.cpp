// One row after another of the decoupled KL: exact maxima, then sums, then the centred square, then
// gradients.

#include "cpu/dkl/dkl.h"

#include "cpu/losses/certain_rows.h"
#include "cpu/losses/kl_sweeps.h"
#include "cpu/layout/lane_tiles.h"
#include "cpu/layout/row_tiles.h"
#include "cpu/dkl/short_dkl.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

constexpr double kInfinity = __builtin_inf(), kNotANumber = __builtin_nan("");

// Columns of row_stats.
enum Stat : int {
  kKind,  // RowKind, and what is certain
  kStudentShift,
  kTeacherShift,
  kStudentSum,
  kTeacherSum,
  kWeightSum,
  kMean,
  kGap
};

constexpr int kStudentCertain = 8, kWeightsCertain = 16;  // added to kKind

struct RowSummary {
  RowKind kind = RowKind::kNan;
  bool student_certain = false, weights_certain = false;  // see Note [Certain rows]
  double student_shift = 0, teacher_shift = 0;
  double gap = 0;                           // s - t where the weight is, or 0; see coarse_gap
  double student_sum = 1, teacher_sum = 1;  // of the exponentials at `temperature`
  double weight_sum = 0;                    // of the weights as weight_of() gives them
  double mean = 0;                          // of d under the weights
  double value = 0;
};

template <class T>
struct Worker {
  using V = Vec<T>;
  const DklParams& params;
  const double inv_t;
  const RowExp<T> exp, weight_exp;
  const bool own_weights;
  T *student_tile, *teacher_tile, *weight_tile, *grad_student_tile, *grad_teacher_tile;
  RowPointer student, teacher, class_weight, grad_student, grad_teacher;  // the present row

  Worker(const DklParams& p, void* scratch)
      : params(p),
        inv_t(1 / p.temperature),
        exp(p.temperature),
        weight_exp(p.weight_temperature),
        own_weights(p.class_weight.data == nullptr) {
    T* at = static_cast<T*>(scratch);
    student_tile = at, teacher_tile = at + kTile, weight_tile = at + 2 * kTile;
    grad_student_tile = at + 3 * kTile, grad_teacher_tile = at + 4 * kTile;
  }

  // Calls f(s, t, w, first class, count) tile by tile; w is null where the weights are the
  // teacher's own.
  template <class F>
  void for_tiles(const F& f) const {
    for (int64_t j = 0; j < params.classes; j += kTile) {
      const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
      f(student.read(j, n, student_tile), teacher.read(j, n, teacher_tile),
        own_weights ? nullptr : class_weight.read(j, n, weight_tile), j, n);
    }
  }

  // What of a class enters the second term. The weights are as given, or unnormalised exponentials;
  // d is less the difference of the shifts, which a gap keeps exact as in RowConstants::x.
  struct Weighted {
    V weight, d;
    typename V::Mask counts;   // weight > 0 and a logit on either side
    typename V::Mask missing;  // ... and -inf on one of them
  };

  struct Gaps {
    T student, teacher;  // as RowConstants::student_gap and teacher_gap
    T teacher_shift;
  };

  Gaps gaps(const RowSummary& row) const {
    const T gap = static_cast<T>(row.gap);
    const bool large_student =
        __builtin_fabs(row.student_shift) >= __builtin_fabs(row.teacher_shift);
    return {large_student ? gap : T(0), large_student ? T(0) : -gap,
            static_cast<T>(row.teacher_shift)};
  }

  template <class Access>
  AFM_MEMBER Weighted weighted(Access access, V s, V t, const T* w, int64_t j,
                               const Gaps& g) const {
    const V zero(T(0)), excluded(-Float<T>::infinity);
    const auto in_s = excluded < s, in_t = excluded < t, in_both = both(in_s, in_t);
    const V weight = w == nullptr ? weight_exp(t - V(g.teacher_shift)) : access.load(w + j, zero);
    // As numbers, since masks have no negation: 1 where the class may count at all.
    const V one(T(1)), in_either = select(in_s, one, select(in_t, one, zero));
    const V eligible =
        w == nullptr ? select(in_t, one, zero) : select(weight == zero, zero, in_either);
    const V missing = select(in_both, zero, eligible);
    const V present = select(in_both, eligible, zero);
    const V d = (t - V(g.teacher)) - (s - V(g.student));
    return {select(zero < present, weight, zero), select(zero < present, d, zero), zero < present,
            zero < missing};
  }

  RowSummary summarise() const {
    RowSummary row;
    double student_max = -kInfinity, teacher_max = -kInfinity;
    bool broken = false;
    for_tiles([&](const T* s, const T* t, const T*, int64_t, int64_t n) {
      classify(s, n, student_max, broken);
      classify(t, n, teacher_max, broken);
    });
    row.value = kNotANumber;
    if (broken || student_max == -kInfinity || teacher_max == -kInfinity) return row;
    row.student_shift = student_max, row.teacher_shift = teacher_max;
    row.kind = RowKind::kGeneral;
    row.value = 0;
    if (params.alpha != 0) add_cross_entropy(row);
    if (params.beta != 0) add_square(row);
    if (!__builtin_isfinite(row.value))
      row.kind = __builtin_isnan(row.value) ? RowKind::kNan : RowKind::kInfinite;
    return row;
  }

  // alpha * (log sum exp(s / T) - E_p[s / T]), both less the student's shift.
  void add_cross_entropy(RowSummary& row) const {
    const V s_shift(static_cast<T>(row.student_shift)), t_shift(static_cast<T>(row.teacher_shift));
    const V zero(T(0)), one(T(1)), excluded(-Float<T>::infinity);
    double student_sum = 0, teacher_sum = 0, mean = 0, missing_sum = 0;
    for_tiles([&](const T* s, const T* t, const T*, int64_t, int64_t n) {
      Accumulator<T> students, teachers, products, missing;
      sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
        const V a = access.load(s + j, excluded), b = access.load(t + j, excluded);
        const auto in_s = excluded < a, in_t = excluded < b;
        const V v = a - s_shift, e_t = exp(b - t_shift);
        students.add(u, exp(v)), teachers.add(u, e_t);
        products.add_product(u, e_t, select(in_s, v, zero));
        missing.add(u, select(in_s, zero, select(in_t, one, zero)));
      });
      student_sum += students.sum(), teacher_sum += teachers.sum();
      mean += products.sum(), missing_sum += missing.sum();
    });
    row.student_sum = student_sum, row.teacher_sum = teacher_sum;
    row.student_certain = kRaise > kCertain * student_sum;
    const double value = __builtin_log(student_sum) - kLogRaise - mean / teacher_sum * inv_t;
    row.value += params.alpha * (missing_sum > 0 ? kInfinity : value);
  }

  // Sets row.weight_sum, and `missing` to the number of classes with weight and but one logit;
  // returns the mean of d.
  double sum_weights(RowSummary& row, double& missing) const {
    const Gaps g = gaps(row);
    const V excluded(-Float<T>::infinity), zero(T(0)), one(T(1));
    double products = 0;
    row.weight_sum = missing = 0, row.weights_certain = false;
    for_tiles([&](const T* s, const T* t, const T* w, int64_t, int64_t n) {
      Accumulator<T> weight, product, lost;
      sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
        const Weighted c =
            weighted(access, access.load(s + j, excluded), access.load(t + j, excluded), w, j, g);
        weight.add(u, c.weight), product.add_product(u, c.weight, c.d);
        lost.add(u, select(c.missing, one, zero));
      });
      row.weight_sum += weight.sum(), products += product.sum(), missing += lost.sum();
      row.weights_certain |= weight.any_above(kCertain * row.weight_sum);
    });
    return row.weight_sum == 0 ? 0 : products / row.weight_sum;
  }

  // beta / 2 * W * sum of w (d - mu)^2, and what of mu rounding left.
  void add_square(RowSummary& row) const {
    // At the maxima, which need not be where the weight is.
    row.gap = coarse_gap(static_cast<T>(row.student_shift - row.teacher_shift));
    double missing, mean = sum_weights(row, missing);
    if (row.gap != 0 && !(__builtin_fabs(mean) <= kGapLimit))
      row.gap = 0, mean = sum_weights(row, missing);
    const Gaps g = gaps(row);
    const V excluded(-Float<T>::infinity);
    const double weights = row.weight_sum;
    const T guess = static_cast<T>(mean);
    double rest = 0, squares = 0;
    for_tiles([&](const T* s, const T* t, const T* w, int64_t, int64_t n) {
      Accumulator<T> first, second;
      sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
        const Weighted c =
            weighted(access, access.load(s + j, excluded), access.load(t + j, excluded), w, j, g);
        const V off = c.d - V(guess), weighted_off = c.weight * off;
        first.add(u, weighted_off), second.add_product(u, weighted_off, off);
      });
      rest += first.sum(), squares += second.sum();
    });
    if (missing > 0) row.value = row.value + params.beta * kInfinity;
    if (weights == 0) return;
    row.mean = static_cast<double>(guess) + rest / weights;
    const double variance = squares / weights - (rest / weights) * (rest / weights);
    const double total = own_weights ? 1 : weights;  // a softmax's own sum
    row.value += params.beta / 2 * total * total * (variance > 0 ? variance : 0);
  }

  // The class of a certain side: the only number from a limit on. Far from 0 the limit rounds to
  // that number itself.
  int64_t peak_of(const RowPointer& numbers, double limit) const {
    for (int64_t j = 0; j < params.classes; j += kTile) {
      const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
      const int64_t at = first_from(numbers.read(j, n, weight_tile), n, static_cast<T>(limit));
      if (at >= 0) return j + at;
    }
    return -1;
  }

  int64_t student_peak(const RowSummary& row) const {
    return peak_of(student, row.student_shift - params.temperature);
  }
  int64_t weights_peak(const RowSummary& row) const {
    return own_weights ? peak_of(teacher, row.teacher_shift - params.weight_temperature)
                       : peak_of(class_weight, row.weight_sum / 2);
  }

  void write_gradients(const RowSummary& row, double scale) const {
    Peak by_student, by_teacher;
    if (row.weights_certain && params.beta != 0) by_teacher.at = weights_peak(row);
    if (params.symmetric) by_student.at = by_teacher.at;
    if (row.student_certain && params.alpha != 0) by_student.at = student_peak(row);
    const Gaps g = gaps(row);
    const double square = params.beta == 0 || row.weight_sum == 0 ? 0
                          : own_weights                           ? params.beta / row.weight_sum
                                                                  : params.beta * row.weight_sum;
    const V per_weight(static_cast<T>(scale * square)), mean(static_cast<T>(row.mean));
    const V per_student(static_cast<T>(scale * params.alpha * inv_t / row.student_sum));
    const V per_teacher(static_cast<T>(-scale * params.alpha * inv_t / row.teacher_sum));
    const V s_shift(static_cast<T>(row.student_shift)), t_shift(static_cast<T>(row.teacher_shift));
    const V zero(T(0)), excluded(-Float<T>::infinity);
    const bool has_soft = params.alpha != 0, has_square = params.beta != 0,
               symmetric = params.symmetric;
    for_tiles([&](const T* s, const T* t, const T* w, int64_t j0, int64_t n) {
      T* to_student = grad_student.data ? grad_student.writable(j0, grad_student_tile) : nullptr;
      T* to_teacher = grad_teacher.data ? grad_teacher.writable(j0, grad_teacher_tile) : nullptr;
      sweep<V>(0, n, [&](auto access, int64_t j, int) AFM_STEP {
        const V a = access.load(s + j, excluded), b = access.load(t + j, excluded);
        V to_t = zero, to_s = zero;
        if (has_square) {
          const Weighted c = weighted(access, a, b, w, j, g);
          to_t = per_weight * c.weight * (c.d - mean);
          to_s = symmetric ? zero - to_t : zero;
        }
        if (has_soft && to_student != nullptr)
          to_s = to_s + fma(exp(a - s_shift), per_student, exp(b - t_shift) * per_teacher);
        if (to_student != nullptr) access.store(to_student + j, to_s);
        if (to_teacher != nullptr) access.store(to_teacher + j, to_t);
      });
      if (to_student)
        by_student.settle<T>(j0, n, to_student), grad_student.write(j0, n, to_student);
      if (to_teacher)
        by_teacher.settle<T>(j0, n, to_teacher), grad_teacher.write(j0, n, to_teacher);
    });
    by_student.close<T>(grad_student), by_teacher.close<T>(grad_teacher);
  }

  void fill(const RowPointer& grad, T* tile, T value) const {
    if (grad.data == nullptr) return;
    for (int64_t j = 0; j < params.classes; j += kTile) {
      const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
      T* out = grad.writable(j, tile);
      for (int64_t i = 0; i < n; ++i) out[i] = value;
      grad.write(j, n, out);
    }
  }

  void save(const RowSummary& row, int64_t i) const {
    if (params.row_stats == nullptr) return;
    T* stats = static_cast<T*>(params.row_stats) + i * kDklRowStats;
    for (int k = 0; k < kDklRowStats; ++k) stats[k] = T(0);
    stats[kKind] =
        static_cast<T>(static_cast<int>(row.kind) + (row.student_certain ? kStudentCertain : 0) +
                       (row.weights_certain ? kWeightsCertain : 0));
    stats[kStudentShift] = static_cast<T>(row.student_shift),
    stats[kTeacherShift] = static_cast<T>(row.teacher_shift);
    stats[kStudentSum] = static_cast<T>(row.student_sum),
    stats[kTeacherSum] = static_cast<T>(row.teacher_sum);
    stats[kWeightSum] = static_cast<T>(row.weight_sum), stats[kMean] = static_cast<T>(row.mean);
    stats[kGap] = static_cast<T>(row.gap);
  }

  RowSummary restore(int64_t i) const {
    const T* stats = static_cast<const T*>(params.row_stats) + i * kDklRowStats;
    RowSummary row;
    const int kind = static_cast<int>(stats[kKind]);
    row.kind = static_cast<RowKind>(kind % kStudentCertain);
    row.student_certain = (kind & kStudentCertain) != 0;
    row.weights_certain = (kind & kWeightsCertain) != 0;
    row.student_shift = stats[kStudentShift], row.teacher_shift = stats[kTeacherShift];
    row.student_sum = stats[kStudentSum], row.teacher_sum = stats[kTeacherSum];
    row.weight_sum = stats[kWeightSum], row.mean = stats[kMean], row.gap = stats[kGap];
    return row;
  }

  void run(int64_t i) const {
    const double weight = weight_of(i);
    RowSummary row;
    if (weight == 0)
      row.kind = RowKind::kMasked;
    else
      row = params.stats_are_given ? restore(i) : summarise();
    if (params.row_values != nullptr)
      params.row_values[i] = weight == 0 ? 0 : row.value * weight * params.scale;
    if (!params.stats_are_given) save(row, i);
    if (grad_student.data == nullptr && grad_teacher.data == nullptr) return;
    if (row.kind != RowKind::kGeneral) {
      const T value = row.kind == RowKind::kMasked ? T(0) : static_cast<T>(kNotANumber);
      fill(grad_student, grad_student_tile, value);
      return fill(grad_teacher, grad_teacher_tile, value);
    }
    write_gradients(row, gradient_scale(i));
  }

  double weight_of(int64_t i) const {
    return params.row_weight == nullptr ? 1 : static_cast<const T*>(params.row_weight)[i];
  }

  double gradient_scale(int64_t i) const {
    const double scale = weight_of(i) * params.scale;
    if (params.grad_loss == nullptr) return scale;
    return scale * static_cast<const T*>(params.grad_loss)[params.grad_loss_stride * i];
  }

  // Keeps what lanes made of row i, unless they did not serve it.
  bool take_short(int64_t i, double value) const {
    const double weight = weight_of(i);
    if (weight == 0 || !__builtin_isfinite(value)) return false;
    if (params.row_values != nullptr) params.row_values[i] = value * weight * params.scale;
    if (!params.stats_are_given) save(RowSummary(), i);
    return true;
  }
};

// Short rows side by side, as LaneWorker of softmax_kl/lane_worker.h.
template <class T>
struct LaneWorker {
  using V = Vec<T>;
  static constexpr int kLanes = V::width;
  const DklParams& params;
  Worker<T>& worker;
  const int64_t classes = params.classes;
  const bool wants_student = params.grad_student.data != nullptr,
             wants_teacher = params.grad_teacher.data != nullptr;
  const T inv_t = static_cast<T>(worker.inv_t);

  template <DklWeights kWeights>
  void run_block(const DklTiles<T>& tiles, int64_t i, int count) const {
    const V alpha(static_cast<T>(params.alpha)), beta(static_cast<T>(params.beta));
    const DklSums<T> sums =
        sum_dkl_lanes<kWeights>(tiles, classes, worker.exp, worker.weight_exp, inv_t);
    // A softmax's own sum is 1.
    const bool is_given = kWeights == DklWeights::kGiven;
    const V total = is_given ? sums.weight_sum : V(T(1));
    const V square = beta * total * total * sums.variance;
    const V value = fma(alpha, sums.soft_cross_entropy, V(T(0.5)) * square);
    T values[kLanes];
    for (int r = 0; r < kLanes; ++r)
      values[r] = static_cast<T>(worker.gradient_scale(i + (r < count ? r : 0)));
    const V scale = V::load(values), soft = scale * alpha * V(inv_t);
    const DklScales<T> by = {soft / sums.student_sum, V(T(0)) - soft / sums.teacher_sum,
                             scale * beta * (is_given ? total : total / sums.weight_sum),
                             params.symmetric};
    if (wants_student && wants_teacher)
      dkl_gradient_lanes<kWeights, true, true>(tiles, classes, sums.mean, by);
    else if (wants_student)
      dkl_gradient_lanes<kWeights, true, false>(tiles, classes, sums.mean, by);
    else if (wants_teacher)
      dkl_gradient_lanes<kWeights, false, true>(tiles, classes, sums.mean, by);
    settle<kWeights>(tiles, sums);
    value.store(values);
    for (int r = 0; r < count; ++r)
      if (!worker.take_short(i + r, values[r])) run_alone(tiles, i + r, r);
  }

  // See Note [Certain rows].
  template <DklWeights kWeights>
  void settle(const DklTiles<T>& tiles, const DklSums<T>& sums) const {
    const V zero(T(0));
    const bool has_soft = params.alpha != 0, is_given = kWeights == DklWeights::kGiven;
    const T* numbers = is_given ? tiles.weight : tiles.teacher;
    const V top = is_given ? sums.weight_max : sums.teacher_max;
    auto weights = is_given ? V(T(kCertain)) * sums.weight_sum < sums.weight_max
                            : certain_lanes(sums.weight_sum);
    if (params.beta == 0) weights = zero < zero;
    if (wants_teacher && any(weights))
      settle_lanes(numbers, top, classes, weights, tiles.difference);
    if (wants_student && params.symmetric && any(weights))
      settle_lanes(numbers, top, classes, weights, tiles.student_exp);
    const auto student = certain_lanes(sums.student_sum);
    if (wants_student && has_soft && any(student))
      settle_lanes(tiles.student, sums.student_max, classes, student, tiles.student_exp);
  }

  // Row i, lane r of the tiles.
  void run_alone(const DklTiles<T>& tiles, int64_t i, int r) const {
    worker.student = lane_of(tiles.student, r), worker.teacher = lane_of(tiles.teacher, r);
    worker.class_weight = lane_of<T>(tiles.weight, r, !worker.own_weights);
    worker.grad_student = lane_of<T>(tiles.student_exp, r, wants_student);
    worker.grad_teacher = lane_of<T>(tiles.difference, r, wants_teacher);
    worker.run(i);
  }

  template <DklWeights kWeights>
  void run(int64_t begin, int64_t end, T* scratch) const {
    const int64_t size = lane_blocks(classes) * kLanes * classes;
    const auto tile = [&](int k) { return scratch + k * size; };
    LaneSlot<T> slots[] = {{LaneRows<T>(params.student, classes), tile(0), false},
                           {LaneRows<T>(params.teacher, classes), tile(1), false},
                           {LaneRows<T>(params.class_weight, classes), tile(2), false},
                           {LaneRows<T>(params.grad_student, classes), tile(3), true},
                           {LaneRows<T>(params.grad_teacher, classes), tile(5), true}};
    for_lane_blocks(
        params.shape, classes, slots, tile(6), begin, end, [&](int64_t i, int count, int64_t at) {
          run_block<kWeights>(
              {tile(0) + at, tile(1) + at, tile(2) + at, tile(3) + at, tile(4) + at, tile(5) + at},
              i, count);
        });
  }

  void run(int64_t begin, int64_t end, T* scratch) const {
    if (!worker.own_weights)
      run<DklWeights::kGiven>(begin, end, scratch);
    else if (params.weight_temperature == params.temperature)
      run<DklWeights::kOfTeacher>(begin, end, scratch);
    else
      run<DklWeights::kOwn>(begin, end, scratch);
  }
};

template <class T>
AFM_INLINE void run_rows(const DklParams& params, int64_t begin, int64_t end, void* scratch) {
  Worker<T> worker(params, scratch);
  T* extra = static_cast<T*>(scratch) + 5 * kTile;
  if (params.classes <= kLaneClasses) return LaneWorker<T>{params, worker}.run(begin, end, extra);
  const RowSlot slots[] = {{params.student, worker.student, nullptr, false},
                           {params.teacher, worker.teacher, nullptr, false},
                           {params.class_weight, worker.class_weight, nullptr, false},
                           {params.grad_student, worker.grad_student, nullptr, true},
                           {params.grad_teacher, worker.grad_teacher, nullptr, true}};
  for_rows(params.shape, params.classes, slots, extra, begin, end,
           [&](int64_t i) { worker.run(i); });
}

}  // namespace

void dkl_rows_float(const DklParams& params, int64_t begin, int64_t end, void* scratch) {
  run_rows<float>(params, begin, end, scratch);
}

void dkl_rows_double(const DklParams& params, int64_t begin, int64_t end, void* scratch) {
  run_rows<double>(params, begin, end, scratch);
}

}  // namespace afm::cpu::AFM_CAPABILITY
