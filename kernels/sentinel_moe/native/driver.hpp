// The op without torch: what is called, and what threads are.

#pragma once

#include "path.hpp"

namespace sentinel {

struct Call {
  DType dtype;                  // of x, out and, unless they have scales, the weights
  int64_t T, H, k, E, B, n;     // n kept blocks
  const void* x;                // [T, H]
  const float* weights;         // [T, k]
  const int32_t* ids;           // [T, k], −1 for no expert
  const void *w13, *w2;         // [n, 2, B, H], [n, B, H]
  const int32_t* block_start;   // [E + 1]
  void* out;                    // [T, H]
  const float *w13_scales, *w2_scales;  // [n, 2, B, ⌈H / SCALED⌉], [n, B, ⌈H / SCALED⌉] of weights of e4m3, or null
};

// Calls work(begin, end, state) for parts of 0 … count − 1 that cover it, at once where it can.
struct Team {
  int64_t threads;
  void (*run)(int64_t count, void (*work)(int64_t begin, int64_t end, void* state), void* state);
};

enum Status { OK = 0, BAD_EXPERT = 1, BAD_BLOCKS = 2, NO_MEMORY = 3 };

// Why there is no result: the first `value` that is wrong.
struct Outcome {
  Status status;
  int64_t value;
};

// Writes out, or says why not; then out is undefined.
Outcome run(const Call& call, const Path& path, const Team& team);

// Reads what `run` would read of the weights, and nothing else: the floor of its time.  Returns a sum of it.
uint64_t read_blocks(const Call& call, const Team& team);

// The paths of this build, best first.
void visit_paths(void (*visit)(const Path& path, void* state), void* state);
// The path of this name, or, for null, the best; null: not in this build, or not for this processor.
const Path* find_path(const char* name);

}  // namespace sentinel
