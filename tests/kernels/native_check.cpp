// The kernels without torch, for processors that are emulated: every path that runs here, against fp64, and row bits.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "driver.hpp"

using namespace sentinel;

namespace {

void run_in_turn(int64_t count, void (*work)(int64_t, int64_t, void*), void* state) {
  for (int64_t i = 0; i < count; ++i) work(i, i + 1, state);
}

float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Values of few bits, exact in every dtype: of fp16 and bf16 those whose bits end in zeros.
struct Values {
  DType dtype;
  std::vector<char> bytes;
  std::vector<double> exact;
};

Values draw(DType dtype, int64_t count, std::mt19937* random) {
  Values values{dtype, std::vector<char>(count * (dtype == F32 ? 4 : 2)), std::vector<double>(count)};
  for (int64_t i = 0; i < count; ++i) {
    const int steps = static_cast<int>((*random)() % 63) - 31;
    const float value = static_cast<float>(steps) / 64;
    values.exact[i] = value;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == F16) half = steps == 0 ? 0 : static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112u << 10)));
    if (dtype == F32) std::memcpy(&values.bytes[i * 4], &value, 4);
    else std::memcpy(&values.bytes[i * 2], &half, 2);
  }
  return values;
}

// Codes of e4m3, all but NaN's, whose scales are drawn too: [rows, H] with one for 128 columns.
Values draw_codes(int64_t rows, int64_t H, std::mt19937* random, std::vector<float>* scales) {
  const int64_t groups = (H + SCALED - 1) / SCALED;
  Values values{F32, std::vector<char>(rows * H), std::vector<double>(rows * H)};
  for (int64_t i = 0; i < rows * groups; ++i) scales->push_back(static_cast<float>((*random)() % 31 + 1) / 4096);
  for (int64_t i = 0; i < rows * H; ++i) {
    int code = static_cast<int>((*random)() % 256);
    if ((code & 127) == 127) code = 0;
    const int exponent = code >> 3 & 15, fraction = code & 7;
    const double magnitude = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
    values.bytes[i] = static_cast<char>(code);
    values.exact[i] = (code & 128 ? -magnitude : magnitude) * (*scales)[i / H * groups + i % H / SCALED];
  }
  return values;
}

double read(const char* p, DType dtype) {
  float value;
  uint16_t half;
  std::memcpy(&value, p, dtype == F32 ? 4 : 2);
  std::memcpy(&half, p, 2);
  if (dtype == F32) std::memcpy(&value, p, 4);
  if (dtype == BF16) value = widen(half);
  if (dtype == F16) value = static_cast<float>((half & 0x8000 ? -1 : 1) * ((half >> 10 & 31) ? std::ldexp(1024 + (half & 1023), (half >> 10 & 31) - 25) : std::ldexp(half & 1023, -24)));
  return value;
}

int failures = 0;

void check(const Path& path, DType dtype, bool fp8, int64_t T, int64_t H, int64_t B, int64_t threads) {
  std::mt19937 random(static_cast<unsigned>(T * 31 + H + B));
  const int64_t E = 5, k = 2, size = dtype == F32 ? 4 : 2;
  const std::vector<int32_t> start = {0, 2, 3, 3, 6, 7};
  const int64_t n = start.back();
  std::vector<float> w13_scales, w2_scales;
  const Values x = draw(dtype, T * H, &random);
  const Values w13 = fp8 ? draw_codes(n * 2 * B, H, &random, &w13_scales) : draw(dtype, n * 2 * B * H, &random);
  const Values w2 = fp8 ? draw_codes(n * B, H, &random, &w2_scales) : draw(dtype, n * B * H, &random);
  std::vector<float> weights(T * k);
  std::vector<int32_t> ids(T * k);
  for (int64_t i = 0; i < T * k; ++i) {
    weights[i] = static_cast<float>(random() % 16 + 1) / 16;
    ids[i] = static_cast<int32_t>(random() % 6) - 1;
  }
  std::vector<char> out(T * H * size, 127), row(H * size);
  Call call{dtype, T, H, k, E, B, n, x.bytes.data(), weights.data(), ids.data(), w13.bytes.data(), w2.bytes.data(), start.data(), out.data(), fp8 ? w13_scales.data() : nullptr, fp8 ? w2_scales.data() : nullptr};
  if (run(call, path, {threads, run_in_turn}).status != OK) ++failures;
  double off = 0, whole = 0;
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> sums(H, 0.0);
    for (int64_t j = 0; j < k; ++j) {
      const int32_t e = ids[t * k + j];
      for (int64_t atom = e < 0 ? 0 : start[e] * B; atom < (e < 0 ? 0 : start[e + 1] * B); ++atom) {
        double gate = 0, up = 0;
        for (int64_t h = 0; h < H; ++h) {
          gate += x.exact[t * H + h] * w13.exact[(atom / B * 2 * B + atom % B) * H + h];
          up += x.exact[t * H + h] * w13.exact[(atom / B * 2 * B + B + atom % B) * H + h];
        }
        const double act = weights[t * k + j] * gate / (1 + std::exp(-gate)) * up;
        for (int64_t h = 0; h < H; ++h) sums[h] += act * w2.exact[atom * H + h];
      }
    }
    for (int64_t h = 0; h < H; ++h) {
      const double difference = read(&out[(t * H + h) * size], dtype) - sums[h];
      off += difference * difference;
      whole += sums[h] * sums[h];
    }
    if (T > 100 && t % 16 != 0) continue;  // some of many will do
    Call alone = call;
    alone.T = 1;
    alone.x = &x.bytes[t * H * size];
    alone.weights = &weights[t * k];
    alone.ids = &ids[t * k];
    alone.out = row.data();
    run(alone, path, {1, run_in_turn});
    if (std::memcmp(row.data(), &out[t * H * size], H * size) != 0) {
      std::printf("%s dtype %d fp8 %d T %d H %d B %d: row %d differs alone\n", path.name, dtype, fp8, static_cast<int>(T), static_cast<int>(H), static_cast<int>(B), static_cast<int>(t));
      ++failures;
    }
  }
  // What is not a number stays in its row.
  std::vector<char> poisoned = x.bytes, others(T * H * size);
  std::memset(&poisoned[T / 2 * H * size], 0xff, H * size);
  Call call_of_poisoned = call;
  call_of_poisoned.x = poisoned.data();
  call_of_poisoned.out = others.data();
  run(call_of_poisoned, path, {threads, run_in_turn});
  for (int64_t t = 0; t < T; ++t) {
    if (t != T / 2 && std::memcmp(&others[t * H * size], &out[t * H * size], H * size) != 0) {
      std::printf("%s dtype %d fp8 %d T %d H %d B %d: row %d is not apart from others\n", path.name, dtype, fp8, static_cast<int>(T), static_cast<int>(H), static_cast<int>(B), static_cast<int>(t));
      ++failures;
    }
  }
  const double limits[] = {2e-6, 1e-3, 6e-3}, error = std::sqrt(off / (whole > 0 ? whole : 1));
  if (!(error < limits[dtype])) {
    std::printf("%s dtype %d fp8 %d T %d H %d B %d: error %g\n", path.name, dtype, fp8, static_cast<int>(T), static_cast<int>(H), static_cast<int>(B), error);
    ++failures;
  }
}

}  // namespace

// Of all paths, or the one that is named.
int main(int count, char** words) {
  visit_paths(
      [](const Path& path, void* only) {
        if (!path.is_supported() || (only != nullptr && std::strcmp(path.name, static_cast<const char*>(only)) != 0)) return;
        for (const DType dtype : {F32, F16, BF16}) {
          for (const int64_t T : {1, 2, 5, 9, 17, 40}) {
            for (const bool fp8 : {false, true}) {
              check(path, dtype, fp8, T, 16, 16, 1);
              check(path, dtype, fp8, T, 80, 48, 3);
              check(path, dtype, fp8, T, 272, 64, 2);
            }
          }
        }
        // More tokens of an expert than are held at once, and more atoms than tiles sum in one chain.
        for (const bool fp8 : {false, true}) {
          check(path, BF16, fp8, 400, 80, 48, 2);
          check(path, BF16, fp8, 9, 160, 256, 2);
          check(path, BF16, fp8, 300, 2048, 16, 2);  // too many for sums that are kept apart
          for (const int64_t T : {2, 32, 180}) {
            check(path, BF16, fp8, T, 32, 144, 1);
            check(path, BF16, fp8, T, 32, 272, 1);
          }
        }
        std::printf("%s\n", path.name);
      },
      count > 1 ? words[1] : nullptr);
  return failures == 0 ? 0 : 1;
}
