// AMX's tiles, for kernels in bf16.  Private to the file that includes it, which is compiled with AMX and AVX-512.

#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>
#if defined(EMULATE_AMX)
#include "amx_emulated.hpp"
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TILE = 16, STEP = 32;  // rows of a tile; bf16 of a row
using TileRows = uint16_t[TILE][STEP];   // in memory: rows of x, weights or interleaved pairs
using TileSums = float[TILE][TILE];

inline int64_t count_steps(int64_t length) { return (length + STEP - 1) / STEP; }
inline int64_t count_tiles(int64_t rows) { return (rows + TILE - 1) / TILE; }

// What was written is in memory before a tile is loaded: g++'s intrinsics do not say that they read it, and it leaves out
// stores that nobody seems to read.
inline void settle_memory(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// All tiles in use are full, 16 rows of 64 bytes: sums 0 to 3, left 4 and 5, right 6 and 7.
struct TileUse {
  TileUse() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    settle_memory(&config);
    _tile_loadconfig(&config);
  }
  ~TileUse() { _tile_release(); }
};

// out[i][j] = in[j][i], sixteen rows of sixteen pairs.
inline void transpose(const __m512i* in, __m512i* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd), high_odd = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    out[i] = _mm512_shuffle_i32x4(low, high, 0x88);
    out[i + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
    out[i + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    out[i + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

// Sixteen rows or fewer, of `length` each, as the right side of products: [step][pair][row][2], zeros for what is not there.
inline void pack_pairs(const uint16_t* const* rows, int64_t count, int64_t length, TileRows* packed) {
  for (int64_t k = 0; k < length; k += STEP) {
    const __mmask32 there = length - k >= STEP ? ~__mmask32(0) : (__mmask32(1) << (length - k)) - 1;
    __m512i lines[TILE];
    for (int64_t r = 0; r < TILE; ++r) lines[r] = r < count ? _mm512_maskz_loadu_epi16(there, rows[r] + k) : _mm512_setzero_si512();
    transpose(lines, reinterpret_cast<__m512i*>(packed[k / STEP]));
  }
}

// Rows of weights from column k on, where a tile is loaded from: as they are, or copied with zeros for what is not there.
struct Left {
  const void* first;
  int64_t stride;
};
inline Left find_left(const uint16_t* row, int64_t stride, int64_t count, int64_t left, TileRows copy) {
  if (count >= TILE && left >= STEP) return {row, stride * static_cast<int64_t>(sizeof(uint16_t))};
  const __mmask32 there = left >= STEP ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
  for (int64_t r = 0; r < TILE; ++r) _mm512_storeu_si512(copy[r], r < count ? _mm512_maskz_loadu_epi16(there, row + r * stride) : _mm512_setzero_si512());
  return {copy, sizeof copy[0]};
}

// Two tiles of rows of weights.
struct RowPair {
  const uint16_t *first, *second;
};

// Rows that come next: in each step so many lines of both tiles are asked for, in their order in memory.
struct Ahead {
  RowPair rows;
  int64_t lines;
  void move(int64_t steps) {
    rows.first += steps * lines * STEP;
    rows.second += steps * lines * STEP;
  }
};

// Copies two tiles of rows, of which `counts` are there, for `multiply_held`: [tile][step].
inline void hold_rows(RowPair rows, const int64_t* counts, int64_t stride, int64_t length, TileRows* held) {
  const int64_t steps = count_steps(length);
  for (int64_t tile = 0; tile < 2; ++tile, held += steps) {
    const uint16_t* row = tile == 0 ? rows.first : rows.second;
    for (int64_t r = 0; r < TILE; ++r, row += r < counts[tile] ? stride : 0) {
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t left = length - s * STEP;
        const __mmask32 there = r >= counts[tile] ? 0 : left >= STEP ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
        _mm512_store_si512(held[s][r], _mm512_maskz_loadu_epi16(there, row + s * STEP));
      }
    }
  }
}

// Asks for lines of rows, one after the other in their order in memory; `stride` in bytes.
struct Asker {
  const char* row;
  int64_t stride, lines, line = 0;
  void ask() {
    __builtin_prefetch(row + line * 64, 0, 2);
    if (++line == lines) line = 0, row += stride;
  }
};

// Zeros for the sums of two products, or of four.
template <int TILES>
inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (TILES == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <int TILES>
inline void load_sums(const TileSums* products) {
  _tile_loadd(0, products[0], 64);
  _tile_loadd(1, products[1], 64);
  if constexpr (TILES == 2) {
    _tile_loadd(2, products[2], 64);
    _tile_loadd(3, products[3], 64);
  }
}

template <int TILES>
inline void store_sums(TileSums* products) {
  _tile_stored(0, products[0], 64);
  _tile_stored(1, products[1], 64);
  if constexpr (TILES == 2) {
    _tile_stored(2, products[2], 64);
    _tile_stored(3, products[3], 64);
  }
}

// Products of two tiles of rows, of which `counts` are there, by TILES packed tiles: [tile][first or second].
template <int TILES>
inline void multiply_rows(RowPair rows, const int64_t* counts, int64_t stride, int64_t length, Ahead ahead, const TileRows* packed, TileRows* copies, TileSums* products) {
  const int64_t steps = count_steps(length);
  clear_sums<TILES>();
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t line = 0; line < ahead.lines; ++line) __builtin_prefetch(ahead.rows.first + line * STEP, 0, 2);
    const Left first = find_left(rows.first + s * STEP, stride, counts[0], length - s * STEP, copies[0]);
    const Left second = find_left(rows.second + s * STEP, stride, counts[1], length - s * STEP, copies[1]);
    settle_memory(copies);
    _tile_loadd(6, packed[s], 64);
    _tile_loadd(4, first.first, first.stride);
    _tile_dpbf16ps(0, 4, 6);
    for (int64_t line = 0; line < ahead.lines; ++line) __builtin_prefetch(ahead.rows.second + line * STEP, 0, 2);
    ahead.move(1);
    _tile_loadd(5, second.first, second.stride);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (TILES == 2) {
      _tile_loadd(7, packed[steps + s], 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums<TILES>(products);
}

// Products of two tiles of rows that are held by TILES packed ones, `apart` from each other: [tile][first or second].  What
// is held stays in the first-level cache, past which packed tiles are loaded.  `more`: to those that are there already.
template <int TILES>
inline void multiply_held(const TileRows* held, int64_t steps, const TileRows* packed, int64_t apart, bool more, Asker& asker, int64_t lines, TileSums* products) {
  if (more) {
    settle_memory(products);
    load_sums<TILES>(products);
  } else {
    clear_sums<TILES>();
  }
  settle_memory(held);
  Asker own = asker;
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t line = 0; line < lines; ++line) own.ask();
    _tile_stream_loadd(6, packed[s], 64);
    _tile_loadd(4, held[s], 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, held[steps + s], 64);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (TILES == 2) {
      _tile_stream_loadd(7, packed[apart + s], 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  asker = own;
  store_sums<TILES>(products);
}

#if defined(EMULATE_AMX)
inline bool ask_for_tiles() { return true; }
#else
// The processor has it, the system keeps its registers, and this process may use them: Linux grants 8 KiB a thread.
inline bool ask_for_tiles() {
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, OSXSAVE = 1u << 27, TILE_STATE = 3u << 17;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & OSXSAVE) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & AMX_BF16) == 0 || (d & AMX_TILE) == 0) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & TILE_STATE) == TILE_STATE && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

#endif

}  // namespace
