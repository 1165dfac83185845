// Element types, for kernel units and operators alike. dtype_of in tensors.h gives a tensor's.

#pragma once

namespace afm::cpu {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

}  // namespace afm::cpu
