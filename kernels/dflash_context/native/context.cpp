// The context of a DFlash drafter on a CPU: of the target's hidden states the keys and values of all its layers.
//
// Three norms, two products and a rotation of a few rows, as one call: a small drafter's step is made of what its calls
// cost.  bf16 in memory, summed in fp32, rounded to bf16 where a model of torch's modules rounds: behind each norm and
// each product.  The products are those of kernels/linear, whose function comes with the drafter.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace {

// linear_bf16 of kernels/linear/native/product.cpp or tiles.cpp.
using Product = int (*)(int64_t M, int64_t N, int64_t K, const void* x, int64_t x_stride, const void* w, int64_t w_stride, const void* bias, void* y, int threads);

constexpr int64_t CHUNK = 256;  // rows whose scratch is held at once
constexpr int64_t LARGEST_HEAD = 1024;  // of launch.py

float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float find_scale(const uint16_t* x, int64_t size, float eps) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < size; ++i) total += widen(x[i]) * widen(x[i]);
  return 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
}

// y = RMSNorm(x) · weight; y may be x.
void normalize(const uint16_t* x, const float* weight, int64_t size, float eps, uint16_t* y) {
  const float scale = find_scale(x, size, eps);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow(widen(x[i]) * scale * weight[i]);
}

}  // namespace

// `_Drafter` of launch.py.
struct Drafter {
  int64_t taps, tap_size, hidden, layers, heads, head_size, rotated, positions;
  int32_t neox;
  float eps;
  const float* tap_norms;     // [taps, tap_size], or null: none
  const float* hidden_norm;   // [hidden], or null: none
  const float* context_norm;  // [hidden]
  const float* key_norms;     // [layers, head_size]
  const uint16_t* fc;         // [hidden, taps · tap_size]
  const uint16_t* kv;         // [layers · 2 · heads · head_size, hidden]
  const uint16_t* kv_bias;    // of its rows, or null
  const uint16_t* angles;     // [positions, rotated], cosines first
  Product product;
};

enum Status { OK = 0, NO_MEMORY = 1 };  // and what else the product says

// states [rows, taps · tap_size], positions [rows] → keys and values, each [layers, rows, heads, head_size].  A position
// behind the last of `angles` is rotated as that.
extern "C" __attribute__((visibility("default"))) int dflash_context(const Drafter* drafter, int64_t rows, const uint16_t* states, const int64_t* positions, uint16_t* keys, uint16_t* values, int threads) {
  const Drafter& d = *drafter;
  const int64_t width = d.taps * d.tap_size, each = d.heads * d.head_size, both = d.layers * 2 * each, half = d.rotated / 2;
  const int64_t held = std::min(rows, CHUNK);
  std::unique_ptr<uint16_t[]> scratch(new (std::nothrow) uint16_t[held * (width + d.hidden + both)]);
  if (scratch == nullptr) return NO_MEMORY;
  uint16_t *normed = scratch.get(), *context = normed + held * width, *kv = context + held * d.hidden;
  for (int64_t first = 0; first < rows; first += CHUNK) {
    const int64_t count = std::min(CHUNK, rows - first);
    const uint16_t* input = states + first * width;
    if (d.tap_norms != nullptr) {
#pragma omp parallel for num_threads(threads) if (count > 8)
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t tap = 0; tap < d.taps; ++tap) {
          const int64_t at = row * width + tap * d.tap_size;
          normalize(input + at, d.tap_norms + tap * d.tap_size, d.tap_size, d.eps, normed + at);
        }
      }
      input = normed;
    }
    if (const int status = d.product(count, d.hidden, width, input, width, d.fc, width, nullptr, context, threads); status != OK) return status;
#pragma omp parallel for num_threads(threads) if (count > 8)
    for (int64_t row = 0; row < count; ++row) {
      uint16_t* x = context + row * d.hidden;
      if (d.hidden_norm != nullptr) normalize(x, d.hidden_norm, d.hidden, d.eps, x);
      normalize(x, d.context_norm, d.hidden, d.eps, x);
    }
    if (const int status = d.product(count, both, d.hidden, context, d.hidden, d.kv, d.hidden, d.kv_bias, kv, threads); status != OK) return status;
#pragma omp parallel for num_threads(threads) if (count > 8)
    for (int64_t row = 0; row < count; ++row) {
      const int64_t position = std::max<int64_t>(0, std::min(positions[first + row], d.positions - 1));
      const uint16_t *cosines = d.angles + position * d.rotated, *sines = cosines + half;
      for (int64_t layer = 0; layer < d.layers; ++layer) {
        const uint16_t* own = kv + row * both + layer * 2 * each;
        const int64_t to = (layer * rows + first + row) * each;
        std::memcpy(values + to, own + each, each * sizeof *values);
        for (int64_t head = 0; head < d.heads; ++head) {
          uint16_t x[LARGEST_HEAD];
          normalize(own + head * d.head_size, d.key_norms + layer * d.head_size, d.head_size, d.eps, x);
          for (int64_t i = 0; i < half; ++i) {
            const int64_t a = d.neox ? i : 2 * i, b = d.neox ? i + half : 2 * i + 1;
            const float cosine = widen(cosines[i]), sine = widen(sines[i]), one = widen(x[a]), other = widen(x[b]);
            x[a] = narrow(one * cosine - other * sine);
            x[b] = narrow(other * cosine + one * sine);
          }
          std::memcpy(keys + to + head * d.head_size, x, d.head_size * sizeof *keys);
        }
      }
    }
  }
  return OK;
}
