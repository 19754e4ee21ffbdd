// A register of Advanced SIMD for PlainOps.

#pragma once

#include <arm_neon.h>

#include "plain_ops.hpp"

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
};

}  // namespace
