// The four steps for one instruction set and dtype, as templates over `Ops`.  Everything here is private to the file
// that includes it, and no header is used that leaves inline functions behind: the linker would keep one copy of
// those, perhaps with instructions that the processor lacks.
//
// Ops states how a step of a row is loaded and multiplied:
//   T, Act             element of a weight and of x, of an activation
//   Vec, PARTS         a register, and how many of them a step takes
//   STEP               elements of a row in a step (32 or fewer); a rest of 16 is loaded with zeros behind it
//   ATOM_STEP          rows of `down` that are multiplied at once
//   REGISTERS          16 or 32, from which the tiles follow

#pragma once

#include "path.hpp"
#include "scalar.hpp"

// Before a loop over registers: g++ leaves one of six rounds as it is, and then keeps all of them in memory.
#define UNROLLED_LOOP _Pragma("GCC unroll 16")

namespace {

using namespace sentinel;

// sums [columns] = the sum of rows in their order; a register has LANES of them.
template <class Ops, int LANES>
void add_up(const float* const* rows, int64_t count, int64_t columns, float* sums) {
  std::memset(sums, 0, columns * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const float* next = rows[i + 1 < count ? i + 1 : i];
    for (int64_t c = 0; c < columns; c += LANES) {
      if (c % 16 == 0) __builtin_prefetch(next + c);
      Ops::store_sum(sums + c, Ops::add(Ops::load_sum(sums + c), Ops::load_sum(rows[i] + c)));
    }
  }
}

template <class Ops>
struct Steps {
  using T = typename Ops::T;
  using Act = typename Ops::Act;
  using Vec = typename Ops::Vec;
  static constexpr int STEP = Ops::STEP, PARTS = Ops::PARTS;
  static constexpr int LINE = 64 / sizeof(T);                      // elements of a cache line
  static constexpr int UNROLLED = STEP < LINE ? LINE : STEP;       // a whole line, so that it is asked for once
  static constexpr bool MANY = Ops::REGISTERS >= 32;
  static constexpr int TOKENS = 6;                                 // tokens of a tile of `activate`
  static constexpr int ROWS = MANY ? 2 : 1;                        // atoms of a tile of `activate`
  static constexpr int ROW_TOKENS = MANY ? 4 : 2;                  // tokens of a tile of `add_rows`
  static constexpr int group_for(int tokens) { return MANY || tokens == 1 ? 8 : 4; }  // atoms of one
  static constexpr int COLUMN_TOKENS = MANY ? 12 : 6;              // tokens of a tile of `add_columns`
  static constexpr int64_t AHEAD = 4096;                           // bytes of gate, and of up, that are asked for early

  // Rows that are asked for, in two halves.
  struct Rows {
    const T *first, *second;  // null: nothing comes
  };

  static const T* weights(const void* p) { return static_cast<const T*>(p); }

  // --- activate ---------------------------------------------------------------------------------------------------

  // How many rows of gate, and of up, are asked for before they are used: a tile's, or, where rows are short, as many
  // groups of four as fit AHEAD.
  static int64_t rows_ahead(const Block& block) {
    const int64_t rows = AHEAD / (block.H * static_cast<int64_t>(sizeof(T))) / 4 * 4;
    return rows < 4 ? ROWS : rows > block.B / 2 ? block.B / 2 : rows;
  }

  // R atoms' gate and up for M tokens, over one step.  Each sum takes the parts of a row in the same order.
  template <int M, int R, bool REST, int P>
  static inline void dot_part(const T* const* x, const T* gate, const T* up, int64_t H, int64_t h, Vec (*sums)[M]) {
    Vec rows[2 * R];
    for (int r = 0; r < R; ++r) {
      rows[r] = Ops::template load<P, REST>(gate + r * H + h);
      rows[R + r] = Ops::template load<P, REST>(up + r * H + h);
    }
    for (int m = 0; m < M; ++m) {
      const Vec input = Ops::template load<P, REST>(x[m] + h);
      for (int r = 0; r < 2 * R; ++r) sums[r][m] = Ops::dot(input, rows[r], sums[r][m]);
    }
  }
  template <int M, int R, bool REST>
  static inline void dot_step(const T* const* x, const T* gate, const T* up, int64_t H, int64_t h, Vec (*sums)[M]) {
    dot_part<M, R, REST, 0>(x, gate, up, H, h, sums);
    if constexpr (PARTS == 2) dot_part<M, R, REST, 1>(x, gate, up, H, h, sums);
  }

  // FETCH: the rows of the next tile are asked for on the way, into the second-level cache: they are a page or more
  // ahead, and would push this tile out of the first.
  template <int M, int R, bool FETCH>
  static inline void dot_tile(const T* const* x, const T* gate, const T* up, int64_t H, const T* next_gate, const T* next_up, float* gates, float* ups) {
    Vec sums[2 * R][M] = {};
    int64_t h = 0;
    for (; h + UNROLLED <= H; h += UNROLLED) {
      if constexpr (FETCH) {
        for (int r = 0; r < R; ++r) {
          for (int i = 0; i < UNROLLED; i += LINE) {
            __builtin_prefetch(next_gate + r * H + h + i, 0, 2);
            __builtin_prefetch(next_up + r * H + h + i, 0, 2);
          }
        }
      }
      for (int i = 0; i < UNROLLED; i += STEP) dot_step<M, R, false>(x, gate, up, H, h + i, sums);
    }
    for (; h + STEP <= H; h += STEP) dot_step<M, R, false>(x, gate, up, H, h, sums);
    if constexpr (STEP > 16) {
      if (h < H) dot_step<M, R, true>(x, gate, up, H, h, sums);
    }
    sum_up<M, R>(sums, gates, ups);
  }

  // The sums' lanes, four sums at once: where rows are short, that is as much work as what made them.
  template <int M, int R>
  static inline void sum_up(const Vec (*sums)[M], float* gates, float* ups) {
    UNROLLED_LOOP
    for (int m = 0; m < M; ++m) {
      if constexpr (R == 2) {
        Ops::sum_four(sums[0][m], sums[1][m], sums[2][m], sums[3][m], gates + m * ATOMS, ups + m * ATOMS);
      } else {
        gates[m * ATOMS] = Ops::sum(sums[0][m]);
        ups[m * ATOMS] = Ops::sum(sums[1][m]);
      }
    }
  }

  template <int M, bool FETCH>
  static void activate_tile(const Block& block, int64_t token, int64_t atom) {
    constexpr int R = ROWS;
    const T* x[M];
    for (int m = 0; m < M; ++m) x[m] = static_cast<const T*>(block.inputs[token + m]);
    float gates[M * ATOMS], ups[M * ATOMS];
    const int64_t H = block.H, ahead = FETCH ? rows_ahead(block) : 0;
    for (int64_t a = 0; a < ATOMS; a += R) {
      const T* gate = weights(block.gate) + (atom + a) * H;
      const T* up = weights(block.up) + (atom + a) * H;
      const int64_t past = atom + a + ahead - block.B;  // 0 and more: the first rows of `down` come next
      const T *next_gate = gate + ahead * H, *next_up = up + ahead * H;
      if (past >= 0) {
        next_gate = weights(block.down) + 2 * past * H;
        next_up = next_gate + R * H;
      }
      dot_tile<M, R, FETCH>(x, gate, up, H, next_gate, next_up, gates + a, ups + a);
    }
    for (int m = 0; m < M; ++m) {
      Act* act = static_cast<Act*>(block.act) + (token + m) * block.act_stride + atom;
      const float weight = block.weights[token + m];
      float values[ATOMS];
      for (int a = 0; a < ATOMS; ++a) {
        values[a] = weigh(weight, gates[m * ATOMS + a], ups[m * ATOMS + a]);
      }
      for (int a = 0; a < ATOMS; ++a) act[a] = Ops::round(values[a]);
    }
  }

  static void activate(const Block& block) {
    for (int64_t atom = 0; atom < block.B; atom += ATOMS) {
      for (int64_t token = 0; token < block.count; token += TOKENS) {
        const int64_t left = block.count - token;
        with_count<TOKENS>(left < TOKENS ? left : TOKENS, [&](auto m) {
          constexpr int M = decltype(m)::value;
          token == 0 ? activate_tile<M, true>(block, token, atom) : activate_tile<M, false>(block, token, atom);
        });
      }
    }
  }

  // --- combine ----------------------------------------------------------------------------------------------------

  // G atoms' rows into the sums of M tokens.  FIRST: the sums start from zero.
  template <int M, int G, bool FIRST, bool REST>
  static inline void row_step(const Vec (*acts)[M], const T* row, int64_t H, float* const* sums, int64_t h) {
    Vec total[M][2];
    for (int m = 0; m < M; ++m) {
      for (int p = 0; p < 2; ++p) total[m][p] = FIRST ? Vec{} : Ops::load_sum(sums[m] + h + p * (STEP / 2));
    }
    for (int g = 0; g < G / Ops::ATOM_STEP; ++g) {
      Vec parts[2];
      Ops::template load_rows<REST>(row + g * Ops::ATOM_STEP * H + h, H, parts);
      for (int m = 0; m < M; ++m) {
        for (int p = 0; p < 2; ++p) total[m][p] = Ops::dot(acts[g][m], parts[p], total[m][p]);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int p = 0; p < 2; ++p) Ops::store_sum(sums[m] + h + p * (STEP / 2), total[m][p]);
    }
  }

  template <int M, int G, bool FIRST, bool FETCH>
  static void row_tile(const Act* const* act, const T* row, int64_t H, float* const* sums, Rows next) {
    Vec acts[G / Ops::ATOM_STEP][M];
    for (int g = 0; g < G; g += Ops::ATOM_STEP) {
      for (int m = 0; m < M; ++m) acts[g / Ops::ATOM_STEP][m] = Ops::spread(act[m] + g);
    }
    int64_t h = 0;
    for (; h + UNROLLED <= H; h += UNROLLED) {
      if constexpr (FETCH) {
        for (int g = 0; g < G; ++g) {
          const T* asked = g < G / 2 ? next.first + g * H : next.second + (g - G / 2) * H;
          for (int i = 0; i < UNROLLED; i += LINE) __builtin_prefetch(asked + h + i, 0, 2);
        }
      }
      for (int i = 0; i < UNROLLED; i += STEP) row_step<M, G, FIRST, false>(acts, row, H, sums, h + i);
    }
    for (; h + STEP <= H; h += STEP) row_step<M, G, FIRST, false>(acts, row, H, sums, h);
    if constexpr (STEP > 16) {
      if (h < H) row_step<M, G, FIRST, true>(acts, row, H, sums, h);
    }
  }

  // The rows that come `number` rows behind the first of `down`: of it, or of the next block's gate and up.
  template <int G>
  static Rows find_next(const Block& block, int64_t number) {
    if (number + G <= block.B) {
      const T* row = weights(block.down) + number * block.H;
      return {row, row + G / 2 * block.H};
    }
    const int64_t past = (number - block.B) / 2;
    if (block.next == nullptr || number < block.B || past >= rows_ahead(block)) return {nullptr, nullptr};
    const T* row = weights(block.next) + past * block.H;
    return {row, row + block.B * block.H};
  }

  template <int M>
  static void add_rows_tile(const Block& block, int64_t token, int64_t atom, int64_t atoms, float* sums, int64_t stride) {
    constexpr int G = group_for(M);
    const int64_t ahead = 2 * rows_ahead(block) > G ? 2 * rows_ahead(block) : G;
    const Act* acts[M];
    float* rows[M];
    for (int m = 0; m < M; ++m) rows[m] = sums + (token + m) * stride;
    for (int64_t a = atom; a < atom + atoms; a += G) {
      for (int m = 0; m < M; ++m) acts[m] = static_cast<const Act*>(block.act) + (token + m) * block.act_stride + a;
      const T* row = weights(block.down) + a * block.H;
      const Rows next = find_next<G>(block, a + ahead);
      if (a == 0) {
        row_tile<M, G, true, true>(acts, row, block.H, rows, next.first == nullptr ? Rows{row, row} : next);
      } else if (token == 0 && next.first != nullptr) {
        row_tile<M, G, false, true>(acts, row, block.H, rows, next);
      } else {
        row_tile<M, G, false, false>(acts, row, block.H, rows, next);
      }
    }
  }

  static void add_rows(const Block& block, float* sums, int64_t stride) {
    for (int64_t atom = 0; atom < block.B; atom += ATOMS) {
      for (int64_t token = 0; token < block.count; token += ROW_TOKENS) {
        const int64_t left = block.count - token;
        with_count<ROW_TOKENS>(left < ROW_TOKENS ? left : ROW_TOKENS, [&](auto m) {
          add_rows_tile<decltype(m)::value>(block, token, atom, ATOMS, sums, stride);
        });
      }
    }
  }

  // M tokens' sums of one step of columns; `packed`: the rows' parts, one atom (or pair) after the other.
  template <int M>
  static void column_tile(const Block& block, const Vec* packed, int64_t token, int64_t column, float* const* sums) {
    const Act* acts = static_cast<const Act*>(block.act) + token * block.act_stride;
    Vec total[M][2] = {};
    for (int64_t atom = 0; atom < block.B; atom += Ops::ATOM_STEP, packed += 2) {
      for (int m = 0; m < M; ++m) {
        const Vec act = Ops::spread(acts + m * block.act_stride + atom);
        for (int p = 0; p < 2; ++p) total[m][p] = Ops::dot(act, packed[p], total[m][p]);
      }
    }
    UNROLLED_LOOP
    for (int m = 0; m < M; ++m) {
      for (int p = 0; p < 2; ++p) {
        float* sum = sums[token + m] + column + p * (STEP / 2);
        Ops::store_sum(sum, Ops::add(Ops::load_sum(sum), total[m][p]));
      }
    }
  }

  // The rows of a block lie a page apart: a line of each is gathered once for all tokens, the next asked for.
  template <int WIDTH, bool REST>
  static void column_tiles(const Block& block, int64_t column, float* const* sums) {
    constexpr int PASSES = WIDTH < STEP ? 1 : WIDTH / STEP;
    Vec* packed = static_cast<Vec*>(block.scratch);
    const int64_t length = block.B / Ops::ATOM_STEP * 2;
    const T* row = weights(block.down) + column;
    for (int64_t atom = 0; atom < block.B; atom += Ops::ATOM_STEP, row += Ops::ATOM_STEP * block.H) {
      for (int i = 0; i < Ops::ATOM_STEP; ++i) __builtin_prefetch(row + i * block.H + 2 * LINE, 0, 2);
      for (int pass = 0; pass < PASSES; ++pass) {
        Ops::template load_rows<REST>(row + pass * STEP, block.H, packed + pass * length + atom / Ops::ATOM_STEP * 2);
      }
    }
    for (int pass = 0; pass < PASSES; ++pass) {
      for (int64_t token = 0; token < block.count; token += COLUMN_TOKENS) {
        const int64_t left = block.count - token;
        with_count<COLUMN_TOKENS>(left < COLUMN_TOKENS ? left : COLUMN_TOKENS, [&](auto m) {
          column_tile<decltype(m)::value>(block, packed + pass * length, token, column + pass * STEP, sums);
        });
      }
    }
  }

  static void add_columns(const Block& block, int64_t first, int64_t columns, float* const* sums) {
    int64_t column = first;
    const int64_t end = first + columns;
    for (; column + UNROLLED <= end; column += UNROLLED) column_tiles<UNROLLED, false>(block, column, sums);
    for (; column + STEP <= end; column += STEP) column_tiles<STEP, false>(block, column, sums);
    if constexpr (STEP > 16) {
      if (column < end) column_tiles<STEP, true>(block, column, sums);
    }
  }

  // --- after ---------------------------------------------------------------------------------------------

  static void reduce(const float* const* rows, int64_t count, int64_t columns, void* out) {
    float sums[REDUCED];
    add_up<Ops, STEP / 2>(rows, count, (columns + COLUMNS - 1) / COLUMNS * COLUMNS, sums);
    Ops::store(sums, columns, static_cast<T*>(out));
  }

  static int64_t count_scratch(int64_t B, int64_t) { return B * COLUMNS * static_cast<int64_t>(sizeof(float)); }

  static constexpr Kernels table = {sizeof(Act), COLUMNS, activate, add_rows, add_columns, reduce, count_scratch, 0, nullptr};
};

}  // namespace
