// The product of kernels/linear against sums in double, and the bits of a row that is computed alone: no torch is needed.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

extern "C" int linear_bf16(int64_t M, int64_t N, int64_t K, const void* x, int64_t x_stride, const void* w, int64_t w_stride, const void* bias, void* y, int threads);

namespace {

int failures = 0;

float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

std::vector<uint16_t> draw(int64_t count, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> drawn(count);
  for (auto& value : drawn) {
    const float wide = normal(*random);
    uint32_t bits;
    std::memcpy(&bits, &wide, sizeof bits);
    value = static_cast<uint16_t>(bits >> 16);
  }
  return drawn;
}

void check(int64_t M, int64_t N, int64_t K, int threads) {
  std::mt19937 random(static_cast<unsigned>(M + N + K));
  const auto x = draw(M * K, &random), w = draw(N * K, &random), bias = draw(N, &random);
  std::vector<uint16_t> y(M * N), alone(N);
  linear_bf16(M, N, K, x.data(), K, w.data(), K, bias.data(), y.data(), threads);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = widen(bias[n]), size = 1;
      for (int64_t k = 0; k < K; ++k) {
        const double term = static_cast<double>(widen(x[m * K + k])) * widen(w[n * K + k]);
        sum += term;
        size += std::fabs(term);
      }
      if (!(std::fabs(widen(y[m * N + n]) - sum) <= std::fabs(sum) / 256 + size * 1e-5)) ++failures;
    }
    linear_bf16(1, N, K, x.data() + m * K, K, w.data(), K, bias.data(), alone.data(), 1);
    if (std::memcmp(alone.data(), y.data() + m * N, N * sizeof alone[0]) != 0) ++failures;
  }
}

}  // namespace

int main() {
  for (const int64_t M : {1, 2, 3, 4, 9, 33}) {
    check(M, 5, 1, 1);
    check(M, 33, 31, 1);
    check(M, 130, 160, 1);
    check(M, 260, 1030, 3);
  }
  check(70, 40, 64, 2);
  check(140, 40, 1030, 2);  // with AMX in parts of K
  check(540, 33, 1030, 2);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
