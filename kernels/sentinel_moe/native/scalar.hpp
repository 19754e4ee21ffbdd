// What the paths compute outside of registers: bf16, the activation, and counts that are known when compiled.  Private to
// the file that includes it, like kernels.hpp.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// The bits of a value rounded to bf16, to nearest even.  Without a branch, so that loops over it are made of vectors.
inline uint32_t round_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t nan = value != value ? ~0u : 0u;
  return (((bits + 0x7fff + ((bits >> 16) & 1)) & ~nan) | (0x7fc00000u & nan)) & 0xffff0000u;
}

inline uint16_t narrow(float value) { return static_cast<uint16_t>(round_bits(value) >> 16); }

inline float round_bf16(float value) {
  const uint32_t bits = round_bits(value);
  float rounded;
  std::memcpy(&rounded, &bits, sizeof rounded);
  return rounded;
}

// e^x by 2^n · p(r), |r| ≤ ln 2 / 2: 1 ulp; from e^-87 to e^88, infinite above, NaN stays NaN.
inline float exponential(float given) {
  float x = given;
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // n in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits, scale_bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  scale_bits = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof scale);
  return given > 88.0f ? __builtin_inff() : p * scale;
}

inline float weigh(float weight, float gate, float up) { return weight * (gate / (1.0f + exponential(-gate))) * up; }

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls f with the compile-time constant that equals count, 1 … MAX.
template <int MAX, typename F>
inline void with_count(int64_t count, F f) {
  if constexpr (MAX == 1) {
    f(Int<1>());
  } else {
    if (count == MAX) {
      f(Int<MAX>());
    } else {
      with_count<MAX - 1>(count, f);
    }
  }
}

}  // namespace
