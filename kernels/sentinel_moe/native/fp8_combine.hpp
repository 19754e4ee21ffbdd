// `add_rows` and `add_columns` for weights of e4m3, as a template over the Ops of fp8_decode.hpp.
//
// The scale of a row's group multiplies the activation: act · s, rounded to bf16 where bf16 is multiplied.

#pragma once

#include "fp8_decode.hpp"

namespace {

template <class Ops>
struct Fp8Combine : Fp8Decoder<Ops> {
  using Base = Fp8Decoder<Ops>;
  using typename Base::Act;
  using typename Base::Flags;
  using typename Base::Vec;
  using Base::ATOM_STEP, Base::GROUP, Base::LANES, Base::MANY, Base::SUMS, Base::UNIT, Base::codes, Base::count_groups;
  static constexpr int ROW_TOKENS = MANY ? 4 : 2;     // tokens of a tile of `add_rows`
  static constexpr int COLUMN_TOKENS = MANY ? 6 : 3;  // tokens of a tile of `add_columns`
  static constexpr int CHUNK = 48;                    // tokens whose activations are scaled at once; all tiles fill it

  static int64_t count_scratch(int64_t B, int64_t H) {
    const int64_t rows = GROUP * count_groups(H) * ROW_TOKENS * static_cast<int64_t>(sizeof(Act));
    const int64_t columns = B / ATOM_STEP * SUMS * sizeof(Vec) + CHUNK * B * sizeof(Act) + B * sizeof(float);
    return rows > columns ? rows : columns;
  }

  // --- whole rows ---------------------------------------------------------------------------------------------------

  // GROUP atoms' rows of one unit into the sums of M tokens.  acts: [M][GROUP / ATOM_STEP][groups][ATOM_STEP].  Returns
  // whether codes were met that want to be decoded exactly; then, unless they were, nothing is stored.
  template <int M, bool FIRST, bool EXACT>
  static inline bool add_unit(const uint8_t* row, int64_t H, int64_t left, const Act* const* acts, int64_t groups, float* const* sums, int64_t h) {
    Vec total[M][SUMS];
    Flags flags{};
    bool any = false;
    for (int m = 0; m < M; ++m) {
      for (int s = 0; s < SUMS; ++s) total[m][s] = FIRST ? Vec{} : Ops::load_sum(sums[m] + h + s * LANES);
    }
    for (int g = 0; g < GROUP / ATOM_STEP; ++g) {
      Vec parts[SUMS];
      const uint8_t* p = row + g * ATOM_STEP * H + h;
      if constexpr (EXACT) {
        any |= Base::decode_rows(p, H, left, parts);
      } else {
        Ops::template decode_rows<false>(p, H, parts, &flags);
      }
      for (int m = 0; m < M; ++m) {
        const Vec act = Ops::spread(acts[m] + g * groups * ATOM_STEP);
        for (int s = 0; s < SUMS; ++s) total[m][s] = Ops::dot(act, parts[s], total[m][s]);
      }
    }
    if constexpr (!EXACT) {
      for (int m = 0; m < M; ++m) {
        for (int s = 0; s < SUMS; ++s) settle(total[m][s]);
      }
      if (flags.any()) return true;
    }
    for (int m = 0; m < M; ++m) {
      for (int s = 0; s < SUMS; ++s) Ops::store_sum(sums[m] + h + s * LANES, total[m][s]);
    }
    return any;
  }
  template <int M, bool FIRST>
  __attribute__((noinline)) static bool add_exactly(const uint8_t* row, int64_t H, const Act* const* acts, int64_t groups, float* const* sums, int64_t h) {
    return add_unit<M, FIRST, true>(row, H, H - h, acts, groups, sums, h);
  }

  template <int M, bool FIRST>
  static void add_tile(const Block& block, int64_t token, int64_t atom, Act* scaled, float* const* sums) {
    const int64_t H = block.H, groups = count_groups(H);
    const float* scales = block.down_scales + atom * groups;
    for (int m = 0; m < M; ++m) {
      const float* act = static_cast<const float*>(block.act) + (token + m) * block.act_stride + atom;
      for (int a = 0; a < GROUP; a += ATOM_STEP) Ops::scale_along(act + a, scales + a * groups, groups, scaled + (m * GROUP + a) * groups);
    }
    const uint8_t* row = codes(block.down) + atom * H;
    const uint8_t* ahead = token > 0 ? nullptr : atom + GROUP < block.B ? row + GROUP * H : codes(block.next);
    bool exact = false;  // as the last unit was
    for (int64_t h = 0; h < H; h += UNIT) {
      const Act* acts[M];
      for (int m = 0; m < M; ++m) acts[m] = scaled + m * GROUP * groups + h / SCALED * ATOM_STEP;
      if (ahead != nullptr && h % 64 == 0) {
        for (int g = 0; g < GROUP; ++g) __builtin_prefetch(ahead + g * H + h, 0, 2);
      }
      const bool whole = h + UNIT <= H;
      if (whole && !exact) exact = add_unit<M, FIRST, false>(row, H, UNIT, acts, groups, sums, h);
      if (!whole || exact) exact = add_exactly<M, FIRST>(row, H, acts, groups, sums, h);
    }
  }

  static void add_rows(const Block& block, float* sums, int64_t stride) {
    Act* scaled = static_cast<Act*>(block.scratch);
    for (int64_t atom = 0; atom < block.B; atom += GROUP) {
      for (int64_t token = 0; token < block.count; token += ROW_TOKENS) {
        const int64_t left = block.count - token;
        with_count<ROW_TOKENS>(left < ROW_TOKENS ? left : ROW_TOKENS, [&](auto m) {
          constexpr int M = decltype(m)::value;
          float* rows[M];
          for (int i = 0; i < M; ++i) rows[i] = sums + (token + i) * stride;
          atom == 0 ? add_tile<M, true>(block, token, atom, scaled, rows) : add_tile<M, false>(block, token, atom, scaled, rows);
        });
      }
    }
  }

  // --- ranges of columns --------------------------------------------------------------------------------------------

  // M tokens' sums of one unit of columns over all atoms; acts: [M][B], scaled.
  template <int M>
  static void column_tile(const Vec* packed, const Act* acts, int64_t B, float* const* sums, int64_t column) {
    Vec total[M][SUMS] = {};
    for (int64_t atom = 0; atom < B; atom += ATOM_STEP, packed += SUMS) {
      for (int m = 0; m < M; ++m) {
        const Vec act = Ops::spread(acts + m * B + atom);
        for (int s = 0; s < SUMS; ++s) total[m][s] = Ops::dot(act, packed[s], total[m][s]);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int s = 0; s < SUMS; ++s) {
        float* sum = sums[m] + column + s * LANES;
        Ops::store_sum(sum, Ops::add(Ops::load_sum(sum), total[m][s]));
      }
    }
  }

  // One unit of columns for `count` tokens whose activations are scaled.
  static void column_unit(const Block& block, int64_t column, int64_t count, Vec* packed, const Act* acts, float* const* sums) {
    const int64_t H = block.H;
    const uint8_t* row = codes(block.down) + column;
    for (int64_t atom = 0; atom < block.B; atom += ATOM_STEP, row += ATOM_STEP * H) {
      for (int r = 0; r < ATOM_STEP; ++r) __builtin_prefetch(row + r * H + 2 * UNIT, 0, 2);
      Base::decode_rows(row, H, H - column, packed + atom / ATOM_STEP * SUMS);
    }
    for (int64_t token = 0; token < count; token += COLUMN_TOKENS) {
      const int64_t left = count - token;
      with_count<COLUMN_TOKENS>(left < COLUMN_TOKENS ? left : COLUMN_TOKENS, [&](auto m) {
        column_tile<decltype(m)::value>(packed, acts + token * block.B, block.B, sums + token, column);
      });
    }
  }

  static void add_columns(const Block& block, int64_t first, int64_t columns, float* const* sums) {
    const int64_t B = block.B, groups = count_groups(block.H);
    Vec* packed = static_cast<Vec*>(block.scratch);
    float* scales = reinterpret_cast<float*>(packed + B / ATOM_STEP * SUMS);
    Act* scaled = reinterpret_cast<Act*>(scales + B);
    for (int64_t token = 0; token < block.count; token += CHUNK) {
      const int64_t left = block.count - token, count = left < CHUNK ? left : CHUNK;
      for (int64_t group = first; group < first + columns; group += SCALED) {
        for (int64_t a = 0; a < B; ++a) scales[a] = block.down_scales[a * groups + group / SCALED];
        for (int64_t m = 0; m < count; ++m) {
          Ops::scale_across(static_cast<const float*>(block.act) + (token + m) * block.act_stride, scales, B, scaled + m * B);
        }
        const int64_t end = group + SCALED < first + columns ? group + SCALED : first + columns;
        for (int64_t column = group; column < end; column += UNIT) column_unit(block, column, count, packed, scaled, sums + token);
      }
    }
  }
};

}  // namespace
