// What elementwise kernels see of their operands, whatever the dtypes and strides. For kernel
// units.
//
// Note [Elements as they lie]
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~
// A kernel is a loop over vectors of the compute type (float or double), which `sweep` loads and
// stores in any dtype. Where all operands are of one dtype and without gaps, the loop runs on the
// tensors. Any other operand passes through a block of the compute type that stays in the
// first-level cache, where each element is loaded and stored once more: as long as the arithmetic
// takes, wherever the images lie in a cache.

#pragma once

#include "cpu/layout/row_tiles.h"
#include "cpu/layout/strided_loop.h"
#include "cpu/vec/sweep.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

// Calls f(an element) with the type of a dtype that is computed in C. Loops that take one type for
// all operands are compiled for these alone.
template <class C, class F>
AFM_INLINE void with_element(DType dtype, const F& f) {
  if constexpr (sizeof(C) == 8) {
    f(double());
  } else if (dtype == DType::kBFloat16) {
    f(BFloat16());
  } else if (dtype == DType::kFloat16) {
    f(Float16());
  } else {
    f(float());
  }
}

template <class C>
AFM_INLINE bool is_computed_in(DType dtype) {
  return (dtype == DType::kFloat64) == (sizeof(C) == 8);
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
