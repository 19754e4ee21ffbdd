// The sums of four registers' lanes at once, for x86.

#pragma once

#include <immintrin.h>

namespace {

// Of a and b into ab, of c and d into cd: each is halved and added to itself, three times, as if it were alone.
inline void sum_four_of_eight(__m256 a, __m256 b, __m256 c, __m256 d, float* ab, float* cd) {
  const auto fold = [](__m256 v, __m256 w) { return _mm256_add_ps(_mm256_permute2f128_ps(v, w, 0x20), _mm256_permute2f128_ps(v, w, 0x31)); };
  const __m256d ac = _mm256_castps_pd(fold(a, c)), bd = _mm256_castps_pd(fold(b, d));
  const __m256 by2 = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ac, bd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ac, bd)));
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(by2, by2, 0x88), _mm256_shuffle_ps(by2, by2, 0xdd));
  _mm_storel_pi(reinterpret_cast<__m64*>(ab), _mm256_castps256_ps128(all));
  _mm_storel_pi(reinterpret_cast<__m64*>(cd), _mm256_extractf128_ps(all, 1));
}

}  // namespace
