// A register of Advanced SIMD for PlainOps.

#pragma once

#include <arm_neon.h>

#include "fp8_plain.hpp"

namespace {

struct Neon {
  using Vec = float32x4_t;
  static constexpr int LANES = 4, REGISTERS = 32;
  static inline Vec load(const float* p) { return vld1q_f32(p); }
  static inline void store(float* p, Vec v) { vst1q_f32(p, v); }
  static inline Vec set1(float value) { return vdupq_n_f32(value); }
  static inline Vec multiply_add(Vec a, Vec b, Vec sum) { return vfmaq_f32(sum, a, b); }
  static inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static inline float sum(Vec v) { return (vgetq_lane_f32(v, 0) + vgetq_lane_f32(v, 2)) + (vgetq_lane_f32(v, 1) + vgetq_lane_f32(v, 3)); }
  static inline void sum_four(Vec a, Vec b, Vec c, Vec d, float* ab, float* cd) {
    const auto fold = [](Vec v) { return vadd_f32(vget_low_f32(v), vget_high_f32(v)); };
    vst1_f32(ab, vpadd_f32(fold(a), fold(b)));
    vst1_f32(cd, vpadd_f32(fold(c), fold(d)));
  }
  static inline uint32x4_t load_pairs(const uint16_t* p) { return vreinterpretq_u32_u16(vld1q_u16(p)); }
  template <bool REST>
  static inline Vec bf16_even(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshlq_n_u32(load_pairs(p), 16));
  }
  template <bool REST>
  static inline Vec bf16_odd(const uint16_t* p) {
    return vreinterpretq_f32_u32(vandq_u32(load_pairs(p), vdupq_n_u32(0xffff0000u)));
  }
  static inline Vec f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static inline uint16_t to_f16(float value) { return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(value))), 0); }
  static inline float from_f16(uint16_t value) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(value))), 0); }

  // e4m3: 16 codes, as fp16 2^-8 times as large, whose subnormals are theirs, and then as fp32; NaN's would be 480 · 2^-8.
  static constexpr float UNSCALE = 256.0f;
  struct Flags {
    uint8x16_t largest = vdupq_n_u8(0);
    inline bool any() const { return vmaxvq_u8(largest) == 0xff; }
  };
  static constexpr int place(int column) { return column; }
  template <bool EXACT>
  static inline void decode(const uint8_t* p, Vec* w, Flags* flags) {
    flags->largest = vmaxq_u8(flags->largest, vorrq_u8(vld1q_u8(p), vdupq_n_u8(0x80)));
    for (int i = 0; i < 2; ++i) {
      const int16x8_t wide = vmovl_s8(vld1_s8(reinterpret_cast<const int8_t*>(p) + 8 * i));
      const float16x8_t halves = vreinterpretq_f16_s16(vandq_s16(vshlq_n_s16(wide, 7), vdupq_n_s16(static_cast<int16_t>(0xbf80))));
      w[2 * i] = vcvt_f32_f16(vget_low_f16(halves));
      w[2 * i + 1] = vcvt_f32_f16(vget_high_f16(halves));
    }
    for (int i = 0; EXACT && i < 4; ++i) {
      const uint32x4_t is_nan = vceqq_f32(vabsq_f32(w[i]), vdupq_n_f32(480.0f / 256));
      w[i] = vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(w[i]), is_nan));
    }
  }
};

}  // namespace
