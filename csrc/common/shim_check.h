// A check of a call through torch's C shims, under one name in every version the library builds
// with.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

// Newer headers have the first, which passes torch's own message on; 2.10 and 2.11 only the second,
// which names the call that failed.
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define AFM_SHIM_CHECK(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define AFM_SHIM_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
