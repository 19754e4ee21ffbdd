// AVX-512 without instructions for bf16: Skylake-SP to Ice Lake.  Thirty-two registers of sixteen floats.

#if defined(__AVX512F__)

#include "avx512.hpp"
#include "fp8_plain.hpp"

namespace {

bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}

}  // namespace

extern const sentinel::Kernels sentinel_avx512_f32 = Steps<PlainOps<Avx512, F32>>::table;
extern const sentinel::Kernels sentinel_avx512_f16 = Steps<PlainOps<Avx512, F16>>::table;
const sentinel::Kernels* sentinel_avx512_fp8(sentinel::DType dtype) { return Fp8PlainTables<Avx512>::find(dtype); }
extern const sentinel::Path sentinel_avx512 = {"avx512", "AVX-512 F and BW", is_supported, {&sentinel_avx512_f32, &sentinel_avx512_f16, &Steps<PlainOps<Avx512, BF16>>::table}, sentinel_avx512_fp8};

#endif
