// y = x · wᵀ + bias on a CPU with AMX: bf16 in memory, multiplied by tiles, summed in fp32.
//
// Sixteen rows of w are a tile as they are in memory, and sixteen rows of x, paired, its columns.  An output is one chain
// of sums over all of K, whatever tiles are multiplied together: its bits depend neither on the other rows nor on the
// threads, who share out rows of w.  Two tiles of w are multiplied by up to two of x at once, so that as many tiles are
// loaded as multiplied; of w from the second-level cache, where a group of its rows stays for all rows of x that are held.

#include <algorithm>
#include <cstddef>
#include <new>
#include <vector>

#include <omp.h>

#include "../../native/amx.hpp"

namespace {

constexpr int64_t GROUP = 2 * TILE;           // rows of w that are multiplied together
constexpr int64_t HELD_BYTES = 1 << 20;       // of x, packed, that are held at once
constexpr int64_t MIN_WORK = 1 << 18;         // multiplications under which another thread costs more than it does
constexpr int64_t GATHERED = 3;               // rows of x up to which a product is read by columns, not transposed
enum Status { OK = 0, NO_MEMORY = 1, NO_TILES = 2 };

struct Problem {
  int64_t M, N, K;
  const uint16_t* x;
  int64_t x_stride;
  const uint16_t* w;
  int64_t w_stride;
  const uint16_t* bias;  // [N], or null
  uint16_t* y;           // [M][N]
};

inline __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

// To nearest even; subnormals stay, NaN is NaN.
inline __m256i narrow(__m512 sums) {
  const __m512i bits = _mm512_castps_si512(sums), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
}

// Sums of sixteen rows of w for each of `count` rows of x, of a product [row of w][row of x].
void read_columns(const TileSums product, int64_t count, __m512i* columns) {
  if (count <= GATHERED) {
    const __m512i lanes = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    for (int64_t row = 0; row < count; ++row) columns[row] = _mm512_castps_si512(_mm512_i32gather_ps(lanes, product[0] + row, 4));
    return;
  }
  __m512i lines[TILE];
  for (int64_t r = 0; r < TILE; ++r) lines[r] = _mm512_loadu_si512(product[r]);
  transpose(lines, columns);
}

// Rounds the two products of a group into `count` rows of y, a line each; `there`: its columns.
void store_products(const Problem& p, const TileSums* products, int64_t m, int64_t count, int64_t n, __mmask32 there) {
  __m512i columns[2][TILE];
  __m512 bias[2];
  for (int half = 0; half < 2; ++half) {
    read_columns(products[half], count, columns[half]);
    if (p.bias != nullptr) bias[half] = widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(there >> half * TILE), p.bias + n + half * TILE));
  }
  for (int64_t row = 0; row < count; ++row) {
    __m256i rounded[2];
    for (int half = 0; half < 2; ++half) {
      const __m512 sums = _mm512_castsi512_ps(columns[half][row]);
      rounded[half] = narrow(p.bias == nullptr ? sums : _mm512_add_ps(sums, bias[half]));
    }
    _mm512_mask_storeu_epi16(p.y + (m + row) * p.N + n, there, _mm512_inserti64x4(_mm512_castsi256_si512(rounded[0]), rounded[1], 1));
  }
}

// A thread's rows of w, a group at a time, for M rows of x from `first_row`, packed.
void run_share(const Problem& p, const TileRows* packed, int64_t first_row, int64_t M, int64_t first, int64_t last) {
  const TileUse use;
  const int64_t steps = count_steps(p.K), passes = (count_tiles(M) + 1) / 2;
  alignas(64) TileRows copies[2];
  alignas(64) TileSums products[4];
  for (int64_t n = first; n < last; n += GROUP) {
    const uint16_t *w = p.w + n * p.w_stride, *next = w + GROUP * p.w_stride;
    const int64_t counts[2] = {std::min(TILE, last - n), std::max<int64_t>(0, std::min(TILE, last - n - TILE))};
    const __mmask32 there = last - n >= GROUP ? ~__mmask32(0) : (__mmask32(1) << (last - n)) - 1;
    const RowPair rows = {w, counts[1] > 0 ? w + TILE * p.w_stride : w};
    Ahead ahead = {{next, next + TILE * p.w_stride}, n + GROUP < last ? (TILE + passes - 1) / passes : 0};
    for (int64_t pass = 0; pass < passes; ++pass, ahead.move(steps)) {
      if (pass == TILE) ahead.lines = 0;  // all were asked for
      const int64_t m = pass * 2 * TILE;
      const TileRows* x = packed + 2 * pass * steps;
      M - m > TILE ? multiply_rows<2>(rows, counts, p.w_stride, p.K, ahead, x, copies, products) : multiply_rows<1>(rows, counts, p.w_stride, p.K, ahead, x, copies, products);
      for (int64_t tile = 0; tile < 2 && m + tile * TILE < M; ++tile) {
        store_products(p, products + 2 * tile, first_row + m + tile * TILE, std::min(TILE, M - m - tile * TILE), n, there);
      }
    }
  }
}

void pack_tile(const Problem& p, int64_t first, int64_t M, TileRows* packed) {
  const uint16_t* rows[TILE];
  const int64_t count = std::min(TILE, M);
  for (int64_t r = 0; r < count; ++r) rows[r] = p.x + (first + r) * p.x_stride;
  pack_pairs(rows, count, p.K, packed);
}

void run_chunk(const Problem& p, int64_t first, int64_t M, TileRows* packed, int threads) {
  const int64_t tiles = count_tiles(M), steps = count_steps(p.K);
  if (threads == 1) {
    for (int64_t tile = 0; tile < tiles; ++tile) pack_tile(p, first + tile * TILE, M - tile * TILE, packed + tile * steps);
    run_share(p, packed, first, M, 0, p.N);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; ++tile) pack_tile(p, first + tile * TILE, M - tile * TILE, packed + tile * steps);
    const int64_t units = (p.N + GROUP - 1) / GROUP, team = omp_get_num_threads(), own = omp_get_thread_num();
    const int64_t from = units * own / team * GROUP, to = std::min(p.N, units * (own + 1) / team * GROUP);
    if (from < to) run_share(p, packed, first, M, from, to);
  }
}

}  // namespace

extern "C" int linear_bf16(int64_t M, int64_t N, int64_t K, const void* x, int64_t x_stride, const void* w, int64_t w_stride, const void* bias, void* y, int threads) {
  const Problem p{M, N, K, static_cast<const uint16_t*>(x), x_stride, static_cast<const uint16_t*>(w), w_stride, static_cast<const uint16_t*>(bias), static_cast<uint16_t*>(y)};
  static const bool granted = ask_for_tiles();
  if (!granted) return NO_TILES;
  struct alignas(64) Packed {
    TileRows rows;
  };
  static thread_local std::vector<Packed> memory;
  const int64_t steps = count_steps(K), held = std::max<int64_t>(2, HELD_BYTES / static_cast<int64_t>(sizeof(TileRows)) / std::max<int64_t>(steps, 1) / 2 * 2) * TILE;
  try {
    const size_t need = static_cast<size_t>(count_tiles(std::min(M, held)) * steps + 1);
    if (memory.size() < need) memory.resize(need);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  if (M * N * K < 2 * MIN_WORK) threads = 1;
  for (int64_t first = 0; first < M; first += held) run_chunk(p, first, std::min(held, M - first), &memory.data()->rows, threads);
  return OK;
}
