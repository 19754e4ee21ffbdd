// y = x · wᵀ + bias on a CPU: bf16 in memory, summed in fp32.
//
// Built by build.py once per instruction set, which fixes LANES.  A register of 2·LANES weights is read as LANES words of
// 32 bits.  With AVX512-BF16 (PAIRS) one instruction multiplies both halves of a word by those of a word of x and adds
// them up; subnormal numbers count as zeros.  Without, weights are widened in registers: the upper half of a word is the
// odd weight, the lower one, shifted up, the even one, and rows of x are widened beforehand into the same order, evens
// apart from odds.  Either way a row of x is padded with zeros.
//
// A tile is ROWS rows of x by WIDTH rows of w, each output a sum of LANES partial sums over all of K in one order,
// whatever the tile: the bits of an output depend neither on the other rows nor on the threads, who share out rows of w.
// Rows of w are read from memory once per CHUNK rows of x: a block of them stays in the second-level cache meanwhile.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include <omp.h>

#if defined(PORTABLE)
#elif defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define NEON
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr bool MANY_REGISTERS = true;
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr bool MANY_REGISTERS = false;
#elif defined(NEON)
constexpr int LANES = 4;
constexpr bool MANY_REGISTERS = true;
#else
constexpr int LANES = 4;
constexpr bool MANY_REGISTERS = false;
#endif
#if defined(__AVX512BF16__)
constexpr int MOST_ROWS = 6;                  // rows of x in a tile
constexpr int ROWS_OF_WIDE = 3;               // those of a tile that has 8 rows of w
typedef uint16_t Prepared;                    // an element of a row of x that tiles read
#else
constexpr int MOST_ROWS = 4;
constexpr int ROWS_OF_WIDE = 1;
typedef float Prepared;
#endif
constexpr int STEP = 2 * LANES;               // elements of K in a register of weights
constexpr int64_t APART = LANES == 8 ? 8 : 0; // between rows of x, so that two loads of half a line meet other banks
constexpr int64_t HALF_CACHE = 4096;          // elements of a prepared row of x that take half of the first-level cache
constexpr int64_t ALIASED = 2048;             // elements of w after which a first-level cache begins again
constexpr int64_t GROUP = 32;                 // rows of w whose outputs are narrowed together
constexpr int64_t CHUNK = 256;                // rows of x that are held at once as tiles read them
constexpr int64_t BLOCK_BYTES = 128 << 10;    // weights that stay in the cache for all rows of a chunk
constexpr int64_t FETCH_AHEAD = 4096;         // weights, at least: the time to memory at full bandwidth
constexpr int64_t MIN_WORK = 1 << 16;         // multiplications under which another thread costs more than it does
enum Status { OK = 0, NO_MEMORY = 1 };

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

// Keeps a value in a register, which compilers would load again for every use of it.
inline vec hold(vec v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("" : "+x"(v));
#endif
  return v;
}

inline vec even(words pairs) { return reinterpret_cast<vec>(pairs << 16); }
inline vec odd(words pairs) { return reinterpret_cast<vec>(pairs & 0xffff0000u); }
inline words load(const uint16_t* p) { return *reinterpret_cast<const words*>(p); }

inline vec multiply_add(vec a, vec b, vec sum) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
#elif defined(__AVX2__)
  return reinterpret_cast<vec>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
#elif defined(NEON)
  return reinterpret_cast<vec>(vfmaq_f32(reinterpret_cast<float32x4_t>(sum), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
#else
  return a * b + sum;
#endif
}

typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));

inline vec4 add_halves(vec v) {
#if defined(__AVX512F__)
  const __m512 whole = reinterpret_cast<__m512>(v);
  const __m256 by8 = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
  return reinterpret_cast<vec4>(_mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1)));
#elif defined(__AVX2__)
  const __m256 whole = reinterpret_cast<__m256>(v);
  return reinterpret_cast<vec4>(_mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1)));
#else
  return v;
#endif
}

// Four of the eight lanes of a and b.
template <int I, int J, int K, int L>
inline vec4 pick(vec4 a, vec4 b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I, J, K, L);
#else
  typedef int lanes __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, lanes{I, J, K, L});
#endif
}

#if defined(__AVX512F__)
// Lanes of two registers whose distance within each is a power of two, added to each other: a level of the tree.
inline __m512 add_by8(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); }
inline __m512 add_by4(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }
inline __m512 add_by2(__m512 a, __m512 b) {
  const __m512d left = _mm512_castps_pd(a), right = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)), _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
}
inline __m512 add_by1(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)); }

// The sums of 16 registers' lanes, in their order: a tree leaves them transposed, so it is given them transposed.
inline void add_lanes16(const vec* sums, float* out) {
  const auto by4 = [sums](int i) {
    const __m512* s = reinterpret_cast<const __m512*>(sums) + i;
    return add_by4(add_by8(s[0], s[4]), add_by8(s[8], s[12]));
  };
  _mm512_storeu_ps(out, add_by1(add_by2(by4(0), by4(1)), add_by2(by4(2), by4(3))));
}

inline void add_lanes8(const vec* sums, float* out) {
  const auto by4 = [sums](int i) {
    const __m512* s = reinterpret_cast<const __m512*>(sums) + i;
    return add_by4(add_by8(s[0], s[4]), add_by8(s[2], s[6]));
  };
  const __m512 by2 = add_by2(by4(0), by4(1));
  const __m512i order = _mm512_setr_epi32(0, 1, 8, 9, 4, 5, 12, 13, 0, 1, 8, 9, 4, 5, 12, 13);
  _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, add_by1(by2, by2))));
}
#endif

// The sums of registers' lanes, as many at once as there are; in one order either way.
template <int COUNT>
inline void add_lanes(const vec* sums, float* out) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= COUNT; i += 16) add_lanes16(sums + i, out + i);
  for (; i + 8 <= COUNT; i += 8) add_lanes8(sums + i, out + i);
#endif
  for (; i + 4 <= COUNT; i += 4) {
    const vec4 a = add_halves(sums[i]), b = add_halves(sums[i + 1]), c = add_halves(sums[i + 2]), d = add_halves(sums[i + 3]);
    const vec4 ab = pick<0, 4, 1, 5>(a, b) + pick<2, 6, 3, 7>(a, b);
    const vec4 cd = pick<0, 4, 1, 5>(c, d) + pick<2, 6, 3, 7>(c, d);
    *reinterpret_cast<vec4*>(out + i) = pick<0, 1, 4, 5>(ab, cd) + pick<2, 3, 6, 7>(ab, cd);
  }
  for (; i < COUNT; ++i) {
    const vec4 v = add_halves(sums[i]);
    out[i] = (v[0] + v[2]) + (v[1] + v[3]);
  }
}

inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// The last elements of a row, fewer than STEP, with zeros after them.
inline words load_tail(const uint16_t* p, int64_t count) {
  uint16_t padded[STEP] = {};
  std::memcpy(padded, p, count * sizeof *p);
  return load(padded);
}

struct alignas(64) Line {
  char bytes[64];
};

struct Problem {
  int64_t M, N, K;
  const uint16_t* x;
  int64_t x_stride;
  const uint16_t* w;
  int64_t w_stride;
  const uint16_t* bias;  // [N], or null
  uint16_t* y;           // [M][N]
  int64_t padded() const { return (K + STEP - 1) / STEP * STEP; }
  int64_t row() const { return padded() + APART; }  // from a prepared row of x to the next
};

#if defined(__AVX512BF16__)
inline void store_pairs(words pairs, uint16_t* row) { *reinterpret_cast<words*>(row) = pairs; }

template <int M, int WIDTH>
inline void tile_step(const uint16_t* const* x, const words* pairs, int64_t k, vec* sums) {
  for (int m = 0; m < M; ++m) {
    const __m512bh row = reinterpret_cast<__m512bh>(load(x[m] + k));
    for (int r = 0; r < WIDTH; ++r) {
      const __m512 sum = reinterpret_cast<__m512>(sums[m * WIDTH + r]);
      sums[m * WIDTH + r] = reinterpret_cast<vec>(_mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs[r]), row));
    }
  }
}
#else
// Evens of a STEP, then its odds.
inline void store_pairs(words pairs, float* row) {
  *reinterpret_cast<vec*>(row) = even(pairs);
  *reinterpret_cast<vec*>(row + LANES) = odd(pairs);
}

template <int M, int WIDTH>
inline void tile_step(const float* const* x, const words* pairs, int64_t k, vec* sums) {
  if constexpr (WIDTH > M) {
    vec evens[M], odds[M];
    for (int m = 0; m < M; ++m) evens[m] = *reinterpret_cast<const vec*>(x[m] + k);
    for (int m = 0; m < M; ++m) odds[m] = *reinterpret_cast<const vec*>(x[m] + k + LANES);
    for (int r = 0; r < WIDTH; ++r) {
      const vec low = even(pairs[r]), high = odd(pairs[r]);
      for (int m = 0; m < M; ++m) sums[m * WIDTH + r] = multiply_add(high, odds[m], multiply_add(low, evens[m], sums[m * WIDTH + r]));
    }
  } else {
    vec low[WIDTH], high[WIDTH];
    for (int r = 0; r < WIDTH; ++r) low[r] = even(pairs[r]), high[r] = odd(pairs[r]);
    for (int m = 0; m < M; ++m) {
      const vec evens = hold(*reinterpret_cast<const vec*>(x[m] + k));
      for (int r = 0; r < WIDTH; ++r) sums[m * WIDTH + r] = multiply_add(low[r], evens, sums[m * WIDTH + r]);
      const vec odds = hold(*reinterpret_cast<const vec*>(x[m] + k + LANES));
      for (int r = 0; r < WIDTH; ++r) sums[m * WIDTH + r] = multiply_add(high[r], odds, sums[m * WIDTH + r]);
    }
  }
}

#endif

// One row of x as tiles read it.
void prepare_row(const uint16_t* x, int64_t K, Prepared* row) {
  for (int64_t k = 0; k < K; k += STEP) store_pairs(k + STEP <= K ? load(x + k) : load_tail(x + k, K - k), row + k);
}

// M rows of x by WIDTH rows of w.  out [M][GROUP], of which WIDTH are written.  `ahead` elements further on is what a later tile reads, asked for now if FETCH.
template <int M, int WIDTH, bool FETCH>
inline void run_tile(const Prepared* const* x, const uint16_t* w, int64_t w_stride, int64_t K, int64_t ahead, float* out) {
  vec sums[WIDTH * M] = {};
  words pairs[WIDTH];
  int64_t k = 0;
  for (; k + STEP <= K; k += STEP) {
    for (int r = 0; r < WIDTH; ++r) pairs[r] = load(w + r * w_stride + k);
    for (int r = 0; FETCH && r < WIDTH; ++r) __builtin_prefetch(w + r * w_stride + k + ahead, 0, 2);
    tile_step<M, WIDTH>(x, pairs, k, sums);
  }
  if (k < K) {
    for (int r = 0; r < WIDTH; ++r) pairs[r] = load_tail(w + r * w_stride + k, K - k);
    tile_step<M, WIDTH>(x, pairs, k, sums);
  }
  float added[WIDTH * M];
  add_lanes<WIDTH * M>(sums, added);
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < WIDTH; ++r) out[m * GROUP + r] = added[m * WIDTH + r];
  }
}

// What a pass over rows of w asks memory for beforehand: its own tiles, the block that is read after it, or nothing.
enum class Fetch { TILES, BLOCK, NOTHING };

// M rows of x by the rows of w from `first` to `last`, WIDTH at once; y: the first of the M rows.  `block`: rows from a block to the next.
template <int M, int WIDTH, Fetch FETCH>
void run_rows(const Problem& p, const Prepared* rows, int64_t first, int64_t last, int64_t block, uint16_t* y) {
  constexpr bool SOME = FETCH != Fetch::NOTHING;
  const int64_t ahead = FETCH == Fetch::BLOCK ? block * p.w_stride : std::max(WIDTH * p.w_stride, FETCH_AHEAD);
  const Prepared* x[M];
  for (int m = 0; m < M; ++m) x[m] = rows + m * p.row();
  float out[M * GROUP];
  for (int64_t n = first; n < last; n += GROUP) {
    const int64_t count = std::min(GROUP, last - n);
    const uint16_t* w = p.w + n * p.w_stride;
    int64_t r = 0;
    for (; r + WIDTH <= count; r += WIDTH) run_tile<M, WIDTH, SOME>(x, w + r * p.w_stride, p.w_stride, p.K, ahead, out + r);
    for (; r < count; ++r) run_tile<M, 1, SOME>(x, w + r * p.w_stride, p.w_stride, p.K, ahead, out + r);
    for (int m = 0; m < M; ++m) {
      uint16_t* row = y + m * p.N + n;
      const float* sums = out + m * GROUP;
      if (p.bias != nullptr) {
        for (r = 0; r < count; ++r) row[r] = narrow(sums[r] + widen(p.bias[n + r]));
      } else {
        for (r = 0; r < count; ++r) row[r] = narrow(sums[r]);
      }
    }
  }
}

template <int M, int WIDTH>
void run_width(Fetch fetch, const Problem& p, const Prepared* rows, int64_t first, int64_t last, int64_t block, uint16_t* y) {
  switch (fetch) {
    case Fetch::TILES: run_rows<M, WIDTH, Fetch::TILES>(p, rows, first, last, block, y); break;
    case Fetch::BLOCK: run_rows<M, WIDTH, Fetch::BLOCK>(p, rows, first, last, block, y); break;
    case Fetch::NOTHING: run_rows<M, WIDTH, Fetch::NOTHING>(p, rows, first, last, block, y); break;
  }
}

// The same for a number of rows of x that is known when it runs, at most MOST.
template <int MOST = MOST_ROWS>
void run_some_rows(int64_t M, Fetch fetch, const Problem& p, const Prepared* rows, int64_t first, int64_t last, int64_t block, uint16_t* y) {
  if (M == MOST) {
    constexpr int WIDTH = MOST <= ROWS_OF_WIDE ? 8 : MANY_REGISTERS || MOST == 2 ? 4 : 2;
    // Eight rows of w that share their sets of the first-level cache, or find it full of x, push each other out.
    if (!MANY_REGISTERS && WIDTH == 8 && (p.w_stride % ALIASED == 0 || p.K > HALF_CACHE)) {
      run_width<MOST, 4>(fetch, p, rows, first, last, block, y);
    } else {
      run_width<MOST, WIDTH>(fetch, p, rows, first, last, block, y);
    }
  } else if constexpr (MOST > 1) {
    run_some_rows<MOST - 1>(M, fetch, p, rows, first, last, block, y);
  }
}

// A thread's rows of w, a block at a time, for all M prepared rows of a chunk.
void run_share(const Problem& p, const Prepared* rows, int64_t M, int64_t first, int64_t last, uint16_t* y) {
  const int64_t block = std::max<int64_t>(8, BLOCK_BYTES / (2 * std::max<int64_t>(p.K, 1)) / 8 * 8);
  for (int64_t n = first; n < last; n += block) {
    int64_t m = 0;
    while (m < M) {
      const int64_t left = M - m, now = left == 7 || left == 8 ? 4 : std::min<int64_t>(left, MOST_ROWS);
      const Fetch fetch = m == 0 ? Fetch::TILES : now == left ? Fetch::BLOCK : Fetch::NOTHING;
      run_some_rows(now, fetch, p, rows + m * p.row(), n, std::min(last, n + block), block, y + m * p.N);
      m += now;
    }
  }
}

void run_chunk(const Problem& p, int64_t first_row, int64_t M, Prepared* rows, int threads) {
  const uint16_t* x = p.x + first_row * p.x_stride;
  uint16_t* y = p.y + first_row * p.N;
  if (threads == 1) {
    for (int64_t m = 0; m < M; ++m) prepare_row(x + m * p.x_stride, p.K, rows + m * p.row());
    run_share(p, rows, M, 0, p.N, y);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; ++m) prepare_row(x + m * p.x_stride, p.K, rows + m * p.row());
    const int64_t units = (p.N + 7) / 8, team = omp_get_num_threads(), own = omp_get_thread_num();
    run_share(p, rows, M, units * own / team * 8, std::min(p.N, units * (own + 1) / team * 8), y);
  }
}

}  // namespace

extern "C" int linear_bf16(int64_t M, int64_t N, int64_t K, const void* x, int64_t x_stride, const void* w, int64_t w_stride, const void* bias, void* y, int threads) {
  const Problem p{M, N, K, static_cast<const uint16_t*>(x), x_stride, static_cast<const uint16_t*>(w), w_stride, static_cast<const uint16_t*>(bias), static_cast<uint16_t*>(y)};
  static thread_local std::vector<Line> rows;
  try {
    const size_t need = static_cast<size_t>(std::min(M, CHUNK) * p.row() * sizeof(Prepared) / sizeof(Line) + 1);
    if (rows.size() < need) rows.resize(need);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  if (M * N * K < 2 * MIN_WORK) threads = 1;
  for (int64_t first = 0; first < M; first += CHUNK) run_chunk(p, first, std::min(CHUNK, M - first), reinterpret_cast<Prepared*>(rows.data()), threads);
  return OK;
}
