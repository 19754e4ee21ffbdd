// A register of AVX-512 for PlainOps; avx512bw for loads of bf16.

#pragma once

#include <immintrin.h>

#include "plain_ops.hpp"
#include "sums.hpp"

namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int LANES = 16, REGISTERS = 32;
  static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static inline Vec set1(float value) { return _mm512_set1_ps(value); }
  static inline Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
  static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static inline __m256 fold(Vec v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  }
  static inline float sum(Vec v) {
    const __m256 by8 = fold(v);
    const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
    const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
    return _mm_cvtss_f32(_mm_add_ss(by2, _mm_shuffle_ps(by2, by2, 1)));
  }
  static inline void sum_four(Vec a, Vec b, Vec c, Vec d, float* ab, float* cd) { sum_four_of_eight(fold(a), fold(b), fold(c), fold(d), ab, cd); }
  template <bool REST>
  static inline __m512i load_pairs(const uint16_t* p) {
    if constexpr (REST) return _mm512_maskz_loadu_epi32(0x00ff, p);
    return _mm512_loadu_si512(p);
  }
  template <bool REST>
  static inline Vec bf16_even(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(load_pairs<REST>(p), 16));
  }
  template <bool REST>
  static inline Vec bf16_odd(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(load_pairs<REST>(p), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static inline Vec f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static inline uint16_t to_f16(float value) { return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)); }
  static inline float from_f16(uint16_t value) { return _cvtsh_ss(value); }

  // e4m3: 64 codes, by UPPER_HALVES.
  static constexpr float UNSCALE = 1.0f;
  struct Flags {
    __m512i largest = _mm512_setzero_si512();
    inline bool any() const { return _mm512_cmpgt_epu8_mask(largest, bytes(LARGEST_SUM)) != 0; }
  };
  static inline __m512i bytes(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
  static inline __m512i words(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
  template <bool EXACT>
  __attribute__((always_inline)) static inline void decode(const uint8_t* p, Vec* w, Flags* flags) {
    const auto look_up = [](const uint8_t* table, __m512i index) {
      return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
    };
    const __m512i codes = _mm512_loadu_si512(p);
    const __m512i index = _mm512_and_si512(_mm512_srli_epi16(codes, 4), bytes(15)), upper = look_up(UPPER_HALVES[0], index);
    flags->largest = _mm512_max_epu8(flags->largest, _mm512_add_epi8(codes, upper));
    const __m512i lower = _mm512_slli_epi16(codes, 4), sound = EXACT ? look_up(UPPER_HALVES[1], index) : upper;
    const __m512i pairs[2] = {_mm512_unpacklo_epi8(lower, sound), _mm512_unpackhi_epi8(lower, sound)};
    for (int i = 0; i < 2; ++i) {
      w[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16));
      w[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs[i], words(0xfff00000u)));
    }
    for (int i = 0; EXACT && i < 4; ++i) w[i] = correct(w[i]);
  }
  static inline Vec correct(Vec w) {
    const Vec magnitude = _mm512_abs_ps(w), subnormal = _mm512_sub_ps(_mm512_add_ps(magnitude, magnitude), set1(0x1p-6f));
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(w), words(0x80000000u));
    const Vec sound = _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(_mm512_min_ps(magnitude, subnormal)), sign));
    return _mm512_mask_mov_ps(sound, _mm512_cmp_ps_mask(magnitude, set1(480.0f), _CMP_EQ_OQ), set1(__builtin_nanf("")));
  }
  static constexpr int place(int column) { return (column % 16 / 8 * 2 + column % 2) * LANES + column / 16 * 4 + column % 8 / 2; }
};

}  // namespace
