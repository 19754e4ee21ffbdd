// Advanced SIMD with bf16 (BFMMLA and BFDOT): Neoverse V1 and N2, Graviton 3, Grace.  bf16 weights meet bf16 inputs in
// products of two rows by two columns; the other dtypes, and weights in 8 bits, go as without.

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

#include <sys/auxv.h>

#include "neon.hpp"

extern const sentinel::Kernels sentinel_neon_f32, sentinel_neon_f16;
const sentinel::Kernels* sentinel_neon_fp8(sentinel::DType dtype);

namespace {

struct PairOps {
  using T = uint16_t;
  using Act = uint16_t;
  using Vec = float32x4_t;
  static constexpr int PARTS = 1, STEP = 8, ATOM_STEP = 2, REGISTERS = 32;

  template <int P, bool REST>
  static inline Vec load(const T* p) {
    return vreinterpretq_f32_u16(vld1q_u16(p));
  }
  static inline bfloat16x8_t pairs(Vec v) { return vreinterpretq_bf16_f32(v); }
  static inline Vec dot(Vec a, Vec b, Vec sum) { return vbfdotq_f32(sum, pairs(a), pairs(b)); }
  static inline float sum(Vec v) { return Neon::sum(v); }
  static inline void sum_four(Vec a, Vec b, Vec c, Vec d, float* ab, float* cd) { Neon::sum_four(a, b, c, d, ab, cd); }

  // Two rows interleaved, so that a lane holds one column of both.
  template <bool REST>
  static inline void load_rows(const T* row, int64_t H, Vec* parts) {
    const uint16x8_t first = vld1q_u16(row), second = vld1q_u16(row + H);
    parts[0] = vreinterpretq_f32_u16(vzip1q_u16(first, second));
    parts[1] = vreinterpretq_f32_u16(vzip2q_u16(first, second));
  }
  static inline Vec spread(const Act* act) {
    uint32_t both;
    std::memcpy(&both, act, sizeof both);
    return vreinterpretq_f32_u32(vdupq_n_u32(both));
  }
  static inline Vec load_sum(const float* sum) { return vld1q_f32(sum); }
  static inline void store_sum(float* sum, Vec v) { vst1q_f32(sum, v); }
  static inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static inline Act round(float value) { return narrow(value); }

  static void store(const float* sums, int64_t columns, T* out) {
    for (int64_t c = 0; c < columns; ++c) out[c] = narrow(sums[c]);
  }
};

// `activate` by BFMMLA: an atom's gate and up are two rows, two tokens two columns; the second column of an odd count is
// the first once more.  An element of a product depends on its own row and column alone.
struct MatrixSteps : Steps<PairOps> {
  static constexpr int PAIRS = 3;  // of tokens in a tile

  static inline bfloat16x8_t zip_low(uint16x8_t a, uint16x8_t b) {
    return vreinterpretq_bf16_u64(vzip1q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
  }
  static inline bfloat16x8_t zip_high(uint16x8_t a, uint16x8_t b) {
    return vreinterpretq_bf16_u64(vzip2q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
  }

  // Two atoms for 2·M tokens; results [token][gate, up] by atom.
  template <int M>
  static void multiply(const uint16_t* const* x, const uint16_t* gate, const uint16_t* up, int64_t H, float (*gates)[2], float (*ups)[2]) {
    float32x4_t sums[2][M] = {};
    for (int64_t h = 0; h < H; h += 8) {
      bfloat16x8_t low[2], high[2];
      for (int r = 0; r < 2; ++r) {
        __builtin_prefetch(gate + (2 + r) * H + h, 0, 2);
        __builtin_prefetch(up + (2 + r) * H + h, 0, 2);
        const uint16x8_t gate_row = vld1q_u16(gate + r * H + h), up_row = vld1q_u16(up + r * H + h);
        low[r] = zip_low(gate_row, up_row);
        high[r] = zip_high(gate_row, up_row);
      }
      for (int m = 0; m < M; ++m) {
        const uint16x8_t first = vld1q_u16(x[2 * m] + h), second = vld1q_u16(x[2 * m + 1] + h);
        const bfloat16x8_t x_low = zip_low(first, second), x_high = zip_high(first, second);
        for (int r = 0; r < 2; ++r) sums[r][m] = vbfmmlaq_f32(vbfmmlaq_f32(sums[r][m], low[r], x_low), high[r], x_high);
      }
    }
    for (int r = 0; r < 2; ++r) {
      for (int m = 0; m < M; ++m) {
        gates[2 * m][r] = vgetq_lane_f32(sums[r][m], 0);
        gates[2 * m + 1][r] = vgetq_lane_f32(sums[r][m], 1);
        ups[2 * m][r] = vgetq_lane_f32(sums[r][m], 2);
        ups[2 * m + 1][r] = vgetq_lane_f32(sums[r][m], 3);
      }
    }
  }

  static void activate(const Block& block) {
    const int64_t H = block.H;
    for (int64_t atom = 0; atom < block.B; atom += 2) {
      const uint16_t *gate = weights(block.gate) + atom * H, *up = weights(block.up) + atom * H;
      for (int64_t token = 0; token < block.count; token += 2 * PAIRS) {
        const int64_t left = block.count - token, count = left < 2 * PAIRS ? left : 2 * PAIRS;
        const uint16_t* x[2 * PAIRS];
        for (int64_t m = 0; m < 2 * PAIRS; ++m) x[m] = weights(block.inputs[token + (m < count ? m : 0)]);
        float gates[2 * PAIRS][2], ups[2 * PAIRS][2];
        with_count<PAIRS>((count + 1) / 2, [&](auto pairs) { multiply<decltype(pairs)::value>(x, gate, up, H, gates, ups); });
        for (int64_t m = 0; m < count; ++m) {
          Act* act = static_cast<Act*>(block.act) + (token + m) * block.act_stride + atom;
          for (int r = 0; r < 2; ++r) act[r] = narrow(weigh(block.weights[token + m], gates[m][r], ups[m][r]));
        }
      }
    }
  }

  static constexpr Kernels matrix_table = {sizeof(Act), COLUMNS, activate, add_rows, add_columns, reduce, count_scratch, 0, nullptr};
};

bool is_supported() { return (getauxval(AT_HWCAP2) & (1UL << 14)) != 0; }  // HWCAP2_BF16

}  // namespace

extern const sentinel::Path sentinel_neonbf16 = {"neonbf16", "ARM's bf16 instructions", is_supported, {&sentinel_neon_f32, &sentinel_neon_f16, &MatrixSteps::matrix_table}, sentinel_neon_fp8};

#endif
