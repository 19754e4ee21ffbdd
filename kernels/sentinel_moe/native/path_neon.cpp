// ARM's Advanced SIMD, which every 64-bit ARM has.  Thirty-two registers of four floats.

#if defined(__aarch64__)

#include "neon.hpp"

namespace {

bool is_supported() { return true; }

}  // namespace

extern const sentinel::Kernels sentinel_neon_f32 = Steps<PlainOps<Neon, F32>>::table;
extern const sentinel::Kernels sentinel_neon_f16 = Steps<PlainOps<Neon, F16>>::table;
const sentinel::Kernels* sentinel_neon_fp8(sentinel::DType dtype) { return Fp8PlainTables<Neon>::find(dtype); }
extern const sentinel::Path sentinel_neon = {"neon", "a 64-bit ARM", is_supported, {&sentinel_neon_f32, &sentinel_neon_f16, &Steps<PlainOps<Neon, BF16>>::table}, sentinel_neon_fp8};

#endif
