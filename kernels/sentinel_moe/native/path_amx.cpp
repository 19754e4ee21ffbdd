// AMX: Sapphire Rapids and later, as the kernel of Linux permits.  Tiles multiply bf16; the rest is AVX512-BF16's.
//
// Every count of tokens goes through tiles, as their order of sums is their own.  In `activate` rows of weights are a
// tile's rows as they are in memory, and sixteen tokens' x its columns in pairs; in the sums over atoms tokens are rows,
// and pairs of rows of `down` are interleaved.  An element of a product depends on its own row and column alone.

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__) && ((defined(__AMX_TILE__) && defined(__AMX_BF16__)) || defined(SENTINEL_EMULATE_AMX))

#include "fp8_vbmi.hpp"
#include "pair_ops.hpp"
#if defined(SENTINEL_EMULATE_AMX)
#include "amx_emulated.hpp"
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern const sentinel::Kernels sentinel_avx512_f32, sentinel_avx512_f16;
const sentinel::Kernels* sentinel_avx512_fp8(sentinel::DType dtype);

namespace {

constexpr int64_t TILE = 16, STEP = 32;      // rows of a tile; bf16 of a row
using TileRows = uint16_t[TILE][STEP];       // in memory: rows of x, weights or interleaved pairs
using TileSums = float[TILE][TILE];

int64_t count_steps(int64_t length) { return (length + STEP - 1) / STEP; }

// All tiles in use are full, 16 rows of 64 bytes: sums 0 and 1, left 2 and 3, right 4.
struct TileUse {
  TileUse() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileUse() { _tile_release(); }
};

// Memory carved from a thread's scratch, in lines.
struct Carver {
  char* at;
  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }
};

// out[i][j] = in[j][i], sixteen rows of sixteen pairs.
void transpose(const __m512i* in, __m512i* out) {
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

// Sixteen tokens' rows of x as the right side of `activate`: [step][pair][token][2], zeros for tokens that are not.
void pack_inputs(const Block& block, int64_t token, int64_t length, TileRows* packed) {
  const int64_t count = block.count - token < TILE ? block.count - token : TILE;
  for (int64_t k = 0; k < length; k += STEP) {
    const __mmask32 there = length - k >= STEP ? ~__mmask32(0) : (__mmask32(1) << (length - k)) - 1;
    __m512i rows[TILE];
    for (int64_t t = 0; t < TILE; ++t) {
      rows[t] = t < count ? _mm512_maskz_loadu_epi16(there, static_cast<const uint16_t*>(block.inputs[token + t]) + k) : _mm512_setzero_si512();
    }
    transpose(rows, reinterpret_cast<__m512i*>(packed[k / STEP]));
  }
}

// Tokens' products of one tile of columns over all atoms; acts [step][token][32], rows [step][pair][column][2].
void multiply_atoms(const TileRows* acts, const TileRows* rows, int64_t steps, TileSums sums) {
  _tile_zero(0);
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(2, acts[s], 64);
    _tile_loadd(4, rows[s], 64);
    _tile_dpbf16ps(0, 2, 4);
  }
  _tile_stored(0, sums, 64);
}

void add_to(float* const* rows, int64_t count, int64_t column, const TileSums sums) {
  for (int64_t t = 0; t < count; ++t) {
    float* to = rows[t] + column;
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_loadu_ps(sums[t])));
  }
}

// The sums over a block's atoms for a range of columns, by a type with add_columns and a granularity of columns.
template <class Table>
void add_all(const Block& block, float* sums, int64_t stride) {
  constexpr int64_t MOST = 64;
  for (int64_t t = 0; t < block.count; ++t) std::memset(sums + t * stride, 0, stride * sizeof(float));
  for (int64_t first = 0; first < block.count; first += MOST) {
    Block part = block;
    part.count = block.count - first < MOST ? block.count - first : MOST;
    part.act = static_cast<char*>(block.act) + first * block.act_stride * Table::ACT_SIZE;
    float* rows[MOST];
    for (int64_t t = 0; t < part.count; ++t) rows[t] = sums + (first + t) * stride;
    Table::add_columns(part, 0, block.H, rows);
  }
}

// --- weights in bf16 ------------------------------------------------------------------------------------------------

struct Dense {
  static constexpr int64_t ACT_SIZE = sizeof(uint16_t);

  static int64_t count_scratch(int64_t B, int64_t H) { return (count_steps(H) + 3 * count_steps(B) + 5) * static_cast<int64_t>(sizeof(TileRows)); }

  // Sixteen rows of weights from column k, where a tile is loaded from: zeros stand behind a rest of 16.
  struct Left {
    const void* first;
    int64_t stride;
  };
  static Left find_left(const uint16_t* row, int64_t H, int64_t k, TileRows rest) {
    if (H - k >= STEP) return {row + k, H * static_cast<int64_t>(sizeof(uint16_t))};
    for (int64_t a = 0; a < TILE; ++a) _mm512_storeu_si512(rest[a], PairOps::load_pairs<true>(row + a * H + k));
    return {rest, sizeof rest[0]};
  }

  static void activate(const Block& block) {
    const TileUse use;
    const int64_t H = block.H;
    Carver memory{static_cast<char*>(block.scratch)};
    TileRows* packed = memory.take<TileRows>(count_steps(H));
    TileRows* rests = memory.take<TileRows>(2);
    TileSums *gates = memory.take<TileSums>(1), *ups = memory.take<TileSums>(1);
    for (int64_t token = 0; token < block.count; token += TILE) {
      pack_inputs(block, token, H, packed);
      const int64_t count = block.count - token < TILE ? block.count - token : TILE;
      for (int64_t atom = 0; atom < block.B; atom += TILE) {
        const uint16_t *gate = static_cast<const uint16_t*>(block.gate) + atom * H, *up = static_cast<const uint16_t*>(block.up) + atom * H;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t k = 0; k < H; k += STEP) {
          if (token == 0 && atom + TILE < block.B) {
            for (int64_t a = 0; a < TILE; ++a) {
              __builtin_prefetch(gate + (TILE + a) * H + k, 0, 2);
              __builtin_prefetch(up + (TILE + a) * H + k, 0, 2);
            }
          }
          _tile_loadd(4, packed[k / STEP], 64);
          const Left gate_tile = find_left(gate, H, k, rests[0]), up_tile = find_left(up, H, k, rests[1]);
          _tile_loadd(2, gate_tile.first, gate_tile.stride);
          _tile_loadd(3, up_tile.first, up_tile.stride);
          _tile_dpbf16ps(0, 2, 4);
          _tile_dpbf16ps(1, 3, 4);
        }
        _tile_stored(0, *gates, 64);
        _tile_stored(1, *ups, 64);
        for (int64_t t = 0; t < count; ++t) {
          uint16_t* act = static_cast<uint16_t*>(block.act) + (token + t) * block.act_stride + atom;
          for (int64_t a = 0; a < TILE; ++a) act[a] = narrow(weigh(block.weights[token + t], (*gates)[a][t], (*ups)[a][t]));
        }
      }
    }
  }

  static void add_columns(const Block& block, int64_t first, int64_t columns, float* const* sums) {
    const TileUse use;
    const int64_t H = block.H, steps = count_steps(block.B);
    Carver memory{static_cast<char*>(block.scratch)};
    TileRows* rows[2] = {memory.take<TileRows>(steps), memory.take<TileRows>(steps)};
    TileRows* acts = memory.take<TileRows>(steps);
    TileSums* products = memory.take<TileSums>(1);
    std::memset(rows[0], 0, 3 * steps * sizeof(TileRows));  // where B ends within a step
    for (int64_t column = first; column < first + columns; column += COLUMNS) {
      const uint16_t* down = static_cast<const uint16_t*>(block.down) + column;
      for (int64_t atom = 0; atom < block.B; atom += 2, down += 2 * H) {
        __m512 parts[2];
        H - column >= COLUMNS ? PairOps::load_rows<false>(down, H, parts) : PairOps::load_rows<true>(down, H, parts);
        for (int i = 0; i < 2; ++i) _mm512_storeu_ps(rows[i][atom / STEP][atom % STEP / 2], parts[i]);
      }
      for (int64_t token = 0; token < block.count; token += TILE) {
        const int64_t count = block.count - token < TILE ? block.count - token : TILE;
        for (int64_t t = 0; t < count; ++t) {
          const uint16_t* act = static_cast<const uint16_t*>(block.act) + (token + t) * block.act_stride;
          for (int64_t atom = 0; atom < block.B; atom += TILE) std::memcpy(acts[atom / STEP][t] + atom % STEP, act + atom, TILE * sizeof(uint16_t));
        }
        for (int i = 0; i < 2; ++i) {
          multiply_atoms(acts, rows[i], steps, *products);
          add_to(sums + token, count, column + i * TILE, *products);
        }
      }
    }
  }

  static constexpr Kernels table = {ACT_SIZE, COLUMNS, activate, add_all<Dense>, add_columns, Steps<PairOps>::table.reduce, count_scratch, 0, nullptr};
};

// --- weights in 8 bits ----------------------------------------------------------------------------------------------

struct Narrow {
  using Codes = Fp8Decoder<VbmiOps>;
  static constexpr int64_t ACT_SIZE = sizeof(float);
  static constexpr int64_t STEPS = SCALED / STEP;  // of a group

  static int64_t count_scratch(int64_t B, int64_t H) {
    return (Codes::pad(H) / STEP + STEPS + 1 + 2 * 2 + 5 * count_steps(B) + 2) * static_cast<int64_t>(sizeof(TileRows)) + B * static_cast<int64_t>(sizeof(float));
  }

  // One group of sixteen rows, decoded, times the packed tokens, times the rows' scales, into totals.
  static void add_group(const uint8_t* row, const float* scales, int64_t H, int64_t h, const TileRows* packed, TileRows* decoded, TileSums products, TileSums totals) {
    for (int64_t a = 0; a < TILE; ++a) {
      for (int64_t u = 0; u < SCALED; u += Codes::UNIT) {
        __m512 w[Codes::VECS] = {};
        if (h + u < H) Codes::decode_row(row + a * H + h + u, H - h - u, w);
        for (int v = 0; v < Codes::VECS; ++v) _mm512_storeu_ps(decoded[u / STEP + v][a], w[v]);
      }
    }
    _tile_zero(0);
    for (int64_t s = 0; s < STEPS; ++s) {
      _tile_loadd(2, decoded[s], 64);
      _tile_loadd(4, packed[h / STEP + s], 64);
      _tile_dpbf16ps(0, 2, 4);
    }
    _tile_stored(0, products, 64);
    for (int64_t a = 0; a < TILE; ++a) {
      const __m512 scale = _mm512_set1_ps(scales[a * Codes::count_groups(H) + h / SCALED]);
      _mm512_storeu_ps(totals[a], _mm512_fmadd_ps(_mm512_loadu_ps(products[a]), scale, _mm512_loadu_ps(totals[a])));
    }
  }

  static void activate(const Block& block) {
    const TileUse use;
    const int64_t H = block.H, groups = Codes::count_groups(H);
    Carver memory{static_cast<char*>(block.scratch)};
    TileRows *packed = memory.take<TileRows>(Codes::pad(H) / STEP), *decoded = memory.take<TileRows>(STEPS);
    TileSums *products = memory.take<TileSums>(1), *totals = memory.take<TileSums>(2);
    for (int64_t token = 0; token < block.count; token += TILE) {
      pack_inputs(block, token, Codes::pad(H), packed);
      const int64_t count = block.count - token < TILE ? block.count - token : TILE;
      for (int64_t atom = 0; atom < block.B; atom += TILE) {
        std::memset(totals, 0, 2 * sizeof(TileSums));
        for (int64_t h = 0; h < H; h += SCALED) {
          add_group(Codes::codes(block.gate) + atom * H, block.gate_scales + atom * groups, H, h, packed, decoded, *products, totals[0]);
          add_group(Codes::codes(block.up) + atom * H, block.up_scales + atom * groups, H, h, packed, decoded, *products, totals[1]);
        }
        for (int64_t t = 0; t < count; ++t) {
          float* act = static_cast<float*>(block.act) + (token + t) * block.act_stride + atom;
          for (int64_t a = 0; a < TILE; ++a) act[a] = weigh(block.weights[token + t], totals[0][a][t], totals[1][a][t]);
        }
      }
    }
  }

  // Activations of sixteen tokens times the scales of one group: [step][token][32].
  static void scale_acts(const Block& block, int64_t token, int64_t count, const float* scales, TileRows* acts) {
    for (int64_t t = 0; t < count; ++t) {
      const float* act = static_cast<const float*>(block.act) + (token + t) * block.act_stride;
      for (int64_t atom = 0; atom < block.B; atom += TILE) VbmiOps::scale_across(act + atom, scales + atom, TILE, acts[atom / STEP][t] + atom % STEP);
    }
  }

  static void add_columns(const Block& block, int64_t first, int64_t columns, float* const* sums) {
    const TileUse use;
    const int64_t H = block.H, groups = Codes::count_groups(H), steps = count_steps(block.B);
    Carver memory{static_cast<char*>(block.scratch)};
    TileRows *rows = memory.take<TileRows>(Codes::SUMS * steps), *acts = memory.take<TileRows>(steps);
    TileSums* products = memory.take<TileSums>(1);
    float* scales = memory.take<float>(block.B);
    std::memset(rows, 0, (Codes::SUMS + 1) * steps * sizeof(TileRows));  // where B ends within a step
    for (int64_t column = first; column < first + columns; column += Codes::UNIT) {
      const uint8_t* down = Codes::codes(block.down) + column;
      for (int64_t atom = 0; atom < block.B; atom += 2, down += 2 * H) {
        __m512 parts[Codes::SUMS];
        Codes::decode_rows(down, H, H - column, parts);
        for (int i = 0; i < Codes::SUMS; ++i) _mm512_storeu_ps(rows[i * steps + atom / STEP][atom % STEP / 2], parts[i]);
        scales[atom] = block.down_scales[atom * groups + column / SCALED];
        scales[atom + 1] = block.down_scales[(atom + 1) * groups + column / SCALED];
      }
      for (int64_t token = 0; token < block.count; token += TILE) {
        const int64_t count = block.count - token < TILE ? block.count - token : TILE;
        scale_acts(block, token, count, scales, acts);
        for (int i = 0; i < Codes::SUMS; ++i) {
          multiply_atoms(acts, rows + i * steps, steps, *products);
          add_to(sums + token, count, column + i * TILE, *products);
        }
      }
    }
  }

  static constexpr Kernels table = {ACT_SIZE, SCALED, activate, add_all<Narrow>, add_columns, Fp8Table<VbmiOps, BF16>::table.reduce, count_scratch, sizeof(uint16_t), Fp8Table<VbmiOps, BF16>::table.prepare};
};

const Kernels* find_fp8(DType dtype) { return dtype == BF16 ? &Narrow::table : sentinel_avx512_fp8(dtype); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

#if defined(SENTINEL_EMULATE_AMX)
bool is_supported() { return has_avx512(); }
#else
// The processor has it, the system keeps its registers, and this process may use them: Linux grants 8 KiB a thread.
bool ask_for_tiles() {
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, OSXSAVE = 1u << 27, TILE_STATE = 3u << 17;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & OSXSAVE) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & AMX_BF16) == 0 || (d & AMX_TILE) == 0) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & TILE_STATE) == TILE_STATE && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

bool is_supported() {
  static const bool granted = has_avx512() && ask_for_tiles();
  return granted;
}
#endif

}  // namespace

extern const sentinel::Path sentinel_amx = {"amx", "AMX-BF16 and its permission, AVX512-BF16 and VBMI", is_supported, {&sentinel_avx512_f32, &sentinel_avx512_f16, &Dense::table}, find_fp8};

#endif
