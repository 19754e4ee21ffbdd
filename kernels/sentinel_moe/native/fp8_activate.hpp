// `activate` for weights of e4m3, as a template over the Ops of fp8_decode.hpp.
//
// A dot product is a sum over groups of SCALED columns.  Each half of a group is summed from zero and then, times the
// group's scale, added: two chains of additions that need not wait for each other.

#pragma once

#include <initializer_list>

#include "fp8_decode.hpp"

namespace {

template <class Ops>
struct Fp8Activate : Fp8Decoder<Ops> {
  using Base = Fp8Decoder<Ops>;
  using typename Base::Flags;
  using typename Base::Vec;
  using typename Base::X;
  using Base::GROUP, Base::MANY, Base::UNIT, Base::VECS, Base::codes, Base::count_groups, Base::decode_row, Base::decoded_vecs;
  static constexpr int HALF = SCALED / 2;
  static constexpr int DIRECT = 4;                       // tokens up to which a row is decoded as it is multiplied
  static constexpr int TOKENS = MANY ? 6 : 4;            // tokens of a tile of decoded rows
  static constexpr int64_t SEGMENT = MANY ? 2048 : 512;  // columns of it at a time
  static constexpr int64_t AHEAD = 16384;                // bytes of a stream that are asked for ahead

  using Round = float (*)(float);  // of an activation, for the dtype of x

  static int64_t count_scratch(int64_t B, int64_t H) {
    return GROUP * 2 * decoded_vecs(H) * static_cast<int64_t>(sizeof(Vec)) + 2 * B * DIRECT * static_cast<int64_t>(sizeof(float));
  }

  // One unit of R rows into the sums of M tokens.
  template <int M, int R>
  static inline void dot_unit(const X* const* x, int64_t u, const Vec (*w)[VECS], Vec (*sums)[M]) {
    for (int v = 0; v < VECS; ++v) {
      for (int m = 0; m < M; ++m) {
        const Vec input = Ops::load_x(x[m] + u + v * (UNIT / VECS));
        for (int r = 0; r < R; ++r) sums[r][m] = Ops::dot(input, w[r][v], sums[r][m]);
      }
    }
  }

  template <int M, int R>
  static inline void add_half(const Vec (*sums)[M], const Vec* scales, Vec (*totals)[M]) {
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) totals[r][m] = Ops::multiply_add(sums[r][m], scales[r], totals[r][m]);
    }
  }

  template <int R>
  static inline void spread_scales(const float* const* scales, int64_t h, Vec* spread) {
    for (int r = 0; r < R; ++r) spread[r] = Ops::set1(scales[r][h / SCALED] * Ops::UNSCALE);
  }

  // --- few tokens: rows are decoded as they are multiplied --------------------------------------------------------

  template <int M, int R>
  static inline void clear(Vec (*sums)[R][M]) {
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < R; ++r) {
        for (int m = 0; m < M; ++m) sums[half][r][m] = Vec{};
      }
    }
  }

  // The halves of a whole group of R rows.  Returns whether they are wrong: codes were met that want to be decoded
  // exactly.
  template <int M, int R>
  static inline bool dot_quickly(const X* const* x, const uint8_t* row, int64_t H, int64_t h, Vec (*sums)[R][M]) {
    constexpr int AT_ONCE = MANY ? R : 1;  // rows that share what is loaded of x
    Flags flags{};
    clear<M, R>(sums);
    for (int64_t i = 0; i < HALF; i += UNIT) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t u = h + half * HALF + i;
        for (int r = 0; r < R; r += AT_ONCE) {
          Vec w[AT_ONCE][VECS];
          for (int a = 0; a < AT_ONCE; ++a) Ops::template decode<false>(row + (r + a) * H + u, w[a], &flags);
          dot_unit<M, AT_ONCE>(x, u, w, sums[half] + r);
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < R; ++r) {
        for (int m = 0; m < M; ++m) settle(sums[half][r][m]);
      }
    }
    return flags.any();
  }

  // The same of any group and with any codes.
  template <int M, int R>
  __attribute__((noinline)) static bool dot_exactly(const X* const* x, const uint8_t* row, int64_t H, int64_t h, Vec (*sums)[R][M]) {
    Flags flags{};
    clear<M, R>(sums);
    const int64_t end = h + SCALED < H ? h + SCALED : H;
    for (int64_t u = h; u < end; u += UNIT) {
      for (int r = 0; r < R; ++r) {
        Vec w[1][VECS];
        Base::template decode_row<true>(row + r * H + u, H - u, w[0], &flags);
        dot_unit<M, 1>(x, u, w, sums[(u - h) / HALF] + r);
      }
    }
    return flags.any();
  }

  // R rows, H apart, into the totals of M tokens.  `ahead`, of R rows too, is asked for on the way, unless it is null.
  template <int M, int R>
  static inline void dot_rows(const X* const* x, const uint8_t* row, const float* const* scales, int64_t H, const uint8_t* ahead, Vec (*totals)[M]) {
    bool exact = false;  // as the last group was: zeros, which are such codes, come together
    for (int64_t h = 0; h < H; h += SCALED) {
      if (ahead != nullptr) {
        for (int r = 0; r < R; ++r) {
          for (int i = 0; i < SCALED; i += 64) __builtin_prefetch(ahead + r * H + h + i, 0, 2);
        }
      }
      Vec spread[R];
      spread_scales<R>(scales, h, spread);
      const bool whole = h + SCALED <= H;
      if (whole && !exact) {
        Vec sums[2][R][M];  // never in memory, as those of `dot_exactly` are
        exact = dot_quickly<M, R>(x, row, H, h, sums);
        if (!exact) {
          for (int half = 0; half < 2; ++half) add_half<M, R>(sums[half], spread, totals);
          continue;
        }
      }
      Vec sums[2][R][M];
      exact = dot_exactly<M, R>(x, row, H, h, sums);
      for (int half = 0; half < 2; ++half) add_half<M, R>(sums[half], spread, totals);
    }
  }

  // A block's scales, a line every 2 KiB of weights or so, which no stream is made of.
  static void fetch_scales(const Block& block) {
    const int64_t bytes = block.B * count_groups(block.H) * static_cast<int64_t>(sizeof(float));
    for (const float* scales : {block.gate_scales, block.up_scales, block.down_scales}) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(scales) + i, 0, 2);
    }
  }

  // Gate, up and then the first of `down` are one stream after the other.
  template <int M>
  static void activate_direct(const Block& block, Round round) {
    constexpr int R = MANY || M == 1 ? 2 : 1;
    fetch_scales(block);
    const int64_t H = block.H, B = block.B, groups = count_groups(H), ahead = (AHEAD + H - 1) / H / R * R;
    float* results = static_cast<float*>(block.scratch);  // [gate, up][B][M]
    const X* x[M];
    for (int m = 0; m < M; ++m) x[m] = static_cast<const X*>(block.inputs[m]);
    for (int64_t part = 0; part < 2; ++part) {
      const uint8_t* first = codes(part == 0 ? block.gate : block.up);
      const uint8_t* next = codes(part == 0 ? block.up : block.down);
      for (int64_t a = 0; a < B; a += R) {
        const float* scales[R];
        for (int r = 0; r < R; ++r) scales[r] = (part == 0 ? block.gate_scales : block.up_scales) + (a + r) * groups;
        const uint8_t* later = a + ahead < B ? first + (a + ahead) * H : next + (a + ahead - B) * H;
        Vec totals[R][M] = {};
        dot_rows<M, R>(x, first + a * H, scales, H, a + ahead - B < B ? later : nullptr, totals);
        for (int r = 0; r < R; ++r) {
          for (int m = 0; m < M; ++m) results[(part * B + a + r) * M + m] = Ops::sum(totals[r][m]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int64_t a = 0; a < B; ++a) {
        const float value = weigh(block.weights[m], results[a * M + m], results[(B + a) * M + m]);
        static_cast<float*>(block.act)[m * block.act_stride + a] = round(value);
      }
    }
  }

  // --- more: GROUP atoms' rows are decoded once, of which a tile's SEGMENT columns stay in the first cache -----------

  static void decode_whole(const uint8_t* row, int64_t H, Vec* decoded) {
    const Vec* end = decoded + decoded_vecs(H);
    for (int64_t u = 0; u < H; u += UNIT, decoded += VECS) decode_row(row + u, H - u, decoded);
    for (; decoded < end; ++decoded) *decoded = Vec{};
  }

  // Columns from `first` to `end`, where groups begin, of an atom's gate and up.
  template <int M>
  static inline void dot_decoded(const X* const* x, const Vec* const* rows, const float* const* scales, int64_t first, int64_t end, Vec (*totals)[M]) {
    for (int64_t h = first; h < end; h += SCALED) {
      Vec spread[2];
      spread_scales<2>(scales, h, spread);
      for (int64_t half = 0; half < 2; ++half) {
        Vec sums[2][M] = {};
        for (int64_t u = h + half * HALF; u < h + (half + 1) * HALF; u += UNIT) {
          Vec w[2][VECS];
          for (int r = 0; r < 2; ++r) {
            for (int v = 0; v < VECS; ++v) w[r][v] = rows[r][u / UNIT * VECS + v];
          }
          dot_unit<M, 2>(x, u, w, sums);
        }
        add_half<M, 2>(sums, spread, totals);
      }
    }
  }

  template <int M>
  static void activate_tile(const Block& block, int64_t token, int64_t atom, const Vec* decoded, Round round) {
    const int64_t H = Base::pad(block.H), groups = count_groups(H), length = decoded_vecs(H);
    const X* x[M];
    for (int m = 0; m < M; ++m) x[m] = static_cast<const X*>(block.inputs[token + m]);
    Vec totals[GROUP][2][M] = {};
    for (int64_t h = 0; h < H; h += SEGMENT) {
      const int64_t end = h + SEGMENT < H ? h + SEGMENT : H;
      for (int64_t a = 0; a < GROUP; ++a) {
        const Vec* rows[2] = {decoded + a * 2 * length, decoded + (a * 2 + 1) * length};
        const float* scales[2] = {block.gate_scales + (atom + a) * groups, block.up_scales + (atom + a) * groups};
        dot_decoded<M>(x, rows, scales, h, end, totals[a]);
      }
    }
    for (int m = 0; m < M; ++m) {
      float* act = static_cast<float*>(block.act) + (token + m) * block.act_stride + atom;
      float gates[GROUP], ups[GROUP];
      for (int a = 0; a < GROUP; a += 2) {
        Ops::sum_four(totals[a][0][m], totals[a + 1][0][m], totals[a][1][m], totals[a + 1][1][m], gates + a, ups + a);
      }
      for (int a = 0; a < GROUP; ++a) act[a] = round(weigh(block.weights[token + m], gates[a], ups[a]));
    }
  }

  static void activate(const Block& block, Round round) {
    if (block.count <= DIRECT) {
      with_count<DIRECT>(block.count, [&](auto m) { activate_direct<decltype(m)::value>(block, round); });
      return;
    }
    const int64_t H = block.H, length = decoded_vecs(H);
    Vec* decoded = static_cast<Vec*>(block.scratch);
    for (int64_t atom = 0; atom < block.B; atom += GROUP) {
      for (int64_t a = 0; a < GROUP; ++a) {
        decode_whole(codes(block.gate) + (atom + a) * H, H, decoded + a * 2 * length);
        decode_whole(codes(block.up) + (atom + a) * H, H, decoded + (a * 2 + 1) * length);
      }
      for (int64_t token = 0; token < block.count; token += TOKENS) {
        const int64_t left = block.count - token;
        with_count<TOKENS>(left < TOKENS ? left : TOKENS, [&](auto m) {
          activate_tile<decltype(m)::value>(block, token, atom, decoded, round);
        });
      }
    }
  }
};

}  // namespace
