// Grouped MoE over the kept blocks of pruned experts, for a CPU.  Built and called by cpu.py, which states the shapes.
//
// Two passes over the experts that a batch chose, each in ascending order:
//   activate  act[pair, atom] = weight · silu(gate · x) · (up · x), a dot product per kept atom;
//   combine   out[token, :] += act[pair, atom] · w2[atom, :], each thread owning a range of columns for all tokens.
// Nothing is read but x and the kept blocks of chosen experts, and these once per chunk of tokens.
//
// A row's bits do not depend on the other rows of the batch: every dot product runs over H in the same order whatever
// tile it is computed in, and every output adds its experts in ascending order and their atoms in stored order.
//
// The inner loops are written in 16-lane vectors, which GCC and Clang lower to what the machine has; bf16 uses the
// AVX512-BF16 dot product where there is one.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include <omp.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int ATOMS = 16;             // atoms of one unit of work in `activate`; every block size is a multiple
constexpr int TOKENS = 6;             // tokens of a tile in `activate`
constexpr int COLUMNS = 2 * LANES;    // columns of a tile in `combine`, or a multiple
constexpr int64_t CHUNK = 4096;       // tokens whose scratch is held at once
enum Status { OK = 0, BAD_EXPERT = 1, NO_MEMORY = 2 };

using f32 = float;
using f16 = _Float16;
struct bf16 {
  uint16_t bits;
};

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vec_u32 __attribute__((vector_size(64)));
typedef uint16_t vec_u16 __attribute__((vector_size(32), aligned(2), may_alias));

inline vec load(const f32* p) { return *reinterpret_cast<const vec*>(p); }
inline vec load(const bf16* p) {
  return reinterpret_cast<vec>(__builtin_convertvector(*reinterpret_cast<const vec_u16*>(p), vec_u32) << 16);
}
inline vec load(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  vec wide;
  for (int lane = 0; lane < LANES; ++lane) wide[lane] = static_cast<float>(p[lane]);
  return wide;
#endif
}

inline float widen(f32 value) { return value; }
inline float widen(f16 value) { return static_cast<float>(value); }
inline float widen(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline void narrow(float value, f32* out) { *out = value; }
inline void narrow(float value, f16* out) { *out = static_cast<f16>(value); }
inline void narrow(float value, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline vec multiply_add(vec a, vec b, vec sum) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
#else
  return a * b + sum;
#endif
}

inline float add_lanes(vec v) {
  typedef float vec8 __attribute__((vector_size(32)));
  typedef float vec4 __attribute__((vector_size(16)));
  const vec8 by8 = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const vec4 by4 = __builtin_shufflevector(by8, by8, 0, 1, 2, 3) + __builtin_shufflevector(by8, by8, 4, 5, 6, 7);
  return (by4[0] + by4[2]) + (by4[1] + by4[3]);
}

inline float silu(float value) { return value / (1.0f + std::exp(-value)); }

// What one tile of `activate` and of `combine` do to a step of their inner loop, by dtype.

template <typename T>
struct Ops {
  static constexpr int STEP = LANES;  // elements of H per step of a dot product
  using Operand = vec;
  static Operand operand(const T* p) { return load(p); }
  static Operand tail(const T* p) { return load(p); }
  static vec dot(Operand a, Operand b, vec sum) { return multiply_add(a, b, sum); }

  // Two atoms' rows of 32 columns (HALF: of 16), times two activations of one token.
  struct Pair {
    vec first[2], second[2];
  };
  template <bool HALF>
  static Pair rows(const T* first, const T* second) {
    if constexpr (HALF) return {{load(first), vec{}}, {load(second), vec{}}};
    return {{load(first), load(first + LANES)}, {load(second), load(second + LANES)}};
  }
  static void accumulate(const Pair& pair, const T* act, vec* sum) {
    const vec one = vec{} + widen(act[0]), two = vec{} + widen(act[1]);
    for (int i = 0; i < 2; ++i) sum[i] = multiply_add(two, pair.second[i], multiply_add(one, pair.first[i], sum[i]));
  }
  // Where column c of 32 lies in an accumulator.
  static int place(int column) { return column; }
};

#if defined(__AVX512BF16__)
template <>
struct Ops<bf16> {
  static constexpr int STEP = 2 * LANES;
  using Operand = __m512bh;
  static Operand operand(const bf16* p) { return reinterpret_cast<Operand>(_mm512_loadu_si512(p)); }
  static Operand tail(const bf16* p) { return reinterpret_cast<Operand>(_mm512_maskz_loadu_epi16(0x0000ffffu, p)); }
  static vec dot(Operand a, Operand b, vec sum) {
    return reinterpret_cast<vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
  }

  // The two rows interleaved, so that a lane holds one column of both.
  struct Pair {
    __m512i low, high;
  };
  template <bool HALF>
  static Pair rows(const bf16* first, const bf16* second) {
    constexpr __mmask32 mask = HALF ? 0x0000ffffu : 0xffffffffu;
    const __m512i one = _mm512_maskz_loadu_epi16(mask, first), two = _mm512_maskz_loadu_epi16(mask, second);
    return {_mm512_unpacklo_epi16(one, two), _mm512_unpackhi_epi16(one, two)};
  }
  static void accumulate(const Pair& pair, const bf16* act, vec* sum) {
    int32_t both;
    std::memcpy(&both, act, sizeof both);
    const Operand acts = reinterpret_cast<Operand>(_mm512_set1_epi32(both));
    sum[0] = dot(acts, reinterpret_cast<Operand>(pair.low), sum[0]);
    sum[1] = dot(acts, reinterpret_cast<Operand>(pair.high), sum[1]);
  }
  // Unpacking takes the lower and upper four of every eight columns.
  static int place(int column) { return (column / 4 % 2) * LANES + column / 8 * 4 + column % 4; }
};
#endif

template <int N>
using Int = std::integral_constant<int, N>;

// Calls f with the compile-time constant that equals count, 1 … MAX.
template <int MAX, typename F>
inline void with_count(int64_t count, F f) {
  if constexpr (MAX == 1) {
    f(Int<1>());
  } else {
    count == MAX ? f(Int<MAX>()) : with_count<MAX - 1>(count, f);
  }
}

struct Shape {
  int64_t T, H, k, E, B;
};

// The (token, expert) pairs of a chunk, sorted by expert.
struct Batch {
  std::vector<int32_t> experts;       // chosen experts, ascending
  std::vector<int64_t> first;         // [chosen + 1] first pair of each
  std::vector<int32_t> tokens;        // [pairs] token of a pair, within the chunk
  std::vector<float> weights;         // [pairs]
  std::vector<int64_t> act;           // [chosen + 1] first activation of each
};

// False: an id is out of range.  An expert that a token names twice is one pair with the sum of the weights.
bool sort_pairs(const Shape& shape, const float* weights, const int32_t* ids, const int32_t* block_start, Batch* batch) {
  const auto is_pair = [&](int64_t t, int64_t j) {
    const int32_t* row = ids + t * shape.k;
    return block_start[row[j] + 1] > block_start[row[j]] && std::find(row, row + j, row[j]) == row + j;
  };
  std::vector<int64_t> count(shape.E, 0);
  for (int64_t t = 0; t < shape.T; ++t) {
    for (int64_t j = 0; j < shape.k; ++j) {
      const int32_t e = ids[t * shape.k + j];
      if (e < 0 || e >= shape.E) return false;
      count[e] += is_pair(t, j);
    }
  }
  std::vector<int64_t> next(shape.E, 0);
  batch->first.push_back(0);
  batch->act.push_back(0);
  for (int64_t e = 0; e < shape.E; ++e) {
    if (count[e] == 0) continue;
    next[e] = batch->first.back();
    batch->experts.push_back(static_cast<int32_t>(e));
    batch->first.push_back(batch->first.back() + count[e]);
    batch->act.push_back(batch->act.back() + count[e] * (block_start[e + 1] - block_start[e]) * shape.B);
  }
  batch->tokens.resize(batch->first.back());
  batch->weights.resize(batch->first.back());
  for (int64_t t = 0; t < shape.T; ++t) {
    for (int64_t j = 0; j < shape.k; ++j) {
      if (!is_pair(t, j)) continue;
      const int64_t place = next[ids[t * shape.k + j]]++;
      batch->tokens[place] = static_cast<int32_t>(t);
      for (int64_t i = j; i < shape.k; ++i) {
        if (ids[t * shape.k + i] == ids[t * shape.k + j]) batch->weights[place] += weights[t * shape.k + i];
      }
    }
  }
  return true;
}

// One step along H of R atoms' gate and up for M tokens.  LAST: the 16 elements that are left of a step of 32.
template <typename T, int M, int R, bool LAST>
inline void dot_step(const T* const* x, const T* gate, const T* up, int64_t H, int64_t h, vec (*sums)[M]) {
  const auto operand = LAST ? Ops<T>::tail : Ops<T>::operand;
  typename Ops<T>::Operand inputs[M];
  for (int m = 0; m < M; ++m) inputs[m] = operand(x[m] + h);
  for (int r = 0; r < R; ++r) {
    // The next atoms' rows, asked for while these are multiplied.
    __builtin_prefetch(gate + (R + r) * H + h, 0, 2);
    __builtin_prefetch(up + (R + r) * H + h, 0, 2);
    const auto gate_row = operand(gate + r * H + h);
    for (int m = 0; m < M; ++m) sums[r][m] = Ops<T>::dot(inputs[m], gate_row, sums[r][m]);
    const auto up_row = operand(up + r * H + h);
    for (int m = 0; m < M; ++m) sums[R + r][m] = Ops<T>::dot(inputs[m], up_row, sums[R + r][m]);
  }
}

// Gate and up of R atoms for M tokens.  The sums go to gates/ups [M][ATOMS].
template <typename T, int M, int R>
void dot_tile(const T* const* x, const T* gate, const T* up, int64_t H, float* gates, float* ups) {
  vec sums[2 * R][M] = {};
  int64_t h = 0;
  for (; h + Ops<T>::STEP <= H; h += Ops<T>::STEP) dot_step<T, M, R, false>(x, gate, up, H, h, sums);
  if (h < H) dot_step<T, M, R, true>(x, gate, up, H, h, sums);
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) {
      gates[m * ATOMS + r] = add_lanes(sums[r][m]);
      ups[m * ATOMS + r] = add_lanes(sums[R + r][m]);
    }
  }
}

template <typename T, int M, int R>
void activate_tokens(const T* const* x, const float* weights, const T* gate, const T* up, int64_t H, T* act, int64_t stride) {
  float gates[M * ATOMS], ups[M * ATOMS];
  for (int atom = 0; atom < ATOMS; atom += R) {
    dot_tile<T, M, R>(x, gate + atom * H, up + atom * H, H, gates + atom, ups + atom);
  }
  for (int m = 0; m < M; ++m) {
    for (int atom = 0; atom < ATOMS; ++atom) {
      narrow(weights[m] * silu(gates[m * ATOMS + atom]) * ups[m * ATOMS + atom], act + m * stride + atom);
    }
  }
}

// One unit of work: 16 atoms of a block for every token that chose the expert.  act [count][stride].
template <typename T>
void activate(const T* x, const int32_t* tokens, const float* weights, int64_t count, const T* gate, const T* up, int64_t H, T* act, int64_t stride) {
  for (int64_t first = 0; first < count; first += TOKENS) {
    const int64_t M = std::min<int64_t>(TOKENS, count - first);
    const T* rows[TOKENS];
    for (int64_t m = 0; m < M; ++m) rows[m] = x + tokens[first + m] * H;
    with_count<TOKENS>(M, [&](auto m) {
      constexpr int M_TILE = decltype(m)::value;
      activate_tokens<T, M_TILE, M_TILE <= 2 ? 4 : 2>(rows, weights + first, gate, up, H, act + first * stride, stride);
    });
  }
}

// M tokens × C·32 columns (HALF: 16): sums [M] rows of fp32 += act [M][stride] · w2 [atoms][H].  FETCH: the next block's
// rows are asked for on the way, as their lines lie too far apart for the hardware to foresee.
template <typename T, int M, int C, bool HALF, bool FETCH>
void combine_tile(const T* act, int64_t stride, const T* w2, int64_t H, int64_t atoms, float* const* sum) {
  vec sums[M][2 * C];
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < 2 * C; ++i) sums[m][i] = load(sum[m] + i * LANES);
  }
  for (int64_t atom = 0; atom < atoms; atom += 2) {
    const T* row = w2 + atom * H;
    for (int c = 0; c < C; ++c) {
      if constexpr (FETCH) {
        __builtin_prefetch(row + atoms * H + c * COLUMNS, 0, 2);
        __builtin_prefetch(row + (atoms + 1) * H + c * COLUMNS, 0, 2);
      }
      const auto pair = Ops<T>::template rows<HALF>(row + c * COLUMNS, row + H + c * COLUMNS);
      for (int m = 0; m < M; ++m) Ops<T>::accumulate(pair, act + m * stride + atom, sums[m] + 2 * c);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < 2 * C; ++i) *reinterpret_cast<vec*>(sum[m] + i * LANES) = sums[m][i];
  }
}

// C·32 columns of a block for every token that chose the expert, M_MAX tokens at a time.
template <typename T, int C, int M_MAX, bool HALF>
void combine_columns(const T* act, int64_t stride, const int32_t* tokens, int64_t count, const T* w2, int64_t H, int64_t atoms, float* sums, int64_t sums_stride) {
  for (int64_t first = 0; first < count; first += M_MAX) {
    const int64_t M = std::min<int64_t>(M_MAX, count - first);
    float* rows[M_MAX];
    for (int64_t m = 0; m < M; ++m) rows[m] = sums + tokens[first + m] * sums_stride;
    with_count<M_MAX>(M, [&](auto m) {
      constexpr int M_TILE = decltype(m)::value;
      const T* from = act + first * stride;
      first == 0 ? combine_tile<T, M_TILE, C, HALF, true>(from, stride, w2, H, atoms, rows)
                 : combine_tile<T, M_TILE, C, HALF, false>(from, stride, w2, H, atoms, rows);
    });
  }
}

// One expert's block for a range of columns: sums [T][sums_stride] += act · w2.  The fewer tokens, the wider the tile.
template <typename T>
void combine(const T* act, int64_t stride, const int32_t* tokens, int64_t count, const T* w2, int64_t H, int64_t atoms, float* sums, int64_t sums_stride, int64_t columns) {
  int64_t column = 0;
  const auto run = [&](auto width, auto tokens_at_once, auto half) {
    constexpr int C = decltype(width)::value;
    for (; column + C * COLUMNS <= columns || half; column += C * COLUMNS) {
      combine_columns<T, C, decltype(tokens_at_once)::value, half>(act, stride, tokens, count, w2 + column, H, atoms, sums + column, sums_stride);
      if (half) break;
    }
  };
  if (count == 1) run(Int<4>(), Int<1>(), std::false_type());
  run(Int<1>(), Int<8>(), std::false_type());
  if (column < columns) run(Int<1>(), Int<8>(), std::true_type());
}

template <typename T>
Status run_chunk(const Shape& shape, const T* x, const float* weights, const int32_t* ids, const T* w13, const T* w2, const int32_t* block_start, T* out, int threads) {
  const int64_t H = shape.H, B = shape.B;
  const int64_t tiles = (H + COLUMNS - 1) / COLUMNS, stride = tiles * COLUMNS;
  Batch batch;
  if (!sort_pairs(shape, weights, ids, block_start, &batch)) return BAD_EXPERT;
  const int64_t chosen = static_cast<int64_t>(batch.experts.size());
  // Units of `activate`: 16 atoms of a kept block of a chosen expert.
  std::vector<int64_t> first_unit(1, 0);
  for (const int32_t e : batch.experts) first_unit.push_back(first_unit.back() + (block_start[e + 1] - block_start[e]) * (B / ATOMS));
  const std::unique_ptr<T[]> act(new T[batch.act.back()]);
  const std::unique_ptr<float[]> sums(new float[shape.T * stride]());

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 4)
    for (int64_t unit = 0; unit < first_unit.back(); ++unit) {
      const int64_t i = std::upper_bound(first_unit.begin(), first_unit.end(), unit) - first_unit.begin() - 1;
      const int64_t start = block_start[batch.experts[i]], width = (block_start[batch.experts[i] + 1] - start) * B;
      const int64_t atom = (unit - first_unit[i]) * ATOMS;
      const T* gate = w13 + ((start + atom / B) * 2 * B + atom % B) * H;
      const int64_t pair = batch.first[i];
      activate(x, &batch.tokens[pair], &batch.weights[pair], batch.first[i + 1] - pair, gate, gate + B * H, H, act.get() + batch.act[i] + atom, width);
    }
#pragma omp for schedule(static, 1)
    for (int64_t slice = 0; slice < threads; ++slice) {
      const int64_t from = tiles * slice / threads * COLUMNS, columns = std::min(H, tiles * (slice + 1) / threads * COLUMNS) - from;
      for (int64_t i = 0; i < chosen; ++i) {
        const int64_t start = block_start[batch.experts[i]], width = (block_start[batch.experts[i] + 1] - start) * B;
        const int64_t pair = batch.first[i];
        for (int64_t atom = 0; atom < width; atom += B) {
          combine(act.get() + batch.act[i] + atom, width, &batch.tokens[pair], batch.first[i + 1] - pair, w2 + (start * B + atom) * H + from, H, B, sums.get() + from, stride, columns);
        }
      }
      for (int64_t t = 0; t < shape.T; ++t) {
        for (int64_t c = from; c < from + columns; ++c) narrow(sums[t * stride + c / COLUMNS * COLUMNS + Ops<T>::place(c % COLUMNS)], out + t * H + c);
      }
    }
  }
  return OK;
}

template <typename T>
Status run(Shape shape, const void* x, const float* weights, const int32_t* ids, const void* w13, const void* w2, const int32_t* block_start, void* out, int threads) {
  const int64_t T_all = shape.T;
  for (int64_t first = 0; first < T_all; first += CHUNK) {
    shape.T = std::min(CHUNK, T_all - first);
    const Status status = run_chunk(shape, static_cast<const T*>(x) + first * shape.H, weights + first * shape.k, ids + first * shape.k, static_cast<const T*>(w13), static_cast<const T*>(w2), block_start, static_cast<T*>(out) + first * shape.H, threads);
    if (status != OK) return status;
  }
  return OK;
}

}  // namespace

extern "C" int sentinel_moe(int dtype, int64_t T, int64_t H, int64_t k, int64_t E, int64_t B, const void* x, const float* weights, const int32_t* ids, const void* w13, const void* w2, const int32_t* block_start, void* out, int threads) {
  const Shape shape{T, H, k, E, B};
  try {
    switch (dtype) {
      case 0: return run<f32>(shape, x, weights, ids, w13, w2, block_start, out, threads);
      case 1: return run<f16>(shape, x, weights, ids, w13, w2, block_start, out, threads);
      default: return run<bf16>(shape, x, weights, ids, w13, w2, block_start, out, threads);
    }
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
