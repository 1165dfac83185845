// How a kernel that is compiled once for each instruction set is declared and chosen; no other
// header is included, so that kernel units may include this one. See Note [Kernel units] in
// setup.py.
//
//   my_kernel.h      AFM_DECLARE_KERNEL(void, my_rows, (const MyParams& params, int64_t begin,
//   int64_t end))
//                    inside namespace afm::cpu
//   my_kernel.cpp    namespace afm::cpu::AFM_CAPABILITY { void my_rows(...) {...} }, with
//                    #if AFM_CAPABILITY_AVX512 / AFM_CAPABILITY_AVX2 where the code differs;
//                    helpers in anonymous namespaces
//   my.cpp           static const auto my_rows = AFM_KERNEL(my_rows);  inside namespace afm::cpu,
//   after dispatch.h

#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define AFM_DECLARE_KERNEL(RESULT, NAME, PARAMETERS) \
  namespace portable {                               \
  RESULT NAME PARAMETERS;                            \
  }                                                  \
  namespace avx2 {                                   \
  RESULT NAME PARAMETERS;                            \
  }                                                  \
  namespace avx512 {                                 \
  RESULT NAME PARAMETERS;                            \
  }
#define AFM_KERNEL(NAME) ::afm::cpu::select(&portable::NAME, &avx2::NAME, &avx512::NAME)
#else
#define AFM_DECLARE_KERNEL(RESULT, NAME, PARAMETERS) \
  namespace portable {                               \
  RESULT NAME PARAMETERS;                            \
  }
#define AFM_KERNEL(NAME) ::afm::cpu::select(&portable::NAME)
#endif
