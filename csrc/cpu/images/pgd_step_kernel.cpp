#include "cpu/images/pgd_step_kernel.h"

#include "cpu/layout/blocks.h"

namespace afm::cpu::AFM_CAPABILITY {

namespace {

using Operand = PgdParams::Operand;

// Whether the loops run on the tensors themselves.
template <class C>
AFM_INLINE bool is_direct(const PgdParams& p) {
  bool direct = p.dtype == p.grad_dtype && is_computed_in<C>(p.dtype);
  for (int k = 0; k < Operand::kOperands; ++k) direct &= p.loop.strides[k][0] == 1;
  return direct;
}

// Calls f(out, x_adv, grad, x, n) for all of [begin, end): on the tensors, or with blocks of
// compute type. See Note [Elements as they lie]. Of a start, x_adv is x.
template <class C, class F>
AFM_INLINE void for_each_block(const PgdParams& p, const int64_t* sample_offsets, int64_t begin,
                               int64_t end, bool writes, const F& f) {
  alignas(64) C scratch[Operand::kOperands][kBlock];
  const bool direct = is_direct<C>(p);
  const int from = p.x_adv == nullptr ? Operand::kX : Operand::kXAdv;
  const void* const data[] = {p.out, p.x_adv, p.grad, p.x};
  for_each_run(p.loop, begin, end, [&](const int64_t* offsets, int64_t length) AFM_LAMBDA_INLINE {
    int64_t at[Operand::kOperands];
    for (int k = 0; k < Operand::kOperands; ++k) at[k] = offsets[k] + sample_offsets[k];
    if (direct) {
      return with_element<C>(p.dtype, [&](auto element) AFM_LAMBDA_INLINE {
        using X = decltype(element);
        const auto run = [&](int k)
                             AFM_LAMBDA_INLINE { return static_cast<const X*>(data[k]) + at[k]; };
        f(writes ? static_cast<X*>(p.out) + at[Operand::kOut] : nullptr, run(from),
          run(Operand::kGrad), run(Operand::kX), length);
      });
    }
    const auto operand = [&](int k) AFM_LAMBDA_INLINE {
      const DType dtype = k == Operand::kGrad ? p.grad_dtype : p.dtype;
      char* base = static_cast<char*>(const_cast<void*>(data[k]));
      return RowPointer{base + at[k] * element_size(dtype), dtype, p.loop.strides[k][0]};
    };
    for (int64_t j = 0; j < length; j += kBlock) {
      const int64_t n = length - j < kBlock ? length - j : kBlock;
      const auto read = [&](int k) AFM_LAMBDA_INLINE { return operand(k).read(j, n, scratch[k]); };
      const auto run = [&](C* block) AFM_LAMBDA_INLINE {
        f(block, read(from), read(Operand::kGrad), read(Operand::kX), n);
      };
      if (!writes) {
        run(nullptr);
        continue;
      }
      const RowPointer out = operand(Operand::kOut);
      C* block = out.writable(j, scratch[Operand::kOut]);
      run(block);
      out.write(j, n, block);
    }
  });
}

constexpr int64_t kNoOffsets[Operand::kOperands] = {};

// A NaN in `value` stays.
template <class V>
AFM_INLINE V clamp(V value, V low, V high) {
  return min(high, max(low, value));
}

template <class C>
struct LinfStep {
  C step, eps, clip_min, clip_max;
  bool stream;
};

// kStart: `grad` is noise, and every pixel moves by step * noise.
template <bool kStart, class C, class X>
AFM_LOOP void linf_run(X* out, const X* x_adv, const X* grad, const X* x, int64_t n,
                       const LinfStep<C> by) {
  using V = Vec<C>;
  const V step(by.step), back(-by.step), eps(by.eps), zero(C(0));
  const V clip_min(by.clip_min), clip_max(by.clip_max);
  sweep_out<V>(out, n, by.stream, [&](auto access, int64_t j, int) AFM_STEP {
    const V g = access.load(grad + j, zero), pixel = access.load(x + j, zero);
    // A gradient of 0 or NaN is its own step.
    const V move = kStart ? step * g : select(zero < g, step, select(g < zero, back, g));
    const V from = kStart ? pixel : access.load(x_adv + j, zero);
    const V moved = clamp(from + move, pixel - eps, pixel + eps);
    access.store(out + j, select(pixel == pixel, clamp(moved, clip_min, clip_max), pixel));
  });
}

template <class C>
AFM_INLINE void linf(const PgdParams& p, int64_t begin, int64_t end) {
  const auto in_c = [](double value) { return static_cast<C>(value); };
  const LinfStep<C> by = {in_c(p.step_size), in_c(p.eps), in_c(p.clip_min), in_c(p.clip_max),
                          p.stream && is_direct<C>(p)};
  for_each_block<C>(p, kNoOffsets, begin, end, true,
                    [&](auto* out, const auto* x_adv, const auto* grad, const auto* x, int64_t n)
                        AFM_LAMBDA_INLINE {
                          if (p.x_adv == nullptr)
                            linf_run<true>(out, x_adv, grad, x, n, by);
                          else
                            linf_run<false>(out, x_adv, grad, x, n, by);
                        });
  end_of_streams();
}

// Sums leave a stretch in double: each lane adds up this many numbers.
constexpr int64_t kAddends = 32;

template <class C, class X>
AFM_LOOP void add_l2_sums(const X* x_adv, const X* grad, const X* x, int64_t n, C grad_scale,
                          PgdSums& sums) {
  using V = Vec<C>;
  constexpr int64_t kStretch = kAddends * kUnroll * V::width;
  const V zero(C(0)), scale(grad_scale);
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    Accumulator<C> gg, dg, dd;
    sweep<V>(begin, n - begin < kStretch ? n : begin + kStretch,
             [&](auto access, int64_t j, int u) AFM_STEP {
               const V g = access.load(grad + j, zero) * scale;
               const V d = access.load(x_adv + j, zero) - access.load(x + j, zero);
               gg.add_product(u, g, g), dg.add_product(u, d, g), dd.add_product(u, d, d);
             });
    sums.gg += gg.sum(), sums.dg += dg.sum(), sums.dd += dd.sum();
  }
}

template <class C>
AFM_INLINE PgdSums l2_sums(const PgdParams& p, const int64_t* sample_offsets, int64_t begin,
                           int64_t end, double grad_scale) {
  PgdSums sums{0, 0, 0};
  for_each_block<C>(
      p, sample_offsets, begin, end, false,
      [&](auto*, const auto* x_adv, const auto* grad, const auto* x, int64_t n)
          AFM_LAMBDA_INLINE { add_l2_sums(x_adv, grad, x, n, static_cast<C>(grad_scale), sums); });
  return sums;
}

template <class C>
struct L2Step {
  C along, grad_scale, shrink, clip_min, clip_max;
  bool stream;
};

template <bool kShrinks, class C, class X>
AFM_LOOP void l2_run(X* out, const X* x_adv, const X* grad, const X* x, int64_t n,
                     const L2Step<C> by) {
  using V = Vec<C>;
  const V along(by.along), grad_scale(by.grad_scale), shrink(by.shrink), zero(C(0));
  const V clip_min(by.clip_min), clip_max(by.clip_max);
  sweep_out<V>(out, n, by.stream, [&](auto access, int64_t j, int) AFM_STEP {
    const V g = access.load(grad + j, zero) * grad_scale;
    V moved = fma(along, g, access.load(x_adv + j, zero));
    if constexpr (kShrinks) {
      const V pixel = access.load(x + j, zero);
      moved = fma(moved - pixel, shrink, pixel);
    }
    access.store(out + j, clamp(moved, clip_min, clip_max));
  });
}

template <class C>
AFM_INLINE void l2_apply(const PgdParams& p, const int64_t* sample_offsets, int64_t begin,
                         int64_t end, double along, double grad_scale, double shrink) {
  const auto in_c = [](double value) { return static_cast<C>(value); };
  const L2Step<C> by = {in_c(along),      in_c(grad_scale), in_c(shrink),
                        in_c(p.clip_min), in_c(p.clip_max), p.stream && is_direct<C>(p)};
  for_each_block<C>(p, sample_offsets, begin, end, true,
                    [&](auto* out, const auto* x_adv, const auto* grad, const auto* x, int64_t n)
                        AFM_LAMBDA_INLINE {
                          if (shrink == 1)
                            l2_run<false>(out, x_adv, grad, x, n, by);
                          else
                            l2_run<true>(out, x_adv, grad, x, n, by);
                        });
  end_of_streams();
}

AFM_INLINE bool any_double(const PgdParams& p) {
  return p.dtype == DType::kFloat64 || p.grad_dtype == DType::kFloat64;
}

}  // namespace

void pgd_linf(const PgdParams& p, int64_t begin, int64_t end) {
  any_double(p) ? linf<double>(p, begin, end) : linf<float>(p, begin, end);
}

PgdSums pgd_l2_sums(const PgdParams& p, const int64_t* sample_offsets, int64_t begin, int64_t end) {
  return any_double(p) ? l2_sums<double>(p, sample_offsets, begin, end, 1)
                       : l2_sums<float>(p, sample_offsets, begin, end, 1);
}

PgdSums pgd_l2_double_sums(const PgdParams& p, const int64_t* sample_offsets, int64_t begin,
                           int64_t end, double grad_scale) {
  return l2_sums<double>(p, sample_offsets, begin, end, grad_scale);
}

void pgd_l2_apply(const PgdParams& p, const int64_t* sample_offsets, int64_t begin, int64_t end,
                  double along, double grad_scale, double shrink) {
  // The factor of a tiny or huge gradient is no float, though its products are. A NaN goes either
  // way.
  const bool fits_float = along == 0 || (along > 1e-30 && along < 1e30);
  if (any_double(p) || grad_scale != 1 || !fits_float)
    l2_apply<double>(p, sample_offsets, begin, end, along, grad_scale, shrink);
  else
    l2_apply<float>(p, sample_offsets, begin, end, along, grad_scale, shrink);
}

double pgd_grad_max(const PgdParams& p, const int64_t* sample_offsets, int64_t begin, int64_t end) {
  double largest = 0;
  for_each_block<double>(p, sample_offsets, begin, end, false,
                         [&](double*, const double*, const double* grad, const double*, int64_t n)
                             AFM_LAMBDA_INLINE {
                               for (int64_t i = 0; i < n; ++i) {
                                 const double magnitude = grad[i] < 0 ? -grad[i] : grad[i];
                                 largest = magnitude <= largest ? largest : magnitude;
                                 if (magnitude != magnitude) return;
                               }
                             });
  return largest;
}

}  // namespace afm::cpu::AFM_CAPABILITY
