// AMX's tiles in plain C++, after Intel's description of the instructions: for processors without them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct EmulatedTiles {
  uint8_t data[8][16][64];
  uint8_t rows[8];
  uint16_t bytes[8];
  bool configured;
};

thread_local EmulatedTiles tiles;

inline void fail_unless(bool holds) {
  if (!holds) __builtin_trap();
}

inline void emulate_config(const void* config) {
  uint8_t raw[64];
  std::memcpy(raw, config, sizeof raw);
  fail_unless(raw[0] == 1 && raw[1] == 0);
  std::memset(&tiles, 0xff, sizeof tiles);  // what is not loaded is NaN
  for (int t = 0; t < 8; ++t) {
    std::memcpy(&tiles.bytes[t], raw + 16 + 2 * t, 2);
    tiles.rows[t] = raw[48 + t];
    fail_unless(tiles.rows[t] <= 16 && tiles.bytes[t] <= 64);
  }
  tiles.configured = true;
}

inline void emulate_load(int t, const void* from, int64_t stride) {
  fail_unless(tiles.configured);
  for (int r = 0; r < tiles.rows[t]; ++r) std::memcpy(tiles.data[t][r], static_cast<const char*>(from) + r * stride, tiles.bytes[t]);
}

inline void emulate_store(int t, void* to, int64_t stride) {
  fail_unless(tiles.configured);
  for (int r = 0; r < tiles.rows[t]; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tiles.data[t][r], tiles.bytes[t]);
}

// Subnormals count as zero.
inline float read_bf16(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  const uint32_t wide = (bits & 0x7f80) == 0 ? 0 : static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Even and odd products are summed apart, and then added to the tile.
inline void emulate_product(int c, int a, int b) {
  fail_unless(tiles.configured && tiles.rows[a] == tiles.rows[c] && tiles.bytes[b] == tiles.bytes[c] && tiles.bytes[a] / 4 == tiles.rows[b]);
  for (int m = 0; m < tiles.rows[c]; ++m) {
    for (int n = 0; n < tiles.bytes[c] / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < tiles.bytes[a] / 4; ++k) {
        even = std::fma(read_bf16(tiles.data[a][m] + 4 * k), read_bf16(tiles.data[b][k] + 4 * n), even);
        odd = std::fma(read_bf16(tiles.data[a][m] + 4 * k + 2), read_bf16(tiles.data[b][k] + 4 * n + 2), odd);
      }
      std::memcpy(&sum, tiles.data[c][m] + 4 * n, 4);
      sum += even + odd;
      std::memcpy(tiles.data[c][m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_stream_loadd
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulate_config(config)
#define _tile_release() (tiles.configured = false)
#define _tile_zero(t) std::memset(tiles.data[t], 0, sizeof tiles.data[t])
#define _tile_loadd(t, from, stride) emulate_load(t, from, stride)
#define _tile_stream_loadd(t, from, stride) emulate_load(t, from, stride)
#define _tile_stored(t, to, stride) emulate_store(t, to, stride)
#define _tile_dpbf16ps(c, a, b) emulate_product(c, a, b)
