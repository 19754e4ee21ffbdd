// AVX2 with FMA and F16C: Haswell and later, Zen 1 to 3.  Sixteen registers.

#if defined(__AVX2__)

#include <immintrin.h>

#include "fp8_plain.hpp"
#include "sums.hpp"

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
  static inline void sum_four(Vec a, Vec b, Vec c, Vec d, float* ab, float* cd) { sum_four_of_eight(a, b, c, d, ab, cd); }
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

  // e4m3: 32 codes, by UPPER_HALVES.
  static constexpr float UNSCALE = 1.0f;
  struct Flags {
    __m256i largest = _mm256_setzero_si256();
    inline bool any() const {
      const __m256i beyond = _mm256_subs_epu8(largest, bytes(LARGEST_SUM));
      return !_mm256_testz_si256(beyond, beyond);
    }
  };
  static inline __m256i bytes(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
  static inline __m256i words(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
  template <bool EXACT>
  __attribute__((always_inline)) static inline void decode(const uint8_t* p, Vec* w, Flags* flags) {
    const auto look_up = [](const uint8_t* table, __m256i index) {
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
    };
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i index = _mm256_and_si256(_mm256_srli_epi16(codes, 4), bytes(15)), upper = look_up(UPPER_HALVES[0], index);
    flags->largest = _mm256_max_epu8(flags->largest, _mm256_add_epi8(codes, upper));
    const __m256i lower = _mm256_slli_epi16(codes, 4), sound = EXACT ? look_up(UPPER_HALVES[1], index) : upper;
    const __m256i pairs[2] = {_mm256_unpacklo_epi8(lower, sound), _mm256_unpackhi_epi8(lower, sound)};
    for (int i = 0; i < 2; ++i) {
      w[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs[i], 16));
      w[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(pairs[i], words(0xfff00000u)));  // less the other's upper half
    }
    for (int i = 0; EXACT && i < 4; ++i) w[i] = correct(w[i]);
  }
  // A subnormal came as (1 + m/8) · 2^-7 instead of m/8 · 2^-6, NaN as 480.
  static inline Vec correct(Vec w) {
    const Vec sign = _mm256_set1_ps(-0.0f), magnitude = _mm256_andnot_ps(sign, w);
    const Vec subnormal = _mm256_sub_ps(_mm256_add_ps(magnitude, magnitude), set1(0x1p-6f));
    const Vec nan = _mm256_cmp_ps(magnitude, set1(480.0f), _CMP_EQ_OQ);
    return _mm256_or_ps(_mm256_or_ps(_mm256_min_ps(magnitude, subnormal), nan), _mm256_and_ps(sign, w));
  }
  // Of each sixteen columns: the even ones of the first eight, the odd ones, the same of the others.
  static constexpr int place(int column) { return (column % 16 / 8 * 2 + column % 2) * LANES + column / 16 * 4 + column % 8 / 2; }
};

// Whatever has AVX2 has F16C, for which clang 14 cannot ask.
bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

extern const sentinel::Path sentinel_avx2 = {"avx2", "AVX2, FMA and F16C", is_supported, {PlainTables<Avx2>::of[0], PlainTables<Avx2>::of[1], PlainTables<Avx2>::of[2]}, Fp8PlainTables<Avx2>::find};

#endif
