// A loop over adjacent elements, a few vectors at a time, and sums over them. For kernel units.

#pragma once

#include "cpu/vec/vec.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// Vectors in flight, to cover the latency of the arithmetic.
constexpr int kUnroll = 2;

// Where a vector stands among the kUnroll that a round of a loop takes.
enum Place { kAlone, kFirst, kSecond };

// How a loop touches memory: a whole vector; one in a loop that asks for lines ahead of itself; one
// whose lines are not worth keeping in the caches; or the first n lanes of one.
struct Whole {
  static constexpr Place kPlace = kAlone;
  static constexpr bool kAhead = false, kStreams = false;
  AFM_MEMBER Vec<float> load(const BFloat16* p, Vec<float>) const { return load_bfloat16(p); }
  AFM_MEMBER void store(BFloat16* p, Vec<float> x) const { store_bfloat16(x, p); }
  AFM_MEMBER void store(BFloat16* p, Vec<float> x, Vec<float> y) const { store_bfloat16(x, y, p); }
  AFM_MEMBER Vec<float> load(const Float16* p, Vec<float>) const { return load_float16(p); }
  AFM_MEMBER void store(Float16* p, Vec<float> x) const { store_float16(x, p); }
  template <class T>
  AFM_MEMBER Vec<T> load(const T* p, Vec<T>) const {
    return Vec<T>::load(p);
  }
  template <class T>
  AFM_MEMBER void store(T* p, Vec<T> x) const {
    x.store(p);
  }
  template <class T>
  AFM_MEMBER Vec<T> or_zero(Vec<T> x) const {
    return x;
  }
};

struct Ahead : Whole {
  static constexpr bool kAhead = true;
};

struct Streamed : Whole {
  static constexpr bool kStreams = true;
  AFM_MEMBER void store(BFloat16* p, Vec<float> x) const { stream_bfloat16(x, p); }
  AFM_MEMBER void store(BFloat16* p, Vec<float> x, Vec<float> y) const { stream_bfloat16(x, y, p); }
  AFM_MEMBER void store(Float16* p, Vec<float> x) const { store_float16(x, p); }  // through them
  template <class T>
  AFM_MEMBER void store(T* p, Vec<T> x) const {
    x.stream(p);
  }
};

template <class Access>
struct PartOf {
  static constexpr Place kPlace = kAlone;
  static constexpr bool kAhead = Access::kAhead, kStreams = Access::kStreams;
  int n;
  AFM_MEMBER Vec<float> load(const BFloat16* p, Vec<float> fill) const {
    return load_bfloat16(p, n, fill);
  }
  AFM_MEMBER void store(BFloat16* p, Vec<float> x) const { store_bfloat16(x, p, n); }
  AFM_MEMBER Vec<float> load(const Float16* p, Vec<float> fill) const {
    return load_float16(p, n, fill);
  }
  AFM_MEMBER void store(Float16* p, Vec<float> x) const { store_float16(x, p, n); }
  template <class T>
  AFM_MEMBER Vec<T> load(const T* p, Vec<T> fill) const {
    return Vec<T>::load(p, n, fill);
  }
  template <class T>
  AFM_MEMBER void store(T* p, Vec<T> x) const {
    x.store(p, n);
  }
  template <class T>
  AFM_MEMBER Vec<T> or_zero(Vec<T> x) const {
    return select(Vec<T>::first(n), x, Vec<T>(T(0)));
  }
};

template <class Access, Place place>
struct Placed : Access {
  static constexpr Place kPlace = place;
};

// Where a loop stores its results: vectors of 16-bit numbers two at a time, which is cheaper.
template <class Out, class T>
struct Output {
  Out* to;
  Vec<T> held;

  template <class Access>
  AFM_MEMBER void store(const Access& access, int64_t j, Vec<T> x) {
    if constexpr (sizeof(Out) == sizeof(T) || Access::kPlace == kAlone)
      access.store(to + j, x);
    else if constexpr (Access::kPlace == kFirst)
      held = x;
    else
      access.store(to + j - Vec<T>::width, held, x);
  }
};

// The loops stay functions of their own: a row's worth of work pays for the call, and their copies
// add up.
#define AFM_LOOP static __attribute__((noinline))
#define AFM_STEP AFM_LAMBDA_INLINE

// Calls step(access, first element, accumulator) over elements [j, n).
template <class V, class Access = Whole, class F>
AFM_INLINE void sweep(int64_t j, int64_t n, const F& step) {
  for (; j + kUnroll * V::width <= n; j += kUnroll * V::width) {
    step(Placed<Access, kFirst>(), j, 0);
    step(Placed<Access, kSecond>(), j + V::width, 1);
  }
  for (; j + V::width <= n; j += V::width) step(Access{}, j, 0);
  if (j < n) step(PartOf<Access>{static_cast<int>(n - j)}, j, 0);
}

// As sweep over [0, n), for loops that store to `out`; where stores are streamed, whole vectors of
// it are aligned. (At an address that is no multiple of the element's size none ever is.)
template <class V, class Out, class F>
AFM_INLINE void sweep_out(const Out* out, int64_t n, bool stream, const F& step) {
  constexpr int64_t kBytes = sizeof(V);
  const int64_t past = reinterpret_cast<uintptr_t>(out) % kBytes;
  if (!stream || past % static_cast<int64_t>(sizeof(Out)) != 0) return sweep<V>(0, n, step);
  int64_t head = past == 0 ? 0 : (kBytes - past) / static_cast<int64_t>(sizeof(Out));
  head = head < n ? head : n;
  sweep<V>(0, head, step);
  sweep<V, Streamed>(head, n, step);
}

// One accumulator for each vector in flight.
template <class T>
struct Accumulator {
  static constexpr int kLanes = kUnroll * Vec<T>::width;
  Vec<T> lanes[kUnroll];
  explicit AFM_MEMBER Accumulator(T start = T(0)) {
    for (int u = 0; u < kUnroll; ++u) lanes[u] = Vec<T>(start);
  }
  AFM_MEMBER void add(int u, Vec<T> x) { lanes[u] = lanes[u] + x; }
  AFM_MEMBER void add_product(int u, Vec<T> x, Vec<T> y) { lanes[u] = fma(x, y, lanes[u]); }
  AFM_MEMBER void take_max(int u, Vec<T> x) { lanes[u] = max(x, lanes[u]); }
  AFM_MEMBER double sum() const {
    Vec<T> s = lanes[0];
    for (int u = 1; u < kUnroll; ++u) s = s + lanes[u];
    return static_cast<double>(s.sum());
  }
  AFM_MEMBER bool any_above(double limit) const {
    Vec<T> s = lanes[0];
    for (int u = 1; u < kUnroll; ++u) s = max(s, lanes[u]);
    return any(Vec<T>(static_cast<T>(limit)) < s);
  }
  // The first lane above a limit, which one is, counted through all vectors.
  AFM_MEMBER int lane_above(T limit) const {
    T sums[kLanes];
    for (int u = 0; u < kUnroll; ++u) lanes[u].store(sums + u * Vec<T>::width);
    int at = 0;
    while (!(sums[at] > limit)) ++at;
    return at;
  }
  // Without the lanes that `other` has above a limit.
  AFM_MEMBER double sum_without(const Accumulator& other, T limit) const {
    Accumulator rest;
    for (int u = 0; u < kUnroll; ++u)
      rest.lanes[u] = select(Vec<T>(limit) < other.lanes[u], Vec<T>(T(0)), lanes[u]);
    return rest.sum();
  }
  AFM_MEMBER T largest() const {
    Vec<T> s = lanes[0];
    for (int u = 1; u < kUnroll; ++u) s = max(s, lanes[u]);
    return s.max();
  }
};

// Element number i of those in [0, n) that a sweep adds to one lane; n or more: there are no more.
template <class T>
AFM_INLINE int64_t element_of_lane(int lane, int64_t i, int64_t n) {
  constexpr int64_t kRound = Accumulator<T>::kLanes, kWidth = Vec<T>::width;
  const int64_t rounds = n / kRound;
  if (i < rounds) return lane + i * kRound;
  return lane < kWidth ? rounds * kRound + (i - rounds) * kWidth + lane : n;
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
