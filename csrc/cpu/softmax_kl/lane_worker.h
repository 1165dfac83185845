// Short rows side by side, one in each lane of a vector. See Note [Rows across lanes].

#pragma once

#include "cpu/layout/lane_tiles.h"
#include "cpu/losses/short_rows.h"
#include "cpu/softmax_kl/row_worker.h"
#include "cpu/softmax_kl/short_js.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// What lanes do not serve (hard values, masked rows, a badly centred one)
// the worker takes from the tiles, and leaves its gradients there. Whether a row is run here
// depends on its length alone: any layout, and any batch, gives the same bits.
template <class T>
struct LaneWorker {
  using V = Vec<T>;
  static constexpr int kLanes = V::width;
  const SoftmaxKlParams& params;
  Worker<T>& worker;
  const int64_t classes = params.classes;
  const bool wants_student = params.grad_student.data != nullptr,
             wants_teacher = params.grad_teacher.data != nullptr;
  const CrossEntropyParams& ce = params.cross_entropy;
  const bool has_labels = ce.labels != nullptr && ce.weight != 0;
  const bool is_separate = has_labels && params.temperature != 1;
  const T inv_t = static_cast<T>(worker.inv_t);
  // One factor for all rows, or each its own.
  const bool is_uniform = params.row_weight == nullptr && params.grad_loss_stride == 0;
  const T uniform_scale = is_uniform ? static_cast<T>(worker.gradient_scale(0)) : T(0);

  static bool serves(const SoftmaxKlParams& params) {
    return params.classes <= kLaneClasses && params.divergence_weight != 0 && !params.overwrites;
  }

  V scale_of(int64_t i, int count) const {
    if (is_uniform) return V(uniform_scale);
    T each[kLanes];
    for (int r = 0; r < kLanes; ++r)
      each[r] = static_cast<T>(worker.gradient_scale(i + (r < count ? r : 0)));
    return V::load(each);
  }

  LaneSums<T> sum(const LaneTiles<T>& tiles) const {
    if (params.divergence == Divergence::kKl)
      return sum_kl_lanes<false>(tiles, classes, worker.exp, inv_t);
    if (params.divergence == Divergence::kJeffreys)
      return sum_kl_lanes<true>(tiles, classes, worker.exp, inv_t);
    LaneSums<T> sums = far_lanes<false>(tiles, classes, worker.exp, inv_t);
    js_lanes(tiles, classes, worker.plain_exp, inv_t, static_cast<T>(params.beta),
             static_cast<T>(params.gamma), sums);
    return sums;
  }

  // What the label's class has of the student's gradient: something comes off it, or it follows
  // from the other classes.
  struct LabelGradient {
    V off;
    typename V::Mask is_certain;
  };

  // Adds the cross-entropy to each row's value and scales.
  LabelGradient add_cross_entropy(const LaneTiles<T>& tiles, int64_t i, int count,
                                  const LaneSums<T>& sums, V scale, LaneScales<T>& by,
                                  V& value) const {
    const V sum = is_separate ? plain_lanes(tiles, classes, worker.hard_exp, sums.student_max)
                              : sums.student_sum;
    T label_logit[kLanes], is_present[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const int64_t label = ce.labels[i + (r < count ? r : 0)];
      const bool present = label != ce.ignore_index;
      is_present[r] = present ? T(1) : T(0);
      label_logit[r] = tiles.student[(present ? label : 0) * kLanes + r];
    }
    const T smoothing = static_cast<T>(ce.label_smoothing);
    V target = V(T(1) - smoothing) * (V::load(label_logit) - sums.student_max);
    if (smoothing != 0)
      target = fma(logit_lanes(tiles, classes, sums.student_max),
                   V(smoothing / static_cast<T>(classes)), target);
    const V present = V::load(is_present), weight = V(static_cast<T>(ce.weight)) * present;
    const V by_row = scale * weight;
    value = fma(weight, log(sum * V(T(1 / kRaise))) - target, value);
    (is_separate ? by.plain : by.softmax) = is_separate ? by_row / sum : by_row;
    by.constant = by_row * V(-smoothing / static_cast<T>(classes));
    const auto is_top = both(V::load(label_logit) == sums.student_max, V(T(0)) < present);
    return {by_row * V(T(1) - smoothing), both(is_top, certain_lanes(sum))};
  }

  template <LaneGradient kGradient>
  void write_gradients(const LaneTiles<T>& tiles, const LaneSums<T>& sums,
                       const LaneScales<T>& by) const {
    if (wants_student && wants_teacher)
      gradient_lanes<kGradient, true, true>(tiles, classes, sums, by);
    else if (wants_student)
      gradient_lanes<kGradient, true, false>(tiles, classes, sums, by);
    else if (wants_teacher)
      gradient_lanes<kGradient, false, true>(tiles, classes, sums, by);
  }

  // See Note [Certain rows]. Near rows of KL and Jeffreys are taken around the peak's own x, and
  // have q - p there in one factor.
  void settle(const LaneTiles<T>& tiles, const LaneSums<T>& sums, const LaneScales<T>& by,
              typename V::Mask label_is_certain) const {
    const V zero(T(0));
    auto student = label_is_certain, teacher = certain_lanes(sums.teacher_sum);
    if (params.divergence == Divergence::kJs) {
      student = certain_lanes(sums.student_sum);
    } else {
      const auto is_near = both(teacher, zero < sums.q_exp);
      const auto lost = both(is_near, abs(by.student * sums.apart_exp) < V(kSmallFactor<T>));
      if (!has_labels) student = lost;
      teacher = both(teacher, sums.q_exp == zero);
      if (params.divergence == Divergence::kJeffreys) teacher = lost;
    }
    if (wants_student && any(student))
      settle_lanes(tiles.student, sums.student_max, classes, student, tiles.student_part);
    if (wants_teacher && any(teacher))
      settle_lanes(tiles.teacher, sums.teacher_max, classes, teacher, tiles.gap);
  }

  // Rows [i, i + count), in tiles.
  void run_block(const LaneTiles<T>& tiles, int64_t i, int count) const {
    const bool is_js = params.divergence == Divergence::kJs;
    const LaneSums<T> sums = sum(tiles);
    const V scale = scale_of(i, count), weight(static_cast<T>(params.divergence_weight));
    const V by_side = scale * weight * V(inv_t), zero(T(0));
    LaneScales<T> by = {by_side, by_side, zero, zero, zero};
    if (is_js) {
      by.student = by_side * V(static_cast<T>(params.gamma));
      by.teacher = by_side * V(static_cast<T>(params.beta));
    }
    V value = weight * select(sums.divergence < zero, zero, sums.divergence);
    LabelGradient label = {zero, zero < zero};
    if (has_labels) label = add_cross_entropy(tiles, i, count, sums, scale, by, value);
    if (is_js)
      write_gradients<LaneGradient::kJs>(tiles, sums, by);
    else if (params.divergence == Divergence::kJeffreys)
      write_gradients<LaneGradient::kJeffreys>(tiles, sums, by);
    else if (is_separate)
      write_gradients<LaneGradient::kWithPlain>(tiles, sums, by);
    else
      write_gradients<LaneGradient::kKl>(tiles, sums, by);
    settle(tiles, sums, by, label.is_certain);
    T values[kLanes], off_label[kLanes];
    value.store(values), select(label.is_certain, zero, label.off).store(off_label);
    for (int r = 0; r < count; ++r) {
      if (!worker.take_short(i + r, values[r])) {
        run_alone(tiles, i + r, r);
      } else if (has_labels && wants_student && off_label[r] != 0) {
        tiles.student_part[ce.labels[i + r] * kLanes + r] -= off_label[r];
      }
    }
    if (params.log_scales != nullptr) turn_into_directions(tiles, i, count);
  }

  // The gradients in the tiles.
  void turn_into_directions(const LaneTiles<T>& tiles, int64_t i, int count) const {
    V largest(T(0));
    for (int64_t j = 0; j < classes; ++j) {
      if (wants_student) largest = max(abs(V::load(tiles.student_part + j * kLanes)), largest);
      if (wants_teacher) largest = max(abs(V::load(tiles.gap + j * kLanes)), largest);
    }
    T largest_of[kLanes], factors[kLanes];
    largest.store(largest_of);
    for (int r = 0; r < kLanes; ++r) {
      const OrdinaryScale<T> ordinary(largest_of[r]);
      factors[r] = ordinary.factor;
      if (r >= count) continue;
      double log_scale = ordinary.log_scale;
      if (!ordinary.exists) {
        place(tiles, r);
        log_scale = worker.direction_job().run();
      }
      static_cast<T*>(params.log_scales)[i + r] = static_cast<T>(log_scale);
    }
    const V factor = V::load(factors);
    const auto scale = [&](T* at) { (V::load(at) * factor).store(at); };
    for (int64_t j = 0; j < classes; ++j) {
      if (wants_student) scale(tiles.student_part + j * kLanes);
      if (wants_teacher) scale(tiles.gap + j * kLanes);
    }
  }

  // Row i, lane r of the tiles.
  void run_alone(const LaneTiles<T>& tiles, int64_t i, int r) const {
    place(tiles, r);
    worker.run(i);
  }

  // Lane r of the tiles is the worker's row.
  void place(const LaneTiles<T>& tiles, int r) const {
    worker.student = lane_of(tiles.student, r), worker.teacher = lane_of(tiles.teacher, r);
    worker.grad_student = lane_of<T>(tiles.student_part, r, wants_student);
    worker.grad_teacher = lane_of<T>(tiles.gap, r, wants_teacher);
  }

  void run(int64_t begin, int64_t end, T* scratch) const {
    const int64_t size = lane_blocks(classes) * kLanes * classes;
    const auto tile = [&](int k) { return scratch + k * size; };
    const LaneTiles<T> tiles = {tile(0), tile(1), tile(2), tile(3), tile(4), tile(5)};
    LaneSlot<T> slots[] = {
        {LaneRows<T>(params.student, classes), tile(0), false},
        {LaneRows<T>(params.teacher, classes), tile(1), false},
        {LaneRows<T>(params.grad_student, classes, params.stream), tile(2), true},
        {LaneRows<T>(params.grad_teacher, classes, params.stream), tile(4), true}};
    for_lane_blocks(params.shape, classes, slots, tile(6), begin, end,
                    [&](int64_t i, int count, int64_t at) {
                      run_block({tiles.student + at, tiles.teacher + at, tiles.student_part + at,
                                 tiles.teacher_exp + at, tiles.gap + at, tiles.extra + at},
                                i, count);
                    });
  }
};

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
