#include "cpu/images/apgd_step_kernel.h"

#include <cmath>

#include "cpu/layout/blocks.h"

namespace afm::cpu::AFM_CAPABILITY {

namespace {

// Calls f(at, grad, x, old, n) with blocks of compute type for all of [begin, end); `old` is
// written back where `writes`. See Note [Elements as they lie].
template <class C, class F>
AFM_INLINE void for_each_block(const ApgdParams& p, const ApgdImage& image, int64_t begin,
                               int64_t end, bool writes, const F& f) {
  alignas(64) C scratch[4][kBlock];
  const auto pointer = [](const void* data, DType dtype) AFM_LAMBDA_INLINE {
    return RowPointer{static_cast<char*>(const_cast<void*>(data)), dtype, 1};
  };
  const RowPointer at = pointer(image.at, p.dtype), grad = pointer(image.grad, p.grad_dtype);
  const RowPointer x = pointer(image.x, p.dtype), old = pointer(image.old, p.dtype);
  for (int64_t j = begin; j < end; j += kBlock) {
    const int64_t n = end - j < kBlock ? end - j : kBlock;
    old.read(j, n, scratch[3]);
    C* to = old.writable(j, scratch[3]);
    f(at.read(j, n, scratch[0]), grad.read(j, n, scratch[1]), x.read(j, n, scratch[2]), to, n);
    if (writes) old.write(j, n, to);
  }
}

// A NaN in `value` stays.
template <class V>
AFM_INLINE V clamp(V value, V low, V high) {
  return min(high, max(low, value));
}

template <class C>
struct LinfStep {
  C step, eps, clip_min, clip_max, fresh, carried;
};

template <class C>
AFM_LOOP void linf_run(const C* at, const C* grad, const C* x, C* old, int64_t n,
                       const LinfStep<C> by) {
  using V = Vec<C>;
  const V step(by.step), back(-by.step), eps(by.eps), zero(C(0));
  const V clip_min(by.clip_min), clip_max(by.clip_max), fresh(by.fresh), carried(by.carried);
  sweep<V>(0, n, [&](auto access, int64_t j, int) AFM_STEP {
    const V g = access.load(grad + j, zero), pixel = access.load(x + j, zero);
    const V here = access.load(at + j, zero), came_from = access.load(old + j, zero);
    const V low = pixel - eps, high = pixel + eps;
    const auto project = [&](V z) AFM_LAMBDA_INLINE {
      return clamp(clamp(z, low, high), clip_min, clip_max);
    };
    // A gradient of 0 or NaN moves nothing.
    const V move = select(zero < g, step, select(g < zero, back, zero));
    const V mixed = fma(project(here + move) - here, fresh, here);
    const V next = project(fma(here - came_from, carried, mixed));
    access.store(old + j, select(pixel == pixel, next, pixel));
  });
}

template <class C>
AFM_INLINE void linf(const ApgdParams& p, const ApgdImage& image, int64_t begin, int64_t end) {
  const auto in_c = [](double value) { return static_cast<C>(value); };
  const LinfStep<C> by = {in_c(image.step_size), in_c(p.eps),         in_c(p.clip_min),
                          in_c(p.clip_max),      in_c(1 - p.carried), in_c(p.carried)};
  for_each_block<C>(p, image, begin, end, true,
                    [&](const C* at, const C* grad, const C* x, C* old, int64_t n)
                        AFM_LAMBDA_INLINE { linf_run(at, grad, x, old, n, by); });
}

// With d = at - x and g = grad * grad_scale.
struct Sums {
  double gg, dg, dd;
};

template <class C>
AFM_LOOP void add_sums(const C* at, const C* grad, const C* x, int64_t n, C grad_scale,
                       Sums& sums) {
  using V = Vec<C>;
  const V zero(C(0)), scale(grad_scale);
  Accumulator<C> gg, dg, dd;  // of a block's few dozen numbers a lane
  sweep<V>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    const V g = access.load(grad + j, zero) * scale;
    const V d = access.load(at + j, zero) - access.load(x + j, zero);
    gg.add_product(u, g, g), dg.add_product(u, d, g), dd.add_product(u, d, d);
  });
  sums.gg += gg.sum(), sums.dg += dg.sum(), sums.dd += dd.sum();
}

template <class C>
AFM_INLINE Sums sums_of(const ApgdParams& p, const ApgdImage& image, int64_t count,
                        double grad_scale) {
  Sums sums{0, 0, 0};
  for_each_block<C>(p, image, 0, count, false,
                    [&](const C* at, const C* grad, const C* x, C*, int64_t n) AFM_LAMBDA_INLINE {
                      add_sums(at, grad, x, n, static_cast<C>(grad_scale), sums);
                    });
  return sums;
}

// The largest |grad|, NaN if one of them is.
AFM_INLINE double largest_of(const ApgdParams& p, const ApgdImage& image, int64_t count) {
  double largest = 0;
  for_each_block<double>(p, image, 0, count, false,
                         [&](const double*, const double* grad, const double*, double*, int64_t n)
                             AFM_LAMBDA_INLINE {
                               for (int64_t i = 0; i < n; ++i) {
                                 const double magnitude = std::fabs(grad[i]);
                                 if (!(magnitude <= largest)) largest = magnitude;
                                 if (magnitude != magnitude) return;
                               }
                             });
  return largest;
}

template <class C>
struct L2Step {
  C along, grad_scale, shrink, clip_min, clip_max, fresh, carried;
};

// What is left of a displacement of this length when it is in the ball.
double shrink_of(double length, double eps) {
  return (length < eps ? length : eps) / (length + 1e-12);
}

// Where the two parts of the step lead, before the second projection.
template <bool kMoves, class C, class Access>
AFM_INLINE Vec<C> mixed(Access access, const C* at, const C* grad, const C* x, const C* old,
                        int64_t j, const L2Step<C>& by) {
  using V = Vec<C>;
  const V zero(C(0)), here = access.load(at + j, zero), pixel = access.load(x + j, zero);
  V moved = here;
  if constexpr (kMoves)
    moved = fma(V(by.along), access.load(grad + j, zero) * V(by.grad_scale), here);
  moved = clamp(fma(moved - pixel, V(by.shrink), pixel), V(by.clip_min), V(by.clip_max));
  return fma(here - access.load(old + j, zero), V(by.carried),
             fma(moved - here, V(by.fresh), here));
}

template <bool kMoves, class C>
AFM_LOOP double mixed_squares(const C* at, const C* grad, const C* x, const C* old, int64_t n,
                              const L2Step<C> by) {
  Accumulator<C> dd;
  const Vec<C> zero(C(0));
  sweep<Vec<C>>(0, n, [&](auto access, int64_t j, int u) AFM_STEP {
    const Vec<C> d =
        access.or_zero(mixed<kMoves>(access, at, grad, x, old, j, by) - access.load(x + j, zero));
    dd.add_product(u, d, d);
  });
  return dd.sum();
}

template <bool kMoves, class C>
AFM_LOOP void l2_run(const C* at, const C* grad, const C* x, C* old, int64_t n, C last_shrink,
                     const L2Step<C> by) {
  using V = Vec<C>;
  const V zero(C(0)), shrink(last_shrink), clip_min(by.clip_min), clip_max(by.clip_max);
  sweep<V>(0, n, [&](auto access, int64_t j, int) AFM_STEP {
    const V pixel = access.load(x + j, zero);
    const V d = mixed<kMoves>(access, at, grad, x, old, j, by) - pixel;
    access.store(old + j, clamp(fma(d, shrink, pixel), clip_min, clip_max));
  });
}

template <bool kMoves, class C>
AFM_INLINE void l2_both(const ApgdParams& p, const ApgdImage& image, int64_t count,
                        const L2Step<C>& by) {
  double squares = 0;
  for_each_block<C>(
      p, image, 0, count, false,
      [&](const C* at, const C* grad, const C* x, C* old, int64_t n)
          AFM_LAMBDA_INLINE { squares += mixed_squares<kMoves>(at, grad, x, old, n, by); });
  const C shrink = static_cast<C>(shrink_of(std::sqrt(squares), p.eps));
  for_each_block<C>(p, image, 0, count, true,
                    [&](const C* at, const C* grad, const C* x, C* old, int64_t n)
                        AFM_LAMBDA_INLINE { l2_run<kMoves>(at, grad, x, old, n, shrink, by); });
}

// The step, given its gradient's factor (0: it has no direction) and where that alone would lead.
template <class C>
AFM_INLINE void l2(const ApgdParams& p, const ApgdImage& image, int64_t count, double along,
                   double grad_scale, double squared_length) {
  const auto in_c = [](double value) { return static_cast<C>(value); };
  const double length = std::sqrt(squared_length < 0 ? 0 : squared_length);
  const L2Step<C> by = {in_c(along),      in_c(grad_scale), in_c(shrink_of(length, p.eps)),
                        in_c(p.clip_min), in_c(p.clip_max), in_c(1 - p.carried),
                        in_c(p.carried)};
  along == 0 ? l2_both<false>(p, image, count, by) : l2_both<true>(p, image, count, by);
}

double squared_length(const Sums& sums, double step_size) {
  return sums.dd + 2 * step_size * sums.dg / std::sqrt(sums.gg) + step_size * step_size;
}

// Whether sums of float squares have the digits that a float result needs: none has vanished, and a
// length that was a difference of larger ones is well within the ball. NaN: they do not.
bool hold(const Sums& sums, const ApgdParams& p, const ApgdImage& image, int64_t count) {
  const double least = 0x1p-120 * static_cast<double>(count), most = 0x1p120;
  if (!(sums.gg > least && sums.gg < most && sums.dd < most && p.eps * p.eps > least)) return false;
  const double squared = squared_length(sums, image.step_size);
  const double parts = sums.dd + image.step_size * image.step_size;
  return 8 * squared > parts || squared + 1e-5 * parts < p.eps * p.eps;
}

AFM_INLINE bool any_double(const ApgdParams& p) {
  return p.dtype == DType::kFloat64 || p.grad_dtype == DType::kFloat64;
}

}  // namespace

void apgd_linf(const ApgdParams& p, const ApgdImage& image, int64_t begin, int64_t end) {
  any_double(p) ? linf<double>(p, image, begin, end) : linf<float>(p, image, begin, end);
}

void apgd_l2(const ApgdParams& p, const ApgdImage& image, int64_t count) {
  if (!any_double(p)) {
    const Sums sums = sums_of<float>(p, image, count, 1);
    const double along = image.step_size / std::sqrt(sums.gg);
    // The factor of a tiny or huge gradient is no float, though its products are.
    if (hold(sums, p, image, count) && along > 1e-30 && along < 1e30)
      return l2<float>(p, image, count, along, 1, squared_length(sums, image.step_size));
  }
  Sums sums = sums_of<double>(p, image, count, 1);
  double grad_scale = 1;
  if (!(sums.gg > 1e-280 && sums.gg < 1e280)) {
    const double largest = largest_of(p, image, count);
    if (largest == 0 || !(largest < HUGE_VAL)) return l2<double>(p, image, count, 0, 1, sums.dd);
    const int exponent = std::ilogb(largest);
    grad_scale = std::ldexp(1.0, exponent < -1022 ? 1022 : -exponent);
    sums = sums_of<double>(p, image, count, grad_scale);
  }
  l2<double>(p, image, count, image.step_size / std::sqrt(sums.gg), grad_scale,
             squared_length(sums, image.step_size));
}

}  // namespace afm::cpu::AFM_CAPABILITY
