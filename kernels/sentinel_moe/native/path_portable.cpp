// Any little-endian processor that the compiler knows: vectors of four floats as the compiler lowers them.

#include "fp8_plain.hpp"

namespace {

float widen_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float value;
  if (magnitude >= 0x7c00u) {
    bits += 0x70000000u;  // infinity or NaN
    std::memcpy(&value, &bits, sizeof value);
  } else {
    std::memcpy(&value, &bits, sizeof value);
    value *= 5.192296858534828e33f;  // 2^112: the exponents' biases differ by so much, and subnormals become normal
  }
  std::memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest even.
uint16_t narrow_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: an addition aligns and rounds
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13));
}

struct E4m3 {
  float values[256];
};

constexpr E4m3 list_e4m3() {
  E4m3 table{};
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> 3, fraction = code & 7;
    float value = static_cast<float>(exponent == 0 ? fraction : fraction + 8) / 512;
    for (int i = 1; i < exponent; ++i) value *= 2;
    if (code == 127) value = __builtin_nanf("");
    table.values[code] = value;
    table.values[code + 128] = -value;
  }
  return table;
}

constexpr E4m3 E4M3 = list_e4m3();

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  static constexpr int LANES = 4, REGISTERS = 16;
  static inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
  static inline Vec set1(float value) { return Vec{value, value, value, value}; }
  static inline Vec multiply_add(Vec a, Vec b, Vec sum) { return a * b + sum; }
  static inline Vec add(Vec a, Vec b) { return a + b; }
  static inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static inline void sum_four(Vec a, Vec b, Vec c, Vec d, float* ab, float* cd) {
    ab[0] = sum(a), ab[1] = sum(b);
    cd[0] = sum(c), cd[1] = sum(d);
  }
  static inline Bits load_pairs(const uint16_t* p) {
    Bits pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return pairs;
  }
  template <bool REST>
  static inline Vec bf16_even(const uint16_t* p) {
    return reinterpret_cast<Vec>(load_pairs(p) << 16);
  }
  template <bool REST>
  static inline Vec bf16_odd(const uint16_t* p) {
    return reinterpret_cast<Vec>(load_pairs(p) & 0xffff0000u);
  }
  static inline Vec f16(const uint16_t* p) { return Vec{widen_half(p[0]), widen_half(p[1]), widen_half(p[2]), widen_half(p[3])}; }
  static inline uint16_t to_f16(float value) { return narrow_half(value); }
  static inline float from_f16(uint16_t value) { return widen_half(value); }

  using Flags = NoFlags;
  static constexpr float UNSCALE = 1.0f;
  static constexpr int place(int column) { return column; }
  template <bool EXACT>
  static inline void decode(const uint8_t* p, Vec* w, Flags*) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = E4M3.values[p[i]];
    std::memcpy(w, values, sizeof values);
  }
};

bool is_supported() { return true; }

}  // namespace

extern const sentinel::Path sentinel_portable = {"portable", "nothing", is_supported, {PlainTables<Portable>::of[0], PlainTables<Portable>::of[1], PlainTables<Portable>::of[2]}, Fp8PlainTables<Portable>::find};
