// The four steps for weights of e4m3 and one dtype of x, as templates over the Ops of fp8_decode.hpp.

#pragma once

#include "fp8_activate.hpp"
#include "fp8_combine.hpp"

namespace {

template <class Ops, DType D>
struct Fp8Table {
  using Decoder = Fp8Decoder<Ops>;

  static int64_t count_scratch(int64_t B, int64_t H) {
    const int64_t activate = Fp8Activate<Ops>::count_scratch(B, H), combine = Fp8Combine<Ops>::count_scratch(B, H);
    return activate > combine ? activate : combine;
  }
  static void prepare(const void* x, int64_t H, void* row) { Ops::template prepare<D>(x, H, Decoder::pad(H), static_cast<typename Ops::X*>(row)); }
  static void activate(const Block& block) { Fp8Activate<Ops>::activate(block, [](float value) { return Ops::template round<D>(value); }); }
  static void reduce(const float* const* rows, int64_t count, int64_t columns, void* out) {
    float sums[REDUCED];
    add_up<Ops, Decoder::LANES>(rows, count, (columns + SCALED - 1) / SCALED * SCALED, sums);
    Ops::template store<D>(sums, columns, out);
  }

  static constexpr Kernels table = {sizeof(float), SCALED, activate, Fp8Combine<Ops>::add_rows, Fp8Combine<Ops>::add_columns, reduce, count_scratch, sizeof(typename Ops::X), prepare};
};

}  // namespace
