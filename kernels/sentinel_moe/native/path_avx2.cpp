// AVX2 with FMA and F16C: Haswell and later, Zen 1 to 3.  Sixteen registers.

#if defined(__AVX2__)

#include <immintrin.h>

#include "plain_ops.hpp"

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
};

// Whatever has AVX2 has F16C, for which clang 14 cannot ask.
bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

extern const sentinel::Path sentinel_avx2 = {"avx2", "AVX2, FMA and F16C", is_supported, {PlainTables<Avx2>::of[0], PlainTables<Avx2>::of[1], PlainTables<Avx2>::of[2]}};

#endif
