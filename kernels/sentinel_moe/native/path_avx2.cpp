// AVX2 with FMA and F16C: Haswell and later, Zen 1 to 3.  Sixteen registers.

#if defined(__AVX2__)

#include <immintrin.h>

#include "fp8_plain.hpp"

namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int LANES = 8, REGISTERS = 16;
  static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static inline Vec set1(float value) { return _mm256_set1_ps(value); }
  static inline Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
  static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static inline float sum(Vec v) {
    const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
    return _mm_cvtss_f32(_mm_add_ss(by2, _mm_shuffle_ps(by2, by2, 1)));
  }
  static inline __m256i load_pairs(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  template <bool REST>
  static inline Vec bf16_even(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(load_pairs(p), 16));
  }
  template <bool REST>
  static inline Vec bf16_odd(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(load_pairs(p), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static inline Vec f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static inline uint16_t to_f16(float value) { return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)); }
  static inline float from_f16(uint16_t value) { return _cvtsh_ss(value); }

  // e4m3: 32 codes, as fp16 2^-8 times as large, whose subnormals are theirs, and then as fp32.
  static constexpr float UNSCALE = 256.0f;
  static inline void decode(const uint8_t* p, Vec* w) {
    for (int i = 0; i < 2; ++i) {
      const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
      const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
      w[2 * i] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
      w[2 * i + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    }
  }
  struct Flags {
    __m256i seen = _mm256_setzero_si256();
    inline void note(const uint8_t* p) {
      const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      seen = _mm256_max_epu8(seen, _mm256_or_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80))));
    }
    inline uint32_t find() const { return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(seen, _mm256_set1_epi8(-1)))); }
    inline bool any() const { return find() != 0; }
    inline bool has(int i) const { return (find() >> i & 1) != 0; }
  };
};

// Whatever has AVX2 has F16C, for which clang 14 cannot ask.
bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

extern const sentinel::Path sentinel_avx2 = {"avx2", "AVX2, FMA and F16C", is_supported, {PlainTables<Avx2>::of[0], PlainTables<Avx2>::of[1], PlainTables<Avx2>::of[2]}, Fp8PlainTables<Avx2>::find};

#endif
