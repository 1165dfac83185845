// One row at a time: it is looked at (probe), summed by the loop that fits it, and turned into
// gradients by a second loop that finds the row and its exponentials still in the cache. JS takes
// the sums of KL, and then loops of its own (js_terms.h).

#pragma once

#include "cpu/layout/row_tiles.h"
#include "cpu/losses/certain_rows.h"
#include "cpu/losses/kl_sweeps.h"
#include "cpu/softmax_kl/direction.h"
#include "cpu/softmax_kl/js_terms.h"
#include "cpu/softmax_kl/softmax_kl.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

constexpr double kInfinity = __builtin_inf(), kNotANumber = __builtin_nan("");

// How much of a row decides its shifts. The maximum of this many logits is nearly always within
// exp's range of the row's; where it is not, or where a near row turns out not to be one, the row
// is summed again.
constexpr int64_t kProbe = 128;

// Shifted logits may exceed the shift by so much before sums would lose their range.
constexpr double kMaxDoublings = 112 - kRaised, kLargestSum = 0x1p112;

// General rows are taken twice anyway rarely enough to be summed around a mean that is far smaller
// than kFarMeanLimit.
constexpr double kGeneralMeanLimit = 4;

// What a row comes to; what a backward needs of it is saved as RowStat.
struct RowSummary {
  RowKind kind = RowKind::kNan;
  double student_shift = 0, teacher_shift = 0, gap = 0, centre = 0, base = 0;
  double student_sum = 1, teacher_sum = 1;
  double a = 0;          // E_p[exp(x)] - 1, in near rows and in general ones of a small KL
  double bridge = 0;     // in those general ones, as RowConstants::bridge
  double log_ratio = 0;  // log(1 + E_p[exp(x) - 1]), in general rows
  double lower = 1;      // general rows: 1, or where an x is near the end of the range 1 / kRaise
  double mean = 0;       // r = E_p[x]; for JS E_p[log(p / m)]
  double student_mean = 0;  // E_q[x], for Jeffreys; for JS E_q[log(q / m)]
  double student_rest = 0;  // in general rows, what rounding takes from student_mean
  double divergence = 0;
  double student_lse = 0;        // log of the sum of exp((s - student_shift) / T)
  bool student_certain = false;  // see Note [Certain rows]
  bool teacher_certain = false;
  // See Note [Sums without the peak].
  int64_t peak = -1;  // the class that the teacher is certain of; -1: none, and the rest is unused
  double peak_x = 0;  // its x; what follows is as above, but for x - peak_x
  double peak_mean = 0, peak_a = 0, peak_student_mean = 0;
  double others = 0;  // what of p is not the peak's
};

// The cross-entropy's part in a row.
struct HardLabel {
  bool is_present = false;
  int64_t label = 0;
  double scale = 0;        // of its gradient
  double shift = 0;        // the student's
  double log_sum_exp = 0;  // of the student's logits less the shift, at temperature 1
  bool is_kept = false;    // whether the worker kept exp(logit - shift), at temperature 1
  double inv_sum = 1;      // of those
};

template <class T>
struct Worker {
  const SoftmaxKlParams& params;
  const bool jeffreys;
  const double inv_t, to_log2;
  const RowExp<T> exp, hard_exp;  // at the loss's temperature; at 1, for the cross-entropy
  const ScaledExp<T> plain_exp;
  T *student_cache, *teacher_cache;  // a row of exponentials each
  T* extra_cache[2];  // a row each: for JS, logarithms; with labels, exponentials at T = 1
  T *student_tile, *teacher_tile, *grad_student_tile, *grad_teacher_tile;  // kTile each
  RowPointer student, teacher, grad_student, grad_teacher;                 // the present row
  RowPointer next_student{}, next_teacher{};  // the row after it; null where there is none
  double* direction_rows = nullptr;           // DirectionJob<T>::kRows of them
  int64_t present = 0, probed = -1;           // rows: the present one, and the one that was probed
  Probe<T> probe;

  Worker(const SoftmaxKlParams& p, void* scratch)
      : params(p),
        jeffreys(p.divergence == Divergence::kJeffreys),
        inv_t(1 / p.temperature),
        to_log2(1.44269504088896340736 / p.temperature),
        exp(p.temperature),
        hard_exp(1),
        plain_exp(1) {
    T* at = static_cast<T*>(scratch);
    student_tile = at, teacher_tile = at + kTile;
    grad_student_tile = at + 2 * kTile, grad_teacher_tile = at + 3 * kTile;
    student_cache = at + 4 * kTile;
    const int64_t row = (p.classes + 15) / 16 * 16;
    teacher_cache = student_cache + row;
    extra_cache[0] = teacher_cache + row, extra_cache[1] = extra_cache[0] + row;
  }

  // The gap is taken off the side that has the offset.
  static bool gap_is_students(const RowSummary& row) {
    return __builtin_fabs(row.student_shift) >= __builtin_fabs(row.teacher_shift);
  }

  // JS has its own means, and wants x to be small where both sides have mass: around the maxima.
  bool is_js() const { return params.divergence == Divergence::kJs; }

  // student - teacher - gap, in the order in which RowConstants::x takes it.
  static double apart(const RowSummary& row, double student, double teacher) {
    return gap_is_students(row) ? (student - row.gap) - teacher : student - (teacher + row.gap);
  }

  RowConstants<T> constants(const RowSummary& row) const {
    const bool of_student = gap_is_students(row);
    return {exp,
            static_cast<T>(inv_t),
            static_cast<T>(row.student_shift),
            static_cast<T>(row.teacher_shift),
            static_cast<T>(of_student ? row.gap : 0),
            static_cast<T>(of_student ? 0 : -row.gap),
            static_cast<T>(row.centre),
            static_cast<T>(row.base),
            excluded_below(row.student_shift),
            excluded_below(row.teacher_shift),
            static_cast<T>(row.bridge),
            static_cast<T>(row.lower)};
  }

  // Divided by the temperature, the distance to a maximum may leave the range: logits as low as
  // that, which are put there to mask a class, exclude it like -inf.
  T excluded_below(double maximum) const {
    constexpr double kLowest = Float<T>::lowest;
    const double bound = maximum + params.temperature * kLowest;
    return bound > kLowest ? static_cast<T>(bound) : -Float<T>::infinity;
  }

  // Whether the loops read and write bfloat16 themselves, instead of through tiles.
  bool is_bfloat16() const {
    if constexpr (sizeof(T) == 8) return false;
    const auto direct = [](const RowPointer& row) {
      return row.data == nullptr || (row.dtype == DType::kBFloat16 && row.stride == 1);
    };
    return direct(student) && direct(teacher) && direct(grad_student) && direct(grad_teacher);
  }

  // As for_tiles, for loops that read bfloat16 themselves.
  template <class F>
  void for_direct_tiles(const F& f) const {
    if constexpr (sizeof(T) == 4) {
      if (is_bfloat16()) {
        for (int64_t j = 0; j < params.classes; j += kTile)
          f(reinterpret_cast<const BFloat16*>(student.at(j)),
            reinterpret_cast<const BFloat16*>(teacher.at(j)), j,
            params.classes - j < kTile ? params.classes - j : kTile);
        return;
      }
    }
    for_tiles(f);
  }

  // Calls f(s, t, first class, count) tile by tile.
  template <class F>
  void for_tiles(const F& f) const {
    for (int64_t j = 0; j < params.classes; j += kTile) {
      const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
      f(student.read(j, n, student_tile), teacher.read(j, n, teacher_tile), j, n);
    }
  }

  // Sums.

  // See Note [Lines ahead].
  Lines no_lines() const {
    const char* at_hand = reinterpret_cast<const char*>(student_cache);
    return {at_hand, at_hand, 0};
  }

  // Of two rows from class j on, for loops that run over both.
  Lines lines_of(const RowPointer& student_row, const RowPointer& teacher_row, int64_t j) const {
    const RowPointer& first = student_row.data != nullptr ? student_row : teacher_row;
    const RowPointer& second = teacher_row.data != nullptr ? teacher_row : student_row;
    if (first.data == nullptr || first.stride != 1 || second.stride != 1 ||
        first.dtype != second.dtype)
      return no_lines();
    return {first.at(j), second.at(j), element_size(first.dtype)};
  }

  bool is_long() const { return params.classes > kTile; }

  template <bool kCache>
  Lines lines_of_sums(int64_t j) const {
    if (!is_long()) return params.stream ? no_lines() : lines_of(grad_student, grad_teacher, j);
    const int64_t bytes = kCache ? kAheadOfStores : kAheadOfLoads;
    return lines_of(student, teacher, j + bytes / element_size(student.dtype));
  }

  void look_at(int64_t i, const RowPointer& s, const RowPointer& t) {
    const int64_t head = params.classes < kProbe ? params.classes : kProbe;
    probe_row(s.read(0, head, student_tile), t.read(0, head, teacher_tile), head, probe);
    probed = i;
  }

  // At the next row while the sums of the present one are on their way: one after the other, each
  // would wait for a chain of a few dozen instructions that leaves the processor idle.
  void look_ahead() {
    if (next_student.data == nullptr || probed != present) return;
    look_at(present + 1, next_student, next_teacher);
  }

  // A row's summary is made in its place: see what kl_sweeps.h says about copies.
  template <bool kCache>
  void summarise(RowSummary& row) {
    if (probed != present) look_at(present, student, teacher);
    row.student_shift = probe.student_max, row.teacher_shift = probe.teacher_max;
    row.gap = coarse_gap(static_cast<T>(probe.student_max - probe.teacher_max));
    const double width = (static_cast<double>(probe.gap_max) - probe.gap_min) * inv_t;
    if (width <= kNearLimit) {
      // At the maxima the two sides mostly agree on the class, and where p is concentrated this is
      // the mean.
      const double guess = apart(row, row.student_shift, row.teacher_shift) * inv_t;
      bool is_near = summarise_near<kCache>(row, guess);
      if (is_near && centre_is_off(row))
        is_near = summarise_near<kCache>(row, row.centre + (row.peak < 0 ? row.mean : row.peak_x));
      if (is_near) return;
    }
    if (!summarise_far<kCache>(row)) summarise_general(row);
  }

  // Around the peak's x, it is what that was away from the centre that rounding is measured by.
  static bool centre_is_off(const RowSummary& row) {
    return near_centre_is_off(row.divergence,
                              row.peak < 0 ? row.mean : row.peak_x * __builtin_sqrt(row.others));
  }

  // Certain rows. See Note [Sums without the peak].

  // Sets the row's peak, if it has one, and completes the sums over the other classes: sum(s, t, n,
  // sums) adds classes that lie side by side.
  template <RowKind kKind, class F>
  void take_peak(RowSummary& row, RowSums& sums, const F& sum) const {
    row.peak = -1;
    if (sums.peak_tile < 0 || !(sums.others.teacher < (1 - kCertain) * sums.teacher)) return;
    const int64_t rest = params.classes - sums.peak_tile, n = rest < kTile ? rest : kTile;
    const T* s = student.read(sums.peak_tile, n, student_tile);
    const T* t = teacher.read(sums.peak_tile, n, teacher_tile);
    const auto class_at = [&](int64_t i) { return element_of_lane<T>(sums.peak_lane, i, n); };
    constexpr int64_t kMost = kTile / Accumulator<T>::kLanes + 2;
    T of_student[kMost], of_teacher[kMost];
    int64_t count = 0;
    for (int64_t j = class_at(0); j < n; j = class_at(++count))
      of_student[count] = s[j], of_teacher[count] = t[j];
    if (count == 0) return;
    const int64_t at = class_of_largest(of_teacher, count--);
    of_student[at] = of_student[count], of_teacher[at] = of_teacher[count];
    RowSums lane;
    sum(of_student, of_teacher, count, lane);
    sums.others += lane;
    row.others = sums.others.teacher / sums.teacher;
    if (!(row.others < 1 - kCertain)) return;
    row.peak = sums.peak_tile + class_at(at), row.peak_x = x_at<kKind>(row, row.peak);
  }

  template <RowKind kKind>
  void take_peak(RowSummary& row, RowSums& sums, const RowConstants<T>& c) const {
    take_peak<kKind>(row, sums, [&](const T* s, const T* t, int64_t n, RowSums& lane) {
      if constexpr (kKind == RowKind::kGeneral)
        sum_general(s, t, n, c, lane);
      else
        sum_tile<kKind, false, !ScaledExp<T>::kOverflowShows>(s, t, n, c, no_lines(), false,
                                                              nullptr, nullptr, lane);
    });
  }

  // What the loops have of a class.
  template <RowKind kKind>
  double x_at(const RowSummary& row, int64_t j) const {
    const RowConstants<T> c = constants(row);
    const Vec<T> s(number_at(student, j)), t(number_at(teacher, j));
    const Vec<T> x = kKind == RowKind::kNear      ? c.x(s, t)
                     : kKind == RowKind::kGeneral ? c.general_x(s, t)
                                                  : c.far_x(s, t);
    return x.max();
  }

  static T number_at(const RowPointer& row, int64_t j) {
    T buffer;
    return *row.at_class(j).read(0, 1, &buffer);
  }

  // Where the KL is small: all of it around the peak's x, y = x - peak_x, from sums around the
  // centre.
  void sum_around_peak(RowSummary& row, const RowSums& sums) const {
    const TeacherSums& of = sums.others;
    const double x = row.peak_x, less = __builtin_expm1(-x);  // exp(y) = exp(x) * (1 + less)
    const double linear = of.linear - x * of.teacher;
    const double excess = of.excess + less * (of.excess + of.linear) + (less + x) * of.teacher;
    row.peak_mean = linear / sums.teacher;
    row.divergence = near_kl(row.peak_mean, excess / sums.teacher);
    row.peak_a = row.peak_mean + excess / sums.teacher;
    if (jeffreys) {
      const double curvature =
          (1 + less) * (of.curvature - x * (of.linear + of.excess)) + less * linear;
      row.divergence = near_jeffreys(row.peak_a, row.peak_mean, curvature / sums.teacher);
      row.peak_student_mean = row.peak_mean + row.divergence;
    }
  }

  // Sets what the loops take instead, around the centre.
  void leave_peak(RowSummary& row) const {
    if (row.peak < 0) return;
    const double x = row.peak_x * x_unit(row);
    row.mean = x + row.peak_mean;
    if (is_small(row)) row.a = row.peak_a + __builtin_expm1(x) * (1 + row.peak_a);
    if (row.kind == RowKind::kNear) row.student_mean = x + row.peak_student_mean;
  }

  // Whether q - p comes from `a`.
  static bool is_small(const RowSummary& row) {
    return row.kind == RowKind::kNear || row.bridge != 0;
  }

  template <RowKind kKind, bool kCache, bool kBounded>
  RowSums sum_tiles(const RowConstants<T>& c) const {
    RowSums sums;
    for_direct_tiles([&](const auto* s, const auto* t, int64_t j, int64_t n) {
      sums.tile = j;
      sum_tile<kKind, kCache, kBounded>(s, t, n, c, lines_of_sums<kCache>(j), is_long(),
                                        student_cache + j, teacher_cache + j, sums);
    });
    return sums;
  }

  template <RowKind kKind, bool kCache, bool kBounded, class In>
  AFM_MEMBER void sum_tile(const In* s, const In* t, int64_t n, const RowConstants<T>& c,
                           const Lines& lines, bool ahead, T* f, T* e, RowSums& sums) const {
    if constexpr (kKind == RowKind::kNear)
      jeffreys ? sum_near<kCache, true, kBounded>(s, t, n, c, lines, ahead, f, e, sums)
               : sum_near<kCache, false, kBounded>(s, t, n, c, lines, ahead, f, e, sums);
    else
      jeffreys ? sum_far<kCache, true, kBounded>(s, t, n, c, lines, ahead, f, e, sums)
               : sum_far<kCache, false, kBounded>(s, t, n, c, lines, ahead, f, e, sums);
  }

  // The sums of a near or far row; with bounds around its exponentials only where they need them.
  template <RowKind kKind, bool kCache>
  RowSums sum_row(const RowConstants<T>& c) const {
    const RowSums sums = sum_tiles<kKind, kCache, false>(c);
    if constexpr (!ScaledExp<T>::kOverflowShows)
      if (!sums.in_range) return sum_tiles<kKind, kCache, true>(c);
    return sums;
  }

  template <bool kCache>
  bool summarise_near(RowSummary& row, double centre) {
    row.centre = static_cast<T>(centre);
    const RowConstants<T> c = constants(row);
    RowSums sums = sum_row<RowKind::kNear, kCache>(c);
    look_ahead();
    if (!(sums.largest_square <= kLargestNearSquare && __builtin_isfinite(sums.linear) &&
          sums.teacher <= kLargestSum))
      return false;
    row.kind = RowKind::kNear;
    row.teacher_sum = sums.teacher;
    // Within e^2 of each other, the sides are certain of the same class.
    row.teacher_certain = row.student_certain = sums.teacher_certain;
    row.mean = sums.linear / sums.teacher;
    const double excess = sums.excess / sums.teacher;
    row.a = row.mean + excess;
    row.divergence = near_kl(row.mean, excess);
    if (jeffreys) {
      row.divergence = near_jeffreys(row.a, row.mean, sums.curvature / sums.teacher);
      row.student_mean = row.mean + row.divergence;
    }
    take_peak<RowKind::kNear>(row, sums, c);
    if (row.peak >= 0) sum_around_peak(row, sums), leave_peak(row);
    return true;
  }

  template <bool kCache>
  bool summarise_far(RowSummary& row) {
    const RowConstants<T> c = constants(row);
    RowSums sums = sum_row<RowKind::kFar, kCache>(c);
    look_ahead();
    if (!(__builtin_isfinite(sums.linear) && sums.student <= kLargestSum &&
          sums.teacher <= kLargestSum)) {
      row.centre = kNotANumber;  // no better guess for the general loop
      return false;
    }
    row.kind = RowKind::kFar, row.peak = -1;
    row.student_sum = sums.student, row.teacher_sum = sums.teacher;
    row.student_certain = sums.student_certain, row.teacher_certain = sums.teacher_certain;
    row.mean = sums.linear / sums.teacher * inv_t;
    const double log_ratio = __builtin_log(sums.student / sums.teacher);
    row.divergence = log_ratio - row.mean;
    if (far_sums_are_off(row.divergence, row.mean)) {
      row.centre = is_js() ? kNotANumber : row.mean;
      return false;
    }
    if (jeffreys) {
      row.student_mean = sums.student_linear / sums.student * inv_t;
      if (!(__builtin_fabs(row.student_mean) <= kFarMeanLimit)) {
        row.centre = row.mean;
        return false;
      }
      row.divergence = row.student_mean - row.mean;
    } else if (!is_js() && (grad_teacher.data != nullptr || wants_stats())) {
      take_peak<RowKind::kFar>(row, sums, c);
      row.peak_mean =
          (sums.others.linear - row.peak_x * sums.others.teacher) / sums.teacher * inv_t;
      leave_peak(row);
    }
    if (params.cross_entropy.labels != nullptr)
      row.student_lse = __builtin_log(sums.student) - kLogRaise;
    return true;
  }

  // row.centre: E_p[(s - m_s - (t - m_t)) / T] with the shifts of `row`, or NaN. Afterwards around
  // the exact maxima: see RowConstants::base.
  void summarise_general(RowSummary& row) {
    double student_max = -kInfinity, teacher_max = -kInfinity;
    bool broken = false;
    for_tiles([&](const T* s, const T* t, int64_t, int64_t n) {
      classify(s, n, student_max, broken);
      classify(t, n, teacher_max, broken);
    });
    row.kind = RowKind::kNan, row.divergence = kNotANumber, row.peak = -1;
    if (broken || student_max == -kInfinity || teacher_max == -kInfinity) return;
    const double probe_apart = row.student_shift - row.teacher_shift;
    row.student_shift = student_max, row.teacher_shift = teacher_max;
    row.gap = coarse_gap(static_cast<T>(student_max - teacher_max));
    row.base = base(row);
    row.centre =
        static_cast<T>(__builtin_isnan(row.centre) || row.teacher_certain
                           ? 0
                           : row.centre + (probe_apart - (student_max - teacher_max)) * inv_t);
    const double difference = (apart(row, student_max, teacher_max) - row.base) * inv_t;
    RowSums sums = general_sums(row, difference);
    if (!__builtin_isfinite(sums.linear) || !__builtin_isfinite(sums.student_linear)) {
      row.lower = 1 / kRaise;
      sums = general_sums(row, difference);
    }
    if (__builtin_fabs(row.mean) > kGeneralMeanLimit && __builtin_isfinite(row.mean) && !is_js()) {
      row.centre = static_cast<T>(row.centre + row.mean);
      sums = general_sums(row, difference);
    }
    row.kind = RowKind::kGeneral;
    row.student_sum = sums.student, row.teacher_sum = sums.teacher;
    row.student_certain = sums.student_certain, row.teacher_certain = sums.teacher_certain;
    row.student_mean = sums.student_linear / sums.student;
    if (jeffreys) row.student_rest = student_rest(row);
    row.student_lse = __builtin_log(sums.student / row.lower) - kLogRaise;
    const double log_ratio = __builtin_log(sums.student / sums.teacher) + difference - row.centre;
    const double plain = log_ratio - row.mean, excess = sums.excess / sums.teacher;
    const bool is_small = plain < 1 && __builtin_fabs(log_ratio) < 1;
    row.a = row.mean + excess;
    if (is_small) row.bridge = __builtin_exp(difference - row.centre);
    row.divergence = is_small ? near_kl(row.mean, excess) : plain;
    if (jeffreys)
      row.divergence = is_small ? near_jeffreys(row.a, row.mean, sums.curvature / sums.teacher)
                                : row.student_mean - row.mean;
    if (!is_js()) {
      take_peak<RowKind::kGeneral>(row, sums, general_constants(row, difference));
      if (is_small && row.peak >= 0)
        sum_around_peak(row, sums);
      else
        row.peak_mean = (sums.others.linear - row.peak_x * sums.others.teacher) / sums.teacher;
      leave_peak(row);
    }
    row.log_ratio = is_small ? __builtin_log1p(row.a) : log_ratio;
    if (jeffreys ? sums.one_sided : sums.student_missing) {
      row.kind = RowKind::kInfinite;
      row.divergence = kInfinity;
    }
  }

  // What the loops have of s - t - k at the maxima.
  double base(const RowSummary& row) const {
    const RowConstants<T> c = constants(row);
    return (c.student_shift - c.student_gap) - (c.teacher_shift - c.teacher_gap);
  }

  RowConstants<T> general_constants(const RowSummary& row, double difference) const {
    RowConstants<T> c = constants(row);
    c.bridge = static_cast<T>(__builtin_exp(difference - row.centre));
    return c;
  }

  // Around row.centre; also sets row.mean. `difference`: what rounding took from row.base, over T.
  RowSums general_sums(RowSummary& row, double difference) const {
    const RowConstants<T> c = general_constants(row, difference);
    RowSums sums;
    for_tiles([&](const T* s, const T* t, int64_t j, int64_t n) {
      sums.tile = j;
      sum_general(s, t, n, c, sums);
    });
    row.mean = sums.linear / sums.teacher;
    return sums;
  }

  double student_rest(const RowSummary& row) const {
    const RowConstants<T> c = constants(row);
    double sum = 0;
    for_tiles([&](const T* s, const T* t, int64_t, int64_t n) {
      sum += sum_student_rest(s, t, n, c, static_cast<T>(row.student_mean));
    });
    return sum / row.student_sum;
  }

  // JS: the sums of KL, by whichever loop fits, then a loop of its own.

  JsCache<T> js_cache() const {
    return {teacher_cache, student_cache, extra_cache[0], extra_cache[1]};
  }

  // Also completes what `row` holds: the constant that the terms' x is off by.
  JsRow<T> js_row(RowSummary& row) const {
    double per_student = 1 / row.student_sum;
    if (row.kind == RowKind::kNear) {
      per_student = 1 / (1 + row.a);
      row.log_ratio = __builtin_log1p(row.a);
    } else {
      // In general rows around the maxima already.
      if (row.kind == RowKind::kFar) {
        const double centre = apart(row, row.student_shift, row.teacher_shift) * inv_t;
        row.centre = static_cast<T>(centre);
        row.log_ratio = __builtin_log(row.student_sum / row.teacher_sum) + (centre - row.centre);
      }
    }
    return {constants(row),
            plain_exp,
            static_cast<T>(params.beta),
            static_cast<T>(params.gamma),
            static_cast<T>(__builtin_log(params.beta)),
            static_cast<T>(__builtin_log(params.gamma)),
            static_cast<T>(per_student),
            static_cast<T>(1 / row.teacher_sum),
            static_cast<T>(row.log_ratio)};
  }

  template <RowKind kKind>
  JsSums sum_js_row(const JsRow<T>& js, bool keep) const {
    JsSums sums;
    for_tiles([&](const T* s, const T* t, int64_t j, int64_t n) {
      if (keep)
        sum_js<kKind, true>(s, t, j, n, js, js_cache(), sums);
      else
        sum_js<kKind, false>(s, t, j, n, js, js_cache(), sums);
    });
    return sums;
  }

  void summarise_js(RowSummary& row, bool keep) {
    summarise<true>(row);
    if (row.kind == RowKind::kNan) return;
    const JsRow<T> js = js_row(row);
    const JsSums sums = row.kind == RowKind::kNear  ? sum_js_row<RowKind::kNear>(js, keep)
                        : row.kind == RowKind::kFar ? sum_js_row<RowKind::kFar>(js, keep)
                                                    : sum_js_row<RowKind::kGeneral>(js, keep);
    // A class that one side excludes costs no more than a finite amount. A backward needs the terms
    // of every class, and takes them again.
    row.kind = RowKind::kGeneral;
    row.divergence = sums.value, row.mean = sums.teacher, row.student_mean = sums.student;
  }

  void write_js_gradients(const RowSummary& row, double scale) const {
    const JsCache<T> cache = js_cache();
    const auto write = [&](const RowPointer& grad, T* tile, const T* probability, const T* logs,
                           double weight, double mean, bool is_certain) {
      Peak peak;
      if (is_certain) peak.at = first_from(probability, params.classes, T(0.5));
      for (int64_t j = 0; j < params.classes && grad.data != nullptr; j += kTile) {
        const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
        T* to = grad.writable(j, tile);
        gradient_js(probability + j, logs + j, n, static_cast<T>(scale * inv_t * weight),
                    static_cast<T>(mean), to);
        peak.settle<T>(j, n, to);
        grad.write(j, n, to);
      }
      peak.close<T>(grad);
    };
    write(grad_student, grad_student_tile, cache.q, cache.log_q_over_m, params.gamma,
          row.student_mean, row.student_certain);
    write(grad_teacher, grad_teacher_tile, cache.p, cache.log_p_over_m, params.beta, row.mean,
          row.teacher_certain);
  }

  // The cross-entropy.

  // -log q of the label, smoothed, at temperature 1; also sets what the gradient takes from `hard`.
  double cross_entropy(const RowSummary& row, HardLabel& hard, bool keep) {
    const double smoothing = params.cross_entropy.label_smoothing;
    const bool known = params.temperature == 1 && row.kind < RowKind::kUnlooked;
    PlainSums plain;
    plain.shift = row.student_shift;
    if (!known && !sum_plain(row, keep, plain)) return kNotANumber;
    T buffer{};
    const double label_logit = *student.at_class(hard.label).read(0, 1, &buffer);
    const double above = label_logit - plain.shift;
    const double log_sum = !known                       ? __builtin_log(plain.sum) - kLogRaise
                           : row.kind == RowKind::kNear ? near_log_sum(row, hard.label)
                                                        : row.student_lse;
    hard.shift = row.kind == RowKind::kUnlooked ? plain.shift : row.student_shift;
    hard.log_sum_exp = log_sum + (plain.shift - hard.shift);
    hard.is_kept = !known && keep, hard.inv_sum = 1 / plain.sum;
    double value = smoothing == 1 ? 0 : (1 - smoothing) * (log_sum - above);
    if (smoothing == 0) return value;
    if (known) add_logits(plain);
    return value + smoothing * (log_sum - plain.logits / static_cast<double>(params.classes));
  }

  // Near rows took no exponential of the student: its log-sum-exp, less the shift, follows from the
  // teacher's and the label's own x, whose rounding then drops out of the label's -log q.
  double near_log_sum(const RowSummary& row, int64_t label) const {
    T s, t;
    s = *student.at_class(label).read(0, 1, &s), t = *teacher.at_class(label).read(0, 1, &t);
    const double x = constants(row).x(Vec<T>(s), Vec<T>(t)).max();
    return __builtin_log(row.teacher_sum) - kLogRaise - (t - row.teacher_shift) +
           __builtin_log1p(row.a) - x + (s - row.student_shift);
  }

  // Sums over the student's logits at temperature 1.
  struct PlainSums {
    double shift = 0, sum = 0;
    double logits = 0;  // of the logits less the shift
  };

  // False for a row that is no distribution.
  bool sum_plain(const RowSummary& row, bool keep, PlainSums& sums) const {
    if (row.kind == RowKind::kNan) return false;
    if (row.kind == RowKind::kUnlooked) {
      bool broken = false;
      sums.shift = -kInfinity;
      for_student_tiles(
          [&](const T* s, int64_t, int64_t n) { classify(s, n, sums.shift, broken); });
      if (broken || sums.shift == -kInfinity) return false;
    }
    // The shift of a row that was looked at is nearly always close to its maximum.
    const double largest = keep ? sum_plain_once<true>(sums) : sum_plain_once<false>(sums);
    if (largest - sums.shift <= kMaxDoublings / to_log2 * inv_t) return true;
    sums.shift = largest;
    keep ? sum_plain_once<true>(sums) : sum_plain_once<false>(sums);
    return true;
  }

  // Returns the largest logit.
  template <bool kKeep>
  double sum_plain_once(PlainSums& sums) const {
    sums.sum = sums.logits = 0;
    double largest = -kInfinity;
    const Vec<T> shift(static_cast<T>(sums.shift));
    for_student_tiles([&](const T* s, int64_t j0, int64_t n) {
      Accumulator<T> exponentials, logits, top(-Float<T>::infinity);
      sweep<Vec<T>>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
        const Vec<T> a = access.load(s + j, Vec<T>(-Float<T>::infinity)), above = a - shift,
                     e = hard_exp(above);
        exponentials.add(u, e), logits.add(u, access.or_zero(above)), top.take_max(u, a);
        if constexpr (kKeep) access.store(extra_cache[0] + j0 + j, e);
      });
      sums.sum += exponentials.sum(), sums.logits += logits.sum();
      largest = larger(largest, top.largest());
    });
    return largest;
  }

  void add_logits(PlainSums& sums) const {
    const Vec<T> shift(static_cast<T>(sums.shift));
    for_student_tiles([&](const T* s, int64_t, int64_t n) {
      Accumulator<T> logits;
      sweep<Vec<T>>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
        logits.add(u, access.or_zero(access.load(s + j, shift) - shift));
      });
      sums.logits += logits.sum();
    });
  }

  template <class F>
  void for_student_tiles(const F& f) const {
    for (int64_t j = 0; j < params.classes; j += kTile) {
      const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
      f(student.read(j, n, student_tile), j, n);
    }
  }

  // Gradients.

  GradientFactors<T> factors(const RowSummary& row, double scale, double ce_scale) const {
    const double by_t = scale * inv_t, p = by_t / row.teacher_sum, unit = x_unit(row);
    double student_f, student_e, student_fx = 0, teacher_e = 0, teacher_f = 0;
    if (is_small(row)) {
      const double q = p / (1 + row.a), ce = ce_scale / row.teacher_sum / (1 + row.a);
      student_f = q + ce, student_e = ce - q * row.a;
      if (jeffreys) student_fx = q, teacher_e = q * row.a, teacher_f = -q;
    } else {
      const double q = by_t / row.student_sum;
      student_f = q + ce_scale / row.student_sum, student_e = -p;
      if (jeffreys) student_fx = q * unit, teacher_e = p, teacher_f = -q;
    }
    const auto in_t = [](double value) { return static_cast<T>(value); };
    return {in_t(student_f),       in_t(student_e),       smoothing_constant(ce_scale),
            in_t(student_fx),      in_t(-p * unit),       in_t(teacher_e),
            in_t(teacher_f),       in_t(row.mean / unit), in_t(row.student_mean / unit),
            in_t(row.student_rest)};
  }

  // What the x that the loops take is worth: far rows leave the temperature out.
  double x_unit(const RowSummary& row) const { return row.kind == RowKind::kFar ? inv_t : 1; }

  // The class with the teacher's largest logit of group number `group`.
  int64_t peak_of_group(int64_t group) const {
    const int64_t j = group * kPeakGroup, rest = params.classes - j;
    const int64_t n = rest < kPeakGroup ? rest : kPeakGroup;
    return j + class_of_largest(teacher.read(j, n, teacher_tile), n);
  }

  // Of KL and Jeffreys, where the loop left noise: q - p or x less its mean, at the peak. Where the
  // two sides are certain of different classes, all of Jeffreys is large at both. So is what the
  // cross-entropy adds, unless the student is certain of the label.
  template <RowKind kKind>
  void write_peak(const RowSummary& row, double scale, const HardLabel& hard) const {
    const bool has_small_difference = is_small(row);
    if (row.peak < 0 || (jeffreys && !has_small_difference)) return;
    const RowConstants<T> c = constants(row);
    const Vec<T> t(number_at(teacher, row.peak));
    const Vec<T> e = kKind == RowKind::kGeneral ? c.teacher_exp(t) : c.finite_teacher_exp(t);
    const double p = scale * inv_t * (e.max() / row.teacher_sum);
    const double q = p / (1 + row.peak_a), q_less_p = 0 - q * row.peak_a;
    if (has_small_difference && hard.scale == 0 && grad_student.data != nullptr)
      grad_student.put(row.peak,
                       static_cast<T>(jeffreys ? q_less_p - q * row.peak_student_mean : q_less_p));
    if (grad_teacher.data != nullptr)
      grad_teacher.put(row.peak,
                       static_cast<T>(jeffreys ? p * row.peak_mean - q_less_p : p * row.peak_mean));
  }

  // -log q of a label is next to nothing.
  bool label_is_certain(const HardLabel& hard) const {
    if (hard.scale == 0) return false;
    constexpr double kLogCertain = -0.0202;
    T buffer;
    const double logit = *student.at_class(hard.label).read(0, 1, &buffer);
    return logit - hard.shift - hard.log_sum_exp > kLogCertain;
  }

  // What fetches by itself keeps up with short rows.
  Lines lines_to_come(int64_t j) const {
    return params.classes > kTile / 2 ? lines_of(next_student, next_teacher, j) : no_lines();
  }

  // kHard: with the cross-entropy's softmax, which is the student's.
  template <RowKind kKind, bool kCached, bool kJeffreys, bool kHard, class In>
  AFM_MEMBER void gradient_tile(const In* s, const In* t, int64_t j, int64_t n,
                                const RowConstants<T>& c, const GradientFactors<T>& by,
                                In* to_student, In* to_teacher, bool stream,
                                HardTerm<T>* hard = nullptr) const {
    const T *f = student_cache + j, *e = teacher_cache + j;
    Lines lines, *next = nullptr;
    if (stream) lines = lines_to_come(j), next = &lines;
    if constexpr (kHard) hard->kept = extra_cache[0] + j;
    if (to_student != nullptr && to_teacher != nullptr)
      gradient<kKind, kCached, true, true, kJeffreys, kHard>(s, t, n, c, by, f, e, to_student,
                                                             to_teacher, next, hard);
    else if (to_student != nullptr)
      gradient<kKind, kCached, true, false, kJeffreys, kHard>(s, t, n, c, by, f, e, to_student,
                                                              to_teacher, next, hard);
    else
      gradient<kKind, kCached, false, true, kJeffreys, false>(s, t, n, c, by, f, e, to_student,
                                                              to_teacher, next, hard);
  }

  template <RowKind kKind, bool kCached>
  void write_gradients(const RowSummary& row, double scale, const HardLabel& hard) const {
    // At temperature 1 the cross-entropy's softmax is the divergence's, and only changes its
    // factors. General rows are too rare for a loop that takes both.
    const bool separate = hard.scale != 0 && params.temperature != 1;
    const bool together = separate && kKind != RowKind::kGeneral && hard.is_kept == kCached;
    const RowConstants<T> c = constants(row);
    const GradientFactors<T> by = factors(row, scale, separate ? 0 : hard.scale);
    const bool stream = params.stream && can_stream() && (together || !separate);
    if constexpr (sizeof(T) == 4) {
      if (hard.scale == 0 && is_bfloat16()) {
        write_bfloat16<kKind, kCached>(c, by, stream);
        return write_peak<kKind>(row, scale, hard);
      }
    }
    HardTerm<T> softmax;
    if (together) softmax = hard_term(hard);
    Peak label;
    if (label_is_certain(hard)) label.at = hard.label;
    // Settled before they leave the caches.
    const bool staged = stream && label.at >= 0;
    // Backwards: the end of a long row is what the caches still hold.
    for (int64_t j = (params.classes - 1) / kTile * kTile; j >= 0; j -= kTile) {
      const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
      const T* s = student.read(j, n, student_tile);
      const T* t = teacher.read(j, n, teacher_tile);
      const auto target = [&](const RowPointer& grad, T* tile) {
        return grad.data == nullptr ? nullptr : staged ? tile : grad.writable(j, tile);
      };
      T* to_student = target(grad_student, grad_student_tile);
      T* to_teacher = target(grad_teacher, grad_teacher_tile);
      if (jeffreys)
        gradient_tile<kKind, kCached, true, false>(s, t, j, n, c, by, to_student, to_teacher,
                                                   stream && !staged);
      else if (together)
        gradient_tile<kKind, kCached, false, kKind != RowKind::kGeneral>(
            s, t, j, n, c, by, to_student, to_teacher, stream && !staged, &softmax);
      else
        gradient_tile<kKind, kCached, false, false>(s, t, j, n, c, by, to_student, to_teacher,
                                                    stream && !staged);
      if (to_student) {
        if (separate && !together) add_softmax(s, j, n, hard, to_student);
        subtract_label(hard, j, n, to_student);
      }
      if (to_student) label.settle<T>(j, n, to_student);
      const auto end = [&](const RowPointer& grad, T* to) {
        if (to == nullptr) return;
        if (staged)
          stream_out(to, n, reinterpret_cast<T*>(grad.at(j)), lines_to_come(j));
        else
          grad.write(j, n, to);
      };
      end(grad_student, to_student), end(grad_teacher, to_teacher);
    }
    label.close<T>(grad_student);
    write_peak<kKind>(row, scale, hard);
  }

  template <RowKind kKind, bool kCached>
  void write_bfloat16(const RowConstants<T>& c, const GradientFactors<T>& by, bool stream) const {
    for (int64_t j = (params.classes - 1) / kTile * kTile; j >= 0; j -= kTile) {
      const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
      const auto at = [&](const RowPointer& row) {
        return row.data == nullptr ? nullptr : reinterpret_cast<BFloat16*>(row.at(j));
      };
      const BFloat16 *s = at(student), *t = at(teacher);
      BFloat16 *to_student = at(grad_student), *to_teacher = at(grad_teacher);
      if (jeffreys)
        gradient_tile<kKind, kCached, true, false>(s, t, j, n, c, by, to_student, to_teacher,
                                                   stream);
      else
        gradient_tile<kKind, kCached, false, false>(s, t, j, n, c, by, to_student, to_teacher,
                                                    stream);
    }
  }

  // Both gradients in place, and on the same phase of a cache line: one loop aligns both.
  bool can_stream() const {
    const bool has_s = grad_student.data != nullptr, has_t = grad_teacher.data != nullptr;
    const bool native =
        (!has_s || grad_student.is_native<T>()) && (!has_t || grad_teacher.is_native<T>());
    if (!native && !is_bfloat16()) return false;
    return !has_s || !has_t || (grad_student.data - grad_teacher.data) % 64 == 0;
  }

  // The cross-entropy's gradient is scale * (softmax(s) - smoothing / C - (1 - smoothing) * [the
  // label's class]): all but the last.
  HardTerm<T> hard_term(const HardLabel& hard) const {
    HardTerm<T> term;
    term.exp = &hard_exp;
    // Exponentials that were not kept are probabilities, up to a factor near 1.
    term.log_sum = static_cast<T>(hard.is_kept ? 0 : hard.log_sum_exp);
    term.factor = static_cast<T>(
        hard.scale *
        (hard.is_kept
             ? hard.inv_sum
             : __builtin_exp(static_cast<double>(term.log_sum) - hard.log_sum_exp) / kRaise));
    term.constant = smoothing_constant(hard.scale), term.shift = static_cast<T>(hard.shift);
    term.kept = extra_cache[0];
    return term;
  }

  void add_softmax(const T* s, int64_t j0, int64_t n, const HardLabel& hard, T* to_student) const {
    const HardTerm<T> term = hard_term(hard);
    const Vec<T> factor(term.factor), constant(term.constant);
    const auto add = [&](auto access, int64_t j, Vec<T> e) AFM_STEP {
      const Vec<T> grad = access.load(static_cast<const T*>(to_student) + j, constant);
      access.store(to_student + j, fma(e, factor, grad + constant));
    };
    if (hard.is_kept) {
      sweep<Vec<T>>(0, n, [&](auto access, int64_t j, int) AFM_STEP {
        add(access, j, access.load(term.kept + j0 + j, constant));
      });
    } else {
      sweep<Vec<T>>(0, n, [&](auto access, int64_t j, int) AFM_STEP {
        const Vec<T> above = access.load(s + j, no_class<T>()) - Vec<T>(term.shift);
        add(access, j, hard_exp(above - Vec<T>(term.log_sum)));
      });
    }
  }

  void subtract_label(const HardLabel& hard, int64_t j, int64_t n, T* to_student) const {
    if (hard.scale == 0 || hard.label < j || hard.label >= j + n) return;
    to_student[hard.label - j] -=
        static_cast<T>(hard.scale * (1 - params.cross_entropy.label_smoothing));
  }

  T smoothing_constant(double ce_scale) const {
    return static_cast<T>(-ce_scale * params.cross_entropy.label_smoothing /
                          static_cast<double>(params.classes));
  }

  // Where the divergence has no part in the loss.
  void write_cross_entropy_gradient(const HardLabel& hard) const {
    fill(grad_teacher, grad_teacher_tile, T(0));
    if (hard.scale == 0 || grad_student.data == nullptr)
      return fill(grad_student, grad_student_tile, T(0));
    Peak peak;
    if (label_is_certain(hard)) peak.at = hard.label;
    for (int64_t j = 0; j < params.classes; j += kTile) {
      const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
      T* to_student = grad_student.writable(j, grad_student_tile);
      for (int64_t i = 0; i < n; ++i) to_student[i] = 0;
      add_softmax(student.read(j, n, student_tile), j, n, hard, to_student);
      subtract_label(hard, j, n, to_student);
      peak.settle<T>(j, n, to_student);
      grad_student.write(j, n, to_student);
    }
    peak.close<T>(grad_student);
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

  // A row.

  T* stats_of(int64_t i) const { return static_cast<T*>(params.row_stats) + i * kRowStats; }
  bool wants_stats() const { return params.row_stats != nullptr && !params.stats_are_given; }

  void save(const RowSummary& row, const HardLabel& hard, T* stats) const {
    const bool has_peak = row.peak >= 0 && row.kind < RowKind::kGeneral;
    stats[kStatKind] = static_cast<T>(static_cast<int>(row.kind) +
                                      (has_peak ? (row.peak / kPeakGroup + 1) * kPeakKind : 0));
    stats[kStatStudentShift] = static_cast<T>(row.student_shift);
    stats[kStatTeacherShift] = static_cast<T>(row.teacher_shift);
    const double a = has_peak ? row.peak_a : row.a, mean = has_peak ? row.peak_mean : row.mean;
    stats[kStatStudent] = static_cast<T>(row.kind == RowKind::kNear ? a : row.student_sum);
    stats[kStatTeacherSum] = static_cast<T>(row.teacher_sum);
    stats[kStatCentre] = static_cast<T>(row.centre);
    stats[kStatMean] = static_cast<T>(mean / x_unit(row));
    const double student_mean = has_peak ? row.peak_student_mean : row.student_mean;
    stats[kStatLast] = static_cast<T>(jeffreys ? student_mean / x_unit(row) : hard.log_sum_exp);
  }

  void restore(const T* stats, RowSummary& row, HardLabel& hard) const {
    const int64_t kind = static_cast<int64_t>(stats[kStatKind]);
    row.kind = static_cast<RowKind>(kind % kPeakKind);
    row.student_shift = stats[kStatStudentShift], row.teacher_shift = stats[kStatTeacherShift];
    row.gap = coarse_gap(static_cast<T>(row.student_shift - row.teacher_shift));
    (row.kind == RowKind::kNear ? row.a : row.student_sum) = stats[kStatStudent];
    row.teacher_sum = stats[kStatTeacherSum];
    row.centre = stats[kStatCentre], row.mean = stats[kStatMean] * x_unit(row),
    row.student_mean = stats[kStatLast] * x_unit(row);
    hard.shift = row.student_shift, hard.log_sum_exp = stats[kStatLast];
    if (kind < kPeakKind) return;
    if (row.peak < 0) row.peak = peak_of_group(kind / kPeakKind - 1);
    row.peak_x = row.kind == RowKind::kNear ? x_at<RowKind::kNear>(row, row.peak)
                                            : x_at<RowKind::kFar>(row, row.peak);
    row.peak_a = row.a, row.peak_mean = row.mean, row.peak_student_mean = row.student_mean;
    leave_peak(row);
  }

  // The row's summary and value, where a loss is wanted or a backward cannot do with what was
  // saved.
  void measure(int64_t i, RowSummary& row, HardLabel& hard, bool cache) {
    double value = 0;
    if (params.divergence_weight != 0) {
      if (is_js())
        summarise_js(row, cache);
      else
        cache ? summarise<true>(row) : summarise<false>(row);
      row.divergence = row.divergence < 0 ? 0 : row.divergence;
      value = params.divergence_weight * row.divergence;
    } else {
      row.kind = RowKind::kUnlooked;
    }
    if (hard.is_present) value += params.cross_entropy.weight * cross_entropy(row, hard, cache);
    if (row.kind == RowKind::kUnlooked) row.student_shift = hard.shift;
    if (!__builtin_isfinite(value))
      row.kind = __builtin_isnan(value) ? RowKind::kNan : RowKind::kInfinite;
    if (params.row_values != nullptr) params.row_values[i] = value * weight_of(i) * params.scale;
    if (wants_stats()) save(row, hard, stats_of(i));
    if (params.as_backward && row.kind != RowKind::kGeneral) {
      T stats[kRowStats];
      save(row, hard, stats), restore(stats, row, hard);
    }
  }

  double weight_of(int64_t i) const {
    return params.row_weight == nullptr ? 1 : static_cast<const T*>(params.row_weight)[i];
  }

  // Keeps what lanes made of row i, unless they did not serve it. `value`: unweighted.
  bool take_short(int64_t i, double value) const {
    const double weight = weight_of(i);
    if (weight == 0 || __builtin_isnan(value)) return false;
    if (params.row_values != nullptr) params.row_values[i] = value * weight * params.scale;
    RowSummary again;  // a backward does as the forward did
    again.kind = RowKind::kGeneral;
    if (wants_stats()) save(again, HardLabel(), stats_of(i));
    return true;
  }

  // A NaN comes out as the one whose bfloat16 is a NaN too, whatever the caller's was.
  double gradient_scale(int64_t i) const {
    const double scale = weight_of(i) * params.scale * given_gradient(i);
    return __builtin_isnan(scale) ? kNotANumber : scale;
  }

  double given_gradient(int64_t i) const {
    return params.grad_loss == nullptr
               ? params.expected_grad_loss
               : static_cast<const T*>(params.grad_loss)[params.grad_loss_stride * i];
  }

  void run(int64_t i) {
    const bool wants_gradients = grad_student.data != nullptr || grad_teacher.data != nullptr;
    const double weight = weight_of(i);
    present = i;
    HardLabel hard;
    if (weight == 0) {
      RowSummary masked;
      masked.kind = RowKind::kMasked;
      if (params.row_values != nullptr) params.row_values[i] = 0;
      if (wants_stats()) save(masked, hard, stats_of(i));
      fill(grad_student, grad_student_tile, T(0));
      return fill(grad_teacher, grad_teacher_tile, T(0));
    }
    const CrossEntropyParams& ce = params.cross_entropy;
    if (ce.labels != nullptr && ce.weight != 0 && ce.labels[i] != ce.ignore_index)
      hard.is_present = true, hard.label = ce.labels[i];

    RowSummary row;
    bool cached = false;
    bool is_measured = !params.stats_are_given;
    if (!is_measured) restore(stats_of(i), row, hard);
    if (!is_measured && row.kind == RowKind::kGeneral) row = RowSummary(), is_measured = true;
    if (is_measured) {
      cached = wants_gradients;
      measure(i, row, hard, cached);
    }
    if (!wants_gradients) return;

    const bool has_divergence = params.divergence_weight != 0;
    if (row.kind == RowKind::kNan || row.kind == RowKind::kInfinite) {
      const T nan = static_cast<T>(kNotANumber);
      fill(grad_student, grad_student_tile, nan);
      return fill(grad_teacher, grad_teacher_tile, has_divergence ? nan : T(0));
    }
    double scale = gradient_scale(i);
    hard.scale = hard.is_present ? scale * ce.weight : 0;
    scale *= params.divergence_weight;
    if (!has_divergence)
      write_cross_entropy_gradient(hard);
    else if (is_js())
      write_js_gradients(row, scale);
    else if (row.kind == RowKind::kNear)
      cached ? write_gradients<RowKind::kNear, true>(row, scale, hard)
             : write_gradients<RowKind::kNear, false>(row, scale, hard);
    else if (row.kind == RowKind::kFar)
      cached ? write_gradients<RowKind::kFar, true>(row, scale, hard)
             : write_gradients<RowKind::kFar, false>(row, scale, hard);
    else
      write_gradients<RowKind::kGeneral, false>(row, scale, hard);
  }

  // The row's gradients in the place of its logits, which go to two rows of `kept` first: the loops
  // come back to logits whose gradients are written (peaks, labels, JS).
  void run_over_logits(int64_t i, T* kept) {
    const auto set_aside = [&](RowPointer& row, T* aside) {
      for (int64_t j = 0; j < params.classes; j += kTile) {
        const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
        const T* from = row.read(j, n, aside + j);
        if (from != aside + j) __builtin_memcpy(aside + j, from, sizeof(T) * n);
      }
      row = {reinterpret_cast<char*>(aside), kNative<T>, 1};
    };
    if (grad_student.data != nullptr) set_aside(student, kept);
    if (grad_teacher.data != nullptr) set_aside(teacher, kept + (params.classes + 15) / 16 * 16);
    run(i);
  }

  // The row's direction. Its gradients pass through two rows of `kept`, for their largest entry is
  // known last.
  void run_direction(int64_t i, T* kept) {
    const RowPointer to_student = grad_student, to_teacher = grad_teacher;
    T *const by_student = kept, *const by_teacher = kept + (params.classes + 15) / 16 * 16;
    const auto aside = [](T* row, const RowPointer& to) {
      return RowPointer{to.data == nullptr ? nullptr : reinterpret_cast<char*>(row), kNative<T>, 1};
    };
    grad_student = aside(by_student, to_student), grad_teacher = aside(by_teacher, to_teacher);
    run(i);
    grad_student = to_student, grad_teacher = to_teacher;
    T largest = 0;
    if (to_student.data) largest = largest_entry(by_student, params.classes);
    if (to_teacher.data) {
      const T other = largest_entry(by_teacher, params.classes);
      largest = other > largest ? other : largest;
    }
    const OrdinaryScale<T> ordinary(largest);
    double log_scale = ordinary.log_scale;
    if (ordinary.exists) {
      for (int64_t j = 0; j < params.classes; j += kTile) {
        const int64_t n = params.classes - j < kTile ? params.classes - j : kTile;
        const auto pass_on = [&](const RowPointer& to, const T* from, T* tile) {
          if (to.data == nullptr) return;
          T* out = to.writable(j, tile);
          scale_row(from + j, n, ordinary.factor, out);
          to.write(j, n, out);
        };
        pass_on(to_student, by_student, grad_student_tile);
        pass_on(to_teacher, by_teacher, grad_teacher_tile);
      }
    } else {
      log_scale = direction_job().run();
    }
    static_cast<T*>(params.log_scales)[i] = static_cast<T>(log_scale);
  }

  DirectionJob<T> direction_job() const {
    return {student,        teacher,
            grad_student,   grad_teacher,
            params.classes, params.temperature,
            direction_rows, (params.classes + 15) / 16 * 16};
  }
};

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
