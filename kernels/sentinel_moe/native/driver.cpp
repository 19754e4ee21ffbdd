// Divides a call among threads, in one of two ways that sum in the same order:
//
//   few tokens an expert   a thread takes a block: activates its atoms, then adds its rows of w2 into partial rows, all as
//                          whole streams; the partial rows of a token are summed in ascending order at the end;
//   many                   the activations of all blocks first; then each thread owns a range of columns for all tokens.
//
// Either way a row of the output is the sum of its blocks' sums in ascending order, each from zero, so that its bits
// depend on neither the batch nor the threads.  Kernels with a `span` sum chains of blocks instead, always the second way.

#include "driver.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "pairs.hpp"

namespace sentinel {

namespace {

constexpr int64_t CHUNK = 4096;            // tokens whose scratch is held at once
constexpr int64_t FEW = 4;                 // tokens of an expert, on average, up to which a thread takes a block
constexpr int64_t TASKS = 8;               // of a worker, at least, where there are as many
constexpr int64_t SHARED_ATOMS = 64;       // of a task, at least, that makes something of x
constexpr int64_t APART_BYTES = 4 << 20;   // of chains' own sums, up to which they are kept apart
constexpr int64_t KEPT_BYTES = 64 << 20;   // scratch that is kept for the next call, besides the workers' own
constexpr int64_t LINE = 64;
constexpr int64_t SIZES[DTYPES] = {4, 2, 2};

int64_t size_of_weight(const Call& call) { return call.w13_scales == nullptr ? SIZES[call.dtype] : 1; }

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Memory of the calling thread that stays between calls, so that its pages are touched once.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  char* reserve(int64_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      memory_ = static_cast<char*>(std::aligned_alloc(LINE, round_up(bytes, LINE)));
      if (memory_ == nullptr) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return memory_;
  }
  void shrink(int64_t kept) {
    if (bytes_ <= kept) return;
    std::free(memory_);
    memory_ = nullptr;
    bytes_ = 0;
  }

 private:
  char* memory_ = nullptr;
  int64_t bytes_ = 0;
};

thread_local Scratch scratch;

template <typename F>
void run_team(const Team& team, int64_t count, F work) {
  team.run(
      count, [](int64_t begin, int64_t end, void* state) { (*static_cast<F*>(state))(begin, end); }, &work);
}

// Every worker takes the next task until none is left.
template <typename F>
void share(const Team& team, int64_t tasks, F work) {
  std::atomic<int64_t> next{0};
  run_team(team, std::min(team.threads, tasks), [&](int64_t begin, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(task, begin);
  });
}

struct Task {
  int32_t chosen;  // index of the expert among the chosen
  int32_t number;  // of the first block within it
  int64_t place;   // of its expert's first activation
  int64_t blocks;
  int64_t begin, end;  // of its atoms
};

// One batch of at most CHUNK tokens.
class Batch {
 public:
  Batch(const Call& call, const Kernels& kernels, const Team& team, const Pairs& pairs) : call_(call), kernels_(kernels), team_(team), pairs_(pairs) {
    size_ = SIZES[call.dtype];
    groups_ = (call.H + SCALED - 1) / SCALED;
    stride_ = round_up(call.H, kernels.columns);
    threads_ = std::max<int64_t>(1, team.threads);
    scratch_bytes_ = round_up(kernels.count_scratch(call.B, call.H), LINE);
    x_stride_ = kernels.x_size == 0 ? call.H * size_ : groups_ * SCALED * kernels.x_size;
    x_bytes_ = kernels.x_size == 0 ? 0 : round_up(call.T * x_stride_, LINE);
    for (size_t i = 0; i < pairs.experts.size(); ++i) widest_ = std::max(widest_, pairs.first[i + 1] - pairs.first[i]);
  }

  void run() {
    const int64_t pairs = static_cast<int64_t>(pairs_.tokens.size()), chosen = static_cast<int64_t>(pairs_.experts.size());
    kernels_.span == 0 && pairs <= FEW * chosen ? run_by_blocks() : run_by_columns();
  }

 private:
  int64_t count_pairs(int64_t chosen) const { return pairs_.first[chosen + 1] - pairs_.first[chosen]; }
  int64_t find_start(int64_t chosen) const { return call_.block_start[pairs_.experts[chosen]]; }
  int64_t count_blocks(int64_t chosen) const { return call_.block_start[pairs_.experts[chosen] + 1] - find_start(chosen); }

  // The memory of this batch, behind its prepared rows of x.
  char* reserve(int64_t bytes) {
    char* memory = scratch.reserve(x_bytes_ + bytes);
    const char* x = static_cast<const char*>(call_.x);
    if (x_bytes_ > 0) {
      share(team_, call_.T, [&](int64_t t, int64_t) { kernels_.prepare(x + t * call_.H * size_, call_.H, memory + t * x_stride_); });
    }
    inputs_.resize(pairs_.tokens.size());
    for (size_t i = 0; i < inputs_.size(); ++i) inputs_[i] = (x_bytes_ > 0 ? memory : x) + pairs_.tokens[i] * x_stride_;
    return memory + x_bytes_;
  }

  Block describe(const Task& task, void* act, int64_t act_stride, void* own) const {
    const int64_t bytes = call_.B * call_.H * size_of_weight(call_), scales = call_.B * groups_, block = find_start(task.chosen) + task.number;
    const char* gate = static_cast<const char*>(call_.w13) + block * 2 * bytes;
    const int64_t first = pairs_.first[task.chosen];
    Block described = {gate, gate + bytes, static_cast<const char*>(call_.w2) + block * bytes, nullptr, nullptr, nullptr, call_.H, call_.B, count_pairs(task.chosen), &inputs_[first], &pairs_.weights[first], act, act_stride, own, nullptr, task.blocks, task.begin, task.end, false};
    if (call_.w13_scales != nullptr) {
      described.gate_scales = call_.w13_scales + block * 2 * scales;
      described.up_scales = described.gate_scales + scales;
      described.down_scales = call_.w2_scales + block * scales;
    }
    return described;
  }

  // Rows of partial sums, one task's behind another's; those of token t are rows[first[t]] to rows[first[t + 1] − 1].
  struct Partials {
    std::vector<int64_t> starts, first;  // of each task, of each token
    std::vector<int64_t> rows;
    int64_t count = 0;
  };

  Partials arrange(const std::vector<Task>& tasks) const {
    Partials partials;
    partials.first.resize(call_.T + 1, 0);
    for (const Task& task : tasks) {
      partials.starts.push_back(partials.count);
      partials.count += count_pairs(task.chosen);
      for (int64_t pair = pairs_.first[task.chosen]; pair < pairs_.first[task.chosen + 1]; ++pair) ++partials.first[pairs_.tokens[pair] + 1];
    }
    for (int64_t t = 0; t < call_.T; ++t) partials.first[t + 1] += partials.first[t];
    partials.rows.resize(partials.count);
    std::vector<int64_t> next(partials.first.begin(), partials.first.end() - 1);
    for (size_t number = 0; number < tasks.size(); ++number) {
      const int64_t pair = pairs_.first[tasks[number].chosen];
      for (int64_t i = 0; i < count_pairs(tasks[number].chosen); ++i) partials.rows[next[pairs_.tokens[pair + i]]++] = partials.starts[number] + i;
    }
    return partials;
  }

  // Every token's partial rows, in the order of tasks, into its row of the output.
  void add_partials(const Partials& partials, const float* sums) const {
    const int64_t pieces = (call_.H + REDUCED - 1) / REDUCED;
    share(team_, call_.T * pieces, [&](int64_t number, int64_t) {
      const int64_t t = number / pieces, column = number % pieces * REDUCED;
      std::vector<const float*> from;
      for (int64_t i = partials.first[t]; i < partials.first[t + 1]; ++i) from.push_back(sums + partials.rows[i] * stride_ + column);
      reduce(from.data(), from.size(), t, column, std::min(REDUCED, call_.H - column));
    });
  }

  void run_by_blocks() {
    std::vector<Task> tasks;
    for (size_t i = 0; i < pairs_.experts.size(); ++i) {
      for (int64_t b = 0; b < count_blocks(i); ++b) tasks.push_back({static_cast<int32_t>(i), static_cast<int32_t>(b), 0, 1, 0, call_.B});
    }
    const Partials partials = arrange(tasks);
    const int64_t act_bytes = round_up(widest_ * call_.B * kernels_.act_size, LINE), own_bytes = act_bytes + scratch_bytes_;
    char* memory = reserve(partials.count * stride_ * sizeof(float) + threads_ * own_bytes);
    float* sums = reinterpret_cast<float*>(memory);
    char* acts = memory + partials.count * stride_ * sizeof(float);
    share(team_, tasks.size(), [&](int64_t number, int64_t worker) {
      char* own = acts + worker * own_bytes;
      Block block = describe(tasks[number], own, call_.B, own + act_bytes);
      if (number + threads_ < static_cast<int64_t>(tasks.size())) block.next = describe(tasks[number + threads_], nullptr, 0, nullptr).gate;
      kernels_.activate(block);
      kernels_.add_rows(block, sums + partials.starts[number] * stride_, stride_);
    });
    add_partials(partials, sums);
  }

  // The chosen experts' blocks, at most `most` of one expert together; `places`: of their first activations.
  std::vector<Task> list_tasks(int64_t most, const std::vector<int64_t>& places) const {
    std::vector<Task> tasks;
    for (size_t i = 0; i < pairs_.experts.size(); ++i) {
      const int64_t width = count_blocks(i);
      for (int64_t b = 0; b < width; b += most) {
        const int64_t blocks = std::min(most, width - b);
        tasks.push_back({static_cast<int32_t>(i), static_cast<int32_t>(b), places[i], blocks, 0, blocks * call_.B});
      }
    }
    return tasks;
  }

  // The chosen experts' atoms, for kernels with a span: as few tasks as give every worker some, as they make something of x.
  std::vector<Task> list_pieces(int64_t atoms, const std::vector<int64_t>& places) const {
    const int64_t piece = std::max(SHARED_ATOMS, round_up(atoms / (TASKS * threads_), ATOMS));
    std::vector<Task> tasks;
    for (size_t i = 0; i < pairs_.experts.size(); ++i) {
      const int64_t all = count_blocks(i) * call_.B;
      for (int64_t a = 0; a < all; a += piece) tasks.push_back({static_cast<int32_t>(i), 0, places[i], count_blocks(i), a, std::min(a + piece, all)});
    }
    return tasks;
  }

  // Blocks of a chain of sums.
  int64_t count_chained() const {
    const int64_t fit = std::max<int64_t>(1, kernels_.span / call_.B);
    return kernels_.span == 0 || call_.B % 32 == 0 ? fit : std::max<int64_t>(2, fit / 2 * 2);
  }

  // Where a task's rows of gate begin.
  const void* find_gate(const Block& block) const {
    const int64_t row = block.begin / call_.B * 2 * call_.B + block.begin % call_.B;
    return static_cast<const char*>(block.gate) + row * call_.H * size_of_weight(call_);
  }

  // How far the activations of a token are apart, and how many tokens have room for them.
  int64_t find_act_stride(int64_t chosen) const { return round_up(count_blocks(chosen) * call_.B, kernels_.span == 0 ? 1 : 32); }
  int64_t count_act_rows(int64_t chosen) const { return round_up(count_pairs(chosen), kernels_.span == 0 ? 1 : 16); }

  void run_by_columns() {
    std::vector<int64_t> places;
    int64_t acts = 0, atoms = 0;
    for (size_t i = 0; i < pairs_.experts.size(); ++i) {
      places.push_back(acts);
      acts += find_act_stride(i) * count_act_rows(i);
      atoms += count_blocks(i) * call_.B;
    }
    const std::vector<Task> added = list_tasks(count_chained(), places);
    const Partials partials = kernels_.span == 0 ? Partials() : arrange(added);
    const bool apart = kernels_.span != 0 && partials.count * stride_ * static_cast<int64_t>(sizeof(float)) <= APART_BYTES;
    const int64_t rows_of_sums = apart ? partials.count : call_.T;
    const int64_t sums_bytes = rows_of_sums * stride_ * sizeof(float), act_bytes = round_up(acts * kernels_.act_size, LINE);
    char* memory = reserve(sums_bytes + act_bytes + threads_ * scratch_bytes_);
    float* sums = reinterpret_cast<float*>(memory);
    char* act = memory + sums_bytes;
    const auto describe_task = [&](const Task& task, int64_t worker) {
      void* own = act + act_bytes + worker * scratch_bytes_;
      return describe(task, act + (task.place + task.number * call_.B) * kernels_.act_size, find_act_stride(task.chosen), own);
    };
    for (size_t i = 0; i < places.size(); ++i) {
      const int64_t stride = find_act_stride(i), used = count_blocks(i) * call_.B;
      for (int64_t row = 0; used < stride && row < count_act_rows(i); ++row) {
        std::memset(act + (places[i] + row * stride + used) * kernels_.act_size, 0, (stride - used) * kernels_.act_size);
      }
    }
    const std::vector<Task> activated = kernels_.span == 0 ? list_tasks(1, places) : list_pieces(atoms, places);
    share(team_, activated.size(), [&](int64_t number, int64_t worker) {
      Block block = describe_task(activated[number], worker);
      if (number + threads_ < static_cast<int64_t>(activated.size())) block.next = find_gate(describe_task(activated[number + threads_], worker));
      kernels_.activate(block);
    });
    const int64_t columns = kernels_.columns, tiles = stride_ / columns, owners = std::min(threads_, tiles);
    if (apart) {
      // Few tokens: each chain reads its rows of `down` as a stream, and writes sums of its own; in ranges of columns where
      // chains are fewer than workers have a use for.
      const int64_t ranges = std::min(tiles, std::max<int64_t>(1, 2 * threads_ / std::max<int64_t>(1, added.size())));
      const auto find_first = [&](int64_t range) { return range * tiles / ranges * columns; };
      share(team_, added.size() * ranges, [&](int64_t number, int64_t worker) {
        const int64_t range = number % ranges, first = find_first(range), after = number + threads_;
        Block block = describe_task(added[number / ranges], worker);
        block.alone = true;
        if (after < static_cast<int64_t>(added.size()) * ranges) {
          const char* next = static_cast<const char*>(describe_task(added[after / ranges], worker).down);
          block.next = next + (find_first(after % ranges) - first) * size_of_weight(call_);
        }
        std::vector<float*> rows(block.count);
        for (int64_t i = 0; i < block.count; ++i) rows[i] = sums + (partials.starts[number / ranges] + i) * stride_;
        kernels_.add_columns(block, first, std::min(find_first(range + 1), call_.H) - first, rows.data());
      });
      return add_partials(partials, sums);
    }
    std::vector<float*> rows(pairs_.tokens.size());
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = sums + pairs_.tokens[i] * stride_;
    run_team(team_, owners, [&](int64_t begin, int64_t end) {
      const int64_t from = begin * tiles / owners * columns, to = std::min(end * tiles / owners * columns, call_.H);
      for (int64_t t = 0; t < call_.T; ++t) std::memset(sums + t * stride_ + from, 0, round_up(to - from, columns) * sizeof(float));
      for (size_t i = 0; i < added.size(); ++i) {
        Block block = describe_task(added[i], begin);
        if (i + 1 < added.size()) block.next = describe_task(added[i + 1], begin).down;
        kernels_.add_columns(block, from, to - from, &rows[pairs_.first[added[i].chosen]]);
      }
      for (int64_t t = 0; t < call_.T; ++t) {
        for (int64_t column = from; column < to; column += REDUCED) {
          const float* row = sums + t * stride_ + column;
          reduce(&row, 1, t, column, std::min(REDUCED, to - column));
        }
      }
    });
  }

  void reduce(const float* const* rows, int64_t count, int64_t t, int64_t column, int64_t columns) const {
    kernels_.reduce(rows, count, columns, static_cast<char*>(call_.out) + (t * call_.H + column) * size_);
  }

  const Call& call_;
  const Kernels& kernels_;
  const Team& team_;
  const Pairs& pairs_;
  int64_t size_, groups_, stride_, threads_, scratch_bytes_, x_stride_, x_bytes_, widest_ = 0;
  std::vector<const void*> inputs_;  // [pairs] rows of x
};

}  // namespace

Outcome run(const Call& whole, const Path& path, const Team& team) {
  const int64_t size = SIZES[whole.dtype];
  int64_t workers = 0;
  try {
    for (int64_t first = 0; first < whole.T; first += CHUNK) {
      Call call = whole;
      call.T = std::min(CHUNK, whole.T - first);
      call.x = static_cast<const char*>(whole.x) + first * whole.H * size;
      call.out = static_cast<char*>(whole.out) + first * whole.H * size;
      call.weights += first * whole.k;
      call.ids += first * whole.k;
      Pairs pairs;
      const Outcome outcome = sort_pairs(call, &pairs);
      if (outcome.status != OK) return outcome;
      const Kernels* kernels = call.w13_scales == nullptr ? path.kernels[call.dtype] : path.find_fp8(call.dtype);
      Batch(call, *kernels, team, pairs).run();
      workers = std::max(workers, team.threads * kernels->count_scratch(call.B, call.H));
    }
    scratch.shrink(KEPT_BYTES + workers);
  } catch (const std::bad_alloc&) {
    return {NO_MEMORY, whole.T};
  }
  return {OK, 0};
}

uint64_t read_blocks(const Call& call, const Team& team) {
  Pairs pairs;
  if (sort_pairs(call, &pairs).status != OK) return 0;
  struct Part {
    const uint64_t* first;
    int64_t words;
  };
  std::vector<Part> parts;
  const auto add = [&](const void* p, int64_t block, int64_t bytes) { parts.push_back({static_cast<const uint64_t*>(p) + block * bytes / 8, bytes / 8}); };
  const int64_t bytes = call.B * call.H * size_of_weight(call), scales = call.B * ((call.H + SCALED - 1) / SCALED) * 4;
  for (const int32_t expert : pairs.experts) {
    for (int64_t block = call.block_start[expert]; block < call.block_start[expert + 1]; ++block) {
      add(call.w13, 2 * block, bytes);
      add(call.w13, 2 * block + 1, bytes);
      add(call.w2, block, bytes);
      if (call.w13_scales != nullptr) add(call.w13_scales, block, 2 * scales);
      if (call.w2_scales != nullptr) add(call.w2_scales, block, scales);
    }
  }
  std::atomic<uint64_t> total{0};
  share(team, parts.size(), [&](int64_t number, int64_t) {
    uint64_t sums[8] = {};
    const Part part = parts[number];
    for (int64_t i = 0; i < part.words; i += 8) {
      __builtin_prefetch(part.first + i + 1024, 0, 2);  // two pages ahead
      for (int j = 0; j < 8; ++j) sums[j] += part.first[i + j];
    }
    for (const uint64_t sum : sums) total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total;
}

}  // namespace sentinel
