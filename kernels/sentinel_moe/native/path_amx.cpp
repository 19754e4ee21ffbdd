// AMX: Sapphire Rapids and later, as the kernel of Linux permits.  Tiles multiply bf16; the rest is AVX512-BF16's.
//
// Every count of tokens goes through tiles, as their order of sums is their own.  In `activate` rows of weights are a
// tile's rows as they are in memory, and sixteen tokens' x its columns in pairs; in the sums over atoms tokens are rows,
// and pairs of rows of `down` are interleaved.  An element of a product depends on its own row and column alone, so that
// it does not matter which tiles are multiplied together: two by two where there are as many, as a tile is loaded in the
// time in which it is multiplied.

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__) && ((defined(__AMX_TILE__) && defined(__AMX_BF16__)) || defined(EMULATE_AMX))

#include "../../native/amx.hpp"
#include "fp8_vbmi.hpp"
#include "pair_ops.hpp"

extern const sentinel::Kernels sentinel_avx512_f32, sentinel_avx512_f16;
const sentinel::Kernels* sentinel_avx512_fp8(sentinel::DType dtype);

namespace {

constexpr int64_t PACKED = 8;                // tiles of tokens whose x is held at once
constexpr int64_t SPAN = 512;                // atoms of a chain of sums
constexpr int64_t HELD_BYTES = 1 << 20;      // of `down`, as tiles are loaded from it, that stay in the second-level cache
constexpr int64_t STREAMED = 64;             // tokens up to which rows of `down` are read in their order
constexpr int64_t PART = 64;                 // of such rows that are read together
constexpr int64_t MOST_KEPT = 896 * TILE;    // columns times tiles of tokens whose products are kept meanwhile
constexpr int64_t ROWS_AHEAD = 8;            // of `down` that are asked for early
constexpr int64_t STRIPS = 8;                // of two tiles of columns whose products are added together, as rows of sums are long

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

// The x of up to PACKED tiles of tokens, each [length / STEP] steps.
void pack_tiles(const Block& block, int64_t token, int64_t length, TileRows* packed) {
  for (int64_t tile = 0; tile < PACKED && token + tile * TILE < block.count; ++tile) {
    const int64_t first = token + tile * TILE;
    pack_pairs(reinterpret_cast<const uint16_t* const*>(block.inputs) + first, block.count - first, length, packed + tile * count_steps(length));
  }
}

// A tile's weighted activations, whose sums are [atom][token], in sixteen rows of `act`; zeros for tokens that are not.
void weigh_tile(const float* weights, int64_t count, const TileSums gates, const TileSums ups, float (*act)[TILE]) {
  float values[TILE][TILE], weight[TILE] = {};
  std::memcpy(weight, weights, (count < TILE ? count : TILE) * sizeof(float));
  for (int64_t a = 0; a < TILE; ++a) {
    for (int64_t t = 0; t < TILE; ++t) values[a][t] = weigh(weight[t], gates[a][t], ups[a][t]);
  }
  __m512i rows[TILE], columns[TILE];
  for (int64_t a = 0; a < TILE; ++a) rows[a] = _mm512_loadu_si512(values[a]);
  transpose(rows, columns);
  for (int64_t t = 0; t < TILE; ++t) _mm512_storeu_si512(act[t], columns[t]);
}

// Activations of tokens as tiles are loaded from them: bytes from a tile, a step and a row to the next.
struct Acts {
  const char* first;
  int64_t tile, step, row;
};

// Products of TILES tiles of tokens by two of columns: [tile][half].  rows: [step][pair][column][2].  `more`: to those that
// are there already.
template <int TILES>
void multiply_atoms(const Acts& acts, const TileRows* left, const TileRows* right, int64_t steps, bool more, TileSums* products) {
  settle_memory(acts.first);
  if (more) {
    load_sums<TILES>(products);
  } else {
    clear_sums<TILES>();
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_stream_loadd(6, left[s], 64);
    _tile_loadd(4, acts.first + s * acts.step, acts.row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, right[s], 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TILES == 2) {
      _tile_loadd(5, acts.first + acts.tile + s * acts.step, acts.row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums<TILES>(products);
}

// Columns of `down`, in units of so many, that are held as tiles at once.
int64_t count_kept(int64_t columns, int64_t steps, int64_t unit) {
  const int64_t most = HELD_BYTES / (steps * static_cast<int64_t>(sizeof(TileRows))) * TILE / unit * unit, all = (columns + unit - 1) / unit * unit;
  return all < most ? all : most < unit ? unit : most;
}

// Zeros in each tile's last step, if the atoms fill half of it.
void clear_ends(TileRows* tiles, int64_t count, int64_t atoms) {
  const int64_t steps = count_steps(atoms);
  for (int64_t tile = 0; atoms % STEP != 0 && tile < count; ++tile) std::memset(tiles[tile * steps + steps - 1], 0, sizeof(TileRows));
}

// Adds products of one tile of tokens to their rows of sums, a row's strips together; from a strip to the next `apart`.
void add_strips(const Block& block, int64_t token, int64_t column, int64_t strips, float* const* sums, const TileSums* products, int64_t apart) {
  for (int64_t t = 0; t < TILE && token + t < block.count; ++t) {
    float* to = sums[token + t] + column;
    const TileSums* from = products;
    for (int64_t strip = 0; strip < strips; ++strip, from += apart, to += COLUMNS) {
      const __m512 first = _mm512_loadu_ps(from[0][t]), second = _mm512_loadu_ps(from[1][t]);
      _mm512_storeu_ps(to, block.alone ? first : _mm512_add_ps(_mm512_loadu_ps(to), first));
      _mm512_storeu_ps(to + TILE, block.alone ? second : _mm512_add_ps(_mm512_loadu_ps(to + TILE), second));
    }
  }
}

// Products of all tokens by two tiles of columns over some rows of `down`, kept: [tile of tokens][half].
void multiply_part(int64_t count, const Acts& acts, const TileRows* left, const TileRows* right, int64_t steps, bool more, TileSums* products) {
  for (int64_t token = 0; token < count; token += 2 * TILE, products += 4) {
    Acts own = acts;
    own.first += token / TILE * acts.tile;
    count - token > TILE ? multiply_atoms<2>(own, left, right, steps, more, products) : multiply_atoms<1>(own, left, right, steps, more, products);
  }
}

// Adds all tokens' products by so many strips of two tiles of columns to their sums, from `column` on; products: [strip][4].
void add_products(const Block& block, const Acts& acts, const TileRows* tiles, int64_t steps, int64_t column, int64_t strips, float* const* sums, TileSums* products) {
  for (int64_t token = 0; token < block.count; token += 2 * TILE) {
    Acts own = acts;
    own.first += token / TILE * acts.tile;
    for (int64_t first = 0; first < strips; first += STRIPS) {
      const int64_t now = strips - first < STRIPS ? strips - first : STRIPS;
      for (int64_t strip = 0; strip < now; ++strip) {
        const TileRows* left = tiles + 2 * (first + strip) * steps;
        multiply_part(block.count - token < 2 * TILE ? block.count - token : 2 * TILE, own, left, left + steps, steps, false, products + 4 * strip);
      }
      add_strips(block, token, column + first * COLUMNS, now, sums, products, 4);
      add_strips(block, token + TILE, column + first * COLUMNS, now, sums, products + 2, 4);
    }
  }
}

// --- weights in bf16 ------------------------------------------------------------------------------------------------

int64_t longest_chain(int64_t B) { return 2 * B > SPAN ? 2 * B : SPAN; }

// The most tiles that are held in `add_columns`, and products of strips.
int64_t count_combined(int64_t B, int64_t unit) {
  const int64_t most = count_steps(longest_chain(B)), bytes = HELD_BYTES / static_cast<int64_t>(sizeof(TileRows));
  return (bytes > unit / TILE * most ? bytes : unit / TILE * most) + 4 * STRIPS;
}

struct Dense {
  static int64_t count_scratch(int64_t B, int64_t H) {
    const int64_t activate = PACKED * count_steps(H) + 2 + 4, combine = count_combined(B, COLUMNS);
    return (activate > combine ? activate : combine) * static_cast<int64_t>(sizeof(TileRows));
  }

  static constexpr int64_t COUNTS[2] = {TILE, TILE};

  static void store_acts(const Block& block, int64_t token, int64_t atom, const TileSums* sums) {
    float act[TILE][TILE];
    weigh_tile(block.weights + token, block.count - token, sums[0], sums[1], act);
    uint16_t* to = static_cast<uint16_t*>(block.act) + token * block.act_stride + atom;
    for (int64_t t = 0; t < TILE; ++t, to += block.act_stride) {
      for (int64_t a = 0; a < TILE; ++a) to[a] = narrow(act[t][a]);
    }
  }

  static void activate(const Block& block) {
    const TileUse use;
    const int64_t H = block.H, steps = count_steps(H);
    Carver memory{static_cast<char*>(block.scratch)};
    TileRows *packed = memory.take<TileRows>(PACKED * steps), *rests = memory.take<TileRows>(2);
    TileSums* sums = memory.take<TileSums>(4);
    const auto find_rows = [&](int64_t atom) {
      const uint16_t* gate = static_cast<const uint16_t*>(atom < block.end ? block.gate : block.next);
      if (atom < block.end) gate += (atom / block.B * 2 * block.B + atom % block.B) * H;
      return RowPair{gate, gate + block.B * H};
    };
    for (int64_t first = 0; first < block.count; first += PACKED * TILE) {
      pack_tiles(block, first, H, packed);
      const int64_t end = block.count - first < PACKED * TILE ? block.count : first + PACKED * TILE;
      for (int64_t atom = block.begin; atom < block.end; atom += TILE) {
        const RowPair rows = find_rows(atom);
        const int64_t passes = (count_tiles(end - first) + 1) / 2;
        const bool asks = first == 0 && (atom + TILE < block.end || block.next != nullptr);
        Ahead ahead = {asks ? find_rows(atom + TILE) : rows, asks ? (TILE + passes - 1) / passes : 0};
        for (int64_t token = first; token < end; token += 2 * TILE, ahead.move(steps)) {
          const TileRows* x = packed + (token - first) / TILE * steps;
          const bool two = token + TILE < end;
          two ? multiply_rows<2>(rows, COUNTS, H, H, ahead, x, rests, sums) : multiply_rows<1>(rows, COUNTS, H, H, ahead, x, rests, sums);
          store_acts(block, token, atom, sums);
          if (two) store_acts(block, token + TILE, atom, sums + 2);
        }
      }
    }
  }

  // Rows of `down` from `column` on as tiles of columns: [tile][step][pair][column][2].
  static void pack_rows(const Block& block, int64_t column, int64_t columns, int64_t steps, TileRows* tiles) {
    const int64_t H = block.H, atoms = block.blocks * block.B;
    const uint16_t* down = static_cast<const uint16_t*>(block.down) + column;
    for (int64_t atom = 0; atom < atoms; atom += 2) {
      const uint16_t* row = down + atom * H;
      for (int64_t c = 0; c < columns; c += COLUMNS) {
        __builtin_prefetch(row + ROWS_AHEAD * H + c, 0, 2);
        __builtin_prefetch(row + (ROWS_AHEAD + 1) * H + c, 0, 2);
        __m512 parts[2];
        H - column - c >= COLUMNS ? PairOps::load_rows<false>(row + c, H, parts) : PairOps::load_rows<true>(row + c, H, parts);
        for (int i = 0; i < 2; ++i) _mm512_storeu_ps(tiles[(c / TILE + i) * steps + atom / STEP][atom % STEP / 2], parts[i]);
      }
    }
  }

  // For few tokens, whose products wait while rows of `down` are read in their order, PART at a time.
  static void stream_columns(const Block& block, int64_t first, int64_t columns, float* const* sums) {
    const int64_t H = block.H, atoms = block.blocks * block.B, strips = (columns + COLUMNS - 1) / COLUMNS;
    const int64_t each = 2 * count_tiles(block.count), stride = block.act_stride * static_cast<int64_t>(sizeof(uint16_t));
    Carver memory{static_cast<char*>(block.scratch)};
    TileRows* tiles = memory.take<TileRows>(2 * PART / STEP);
    TileSums* products = memory.take<TileSums>(strips * each);
    for (int64_t atom = 0; atom < atoms; atom += PART) {
      const int64_t rows = atoms - atom < PART ? atoms - atom : PART, steps = count_steps(rows);
      const uint16_t* down = static_cast<const uint16_t*>(block.down) + atom * H + first;
      const uint16_t* next = atom + PART < atoms ? down + PART * H : block.next == nullptr ? down : static_cast<const uint16_t*>(block.next) + first;
      Asker asker = {reinterpret_cast<const char*>(next), H * static_cast<int64_t>(sizeof(uint16_t)), strips};
      const Acts acts = {static_cast<const char*>(block.act) + atom * static_cast<int64_t>(sizeof(uint16_t)), TILE * stride, STEP * static_cast<int64_t>(sizeof(uint16_t)), stride};
      clear_ends(tiles, 2, rows);
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t column = first + strip * COLUMNS;
        for (int64_t row = 0; row < rows; row += 2) {
          asker.ask();
          asker.ask();
          const uint16_t* pair = down + row * H + strip * COLUMNS;
          __m512 parts[2];
          H - column >= COLUMNS ? PairOps::load_rows<false>(pair, H, parts) : PairOps::load_rows<true>(pair, H, parts);
          for (int i = 0; i < 2; ++i) _mm512_storeu_ps(tiles[i * steps + row / STEP][row % STEP / 2], parts[i]);
        }
        multiply_part(block.count, acts, tiles, tiles + steps, steps, atom > 0, products + strip * each);
      }
    }
    for (int64_t tile = 0; tile < each / 2; ++tile) add_strips(block, tile * TILE, first, strips, sums, products + 2 * tile, each);
  }

  static void add_columns(const Block& block, int64_t first, int64_t columns, float* const* sums) {
    const TileUse use;
    if (block.count <= STREAMED && count_tiles(block.count) * columns <= MOST_KEPT) return stream_columns(block, first, columns, sums);
    const int64_t atoms = block.blocks * block.B, steps = count_steps(atoms), end = first + columns, kept = count_kept(columns, steps, COLUMNS);
    Carver memory{static_cast<char*>(block.scratch)};
    TileRows* tiles = memory.take<TileRows>(kept / TILE * steps);
    TileSums* products = memory.take<TileSums>(4 * STRIPS);
    clear_ends(tiles, kept / TILE, atoms);
    const int64_t stride = block.act_stride * static_cast<int64_t>(sizeof(uint16_t));
    const Acts acts = {static_cast<const char*>(block.act), TILE * stride, STEP * static_cast<int64_t>(sizeof(uint16_t)), stride};
    for (int64_t column = first; column < end; column += kept) {
      const int64_t now = end - column < kept ? end - column : kept;
      pack_rows(block, column, now, steps, tiles);
      add_products(block, acts, tiles, steps, column, (now + COLUMNS - 1) / COLUMNS, sums, products);
    }
  }

  static constexpr Kernels table = {sizeof(uint16_t), COLUMNS, activate, nullptr, add_columns, Steps<PairOps>::table.reduce, count_scratch, 0, nullptr, SPAN};
};

// --- weights in 8 bits ----------------------------------------------------------------------------------------------

struct Narrow {
  using Codes = Fp8Decoder<VbmiOps>;
  static constexpr int64_t STEPS = SCALED / STEP;  // of a group

  static int64_t count_scratch(int64_t B, int64_t H) {
    const int64_t most = longest_chain(B);
    const int64_t activate = PACKED * (Codes::pad(H) / STEP + 2) + 4 * STEPS + 4, combine = count_combined(B, SCALED) + 2 * count_steps(most) + count_tiles(most);
    return (activate > combine ? activate : combine) * static_cast<int64_t>(sizeof(TileRows));
  }

  // Sixteen rows of one group, decoded, and as many of the rows to come asked for.
  static void decode_group(const uint8_t* row, const uint8_t* next, int64_t H, int64_t h, TileRows* decoded) {
    for (int64_t a = 0; a < TILE; ++a) {
      for (int64_t u = 0; u < SCALED; u += Codes::UNIT) {
        if (next != nullptr) __builtin_prefetch(next + h * TILE + a * SCALED + u, 0, 2);
        __m512 w[Codes::VECS] = {};
        if (h + u < H) Codes::decode_row(row + a * H + h + u, H - h - u, w);
        for (int v = 0; v < Codes::VECS; ++v) _mm512_storeu_ps(decoded[u / STEP + v][a], w[v]);
      }
    }
  }

  // A group of gate and of up times TILES packed tiles of tokens, times the rows' scales, into totals: [tile][gate or up].
  template <int TILES>
  static void add_group(const TileRows* decoded, const float* const* scales, int64_t groups, const TileRows* packed, int64_t steps, TileSums* products, TileSums* totals) {
    clear_sums<TILES>();
    settle_memory(decoded);
    for (int64_t s = 0; s < STEPS; ++s) {
      _tile_loadd(6, packed[s], 64);
      _tile_loadd(4, decoded[s], 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, decoded[STEPS + s], 64);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (TILES == 2) {
        _tile_loadd(7, packed[steps + s], 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    store_sums<TILES>(products);
    for (int i = 0; i < 2; ++i) {
      for (int64_t a = 0; a < TILE; ++a) {
        const __m512 scale = _mm512_set1_ps(scales[i][a * groups]);
        for (int tile = 0; tile < TILES; ++tile) {
          float* total = totals[2 * tile + i][a];
          _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_loadu_ps(products[2 * tile + i][a]), scale, _mm512_loadu_ps(total)));
        }
      }
    }
  }

  static void activate(const Block& block) {
    const TileUse use;
    const int64_t H = block.H, B = block.B, groups = Codes::count_groups(H), steps = Codes::pad(H) / STEP;
    Carver memory{static_cast<char*>(block.scratch)};
    TileRows *packed = memory.take<TileRows>(PACKED * steps), *decoded = memory.take<TileRows>(4 * STEPS);
    TileSums *products = memory.take<TileSums>(4), *totals = memory.take<TileSums>(2 * PACKED);
    const auto find_row = [&](int64_t atom) { return atom / B * 2 * B + atom % B; };
    for (int64_t first = 0; first < block.count; first += PACKED * TILE) {
      pack_tiles(block, first, Codes::pad(H), packed);
      const int64_t tiles = count_tiles(block.count - first < PACKED * TILE ? block.count - first : PACKED * TILE);
      for (int64_t atom = block.begin; atom < block.end; atom += TILE) {
        const uint8_t *gate = Codes::codes(block.gate) + find_row(atom) * H, *up = gate + B * H;
        const uint8_t* next = first > 0 ? nullptr : atom + TILE < block.end ? Codes::codes(block.gate) + find_row(atom + TILE) * H : Codes::codes(block.next);
        std::memset(totals, 0, 2 * tiles * sizeof(TileSums));
        const auto decode = [&](int64_t h) {
          TileRows* to = decoded + h / SCALED % 2 * 2 * STEPS;
          decode_group(gate, next, H, h, to);
          decode_group(up, next == nullptr ? nullptr : next + B * H, H, h, to + STEPS);
        };
        decode(0);
        for (int64_t h = 0; h < H; h += SCALED) {
          if (h + SCALED < H) decode(h + SCALED);  // ahead, so that no tile waits for what was just written
          const TileRows* now = decoded + h / SCALED % 2 * 2 * STEPS;
          const float* scales[2] = {block.gate_scales + find_row(atom) * groups + h / SCALED, block.up_scales + find_row(atom) * groups + h / SCALED};
          for (int64_t tile = 0; tile < tiles; tile += 2) {
            const TileRows* x = packed + tile * steps + h / STEP;
            tile + 1 < tiles ? add_group<2>(now, scales, groups, x, steps, products, totals + 2 * tile) : add_group<1>(now, scales, groups, x, steps, products, totals + 2 * tile);
          }
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t token = first + tile * TILE;
          float act[TILE][TILE];
          weigh_tile(block.weights + token, block.count - token, totals[2 * tile], totals[2 * tile + 1], act);
          float* to = static_cast<float*>(block.act) + token * block.act_stride + atom;
          for (int64_t t = 0; t < TILE; ++t, to += block.act_stride) std::memcpy(to, act[t], sizeof act[t]);
        }
      }
    }
  }

  // Activations of a tile of tokens times the scales of one group: [step][token][32].
  static void scale_acts(const Block& block, int64_t token, int64_t atoms, const float* scales, TileRows* acts) {
    for (int64_t t = 0; t < TILE; ++t) {
      const float* act = static_cast<const float*>(block.act) + (token + t) * block.act_stride;
      for (int64_t atom = 0; atom < atoms; atom += TILE) VbmiOps::scale_across(act + atom, scales + atom, TILE, acts[atom / STEP][t] + atom % STEP);
    }
  }

  // Rows of `down` from `column` on, decoded, as tiles of columns: [tile][step][pair][column][2].
  static void pack_rows(const Block& block, int64_t column, int64_t columns, int64_t steps, TileRows* tiles) {
    const int64_t H = block.H, atoms = block.blocks * block.B;
    const uint8_t* down = Codes::codes(block.down) + column;
    for (int64_t atom = 0; atom < atoms; atom += 2) {
      const uint8_t* row = down + atom * H;
      for (int64_t c = 0; c < columns && column + c < H; c += Codes::UNIT) {
        __builtin_prefetch(row + ROWS_AHEAD * H + c, 0, 2);
        __builtin_prefetch(row + (ROWS_AHEAD + 1) * H + c, 0, 2);
        __m512 parts[Codes::SUMS];
        Codes::decode_rows(row + c, H, H - column - c, parts);
        for (int i = 0; i < Codes::SUMS; ++i) _mm512_storeu_ps(tiles[(c / TILE + i) * steps + atom / STEP][atom % STEP / 2], parts[i]);
      }
    }
  }

  // As Dense::stream_columns.
  static void stream_columns(const Block& block, int64_t first, int64_t columns, float* const* sums) {
    const int64_t H = block.H, groups = Codes::count_groups(H), atoms = block.blocks * block.B, strips = (columns + COLUMNS - 1) / COLUMNS;
    const int64_t each = 2 * count_tiles(block.count);
    Carver memory{static_cast<char*>(block.scratch)};
    TileRows *tiles = memory.take<TileRows>(SCALED / TILE * PART / STEP), *acts = memory.take<TileRows>(each / 2 * PART / STEP);
    TileSums* products = memory.take<TileSums>((strips + SCALED / COLUMNS) * each);
    for (int64_t atom = 0; atom < atoms; atom += PART) {
      Block part = block;
      part.act = static_cast<float*>(block.act) + atom;
      const int64_t rows = atoms - atom < PART ? atoms - atom : PART, steps = count_steps(rows);
      const uint8_t* down = Codes::codes(block.down) + atom * H + first;
      const uint8_t* next = atom + PART < atoms ? down + PART * H : block.next == nullptr ? down : Codes::codes(block.next) + first;
      Asker asker = {reinterpret_cast<const char*>(next), H, (columns + 63) / 64};
      const Acts scaled = {reinterpret_cast<const char*>(acts), steps * static_cast<int64_t>(sizeof(TileRows)), sizeof(TileRows), sizeof acts[0][0]};
      clear_ends(tiles, SCALED / TILE, rows);
      clear_ends(acts, each / 2, rows);
      for (int64_t column = first; column < first + columns; column += SCALED, down += SCALED) {
        float scales[PART];
        for (int64_t row = 0; row < rows; ++row) scales[row] = block.down_scales[(atom + row) * groups + column / SCALED];
        for (int64_t tile = 0; tile < each / 2; ++tile) scale_acts(part, tile * TILE, rows, scales, acts + tile * steps);
        for (int64_t u = 0; u < SCALED && column + u < H; u += Codes::UNIT) {
          for (int64_t row = 0; row < rows; row += 2) {
            asker.ask();
            asker.ask();
            __m512 parts[Codes::SUMS];
            Codes::decode_rows(down + row * H + u, H, H - column - u, parts);
            for (int i = 0; i < Codes::SUMS; ++i) _mm512_storeu_ps(tiles[(u / TILE + i) * steps + row / STEP][row % STEP / 2], parts[i]);
          }
          TileSums* own = products + (column - first + u) / COLUMNS * each;
          for (int i = 0; i < Codes::SUMS; i += 2, own += each) {
            const TileRows* left = tiles + (u / TILE + i) * steps;
            multiply_part(block.count, scaled, left, left + steps, steps, atom > 0, own);
          }
        }
      }
    }
    const int64_t written = (columns + Codes::UNIT - 1) / Codes::UNIT * (Codes::UNIT / COLUMNS);
    for (int64_t tile = 0; tile < each / 2; ++tile) add_strips(block, tile * TILE, first, written, sums, products + 2 * tile, each);
  }

  static void add_columns(const Block& block, int64_t first, int64_t columns, float* const* sums) {
    const TileUse use;
    if (block.count <= STREAMED && count_tiles(block.count) * columns <= MOST_KEPT) return stream_columns(block, first, columns, sums);
    const int64_t H = block.H, groups = Codes::count_groups(H), atoms = block.blocks * block.B, steps = count_steps(atoms);
    const int64_t end = first + columns, kept = count_kept(columns, steps, SCALED);
    Carver memory{static_cast<char*>(block.scratch)};
    TileRows *tiles = memory.take<TileRows>(kept / TILE * steps), *acts = memory.take<TileRows>(2 * steps);
    TileSums* products = memory.take<TileSums>(4 * STRIPS);
    float* scales = memory.take<float>(atoms);
    clear_ends(tiles, kept / TILE, atoms);
    clear_ends(acts, 2, atoms);
    const Acts scaled = {reinterpret_cast<const char*>(acts), steps * static_cast<int64_t>(sizeof(TileRows)), sizeof(TileRows), sizeof acts[0][0]};
    for (int64_t column = first; column < end; column += kept) {
      const int64_t now = end - column < kept ? end - column : kept;
      pack_rows(block, column, now, steps, tiles);
      for (int64_t c = 0; c < now; c += SCALED) {
        for (int64_t atom = 0; atom < atoms; ++atom) scales[atom] = block.down_scales[atom * groups + (column + c) / SCALED];
        for (int64_t token = 0; token < block.count; token += 2 * TILE) {
          Block some = block;
          some.count = block.count - token < 2 * TILE ? block.count - token : 2 * TILE;
          for (int64_t tile = 0; tile < count_tiles(some.count); ++tile) scale_acts(block, token + tile * TILE, atoms, scales, acts + tile * steps);
          const int64_t rest = (H - column - c + Codes::UNIT - 1) / Codes::UNIT * Codes::UNIT;
          add_products(some, scaled, tiles + c / TILE * steps, steps, column + c, (rest < SCALED ? rest : SCALED) / COLUMNS, sums + token, products);
        }
      }
    }
  }

  static constexpr Kernels table = {sizeof(float), SCALED, activate, nullptr, add_columns, Fp8Table<VbmiOps, BF16>::table.reduce, count_scratch, sizeof(uint16_t), Fp8Table<VbmiOps, BF16>::table.prepare, SPAN};
};

const Kernels* find_fp8(DType dtype) { return dtype == BF16 ? &Narrow::table : sentinel_avx512_fp8(dtype); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

bool is_supported() {
  static const bool granted = has_avx512() && ask_for_tiles();
  return granted;
}

}  // namespace

extern const sentinel::Path sentinel_amx = {"amx", "AMX-BF16 and its permission, AVX512-BF16 and VBMI", is_supported, {&sentinel_avx512_f32, &sentinel_avx512_f16, &Dense::table}, find_fp8};

#endif
