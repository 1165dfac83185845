#include "cpu/pgd_step_kernel.h"

#include "cpu/blocks.h"

namespace afm::cpu::AFM_CAPABILITY {

namespace {

using Operand = PgdParams::Operand;

// Calls f(out, x_adv, grad, x, n) for all of [begin, end), with blocks of compute type or, see Note
// [bfloat16 as it lies], with the operands themselves.
template <class C, class F>
AFM_INLINE void for_each_block(const PgdParams& p, const int64_t* sample_offsets, int64_t begin,
                               int64_t end, bool writes, const F& f) {
  alignas(64) C scratch[Operand::kOperands][kBlock];
  int64_t strides[Operand::kOperands];
  for (int k = 0; k < Operand::kOperands; ++k) strides[k] = p.loop.strides[k][0];
  bool is_direct = p.dtype == DType::kBFloat16 && p.grad_dtype == DType::kBFloat16;
  for (int64_t stride : strides) is_direct &= stride == 1;
  const Target out{p.out, p.dtype};
  const Source sources[Operand::kOperands] = {
      {nullptr, p.dtype}, {p.x_adv, p.dtype}, {p.grad, p.grad_dtype}, {p.x, p.dtype}};
  for_each_run(p.loop, begin, end, [&](const int64_t* offsets, int64_t length) AFM_LAMBDA_INLINE {
    int64_t at[Operand::kOperands];
    for (int k = 0; k < Operand::kOperands; ++k) at[k] = offsets[k] + sample_offsets[k];
    if constexpr (sizeof(C) == 4) {
      if (is_direct) {
        const auto* x = static_cast<const BFloat16*>(p.x) + at[Operand::kX];
        const auto* x_adv = static_cast<const BFloat16*>(p.x_adv) + at[Operand::kXAdv];
        return f(static_cast<BFloat16*>(p.out) + at[Operand::kOut], p.x_adv == nullptr ? x : x_adv,
                 static_cast<const BFloat16*>(p.grad) + at[Operand::kGrad], x, length);
      }
    }
    for (int64_t done = 0; done < length; done += kBlock) {
      const int n = static_cast<int>(length - done < kBlock ? length - done : kBlock);
      const C* blocks[Operand::kOperands];
      for (int k = Operand::kXAdv; k < Operand::kOperands; ++k) {
        blocks[k] = sources[k].base == nullptr ? nullptr
                                               : load_block(sources[k], at[k] + done * strides[k],
                                                            strides[k], n, scratch[k]);
      }
      if (blocks[Operand::kXAdv] == nullptr) blocks[Operand::kXAdv] = blocks[Operand::kX];
      const int64_t out_at = at[Operand::kOut] + done * strides[Operand::kOut];
      C* block = writes ? place_block(out, out_at, strides[Operand::kOut], scratch[Operand::kOut])
                        : nullptr;
      f(block, blocks[Operand::kXAdv], blocks[Operand::kGrad], blocks[Operand::kX], n);
      if (writes)
        store_block(out, out_at, strides[Operand::kOut], n, block, scratch[Operand::kOut]);
    }
  });
}

constexpr int64_t kNoOffsets[Operand::kOperands] = {};

// Comparisons are written so that a NaN fails them and stays.
template <class C>
AFM_INLINE C clamp(C value, C low, C high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

template <class C>
AFM_INLINE void linf(const PgdParams& p, int64_t begin, int64_t end) {
  const C step = static_cast<C>(p.step_size), eps = static_cast<C>(p.eps);
  const C clip_min = static_cast<C>(p.clip_min), clip_max = static_cast<C>(p.clip_max);
  const bool start = p.x_adv == nullptr;
  for_each_block<C>(
      p, kNoOffsets, begin, end, true,
      [=](auto* out, const auto* x_adv, const auto* grad, const auto* x, int64_t n)
          AFM_LAMBDA_INLINE {
            if (start) {
              AFM_INDEPENDENT
              for (int64_t i = 0; i < n; ++i) {
                const C pixel = to_float(x[i]);
                const C moved = clamp(pixel + step * to_float(grad[i]), pixel - eps, pixel + eps);
                const C clipped = clamp(moved, clip_min, clip_max);
                from_float(pixel != pixel ? pixel : clipped, out + i);
              }
              return;
            }
            AFM_INDEPENDENT
            for (int64_t i = 0; i < n; ++i) {
              const C g = to_float(grad[i]), pixel = to_float(x[i]);
              const C down = g < 0 ? -step : g;  // a gradient of 0 or NaN is its own step
              const C moved =
                  clamp(to_float(x_adv[i]) + (g > 0 ? step : down), pixel - eps, pixel + eps);
              const C clipped = clamp(moved, clip_min, clip_max);
              from_float(pixel != pixel ? pixel : clipped, out + i);
            }
          });
}

// Lanes of sums: enough additions in flight to hide their latency, in an order that never changes.
// Sums are double: in float, the squares of a small gradient would vanish.
constexpr int kLanes = 16;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

template <class C>
AFM_INLINE Lanes load_lanes(const C* source) {
  typedef C Vector __attribute__((vector_size(kLanes * sizeof(C))));
  Vector vector;
  memcpy(&vector, source, sizeof(vector));
  return __builtin_convertvector(vector, Lanes);
}

AFM_INLINE Lanes load_lanes(const BFloat16* source) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
  Halves halves;
  memcpy(&halves, source, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  return __builtin_convertvector((Floats)words, Lanes);
}

AFM_INLINE double total(const Lanes& lanes) {
  double sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum;
}

AFM_INLINE bool any_double(const PgdParams& p) {
  return p.dtype == DType::kFloat64 || p.grad_dtype == DType::kFloat64;
}

template <class C>
AFM_INLINE PgdSums l2_sums(const PgdParams& p, const int64_t* sample_offsets, int64_t begin,
                           int64_t end, double grad_scale) {
  Lanes gg{}, dg{}, dd{};
  PgdSums tail{0, 0, 0};
  for_each_block<C>(p, sample_offsets, begin, end, false,
                    [&](auto*, const auto* x_adv, const auto* grad, const auto* x, int64_t n)
                        AFM_LAMBDA_INLINE {
                          int64_t i = 0;
                          for (; i + kLanes <= n; i += kLanes) {
                            const Lanes g = load_lanes(grad + i) * grad_scale;
                            const Lanes d = load_lanes(x_adv + i) - load_lanes(x + i);
                            gg += g * g;
                            dg += d * g;
                            dd += d * d;
                          }
                          for (; i < n; ++i) {
                            const double g = to_float(grad[i]) * grad_scale;
                            const double d = static_cast<double>(to_float(x_adv[i])) -
                                             static_cast<double>(to_float(x[i]));
                            tail.gg += g * g;
                            tail.dg += d * g;
                            tail.dd += d * d;
                          }
                        });
  return {total(gg) + tail.gg, total(dg) + tail.dg, total(dd) + tail.dd};
}

template <class C>
AFM_INLINE void l2_apply(const PgdParams& p, const int64_t* sample_offsets, int64_t begin,
                         int64_t end, C along, C grad_scale, C shrink) {
  const C clip_min = static_cast<C>(p.clip_min), clip_max = static_cast<C>(p.clip_max);
  for_each_block<C>(
      p, sample_offsets, begin, end, true,
      [=](auto* out, const auto* x_adv, const auto* grad, const auto* x, int64_t n)
          AFM_LAMBDA_INLINE {
            if (shrink == 1) {
              AFM_INDEPENDENT
              for (int64_t i = 0; i < n; ++i) {
                const C moved = to_float(x_adv[i]) + along * (to_float(grad[i]) * grad_scale);
                from_float(clamp(moved, clip_min, clip_max), out + i);
              }
              return;
            }
            AFM_INDEPENDENT
            for (int64_t i = 0; i < n; ++i) {
              const C moved = to_float(x_adv[i]) + along * (to_float(grad[i]) * grad_scale);
              const C pixel = to_float(x[i]);
              from_float(clamp(pixel + (moved - pixel) * shrink, clip_min, clip_max), out + i);
            }
          });
}

}  // namespace

void pgd_linf(const PgdParams& p, int64_t begin, int64_t end) {
  any_double(p) ? linf<double>(p, begin, end) : linf<float>(p, begin, end);
}

PgdSums pgd_l2_sums(const PgdParams& p, const int64_t* sample_offsets, int64_t begin, int64_t end,
                    double grad_scale) {
  return any_double(p) ? l2_sums<double>(p, sample_offsets, begin, end, grad_scale)
                       : l2_sums<float>(p, sample_offsets, begin, end, grad_scale);
}

void pgd_l2_apply(const PgdParams& p, const int64_t* sample_offsets, int64_t begin, int64_t end,
                  double along, double grad_scale, double shrink) {
  // The factor of a tiny or huge gradient is no float, though its products are. A NaN goes either
  // way.
  const bool fits_float = along == 0 || (along > 1e-30 && along < 1e30);
  if (any_double(p) || grad_scale != 1 || !fits_float) {
    l2_apply<double>(p, sample_offsets, begin, end, along, grad_scale, shrink);
  } else {
    l2_apply<float>(p, sample_offsets, begin, end, static_cast<float>(along), 1.0f,
                    static_cast<float>(shrink));
  }
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
