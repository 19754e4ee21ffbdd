// The (token, expert) pairs of a batch, sorted by expert.

#pragma once

#include <vector>

#include "driver.hpp"

namespace sentinel {

struct Pairs {
  std::vector<int32_t> experts;  // chosen experts, ascending, of which something is kept
  std::vector<int64_t> first;    // [chosen + 1] first pair of each
  std::vector<int32_t> tokens;   // [pairs] ascending within an expert
  std::vector<float> weights;    // [pairs]
};

// An expert that a token names twice is one pair with the sum of the weights.  block_start is looked at where an expert
// was chosen.
Outcome sort_pairs(const Call& call, Pairs* pairs);

}  // namespace sentinel
