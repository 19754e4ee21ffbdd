// A register of AVX-512 for PlainOps; avx512bw for loads of bf16.

#pragma once

#include <immintrin.h>

#include "plain_ops.hpp"

namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int LANES = 16, REGISTERS = 32;
  static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static inline Vec set1(float value) { return _mm512_set1_ps(value); }
  static inline Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
  static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static inline float sum(Vec v) {
    const __m256 by8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
    const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
    return _mm_cvtss_f32(_mm_add_ss(by2, _mm_shuffle_ps(by2, by2, 1)));
  }
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

  // e4m3: 64 codes, as fp16 2^-8 times as large, whose subnormals are theirs, and then as fp32.
  static constexpr float UNSCALE = 256.0f;
  static inline void decode(const uint8_t* p, Vec* w) {
    for (int i = 0; i < 2; ++i) {
      const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i));
      const __m512i halves = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(static_cast<short>(0xbf80)));
      w[2 * i] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
      w[2 * i + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    }
  }
  struct Flags {
    __m512i seen = _mm512_setzero_si512();
    inline void note(const uint8_t* p) { seen = _mm512_max_epu8(seen, _mm512_or_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)))); }
    inline uint64_t find() const { return _mm512_cmpeq_epi8_mask(seen, _mm512_set1_epi8(-1)); }
    inline bool any() const { return find() != 0; }
    inline bool has(int i) const { return (find() >> i & 1) != 0; }
  };
};

}  // namespace
