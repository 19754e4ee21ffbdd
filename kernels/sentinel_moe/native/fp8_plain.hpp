// e4m3 by fp32 multiply-add: x is widened once a call, weights as they are used, in the order of their columns.
//
// V states a register of floats as for PlainOps, and: decode (4 · LANES codes to four registers, NaN's codes to some
// number), Flags, UNSCALE.

#pragma once

#include "fp8.hpp"
#include "plain_ops.hpp"

namespace {

template <class V>
struct Fp8Plain {
  using X = float;
  using Act = float;
  using Vec = typename V::Vec;
  using Flags = typename V::Flags;
  static constexpr int LANES = V::LANES, UNIT = 4 * LANES, VECS = 4, SUMS = 4, ATOM_STEP = 1, REGISTERS = V::REGISTERS;
  static constexpr float UNSCALE = V::UNSCALE;

  static constexpr int place(int column) { return column; }
  static inline void decode(const uint8_t* p, Vec* w) { V::decode(p, w); }
  static inline void decode_rows(const uint8_t* p, int64_t, Vec* parts) { V::decode(p, parts); }
  static inline Vec load_x(const float* p) { return V::load(p); }
  static inline Vec dot(Vec a, Vec b, Vec sum) { return V::multiply_add(a, b, sum); }
  static inline Vec multiply_add(Vec a, Vec b, Vec sum) { return V::multiply_add(a, b, sum); }
  static inline Vec set1(float value) { return V::set1(value); }
  static inline float sum(Vec v) { return V::sum(v); }
  static inline Vec spread(const Act* act) { return V::set1(*act); }
  static inline Vec load_sum(const float* sum) { return V::load(sum); }
  static inline void store_sum(float* sum, Vec v) { V::store(sum, v); }
  static inline Vec add(Vec a, Vec b) { return V::add(a, b); }

  static inline void scale_along(const float* act, const float* scales, int64_t groups, Act* out) {
    for (int64_t g = 0; g < groups; ++g) out[g] = *act * (scales[g] * UNSCALE);
  }
  static inline void scale_across(const float* acts, const float* scales, int64_t B, Act* out) {
    for (int64_t a = 0; a < B; ++a) out[a] = acts[a] * (scales[a] * UNSCALE);
  }

  template <DType D>
  static inline float round(float value) {
    return PlainOps<V, D>::round(value);
  }
  template <DType D>
  static inline void store(float sum, int64_t column, void* out) {
    if constexpr (D == F32) static_cast<float*>(out)[column] = sum;
    if constexpr (D == F16) static_cast<uint16_t*>(out)[column] = V::to_f16(sum);
    if constexpr (D == BF16) static_cast<uint16_t*>(out)[column] = narrow(sum);
  }
  template <DType D>
  static void prepare(const void* x, int64_t H, int64_t padded, float* row) {
    for (int64_t h = 0; h < H; ++h) {
      if constexpr (D == F32) row[h] = static_cast<const float*>(x)[h];
      if constexpr (D == F16) row[h] = V::from_f16(static_cast<const uint16_t*>(x)[h]);
      if constexpr (D == BF16) row[h] = widen(static_cast<const uint16_t*>(x)[h]);
    }
    std::memset(row + H, 0, (padded - H) * sizeof(float));
  }
};

template <class V>
struct Fp8PlainTables {
  static const Kernels* find(DType dtype) {
    static constexpr const Kernels* of[DTYPES] = {&Fp8Table<Fp8Plain<V>, F32>::table, &Fp8Table<Fp8Plain<V>, F16>::table, &Fp8Table<Fp8Plain<V>, BF16>::table};
    return of[dtype];
  }
};

}  // namespace
