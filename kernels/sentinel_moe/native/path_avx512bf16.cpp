// AVX512-BF16: Cooper Lake, Sapphire Rapids, Zen 4 and later.  bf16 weights meet bf16 inputs in a dot product of pairs;
// the other dtypes go as on plain AVX-512.

#if defined(__AVX512BF16__)

#include "pair_ops.hpp"

extern const sentinel::Kernels sentinel_avx512_f32, sentinel_avx512_f16;
const sentinel::Kernels* sentinel_avx512_fp8(sentinel::DType dtype);
// A file of its own, which a compiler or a processor (Cooper Lake) may not know.
extern const sentinel::Kernels sentinel_vbmi_fp8 __attribute__((weak, visibility("hidden")));

namespace {

bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
}

const sentinel::Kernels* find_fp8(sentinel::DType dtype) {
  const bool bf16 = dtype == sentinel::BF16 && &sentinel_vbmi_fp8 != nullptr && __builtin_cpu_supports("avx512vbmi");
  return bf16 ? &sentinel_vbmi_fp8 : sentinel_avx512_fp8(dtype);
}

}  // namespace

extern const sentinel::Path sentinel_avx512bf16 = {"avx512bf16", "AVX512-BF16", is_supported, {&sentinel_avx512_f32, &sentinel_avx512_f16, &Steps<PairOps>::table}, find_fp8};

#endif
