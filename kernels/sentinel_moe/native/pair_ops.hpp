// bf16 weights meet bf16 inputs in a dot product of pairs (AVX512-BF16).

#pragma once

#include "avx512.hpp"

namespace {

struct PairOps {
  using T = uint16_t;
  using Act = uint16_t;
  using Vec = __m512;
  static constexpr int PARTS = 1, STEP = 32, ATOM_STEP = 2, REGISTERS = 32;

  template <bool REST>
  static inline __m512i load_pairs(const T* p) {
    return Avx512::load_pairs<REST>(p);
  }
  template <int P, bool REST>
  static inline Vec load(const T* p) {
    return _mm512_castsi512_ps(load_pairs<REST>(p));
  }
  static inline Vec dot(Vec a, Vec b, Vec sum) { return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)); }
  static inline float sum(Vec v) { return Avx512::sum(v); }
  static inline void sum_four(Vec a, Vec b, Vec c, Vec d, float* ab, float* cd) { Avx512::sum_four(a, b, c, d, ab, cd); }

  // Two rows interleaved, so that a lane holds one column of both: the lower, then the upper four of every eight.
  template <bool REST>
  static inline void load_rows(const T* row, int64_t H, Vec* parts) {
    const __m512i first = load_pairs<REST>(row), second = load_pairs<REST>(row + H);
    parts[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(first, second));
    parts[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(first, second));
  }
  static inline Vec spread(const Act* act) {
    int both;
    std::memcpy(&both, act, sizeof both);
    return _mm512_castsi512_ps(_mm512_set1_epi32(both));
  }
  static inline Vec load_sum(const float* sum) { return _mm512_loadu_ps(sum); }
  static inline void store_sum(float* sum, Vec v) { _mm512_storeu_ps(sum, v); }
  static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static inline Act round(float value) { return narrow(value); }

  static void store(const float* sums, int64_t columns, T* out) {
    for (int64_t c = 0; c < columns; c += 8) {
      const float* low = sums + c / STEP * STEP + c % STEP / 2;
      for (int i = 0; i < 4; ++i) {
        out[c + i] = narrow(low[i]);
        out[c + 4 + i] = narrow(low[16 + i]);
      }
    }
  }
};

}  // namespace
