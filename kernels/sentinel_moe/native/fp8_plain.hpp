// e4m3 by fp32 multiply-add: x is widened once a call, weights as they are used.
//
// V states a register of floats as for PlainOps, and of 4 · LANES codes: decode, Flags and UNSCALE as Ops, and place(c),
// where column c goes in their four registers.

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

  template <bool EXACT>
  static inline void decode(const uint8_t* p, Vec* w, Flags* flags) {
    V::template decode<EXACT>(p, w, flags);
  }
  template <bool EXACT>
  static inline void decode_rows(const uint8_t* p, int64_t, Vec* parts, Flags* flags) {
    V::template decode<EXACT>(p, parts, flags);
  }
  static inline Vec load_x(const float* p) { return V::load(p); }
  static inline Vec dot(Vec a, Vec b, Vec sum) { return V::multiply_add(a, b, sum); }
  static inline Vec multiply_add(Vec a, Vec b, Vec sum) { return V::multiply_add(a, b, sum); }
  static inline Vec set1(float value) { return V::set1(value); }
  static inline float sum(Vec v) { return V::sum(v); }
  static inline void sum_four(Vec a, Vec b, Vec c, Vec d, float* ab, float* cd) { V::sum_four(a, b, c, d, ab, cd); }
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
  static void store(const float* sums, int64_t columns, void* out) {
    float values[REDUCED];
    for (int64_t c = 0; c < columns; ++c) values[c] = sums[c / UNIT * UNIT + V::place(c % UNIT)];
    if constexpr (D == F32) std::memcpy(out, values, columns * sizeof(float));
    for (int64_t c = 0; c < columns; ++c) {
      if constexpr (D == F16) static_cast<uint16_t*>(out)[c] = V::to_f16(values[c]);
      if constexpr (D == BF16) static_cast<uint16_t*>(out)[c] = narrow(values[c]);
    }
  }
  template <DType D>
  static void prepare(const void* x, int64_t H, int64_t padded, float* row) {
    std::memset(row + H / UNIT * UNIT, 0, (padded - H / UNIT * UNIT) * sizeof(float));
    for (int64_t h = 0; h < H; ++h) {
      float* to = row + h / UNIT * UNIT + V::place(h % UNIT);
      if constexpr (D == F32) *to = static_cast<const float*>(x)[h];
      if constexpr (D == F16) *to = V::from_f16(static_cast<const uint16_t*>(x)[h]);
      if constexpr (D == BF16) *to = widen(static_cast<const uint16_t*>(x)[h]);
    }
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
