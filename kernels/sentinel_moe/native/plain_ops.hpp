// Ops whose arithmetic is fp32 multiply-add, whatever the weights' dtype: a step is two registers, the even and the
// odd columns of bf16 (a shift and a mask widen them), the first and the second half of fp16 and fp32.  Sums
// are kept in that order.
//
// V states a register of floats: Vec, LANES, load, store, set1, multiply_add, add, sum, sum_four, bf16_even, bf16_odd (REST:
// of 16 elements only, zeros behind), f16, to_f16.

#pragma once

#include <type_traits>

#include "kernels.hpp"

namespace {

// e4m3 by look-up.  A code's upper half, sign and exponent but for its last bit, is looked up as the upper byte of
// bf16; its lower half shifted is the lower byte.  Subnormals, which the first table gets wrong, zero and the smallest
// normals share an upper half, whose entry is larger than all others once the code is added, which takes the sign
// away; as is the sum of NaN's codes.  The second table is for codes that are then corrected.
alignas(16) constexpr uint8_t UPPER_HALVES[2][16] = {
    {200, 61, 62, 63, 64, 65, 66, 67, 72, 189, 190, 191, 192, 193, 194, 195},
    {60, 61, 62, 63, 64, 65, 66, 67, 188, 189, 190, 191, 192, 193, 194, 195}};
constexpr int LARGEST_SUM = 60 + 17 * 7 + 14;  // of an entry and its code, of all other codes

template <class V, DType D>
struct PlainOps {
  using T = std::conditional_t<D == F32, float, uint16_t>;
  using Act = float;
  using Vec = typename V::Vec;
  static constexpr int PARTS = 2, STEP = 2 * V::LANES, ATOM_STEP = 1, REGISTERS = V::REGISTERS;

  template <int P, bool REST>
  static inline Vec load(const T* p) {
    if constexpr (D == BF16) {
      if constexpr (P == 0) return V::template bf16_even<REST>(p);
      return V::template bf16_odd<REST>(p);
    } else {
      if constexpr (P == 1 && REST) return V::set1(0.0f);
      if constexpr (D == F16) return V::f16(p + P * V::LANES);
      if constexpr (D == F32) return V::load(p + P * V::LANES);
    }
  }
  static inline Vec dot(Vec a, Vec b, Vec sum) { return V::multiply_add(a, b, sum); }
  static inline float sum(Vec v) { return V::sum(v); }
  static inline void sum_four(Vec a, Vec b, Vec c, Vec d, float* ab, float* cd) { V::sum_four(a, b, c, d, ab, cd); }

  template <bool REST>
  static inline void load_rows(const T* row, int64_t, Vec* parts) {
    parts[0] = load<0, REST>(row);
    parts[1] = load<1, REST>(row);
  }
  static inline Vec spread(const Act* act) { return V::set1(*act); }
  static inline Vec load_sum(const float* sum) { return V::load(sum); }
  static inline void store_sum(float* sum, Vec v) { V::store(sum, v); }
  static inline Vec add(Vec a, Vec b) { return V::add(a, b); }

  static inline Act round(float value) {
    if constexpr (D == F32) return value;
    if constexpr (D == F16) return V::from_f16(V::to_f16(value));
    if constexpr (D == BF16) return round_bf16(value);
  }

  static void store(const float* sums, int64_t columns, T* out) {
    for (int64_t c = 0; c < columns; c += 16) {
      for (int i = 0; i < 16; ++i) {
        const int64_t column = c + i, step = column / STEP * STEP, within = column % STEP;
        if constexpr (D == BF16) out[column] = narrow(sums[step + within % 2 * V::LANES + within / 2]);
        if constexpr (D == F16) out[column] = V::to_f16(sums[column]);
        if constexpr (D == F32) out[column] = sums[column];
      }
    }
  }
};

template <class V>
struct PlainTables {
  static constexpr const Kernels* of[DTYPES] = {&Steps<PlainOps<V, F32>>::table, &Steps<PlainOps<V, F16>>::table, &Steps<PlainOps<V, BF16>>::table};
};

}  // namespace
