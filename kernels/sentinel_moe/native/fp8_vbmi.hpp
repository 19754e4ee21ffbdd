// e4m3 by dot products of bf16 pairs (AVX512-BF16), decoded by AVX512-VBMI: the two bytes of |code| as bf16 from two
// tables of 128.  Subnormals of e4m3 are normal in bf16, and the codes of NaN are NaN.

#pragma once

#include "avx512.hpp"
#include "fp8.hpp"

namespace {

struct Bf16Bytes {
  uint8_t low[128], high[128];
};

constexpr Bf16Bytes list_bf16_bytes() {
  Bf16Bytes bytes{};
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> 3, fraction = code & 7;
    int bits = (exponent + 120) << 7 | fraction << 4;
    if (code == 127) bits = 0x7fc0;
    if (exponent == 0) {
      bits = 0;
      for (int top = 0; top < 3; ++top) {  // fraction · 2^-9, its highest bit at 2^top
        if (fraction >> top == 1) bits = (top - 9 + 127) << 7 | (fraction << (7 - top) & 0x7f);
      }
    }
    bytes.low[code] = static_cast<uint8_t>(bits);
    bytes.high[code] = static_cast<uint8_t>(bits >> 8);
  }
  return bytes;
}

alignas(64) constexpr Bf16Bytes BF16_BYTES = list_bf16_bytes();

struct VbmiOps {
  using X = uint16_t;
  using Act = uint16_t;
  using Vec = __m512;
  using Flags = NoFlags;
  static constexpr int UNIT = 64, VECS = 2, SUMS = 4, ATOM_STEP = 2, REGISTERS = 32;
  static constexpr float UNSCALE = 1.0f;

  static inline __m512i as_bytes(Vec v) { return _mm512_castps_si512(v); }
  static inline Vec as_vec(__m512i v) { return _mm512_castsi512_ps(v); }

  // 64 codes; in each sixteen of them, the first eight in w[0] and the others in w[1].
  template <bool EXACT>
  static inline void decode(const uint8_t* p, Vec* w, Flags*) {
    const __m512i codes = _mm512_loadu_si512(p);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(BF16_BYTES.low), codes, _mm512_load_si512(BF16_BYTES.low + 64));
    const __m512i magnitude = _mm512_permutex2var_epi8(_mm512_load_si512(BF16_BYTES.high), codes, _mm512_load_si512(BF16_BYTES.high + 64));
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);  // a | (b & c)
    w[0] = as_vec(_mm512_unpacklo_epi8(low, high));
    w[1] = as_vec(_mm512_unpackhi_epi8(low, high));
  }
  // Two rows interleaved, so that a lane holds one column of both: of each sixteen columns four in each register.
  template <bool EXACT>
  static inline void decode_rows(const uint8_t* p, int64_t H, Vec* parts, Flags* flags) {
    Vec first[2], second[2];
    decode<EXACT>(p, first, flags);
    decode<EXACT>(p + H, second, flags);
    for (int i = 0; i < 2; ++i) {
      parts[2 * i] = as_vec(_mm512_unpacklo_epi16(as_bytes(first[i]), as_bytes(second[i])));
      parts[2 * i + 1] = as_vec(_mm512_unpackhi_epi16(as_bytes(first[i]), as_bytes(second[i])));
    }
  }
  static constexpr int place(int column) { return column % 16 / 4 * 16 + column / 16 * 4 + column % 4; }

  static inline Vec load_x(const X* p) { return _mm512_loadu_ps(p); }
  static inline Vec dot(Vec a, Vec b, Vec sum) { return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)); }
  static inline Vec multiply_add(Vec a, Vec b, Vec sum) { return Avx512::multiply_add(a, b, sum); }
  static inline Vec set1(float value) { return Avx512::set1(value); }
  static inline float sum(Vec v) { return Avx512::sum(v); }
  static inline void sum_four(Vec a, Vec b, Vec c, Vec d, float* ab, float* cd) { Avx512::sum_four(a, b, c, d, ab, cd); }
  static inline Vec spread(const Act* act) {
    int both;
    std::memcpy(&both, act, sizeof both);
    return as_vec(_mm512_set1_epi32(both));
  }
  static inline Vec load_sum(const float* sum) { return _mm512_loadu_ps(sum); }
  static inline void store_sum(float* sum, Vec v) { _mm512_storeu_ps(sum, v); }
  static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }

  static inline void scale_along(const float* act, const float* scales, int64_t groups, Act* out) {
    for (int64_t g = 0; g < groups; ++g) {
      out[2 * g] = narrow(act[0] * scales[g]);
      out[2 * g + 1] = narrow(act[1] * scales[groups + g]);
    }
  }
  static inline void scale_across(const float* acts, const float* scales, int64_t B, Act* out) {
    for (int64_t a = 0; a < B; ++a) out[a] = narrow(acts[a] * scales[a]);
  }

  template <DType D>
  static inline float round(float value) {
    return value;  // when its scale is applied
  }
  template <DType D>
  static void store(const float* sums, int64_t columns, void* out) {
    float values[REDUCED];
    for (int64_t c = 0; c < columns; ++c) values[c] = sums[c / UNIT * UNIT + place(c % UNIT)];
    for (int64_t c = 0; c < columns; ++c) static_cast<uint16_t*>(out)[c] = narrow(values[c]);
  }
  template <DType D>
  static void prepare(const void* x, int64_t H, int64_t padded, X* row) {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    for (int64_t h = 0; h < padded; h += 8) {
      X* to = row + h / UNIT * UNIT + h % 16 / 8 * (UNIT / 2) + h % UNIT / 16 * 8;
      if (h < H) {
        std::memcpy(to, from + h, 16);
      } else {
        std::memset(to, 0, 16);
      }
    }
  }
};

}  // namespace
