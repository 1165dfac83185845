// The loops over the classes of one row for KL and Jeffreys: sums, then gradients. See Note
// [Centred KL].
//
// Each loop keeps kUnroll vectors in flight, to cover the latency of the polynomials, and ends with
// one masked vector. Sums leave a tile in double precision, so that long rows do not lose digits.

#pragma once

#include "common/softmax_kl_math.h"
#include "cpu/losses/certain_rows.h"
#include "cpu/vec/sweep.h"
#include "cpu/vec/vec_math.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// Of x, in near rows. The polynomial is fitted a little beyond 1.
constexpr double kLargestNearSquare = kNearLimit * kNearLimit * 1.01;

AFM_INLINE double larger(double a, double b) { return a > b ? a : b; }

// Note [Sums without the peak]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
// Where the teacher is certain of a class, the peak, what matters is the other classes' share in
// the sums, and the peak's drowns it. But only in one lane of one tile: all other lanes' sums are
// good as they are. So a tile one of whose lanes has nearly all of Z_t keeps the others' sums
// apart, and the few classes of that lane are gone through once more, without the peak. From these
// sums follow, around the peak's own x, the divergence and the gradients at the peak, and nothing
// in them is a difference of large numbers. The loops stay as they are for rows of every kind.

// Sums under the teacher, over some of the classes of a row. See Note [Centred KL].
struct TeacherSums {
  double teacher = 0;    // Z_t
  double linear = 0;     // of e * x
  double excess = 0;     // near and general: of e * (exp(x) - 1 - x)
  double curvature = 0;  // near and general: of e * x * (exp(x) - 1)

  AFM_MEMBER void operator+=(const TeacherSums& more) {
    teacher += more.teacher, linear += more.linear;
    excess += more.excess, curvature += more.curvature;
  }
};

// The sums of a row, whichever loop took them.
struct RowSums : TeacherSums {
  double student = 0;            // Z_s; not in near rows
  double student_linear = 0;     // far and general: of exp((s - m_s) / T) * x
  bool in_range = true;          // near and far: no exponential left its range unnoticed
  double largest_square = 0;     // near: of x
  bool student_certain = false;  // one lane has nearly all of Z_s, as where one class has
  bool teacher_certain = false;
  bool one_sided = false;        // general: a class is -inf on one side only
  bool student_missing = false;  // general: ... on the student's side

  // See Note [Sums without the peak].
  TeacherSums others;      // of all classes but those that share the peak's lane
  int64_t tile = 0;        // the first class of the present tile; set by the caller
  int64_t peak_tile = -1;  // ... of the one with the peak; -1: no tile has one
  int peak_lane = 0;

  // The present tile has been added to the sums.
  template <class T>
  AFM_MEMBER void set_apart(const TeacherSums& before, const TeacherSums& of_tile,
                            const Accumulator<T>& teacher_lanes, const Accumulator<T>& linear_lanes,
                            const Accumulator<T>* excess_lanes,
                            const Accumulator<T>* curvature_lanes) {
    const T limit = static_cast<T>(kCertain * teacher);
    if (!teacher_lanes.any_above(limit)) {
      others += of_tile;
      return;
    }
    peak_tile = tile, peak_lane = teacher_lanes.lane_above(limit), teacher_certain = true;
    const auto rest = [&](const Accumulator<T>& lanes)
                          AFM_LAMBDA_INLINE { return lanes.sum_without(teacher_lanes, limit); };
    others = before;
    others +=
        {rest(teacher_lanes), rest(linear_lanes), excess_lanes == nullptr ? 0 : rest(*excess_lanes),
         curvature_lanes == nullptr ? 0 : rest(*curvature_lanes)};
  }
};

// Constants of a row, in the arithmetic type.
template <class T>
struct RowConstants {
  RowExp<T> exp;
  T inv_t;                               // 1 / temperature
  T student_shift, teacher_shift;        // m_s, m_t
  T student_gap, teacher_gap;            // k_s, k_t; k = k_s - k_t, see coarse_gap
  T centre;                              // c; in general rows less base / T
  T base;                                // general: what of s - t - k is taken off before it is
                                         // scaled. At the maxima nothing is left, at any T
  T student_excluded, teacher_excluded;  // general: logits up to here are as good as -inf
  T bridge;  // general: exp((m_s - m_t - k - base) / T - centre), so that e * exp(x) = bridge *
             // exp((s - m_s) / T). In gradients 0 where the row takes no difference of the two
  T lower;  // general: what exponentials are multiplied with, so that their products with x stay in
            // the range

  AFM_MEMBER Vec<T> x(Vec<T> s, Vec<T> t) const {
    return fma((s - Vec<T>(student_gap)) - (t - Vec<T>(teacher_gap)), Vec<T>(inv_t),
               Vec<T>(-centre));
  }
  AFM_MEMBER Vec<T> general_x(Vec<T> s, Vec<T> t) const {
    return fma(((s - Vec<T>(student_gap)) - (t - Vec<T>(teacher_gap))) - Vec<T>(base),
               Vec<T>(inv_t), Vec<T>(-centre));
  }
  // Of general rows.
  AFM_MEMBER Vec<T> student_exp(Vec<T> s) const {
    return exp(s - Vec<T>(student_shift)) * Vec<T>(lower);
  }
  AFM_MEMBER Vec<T> teacher_exp(Vec<T> t) const {
    return exp(t - Vec<T>(teacher_shift)) * Vec<T>(lower);
  }
  // Of near and far rows.
  AFM_MEMBER Vec<T> finite_student_exp(Vec<T> s) const {
    return exp.unbounded(s - Vec<T>(student_shift));
  }
  AFM_MEMBER Vec<T> finite_teacher_exp(Vec<T> t) const {
    return exp.unbounded(t - Vec<T>(teacher_shift));
  }
  // Far rows take c = (m_s - m_t - k) / T, and x in units of logits.
  AFM_MEMBER Vec<T> far_x(Vec<T> s, Vec<T> t) const {
    return (s - Vec<T>(student_shift)) - (t - Vec<T>(teacher_shift));
  }
};

// Beyond the end of a row: exp gives 0, and differences stay finite.
template <class T>
AFM_INLINE Vec<T> no_class() {
  return Vec<T>(Float<T>::lowest / 4);
}

// The first look at a row: enough of it to choose shifts, and the loop to run.
template <class T>
struct Probe {
  T student_max, teacher_max, gap_min, gap_max;
};

template <class T>
AFM_LOOP void probe_row(const T* s, const T* t, int64_t n, Probe<T>& probe) {
  using V = Vec<T>;
  const V lowest(Float<T>::lowest), highest(-Float<T>::lowest);
  V s_max = lowest, t_max = lowest, d_min = highest, d_max = lowest;
  int64_t j = 0;
  for (; j + V::width <= n; j += V::width) {
    const V a = V::load(s + j), b = V::load(t + j), d = a - b;
    s_max = max(a, s_max), t_max = max(b, t_max), d_min = min(d, d_min), d_max = max(d, d_max);
  }
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    const auto lanes = V::first(rest);
    const V a = V::load(s + j, rest, lowest), b = V::load(t + j, rest, lowest), d = a - b;
    s_max = max(a, s_max), t_max = max(b, t_max);
    d_min = min(select(lanes, d, highest), d_min), d_max = max(select(lanes, d, lowest), d_max);
  }
  probe.student_max = s_max.max(), probe.teacher_max = t_max.max();
  probe.gap_min = d_min.min(), probe.gap_max = d_max.max();
}

// Note [Lines ahead]
// ~~~~~~~~~~~~~~~~~~
// A core waits for a dozen or so lines at a time, and what fetches by itself stops at every page.
// So each loop asks for lines that it, or a later one, will want, and spreads the traffic of a row
// over all the time that the row takes:
//
// * A row of at most a tile: the sums leave memory idle, and ask for the lines that the gradients
//   will be stored to. (A store to a line that is far away waits for the line to come.) At 512 x
//   1000 the kernel then takes two thirds of the time, at most 1.5 times a copy.
// * A longer row would have lost those lines again. Its sums ask for the logits that they will
//   come to: soon where nothing else moves; later where they also store exponentials.
// * Where gradients go past the caches it asks for the next row instead. Reads and writes then go
//   side by side, as in a copy, where before the sums read and the gradients wrote: operators that
//   keep the exponentials take a quarter less for it at 96 x 21841 and 256 x 32000, a backward
//   that takes them again a quarter to a third.
struct Lines {
  const char *first, *second;  // of class 0 of what the loop runs over; memory at hand where there
                               // is nothing to ask for
  int64_t class_bytes;

  AFM_MEMBER void request_to_write(int64_t j) const {
    __builtin_prefetch(first + j * class_bytes, 1);
    __builtin_prefetch(second + j * class_bytes, 1);
  }
  // kNear: into the first-level cache, else into the second.
  template <bool kNear>
  AFM_MEMBER void request_to_read(int64_t j) const {
    __builtin_prefetch(first + j * class_bytes, 0, kNear ? 3 : 2);
    __builtin_prefetch(second + j * class_bytes, 0, kNear ? 3 : 2);
  }
};

// How far ahead of themselves the sums of long rows ask for logits, in bytes, with exponentials to
// store and without.
constexpr int64_t kAheadOfStores = 2048, kAheadOfLoads = 512;

// Sums of a row that is_long ask for its own logits, others for the lines of its gradients.
template <bool kCache, class Access>
AFM_INLINE void request_lines(const Access&, const Lines& lines, int64_t j) {
  if constexpr (Access::kAhead)
    lines.template request_to_read<true>(j);
  else if constexpr (kCache)
    lines.request_to_write(j);
}

// Sums over classes [0, n) of a tile. Loops that store take their constants into a variable of
// their own: the compiler would read them again after every store, which might have changed them.
// (Passed by value they would be copied in 64 bytes at a time from where they were just written in
// pieces, and a load that spans several stores waits until all of them have reached the cache.)
//
// sum_far and sum_near are done with a row at the first tile that shows that they do not serve it.

// All finite. `linear` and `student_linear` come in units of logits: see RowConstants::far_x.
// Anything that is not finite turns `linear` into NaN or inf. kBounded: for rows that turned out
// not to be in_range, see Note [Exponentials]; what is too large then shows in the sums.
template <bool kCache, bool kJeffreys, bool kBounded, class In, class T>
AFM_LOOP void sum_far(const In* s, const In* t, int64_t n, const RowConstants<T>& constants,
                      const Lines& lines_ahead, bool is_long, T* student_cache, T* teacher_cache,
                      RowSums& sums) {
  using V = Vec<T>;
  const RowConstants<T> row = constants;
  const Lines lines = lines_ahead;
  if (!sums.in_range || !__builtin_isfinite(sums.linear)) return;
  const V student_shift(row.student_shift), teacher_shift(row.teacher_shift);
  Accumulator<T> student, teacher, linear, student_linear, bits;
  const auto step = [&](auto access, int64_t j, int u) AFM_STEP {
    const V a = access.load(s + j, student_shift), b = access.load(t + j, teacher_shift);
    request_lines<kCache>(access, lines, j);
    const V v = a - student_shift, w = b - teacher_shift, x = v - w;
    const V e_s = access.or_zero(row.exp.template checked<kBounded>(v, bits.lanes[u])),
            e_t = access.or_zero(row.exp.template checked<kBounded>(w, bits.lanes[u]));
    student.add(u, e_s), teacher.add(u, e_t), linear.add_product(u, e_t, x);
    if constexpr (kJeffreys) student_linear.add_product(u, e_s, x);
    if constexpr (kCache)
      access.store(student_cache + j, e_s), access.store(teacher_cache + j, e_t);
  };
  is_long ? sweep<V, Ahead>(0, n, step) : sweep<V>(0, n, step);
  const TeacherSums before = sums, tile = {teacher.sum(), linear.sum()};
  sums.student += student.sum(), sums += tile;
  sums.student_certain |= student.any_above(kCertain * sums.student);
  sums.set_apart<T>(before, tile, teacher, linear, nullptr, nullptr);
  if constexpr (kJeffreys) sums.student_linear += student_linear.sum();
  if constexpr (!kBounded) sums.in_range = row.exp.in_range(bits.lanes);
}

// |x| <= 1 everywhere, which `largest_square` proves: one exponential a class.
template <bool kCache, bool kJeffreys, bool kBounded, class In, class T>
AFM_LOOP void sum_near(const In* s, const In* t, int64_t n, const RowConstants<T>& constants,
                       const Lines& lines_ahead, bool is_long, T* student_cache, T* teacher_cache,
                       RowSums& sums) {
  using V = Vec<T>;
  const RowConstants<T> row = constants;
  const Lines lines = lines_ahead;
  if (!sums.in_range || !(sums.largest_square <= kLargestNearSquare)) return;
  const V teacher_shift(row.teacher_shift);
  Accumulator<T> teacher, linear, excess, curvature, largest_square, bits;
  const auto step = [&](auto access, int64_t j, int u) AFM_STEP {
    const V a = access.load(s + j, teacher_shift), b = access.load(t + j, teacher_shift);
    request_lines<kCache>(access, lines, j);
    const V e_t =
        access.or_zero(row.exp.template checked<kBounded>(b - teacher_shift, bits.lanes[u]));
    const V x = access.or_zero(row.x(a, b)), square = x * x;
    largest_square.take_max(u, square);
    const V above = square * polynomial(Float<T>::excess, x);
    teacher.add(u, e_t), linear.add_product(u, e_t, x), excess.add_product(u, e_t, above);
    if constexpr (kJeffreys) curvature.add_product(u, e_t, x * (x + above));
    if constexpr (kCache)
      access.store(student_cache + j, x + above), access.store(teacher_cache + j, e_t);
  };
  is_long ? sweep<V, Ahead>(0, n, step) : sweep<V>(0, n, step);
  const TeacherSums before = sums, tile = {teacher.sum(), linear.sum(), excess.sum(),
                                           kJeffreys ? curvature.sum() : 0};
  sums += tile;
  sums.set_apart(before, tile, teacher, linear, &excess, kJeffreys ? &curvature : nullptr);
  if constexpr (!kBounded) sums.in_range = row.exp.in_range(bits.lanes);
  sums.largest_square = larger(sums.largest_square, largest_square.largest());
}

// The exact maximum of one side; `broken` where it holds NaN or +inf, and is no distribution.
template <class T>
AFM_LOOP void classify(const T* s, int64_t n, double& largest, bool& broken) {
  using V = Vec<T>;
  Accumulator<T> top(-Float<T>::infinity), spoilt;
  sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    const V a = access.load(s + j, V(-Float<T>::infinity));
    top.take_max(u, a);
    spoilt.add(u, select(a < V(Float<T>::infinity), V(T(0)), V(T(1))));
  });
  largest = larger(largest, top.largest());
  broken = broken || spoilt.sum() > 0;
}

// Any logits but NaN and +inf, with exact maxima as shifts.
template <class T>
AFM_LOOP void sum_general(const T* s, const T* t, int64_t n, const RowConstants<T>& row,
                          RowSums& sums) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1)), excluded(-Float<T>::infinity), bridge(row.bridge);
  const V student_excluded(row.student_excluded), teacher_excluded(row.teacher_excluded);
  Accumulator<T> student, teacher, linear, excess, curvature, student_linear, one_sided,
      student_missing;
  sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    const V a = access.load(s + j, excluded), b = access.load(t + j, excluded);
    const auto in_s = student_excluded < a, in_t = teacher_excluded < b, in_both = both(in_s, in_t);
    one_sided.add(u, select(in_both, zero, select(in_s, one, select(in_t, one, zero))));
    student_missing.add(u, select(in_s, zero, select(in_t, one, zero)));
    const V e_s = row.student_exp(a), e_t = row.teacher_exp(b),
            x = select(in_both, row.general_x(a, b), zero);
    const auto is_near = both(in_both, abs(x) <= V(T(kNearLimit)));
    const V y = x + excess_of_exp<T>(x), moved = bridge * e_s - e_t;
    const V above = select(is_near, e_t * excess_of_exp<T>(x), moved - e_t * x);
    student.add(u, e_s), teacher.add(u, e_t), linear.add_product(u, e_t, x), excess.add(u, above);
    curvature.add_product(u, x, select(is_near, e_t * y, moved)),
        student_linear.add_product(u, e_s, x);
  });
  const TeacherSums before = sums,
                    tile = {teacher.sum(), linear.sum(), excess.sum(), curvature.sum()};
  sums.student += student.sum(), sums += tile;
  sums.student_certain |= student.any_above(kCertain * sums.student);
  sums.set_apart(before, tile, teacher, linear, &excess, &curvature);
  sums.student_linear += student_linear.sum();
  sums.one_sided = sums.one_sided || one_sided.sum() > 0;
  sums.student_missing = sums.student_missing || student_missing.sum() > 0;
}

// Sum of exp((s - m_s) / T) * (x - mean), for a mean as rounded as the gradients take it.
template <class T>
AFM_LOOP double sum_student_rest(const T* s, const T* t, int64_t n, const RowConstants<T>& row,
                                 T mean) {
  using V = Vec<T>;
  const V excluded(-Float<T>::infinity), centre(mean);
  const V student_excluded(row.student_excluded), teacher_excluded(row.teacher_excluded);
  Accumulator<T> rest;
  sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    const V a = access.load(s + j, excluded), b = access.load(t + j, excluded);
    const auto in_both = both(student_excluded < a, teacher_excluded < b);
    rest.add_product(u, row.student_exp(a), select(in_both, row.general_x(a, b), centre) - centre);
  });
  return rest.sum();
}

// Gradients of classes [0, n) of a tile.

// What multiplies what in the gradients, everything of the row folded in (weight, scale, 1/T,
// normalisers), but for the means: where one class has nearly all of p, x less the mean is next to
// nothing, and its digits are only kept if it is taken before any factor.
//
//   e = exp((t - m_t) / T);  x as the loops take it
//   f = exp((s - m_s) / T), in near rows and in general ones of a small KL e * (exp(x) - 1): where
//   one class has nearly all of both sides, q - p is next to nothing there
//   g = exp((s - m_s) / T), or in units of e what is as much, e * exp(x)
//
//   KL        grad_s  = f * student_f + e * student_e + student_1
//             grad_t  = e * (x - mean) * teacher_x: e first, for 0 has to stay 0 for any finite x
//   Jeffreys  grad_s += g * (x - student_mean) * student_fx
//             grad_t += e * teacher_e + f * teacher_f
template <class T>
struct GradientFactors {
  T student_f = 0, student_e = 0, student_1 = 0, student_fx = 0;
  T teacher_x = 0, teacher_e = 0, teacher_f = 0;
  T mean = 0, student_mean = 0;
  T student_rest = 0;  // general: what student_mean is off by
};

// The cross-entropy's softmax, where it is another one than the divergence's: what comes to the
// student's gradient besides is factor * exp(s - shift - log_sum) + constant.
template <class T>
struct HardTerm {
  const RowExp<T>* exp;
  T factor, constant, shift, log_sum;
  const T* kept;  // where exponentials are cached, exp(s - shift): log_sum is in the factor then
};

// `next`: where stores are streamed, the lines of the row to come.
template <RowKind kKind, bool kCached, bool kStudent, bool kTeacher, bool kJeffreys, bool kHard,
          class In, class T>
AFM_LOOP void gradient(const In* s, const In* t, int64_t n, const RowConstants<T>& constants,
                       const GradientFactors<T>& by, const T* student_cache, const T* teacher_cache,
                       In* grad_student, In* grad_teacher, const Lines* next,
                       const HardTerm<T>* hard_term) {
  using V = Vec<T>;
  const RowConstants<T> row = constants;
  HardTerm<T> hard;
  if constexpr (kHard) hard = *hard_term;
  const RowExp<T> hard_exp = kHard ? *hard.exp : row.exp;
  const bool stream = next != nullptr;
  Lines lines;
  if (stream) lines = *next;
  constexpr bool kNear = kKind == RowKind::kNear, kGeneral = kKind == RowKind::kGeneral;
  constexpr bool kNeedsF = kStudent || kJeffreys,
                 kNeedsX = kTeacher || kJeffreys || kGeneral || (kNear && !kCached);
  const V student_f(by.student_f), student_e(by.student_e), student_1(by.student_1),
      student_fx(by.student_fx);
  const V teacher_x(by.teacher_x), teacher_e(by.teacher_e), teacher_f(by.teacher_f);
  const V mean(by.mean), student_mean(by.student_mean), student_rest(by.student_rest);
  Output<In, T> by_student{grad_student, V()}, by_teacher{grad_teacher, V()};
  sweep_out<V>(kStudent ? grad_student : grad_teacher, n, stream,
               [&](auto access, int64_t j, int) AFM_STEP {
                 V a, b, x, e, f, g;
                 typename V::Mask in_both;
                 if constexpr (decltype(access)::kStreams) lines.template request_to_read<false>(j);
                 if constexpr (!kCached || kNeedsX) {
                   a = access.load(s + j, no_class<T>()), b = access.load(t + j, no_class<T>());
                 }
                 if constexpr (kNeedsX) {
                   x = kNear ? row.x(a, b) : kGeneral ? row.general_x(a, b) : row.far_x(a, b);
                   if constexpr (kGeneral) {
                     in_both = both(V(row.student_excluded) < a, V(row.teacher_excluded) < b);
                     x = select(in_both, x, V(T(0)));
                   }
                 }
                 if constexpr (kCached) {
                   e = access.load(teacher_cache + j, V(T(0)));
                   if constexpr (kNeedsF) f = access.load(student_cache + j, V(T(0)));
                 } else {
                   e = kGeneral ? row.teacher_exp(b) : row.finite_teacher_exp(b);
                   if constexpr (kNeedsF)
                     f = kNear      ? x + excess_of_exp<T>(x)
                         : kGeneral ? row.student_exp(a)
                                    : row.finite_student_exp(a);
                 }
                 if constexpr (kNear && kNeedsF) f = e * f;
                 if constexpr (kJeffreys) g = kNear ? e + f : f;
                 if constexpr (kGeneral && kNeedsF) {
                   if (row.bridge != 0) {
                     const auto is_near = both(in_both, abs(x) <= V(T(kNearLimit)));
                     g = V(row.bridge) * f;
                     f = select(is_near, e * (x + excess_of_exp<T>(x)), g - e);
                   }
                 }
                 if constexpr (kStudent) {
                   V grad = fma(f, student_f, fma(e, student_e, student_1));
                   if constexpr (kJeffreys) {
                     V off = x - student_mean;
                     if constexpr (kGeneral) off = off - student_rest;
                     grad = fma(g * off, student_fx, grad);
                   }
                   if constexpr (kHard) {
                     const V q = kCached ? access.load(hard.kept + j, V(T(0)))
                                         : hard_exp((a - V(hard.shift)) - V(hard.log_sum));
                     grad = fma(q, V(hard.factor), grad + V(hard.constant));
                   }
                   by_student.store(access, j, grad);
                 }
                 if constexpr (kTeacher) {
                   V grad = e * (x - mean) * teacher_x;
                   if constexpr (kJeffreys) grad = fma(f, teacher_f, fma(e, teacher_e, grad));
                   by_teacher.store(access, j, grad);
                 }
               });
}

// What is made already past the caches, asking for the lines of the next row.
template <class In>
AFM_LOOP void stream_out(const In* from, int64_t n, In* to, const Lines& next) {
  constexpr int64_t kLine = 64, kStep = kLine / sizeof(In);
  int64_t j = 0;
  const uintptr_t at = reinterpret_cast<uintptr_t>(to);
  if (at % sizeof(In) != 0) {  // no line begins with an element
    memcpy(to, from, static_cast<size_t>(n) * sizeof(In));
    return;
  }
  const int64_t past = static_cast<int64_t>(at % kLine / sizeof(In));
  for (; j < n && (past + j) % kStep != 0; ++j) to[j] = from[j];
  for (; j + kStep <= n; j += kStep) {
    next.request_to_read<false>(j);
    stream_lines(to + j, from + j, kLine);
  }
  for (; j < n; ++j) to[j] = from[j];
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
