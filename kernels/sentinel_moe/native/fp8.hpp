// The four steps for weights of e4m3, as templates over `Ops`; private to the file that includes it, like kernels.hpp.
//
// A row of weights has a scale for every SCALED columns.  The dot product of a row is a sum of its groups' sums, each
// from zero and times its scale.  In a sum over atoms a scale multiplies the activation: act · s, rounded to bf16 where
// bf16 is multiplied.  Weights are decoded in registers: each is exact in bf16 and in fp32.
//
// Ops states how UNIT columns are decoded and multiplied:
//   X, Act             element of a prepared row of x, of an activation that is multiplied
//   Vec                a register
//   UNIT               columns that are decoded at once; divides SCALED
//   VECS, SUMS         registers of UNIT columns of a row, and of as many sums in fp32
//   ATOM_STEP          rows of `down` that are multiplied at once
//   REGISTERS          16 or 32, from which the tiles follow
//   Flags              finds the codes of NaN where decoding does not make NaN of them
//   UNSCALE            what a decoded weight is to be multiplied by
//   place(c)           where the sum of column c is among those of its unit

#pragma once

#include <initializer_list>

#include "kernels.hpp"

namespace {

// Decoding makes NaN of NaN's codes: nothing to look for.
struct NoFlags {
  void note(const uint8_t*) {}
  bool any() const { return false; }
  bool has(int) const { return false; }
};

template <class Ops>
struct Fp8Steps {
  using X = typename Ops::X;
  using Act = typename Ops::Act;
  using Vec = typename Ops::Vec;
  using Flags = typename Ops::Flags;
  static constexpr int UNIT = Ops::UNIT, VECS = Ops::VECS, SUMS = Ops::SUMS, ATOM_STEP = Ops::ATOM_STEP;
  static constexpr int LANES = UNIT / SUMS;
  static constexpr bool MANY = Ops::REGISTERS >= 32;
  static constexpr int DIRECT = 4;                     // tokens up to which a row is decoded as it is multiplied
  static constexpr int TOKENS = MANY ? 6 : 4;          // tokens of a tile of decoded rows
  static constexpr int64_t SEGMENT = MANY ? 2048 : 512;  // columns of it at a time
  static constexpr int GROUP = 8;                      // atoms whose rows are decoded, or added, at once
  static constexpr int ROW_TOKENS = MANY ? 4 : 2;      // tokens of a tile of `add_rows`
  static constexpr int COLUMN_TOKENS = MANY ? 6 : 3;   // tokens of a tile of `add_columns`
  static constexpr int CHUNK = 48;                     // tokens whose activations are scaled at once; all tiles fill it
  static constexpr int64_t AHEAD = 16384;              // bytes of a stream that are asked for ahead

  static int64_t count_groups(int64_t H) { return (H + SCALED - 1) / SCALED; }
  static int64_t pad(int64_t H) { return count_groups(H) * SCALED; }
  static int64_t decoded_vecs(int64_t H) { return pad(H) / UNIT * VECS; }

  static int64_t count_scratch(int64_t B, int64_t H) {
    const int64_t activate = (GROUP * 2 * decoded_vecs(H)) * sizeof(Vec) + 2 * B * DIRECT * sizeof(float);
    const int64_t rows = GROUP * count_groups(H) * ROW_TOKENS * sizeof(Act);
    const int64_t columns = B / ATOM_STEP * SUMS * sizeof(Vec) + CHUNK * B * sizeof(Act) + B * sizeof(float);
    return (activate > columns ? activate : columns) + rows + 256;
  }

  // UNIT columns from p, of which `left` are there, decoded; Flags sees them.  For `rows` rows, H apart.
  template <typename Decode>
  static inline void decode_padded(const uint8_t* p, int64_t H, int rows, int64_t left, Decode decode) {
    alignas(64) uint8_t padded[ATOM_STEP * UNIT] = {};
    for (int r = 0; r < rows; ++r) std::memcpy(padded + r * UNIT, p + r * H, left);
    decode(padded, UNIT);
  }
  static inline void decode_row(const uint8_t* p, int64_t left, Vec* w, Flags* flags) {
    if (left >= UNIT) {
      Ops::decode(p, w);
      flags->note(p);
    } else {
      decode_padded(p, 0, 1, left, [&](const uint8_t* padded, int64_t) {
        Ops::decode(padded, w);
        flags->note(padded);
      });
    }
  }
  static inline void decode_rows(const uint8_t* p, int64_t H, int64_t left, Vec* parts, Flags* flags) {
    const auto decode = [&](const uint8_t* from, int64_t stride) {
      Ops::decode_rows(from, stride, parts);
      for (int r = 0; r < ATOM_STEP; ++r) flags->note(from + r * stride);
    };
    left >= UNIT ? decode(p, H) : decode_padded(p, H, ATOM_STEP, left, decode);
  }

  // --- activate ---------------------------------------------------------------------------------------------------

  // What R rows of a tile have in common: weights as they are, or decoded.
  struct Row {
    const uint8_t* codes;
    const Vec* decoded;
    const float* scales;
  };

  // One unit of R rows into the sums of M tokens.
  template <int M, int R, bool DECODED>
  static inline void dot_unit(const X* const* x, const Row* rows, int64_t u, int64_t left, Flags* flags, Vec (*sums)[M]) {
    Vec w[R][VECS];
    for (int r = 0; r < R; ++r) {
      if constexpr (DECODED) {
        for (int v = 0; v < VECS; ++v) w[r][v] = rows[r].decoded[u / UNIT * VECS + v];
      } else {
        decode_row(rows[r].codes + u, left, w[r], flags + r);
      }
    }
    for (int v = 0; v < VECS; ++v) {
      for (int m = 0; m < M; ++m) {
        const Vec input = Ops::load_x(x[m] + u + v * (UNIT / VECS));
        for (int r = 0; r < R; ++r) sums[r][m] = Ops::dot(input, w[r][v], sums[r][m]);
      }
    }
  }

  // Columns from `first`, where a group begins, to `end` of R rows into the totals of M tokens.  `ahead`, of R rows
  // too, is asked for on the way, unless it is null.
  template <int M, int R, bool DECODED>
  static inline void dot_rows(const X* const* x, const Row* rows, int64_t H, int64_t first, int64_t end, const uint8_t* ahead, Flags* flags, Vec (*totals)[M]) {
    const auto add_group = [&](int64_t h, Vec (*sums)[M]) {
      for (int r = 0; r < R; ++r) {
        const Vec scale = Ops::set1(rows[r].scales[h / SCALED] * Ops::UNSCALE);
        for (int m = 0; m < M; ++m) totals[r][m] = Ops::multiply_add(sums[r][m], scale, totals[r][m]);
      }
    };
    int64_t h = first;
    for (; h + SCALED <= end; h += SCALED) {
      if (ahead != nullptr) {
        for (int r = 0; r < R; ++r) {
          for (int i = 0; i < SCALED; i += 64) __builtin_prefetch(ahead + r * H + h + i, 0, 2);
        }
      }
      Vec sums[R][M] = {};
      for (int i = 0; i < SCALED; i += UNIT) dot_unit<M, R, DECODED>(x, rows, h + i, UNIT, flags, sums);
      add_group(h, sums);
    }
    if (h < end) {
      Vec sums[R][M] = {};
      for (int64_t u = h; u < end; u += UNIT) dot_unit<M, R, DECODED>(x, rows, u, end - u, flags, sums);
      add_group(h, sums);
    }
  }

  using Round = float (*)(float);  // of an activation, for the dtype of x

  static const uint8_t* codes(const void* p) { return static_cast<const uint8_t*>(p); }
  static float poison(const Flags& flags, float value) { return flags.any() ? NAN_VALUE : value; }
  static constexpr float NAN_VALUE = __builtin_nanf("");

  // A block's scales, a line every 2 KiB of weights or so, which no stream is made of.
  static void fetch_scales(const Block& block) {
    const int64_t bytes = block.B * count_groups(block.H) * static_cast<int64_t>(sizeof(float));
    for (const float* scales : {block.gate_scales, block.up_scales, block.down_scales}) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(scales) + i, 0, 2);
    }
  }

  // Few tokens: gate, up and then the first of `down` are one stream after the other.
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
      const float* scales = part == 0 ? block.gate_scales : block.up_scales;
      for (int64_t a = 0; a < B; a += R) {
        Row rows[R];
        for (int r = 0; r < R; ++r) rows[r] = {first + (a + r) * H, nullptr, scales + (a + r) * groups};
        const uint8_t* later = a + ahead < B ? first + (a + ahead) * H : next + (a + ahead - B) * H;
        Flags flags[R]{};
        Vec totals[R][M] = {};
        dot_rows<M, R, false>(x, rows, H, 0, H, a + ahead - B < B ? later : nullptr, flags, totals);
        for (int r = 0; r < R; ++r) {
          for (int m = 0; m < M; ++m) results[(part * B + a + r) * M + m] = poison(flags[r], Ops::sum(totals[r][m]));
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

  static Flags decode_whole(const uint8_t* row, int64_t H, Vec* decoded) {
    Flags flags{};
    for (int64_t u = 0; u < H; u += UNIT, decoded += VECS) decode_row(row + u, H - u, decoded, &flags);
    return flags;
  }

  // More: GROUP atoms' rows are decoded once for all tokens, of which a tile's SEGMENT columns stay in the first cache.
  template <int M>
  static void activate_tile(const Block& block, int64_t token, int64_t atom, const Vec* decoded, const bool (*is_nan)[2], Round round) {
    const int64_t H = block.H, groups = count_groups(H), length = decoded_vecs(H);
    const X* x[M];
    for (int m = 0; m < M; ++m) x[m] = static_cast<const X*>(block.inputs[token + m]);
    Row rows[GROUP][2];
    for (int64_t a = 0; a < GROUP; ++a) {
      rows[a][0] = {nullptr, decoded + a * 2 * length, block.gate_scales + (atom + a) * groups};
      rows[a][1] = {nullptr, decoded + (a * 2 + 1) * length, block.up_scales + (atom + a) * groups};
    }
    Vec totals[GROUP][2][M] = {};
    for (int64_t h = 0; h < H; h += SEGMENT) {
      const int64_t end = h + SEGMENT < H ? h + SEGMENT : H;
      for (int64_t a = 0; a < GROUP; ++a) dot_rows<M, 2, true>(x, rows[a], H, h, end, nullptr, nullptr, totals[a]);
    }
    for (int m = 0; m < M; ++m) {
      float* act = static_cast<float*>(block.act) + (token + m) * block.act_stride + atom;
      for (int a = 0; a < GROUP; ++a) {
        const float value = weigh(block.weights[token + m], Ops::sum(totals[a][0][m]), Ops::sum(totals[a][1][m]));
        act[a] = is_nan[a][0] || is_nan[a][1] ? NAN_VALUE : round(value);
      }
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
      bool is_nan[GROUP][2];
      for (int64_t a = 0; a < GROUP; ++a) {
        is_nan[a][0] = decode_whole(codes(block.gate) + (atom + a) * H, H, decoded + a * 2 * length).any();
        is_nan[a][1] = decode_whole(codes(block.up) + (atom + a) * H, H, decoded + (a * 2 + 1) * length).any();
      }
      for (int64_t token = 0; token < block.count; token += TOKENS) {
        const int64_t left = block.count - token;
        with_count<TOKENS>(left < TOKENS ? left : TOKENS, [&](auto m) {
          activate_tile<decltype(m)::value>(block, token, atom, decoded, is_nan, round);
        });
      }
    }
  }

  // --- combine ----------------------------------------------------------------------------------------------------

  // M tokens' sums of one unit become NaN where a weight is.
  static inline void poison_sums(const Flags& flags, int64_t count, float* const* sums, int64_t column) {
    if (!flags.any()) return;
    for (int64_t m = 0; m < count; ++m) {
      for (int c = 0; c < UNIT; ++c) {
        if (flags.has(c)) sums[m][column + Ops::place(c)] = NAN_VALUE;
      }
    }
  }

  // GROUP atoms' rows of one unit into the sums of M tokens.  acts: [M][GROUP / ATOM_STEP][groups][ATOM_STEP].
  template <int M, bool FIRST>
  static inline void row_unit(const uint8_t* row, int64_t H, int64_t left, const Act* const* acts, int64_t groups, float* const* sums, int64_t h) {
    Vec total[M][SUMS];
    Flags flags{};
    for (int m = 0; m < M; ++m) {
      for (int s = 0; s < SUMS; ++s) total[m][s] = FIRST ? Vec{} : Ops::load_sum(sums[m] + h + s * LANES);
    }
    for (int g = 0; g < GROUP / ATOM_STEP; ++g) {
      Vec parts[SUMS];
      decode_rows(row + g * ATOM_STEP * H, H, left, parts, &flags);
      for (int m = 0; m < M; ++m) {
        const Vec act = Ops::spread(acts[m] + g * groups * ATOM_STEP);
        for (int s = 0; s < SUMS; ++s) total[m][s] = Ops::dot(act, parts[s], total[m][s]);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int s = 0; s < SUMS; ++s) Ops::store_sum(sums[m] + h + s * LANES, total[m][s]);
    }
    poison_sums(flags, M, sums, h);
  }

  template <int M, bool FIRST>
  static void row_tile(const Block& block, int64_t token, int64_t atom, Act* scaled, float* const* sums) {
    const int64_t H = block.H, groups = count_groups(H);
    const float* scales = block.down_scales + atom * groups;
    for (int m = 0; m < M; ++m) {
      const float* act = static_cast<const float*>(block.act) + (token + m) * block.act_stride + atom;
      for (int a = 0; a < GROUP; a += ATOM_STEP) Ops::scale_along(act + a, scales + a * groups, groups, scaled + (m * GROUP + a) * groups);
    }
    const uint8_t* row = codes(block.down) + atom * H;
    const uint8_t* ahead = token > 0 ? nullptr : atom + GROUP < block.B ? row + GROUP * H : codes(block.next);
    for (int64_t h = 0; h < H; h += UNIT) {
      const Act* acts[M];
      for (int m = 0; m < M; ++m) acts[m] = scaled + m * GROUP * groups + h / SCALED * ATOM_STEP;
      if (ahead != nullptr && h % 64 == 0) {
        for (int g = 0; g < GROUP; ++g) __builtin_prefetch(ahead + g * H + h, 0, 2);
      }
      row_unit<M, FIRST>(row + h, H, H - h, acts, groups, sums, h);
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
          atom == 0 ? row_tile<M, true>(block, token, atom, scaled, rows) : row_tile<M, false>(block, token, atom, scaled, rows);
        });
      }
    }
  }

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
    Flags flags{};
    for (int64_t atom = 0; atom < block.B; atom += ATOM_STEP, row += ATOM_STEP * H) {
      for (int r = 0; r < ATOM_STEP; ++r) __builtin_prefetch(row + r * H + 2 * UNIT, 0, 2);
      decode_rows(row, H, H - column, packed + atom / ATOM_STEP * SUMS, &flags);
    }
    for (int64_t token = 0; token < count; token += COLUMN_TOKENS) {
      const int64_t left = count - token;
      with_count<COLUMN_TOKENS>(left < COLUMN_TOKENS ? left : COLUMN_TOKENS, [&](auto m) {
        column_tile<decltype(m)::value>(packed, acts + token * block.B, block.B, sums + token, column);
      });
    }
    poison_sums(flags, count, sums, column);
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

// The steps for one dtype of x: how its rows are prepared, activations rounded and results stored.
template <class Ops, DType D>
struct Fp8Table {
  using Steps8 = Fp8Steps<Ops>;

  static void prepare(const void* x, int64_t H, void* row) { Ops::template prepare<D>(x, H, Steps8::pad(H), static_cast<typename Ops::X*>(row)); }
  static void activate(const Block& block) { Steps8::activate(block, [](float value) { return Ops::template round<D>(value); }); }
  static void reduce(const float* const* rows, int64_t count, int64_t columns, void* out) {
    float sums[REDUCED] = {};
    const int64_t padded = (columns + SCALED - 1) / SCALED * SCALED;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < padded; ++c) sums[c] += rows[i][c];
    }
    for (int64_t c = 0; c < columns; ++c) Ops::template store<D>(sums[c / Ops::UNIT * Ops::UNIT + Ops::place(c % Ops::UNIT)], c, out);
  }

  static constexpr Kernels table = {sizeof(float), SCALED, activate, Steps8::add_rows, Steps8::add_columns, reduce, Steps8::count_scratch, sizeof(typename Ops::X), prepare};
};

}  // namespace
