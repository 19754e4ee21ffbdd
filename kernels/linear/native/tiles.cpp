// y = x · wᵀ + bias on a CPU with AMX: bf16 in memory, multiplied by tiles, summed in fp32.
//
// Sixteen rows of w are a tile as they are in memory, and sixteen rows of x, paired, its columns.  An output is one chain
// of sums over all of K, whatever tiles are multiplied together: its bits depend neither on the other rows nor on the
// threads, who share out rows of w.  Two tiles of w, a group, are multiplied by up to two of x at once, so that as many
// tiles are loaded as multiplied.
//
//   few rows of x      all of K at once: of w from the second-level cache, where the group stays meanwhile
//   many, and long     K in parts: the group's part of w is held in the first-level cache, x's in the second, and sums
//                      are kept in memory from a part to the next

#include <algorithm>
#include <cstddef>
#include <new>
#include <vector>

#include <omp.h>

#include "../../native/amx.hpp"

namespace {

constexpr int64_t GROUP = 2 * TILE;           // rows of w that are multiplied together
constexpr int64_t ROWS = 512;                 // rows of x that are packed at once
constexpr int64_t FEW = 128;                  // rows of x up to which all of K is multiplied at once, if they are cached
constexpr int64_t PART = 16;                  // steps of K, else
constexpr int64_t GROUPS = 16;                // groups that meet a part of x before the next one, if all of x is not cached
constexpr int64_t CACHED_BYTES = 1 << 20;     // of x, or of y, up to which it stays in the second-level cache
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

// Rounds the two products of a group into `count` rows of y, a line each; `there`: its columns.  `past`: whole lines, past
// the caches.
void store_products(const Problem& p, const TileSums* products, int64_t m, int64_t count, int64_t n, __mmask32 there, bool past) {
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
    const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512(rounded[0]), rounded[1], 1);
    uint16_t* y = p.y + (m + row) * p.N + n;
    past ? _mm512_stream_si512(reinterpret_cast<__m512i*>(y), line) : _mm512_mask_storeu_epi16(y, there, line);
  }
}

// Tiles of w in the group from row n on, and which of its columns of y are there.
struct Group {
  RowPair rows;
  int64_t counts[2];
  __mmask32 there;
};
Group find_group(const Problem& p, int64_t n, int64_t last) {
  const uint16_t* w = p.w + n * p.w_stride;
  const int64_t left = last - n;
  return {{w, left > TILE ? w + TILE * p.w_stride : w}, {std::min(TILE, left), std::max<int64_t>(0, std::min(TILE, left - TILE))}, left >= GROUP ? ~__mmask32(0) : (__mmask32(1) << left) - 1};
}

// A thread's rows of w, a group at a time, for M rows of x from `first_row`, packed: [tile][step].
void multiply_whole(const Problem& p, const TileRows* packed, int64_t first_row, int64_t M, int64_t first, int64_t last) {
  const TileUse use;
  const int64_t steps = count_steps(p.K), passes = (count_tiles(M) + 1) / 2;
  alignas(64) TileRows copies[2];
  alignas(64) TileSums products[4];
  for (int64_t n = first; n < last; n += GROUP) {
    const Group group = find_group(p, n, last);
    const uint16_t* next = group.rows.first + GROUP * p.w_stride;
    Ahead ahead = {{next, next + TILE * p.w_stride}, n + GROUP < last ? (TILE + passes - 1) / passes : 0};
    for (int64_t pass = 0; pass < passes; ++pass, ahead.move(steps)) {
      if (pass == TILE) ahead.lines = 0;  // all were asked for
      const int64_t m = pass * 2 * TILE;
      const TileRows* x = packed + 2 * pass * steps;
      M - m > TILE ? multiply_rows<2>(group.rows, group.counts, p.w_stride, p.K, ahead, x, copies, products) : multiply_rows<1>(group.rows, group.counts, p.w_stride, p.K, ahead, x, copies, products);
      for (int64_t tile = 0; tile < 2 && m + tile * TILE < M; ++tile) {
        store_products(p, products + 2 * tile, first_row + m + tile * TILE, std::min(TILE, M - m - tile * TILE), n, group.there, false);
      }
    }
  }
}

// The same with K in parts, each met by so many groups; packed: [part][tile][step], sums: [group][pass][tile][half].
void multiply_parts(const Problem& p, const TileRows* packed, int64_t first_row, int64_t M, int64_t first, int64_t last, int64_t groups, TileSums* sums) {
  const TileUse use;
  const int64_t steps = count_steps(p.K), tiles = count_tiles(M), passes = (tiles + 1) / 2, lines = (GROUP + passes - 1) / passes;
  const bool past = M * p.N * 2 > CACHED_BYTES && p.N % GROUP == 0 && reinterpret_cast<uintptr_t>(p.y) % 64 == 0;
  alignas(64) TileRows held[2 * PART];
  for (int64_t block = first; block < last; block += groups * GROUP) {
    const int64_t end = std::min(last, block + groups * GROUP);
    for (int64_t step = 0; step < steps; step += PART) {
      const int64_t now = std::min(PART, steps - step), k = step * STEP;
      const bool ends = step + PART >= steps;
      const TileRows* x = packed + step * tiles;
      TileSums* own = sums;
      for (int64_t n = block; n < end; n += GROUP) {
        const Group group = find_group(p, n, last);
        hold_rows({group.rows.first + k, group.rows.second + k}, group.counts, p.w_stride, std::min(PART * STEP, p.K - k), held);
        const uint16_t* next = n + GROUP < end ? group.rows.first + GROUP * p.w_stride + k : ends ? p.w + end * p.w_stride : p.w + block * p.w_stride + k + PART * STEP;
        Asker asker = {reinterpret_cast<const char*>(next), p.w_stride * static_cast<int64_t>(sizeof(uint16_t)), PART};
        for (int64_t pass = 0; pass < passes; ++pass, own += 4) {
          const int64_t m = pass * 2 * TILE, asked = pass < GROUP && (!ends || end < last || n + GROUP < end) ? lines : 0;
          const TileRows* two = x + 2 * pass * now;
          M - m > TILE ? multiply_held<2>(held, now, two, now, step > 0, asker, asked, own) : multiply_held<1>(held, now, two, now, step > 0, asker, asked, own);
          for (int64_t tile = 0; ends && tile < 2 && m + tile * TILE < M; ++tile) {
            store_products(p, own + 2 * tile, first_row + m + tile * TILE, std::min(TILE, M - m - tile * TILE), n, group.there, past);
          }
        }
      }
    }
  }
  if (past) _mm_sfence();
}

// How M rows of x are multiplied.
struct Plan {
  int64_t tiles, steps;
  bool cached, whole;
  int64_t part, groups;  // steps that are packed together, groups that meet them
  Plan(int64_t M, int64_t K) : tiles(count_tiles(M)), steps(count_steps(K)) {
    cached = M * K * static_cast<int64_t>(sizeof(uint16_t)) <= CACHED_BYTES;
    whole = steps <= PART || (M <= FEW && cached);
    part = whole ? steps : PART;
    groups = cached ? 1 : GROUPS;
  }
  int64_t count_sums() const { return whole ? 0 : (tiles + 1) / 2 * 4 * groups; }
};

// Rows of x that are packed at once: where few rows of w meet them, as many as are cached meanwhile.
int64_t choose_chunk(int64_t N, int64_t K) {
  const int64_t cached = CACHED_BYTES / std::max<int64_t>(1, K * static_cast<int64_t>(sizeof(uint16_t))) / GROUP * GROUP;
  return N > GROUPS * GROUP ? ROWS : std::min(ROWS, std::max(GROUP, cached));
}

// A tile of rows of x: [part][tile][step].
void pack_tile(const Problem& p, const Plan& plan, int64_t first, int64_t count, int64_t tile, TileRows* packed) {
  const uint16_t* rows[TILE];
  for (int64_t step = 0; step < plan.steps; step += plan.part) {
    const int64_t now = std::min(plan.part, plan.steps - step), k = step * STEP;
    for (int64_t r = 0; r < count; ++r) rows[r] = p.x + (first + r) * p.x_stride + k;
    pack_pairs(rows, count, std::min(now * STEP, p.K - k), packed + step * plan.tiles + tile * now);
  }
}

void run_chunk(const Problem& p, const Plan& plan, int64_t first, int64_t M, TileRows* packed, TileSums* sums, int threads) {
  const auto pack = [&](int64_t tile) { pack_tile(p, plan, first + tile * TILE, std::min(TILE, M - tile * TILE), tile, packed); };
  const auto multiply = [&](int64_t from, int64_t to, int64_t thread) { plan.whole ? multiply_whole(p, packed, first, M, from, to) : multiply_parts(p, packed, first, M, from, to, plan.groups, sums + thread * plan.count_sums()); };
  if (threads == 1) {
    for (int64_t tile = 0; tile < plan.tiles; ++tile) pack(tile);
    return multiply(0, p.N, 0);
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < plan.tiles; ++tile) pack(tile);
    const int64_t units = (p.N + GROUP - 1) / GROUP, team = omp_get_num_threads(), own = omp_get_thread_num();
    const int64_t from = units * own / team * GROUP, to = std::min(p.N, units * (own + 1) / team * GROUP);
    if (from < to) multiply(from, to, own);
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
  static_assert(sizeof(TileRows) == sizeof(TileSums), "memory is shared out in units of both");
  static thread_local std::vector<Packed> memory;
  if (M * N * K < 2 * MIN_WORK) threads = 1;
  const int64_t chunk = choose_chunk(N, K);
  const Plan most(std::min(M, chunk), K);
  const int64_t rows = most.tiles * most.steps;
  try {
    const size_t need = static_cast<size_t>(rows + threads * most.count_sums() + 1);
    if (memory.size() < need) memory.resize(need);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  TileRows* packed = &memory.data()->rows;
  TileSums* sums = reinterpret_cast<TileSums*>(packed + rows);
  for (int64_t first = 0; first < M; first += chunk) {
    const int64_t now = std::min(chunk, M - first);
    run_chunk(p, Plan(now, K), first, now, packed, sums, threads);
  }
  return OK;
}
