// e4m3 on processors that have AVX512-VBMI beside AVX512-BF16: Sapphire Rapids, Zen 4 and later.

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)

#include "fp8_vbmi.hpp"

extern const sentinel::Kernels sentinel_vbmi_fp8 = Fp8Table<VbmiOps, sentinel::BF16>::table;

#endif
