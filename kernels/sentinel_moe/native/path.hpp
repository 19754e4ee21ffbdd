// What a path through the kernels is: the same four steps for one instruction set, chosen at run time.

#pragma once

#include <cstddef>
#include <cstdint>

namespace sentinel {

enum DType { F32 = 0, F16 = 1, BF16 = 2, DTYPES = 3 };

constexpr int64_t ATOMS = 16;    // atoms whose weights stay in the cache while all tokens pass; divides every block
constexpr int64_t COLUMNS = 32;  // dense weights: a path may keep sums in an order of its own within so many columns
constexpr int64_t SCALED = 128;  // columns of a row of 8-bit weights that share a scale; their sums likewise

// One block of an expert, [B, H] row by row in memory, and the tokens that chose the expert.
struct Block {
  const void *gate, *up, *down;
  const float *gate_scales, *up_scales, *down_scales;  // [B, ⌈H / SCALED⌉] of 8-bit weights
  int64_t H, B;
  int64_t count;                // tokens
  const void* const* inputs;    // [count] rows of x, prepared where the kernels do that
  const float* weights;         // [count] of the routing
  void* act;                    // [count][act_stride] weighted activations
  int64_t act_stride;
  void* scratch;                // of `count_scratch` bytes
  const void* next;             // the rows of gate, or of `down`, that are probably read after these, or null
  int64_t blocks;               // 1, or as many of the expert as follow each other from this one: kernels with a `span`
  int64_t begin, end;           // of their atoms those that `activate` is for
  bool alone;                   // `add_columns` writes sums, which nobody else adds to: kernels with a `span`
};

// Sums are rows of fp32 of a multiple of `columns`.  A sum over a block's atoms, or a chain's, starts from zero and takes the
// atoms in one order, whatever else is computed beside it, in `add_rows` and `add_columns` alike.
struct Kernels {
  int64_t act_size;  // bytes of an activation
  int64_t columns;   // a thread of `add_columns` has a multiple of so many
  // act = weight · silu(gate · x) · (up · x)
  void (*activate)(const Block& block);
  // sums [count][stride] = act · down, each row of `down` read as one stream
  void (*add_rows)(const Block& block, float* sums, int64_t stride);
  // sums[i] [columns] += act · down for columns from `first`, for many tokens
  void (*add_columns)(const Block& block, int64_t first, int64_t columns, float* const* sums);
  // out [columns] = the sum of rows in their order; columns ≤ REDUCED
  void (*reduce)(const float* const* rows, int64_t count, int64_t columns, void* out);
  int64_t (*count_scratch)(int64_t B, int64_t H);
  // Bytes of an element of a prepared row of x, of ⌈H / SCALED⌉ · SCALED elements; 0: rows are taken as they are.
  int64_t x_size;
  void (*prepare)(const void* x, int64_t H, void* row);
  // 0: sums over atoms are a block's.  Else an expert's atoms are summed in chains, each from zero: of as many whole blocks
  // as fit in `span` atoms, or at least one, or two where a block is an odd multiple of 16, so that only the last chain may
  // be one.  Then `activate` takes any sixteen atoms of an expert and `add_columns` a chain; activations have room for a
  // multiple of 16 tokens and of 32 atoms, zeros behind the last; `add_rows` is not called.
  int64_t span;
};

constexpr int64_t REDUCED = 512;

struct Path {
  const char* name;
  const char* needs;           // of the processor, for people
  bool (*is_supported)();
  const Kernels* kernels[DTYPES];
  const Kernels* (*find_fp8)(DType of_x);
};

}  // namespace sentinel
