// Operators about the module itself. The others are registered beside their code; every schema is
// in afm_kernels/ops.py.

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dispatch/dispatch.h"

namespace afm::cpu {

std::string cpu_capability() { return capability_name(capability()); }

}  // namespace afm::cpu

// An operator without tensors has no device to be dispatched on.
STABLE_TORCH_LIBRARY_IMPL(afm_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&afm::cpu::cpu_capability));
}
