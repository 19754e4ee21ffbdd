#include "pairs.hpp"

#include <algorithm>

namespace sentinel {

namespace {

// Whether slot j of a token's row is the first that names its expert.
bool is_first(const int32_t* row, int64_t j) { return std::find(row, row + j, row[j]) == row + j; }

}  // namespace

Outcome sort_pairs(const Call& call, Pairs* pairs) {
  std::vector<int64_t> place(call.E, 0);  // pairs of an expert, then where its next one goes
  for (int64_t t = 0; t < call.T; ++t) {
    const int32_t* row = call.ids + t * call.k;
    for (int64_t j = 0; j < call.k; ++j) {
      if (row[j] < -1 || row[j] >= call.E) return {BAD_EXPERT, row[j]};
      if (row[j] >= 0 && is_first(row, j)) ++place[row[j]];
    }
  }
  pairs->first.push_back(0);
  for (int64_t e = 0; e < call.E; ++e) {
    const int64_t count = place[e], start = call.block_start[e], end = call.block_start[e + 1];
    place[e] = -1;
    if (count == 0) continue;
    if (start < 0 || end < start || end > call.n) return {BAD_BLOCKS, end};
    if (end == start) continue;
    place[e] = pairs->first.back();
    pairs->experts.push_back(static_cast<int32_t>(e));
    pairs->first.push_back(pairs->first.back() + count);
  }
  pairs->tokens.resize(pairs->first.back());
  pairs->weights.resize(pairs->first.back());
  for (int64_t t = 0; t < call.T; ++t) {
    const int32_t* row = call.ids + t * call.k;
    for (int64_t j = 0; j < call.k; ++j) {
      if (row[j] < 0 || place[row[j]] < 0 || !is_first(row, j)) continue;
      const int64_t pair = place[row[j]]++;
      pairs->tokens[pair] = static_cast<int32_t>(t);
      for (int64_t i = j; i < call.k; ++i) {
        if (row[i] == row[j]) pairs->weights[pair] += call.weights[t * call.k + i];
      }
    }
  }
  return {OK, 0};
}

}  // namespace sentinel
