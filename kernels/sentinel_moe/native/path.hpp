// What a path through the kernels is: the same four steps for one instruction set, chosen at run time.

#pragma once

#include <cstddef>
#include <cstdint>

namespace sentinel {

enum DType { F32 = 0, F16 = 1, BF16 = 2, DTYPES = 3 };

constexpr int64_t ATOMS = 16;    // atoms whose weights stay in the cache while all tokens pass; divides every block
constexpr int64_t COLUMNS = 32;  // a path may keep sums in an order of its own within so many columns

// One block of an expert, [B, H] row by row in memory, and the tokens that chose the expert.
struct Block {
  const void *gate, *up, *down;
  int64_t H, B;
  int64_t count;                // tokens
  const void* const* inputs;    // [count] rows of x
  const float* weights;         // [count] of the routing
  void* act;                    // [count][act_stride] weighted activations, rounded to the dtype once
  int64_t act_stride;
  void* scratch;                // of `add_columns`: B · COLUMNS floats
};

// Sums are rows of fp32 of a multiple of COLUMNS.  A sum over a block's atoms starts from zero and takes the atoms in
// ascending order, whatever else is computed beside it, in `add_rows` and `add_columns` alike.
struct Kernels {
  int64_t act_size;  // bytes of an activation
  // act = weight · silu(gate · x) · (up · x)
  void (*activate)(const Block& block);
  // sums [count][stride] = act · down, each row of `down` read as one stream
  void (*add_rows)(const Block& block, float* sums, int64_t stride);
  // sums[i] [columns] += act · down for columns from `first`, for many tokens
  void (*add_columns)(const Block& block, int64_t first, int64_t columns, float* const* sums);
  // out [columns] = the sum of rows in their order; columns ≤ REDUCED
  void (*reduce)(const float* const* rows, int64_t count, int64_t columns, void* out);
};

constexpr int64_t REDUCED = 512;

struct Path {
  const char* name;
  const char* needs;           // of the processor, for people
  bool (*is_supported)();
  const Kernels* kernels[DTYPES];
};

}  // namespace sentinel
