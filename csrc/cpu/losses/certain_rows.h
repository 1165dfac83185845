// Rows that are certain of a class: finding it, and its gradient. For kernel units.
//
// Note [Certain rows]
// ~~~~~~~~~~~~~~~~~~~
// Where a side has nearly all of its mass on one class, its gradient is next to nothing: every
// other class has a tiny probability, and at the peak two numbers of its size cancel, x and its
// mean, or q and p. Unless both are next to nothing themselves, as they are around the peak's own
// x, what rounding leaves there is larger than the whole gradient. The other classes keep their
// digits; and the gradients of a row sum to 0. So the peak's is minus the sum of the others. KL and
// Jeffreys have that from their sums, at no cost to the gradients: Note [Sums without the peak].

#pragma once

#include "cpu/layout/row_tiles.h"
#include "cpu/vec/sweep.h"
#include "cpu/vec/vec_math.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// A side with a larger probability is certain. Below, the rounding at the peak is 4e-6 of the
// gradient.
constexpr double kCertain = 0.98;

// A factor that is smaller may have lost digits to the end of the range.
template <class T>
constexpr T kSmallFactor = static_cast<T>(__builtin_ldexp(1.0, 25 - Float<T>::bias));

// The first of n classes whose number is no less than `limit`; -1 where none is.
template <class T>
AFM_LOOP int64_t first_from(const T* numbers, int64_t n, T limit) {
  using V = Vec<T>;
  const V bound(limit);
  const auto lane = [&](V x) {
    T lanes[V::width];
    x.store(lanes);
    int at = 0;
    while (!(lanes[at] >= limit)) ++at;
    return at;
  };
  int64_t j = 0;
  for (; j + V::width <= n; j += V::width) {
    const V x = V::load(numbers + j);
    if (any(bound <= x)) return j + lane(x);
  }
  if (j == n) return -1;
  const V x = V::load(numbers + j, static_cast<int>(n - j), V(-Float<T>::infinity));
  return any(bound <= x) ? j + lane(x) : -1;
}

// The first of those whose number is the largest; all are finite.
template <class T>
AFM_LOOP int64_t class_of_largest(const T* numbers, int64_t n) {
  using V = Vec<T>;
  Accumulator<T> top(-Float<T>::infinity);
  sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    top.take_max(u, access.load(numbers + j, V(-Float<T>::infinity)));
  });
  const T largest = top.largest();
  const V all(largest);
  int64_t j = 0;
  while (j + V::width <= n && !any(V::load(numbers + j) == all)) j += V::width;
  while (j < n && numbers[j] != largest) ++j;
  return j;
}

template <class T, class In>
AFM_LOOP double sum_of(const In* numbers, int64_t n) {
  Accumulator<T> sum;
  sweep<Vec<T>>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    sum.add(u, access.load(numbers + j, Vec<T>(T(0))));
  });
  return sum.sum();
}

// A class whose gradient is minus the sum of the others; -1: there is none such.
struct Peak {
  int64_t at = -1;
  double others = 0;

  // Classes [j, j + n) are complete, but for the peak.
  template <class T, class In>
  AFM_MEMBER void settle(int64_t j, int64_t n, In* grads) {
    if (at < 0) return;
    if (j <= at && at < j + n) grads[at - j] = In();
    others += sum_of<T>(grads, n);
  }

  // All of them are.
  template <class T>
  AFM_MEMBER void close(const RowPointer& grad) const {
    if (at >= 0 && grad.data != nullptr) grad.put(at, static_cast<T>(0 - others));
  }
};

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
