// The op for torch, by its stable interface (2.10 and later): registered for the CPU as soon as the library is loaded.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>

#include "driver.hpp"

namespace {

using sentinel::Call;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MAX_TOPK = 16;
std::atomic<const sentinel::Path*> chosen_path{sentinel::find_path(nullptr)};

void run_in_torch(int64_t count, void (*work)(int64_t, int64_t, void*), void* state) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { work(begin, end, state); });
}

sentinel::Team make_team() { return {static_cast<int64_t>(torch::stable::get_num_threads()), run_in_torch}; }

bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t size : shape) {
    if (tensor.size(i++) != size) return false;
  }
  return tensor.is_contiguous();
}

// The arguments as sentinel_moe states them; what is wrong with others is found in Python.
Call read_call(const Tensor& x, const Tensor& weights, const Tensor& ids, const Tensor& w13, const Tensor& w2, const Tensor& start, const std::optional<Tensor>& w13_scales, const std::optional<Tensor>& w2_scales) {
  const auto refuse_unless = [](bool good) {
    if (!good) throw std::invalid_argument("sentinel_moe: expected tensors as its documentation has them, got others; see sentinel_moe's arguments");
  };
  refuse_unless(x.dim() == 2 && ids.dim() == 2 && w2.dim() == 3 && start.dim() == 1);
  const int64_t T = x.size(0), H = x.size(1), k = ids.size(1), n = w2.size(0), B = w2.size(1), E = start.size(0) - 1;
  const ScalarType type = x.scalar_type();
  refuse_unless(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16);
  const bool scaled = w13_scales.has_value();
  const ScalarType weight_type = scaled ? ScalarType::Float8_e4m3fn : type;
  refuse_unless(w13.scalar_type() == weight_type && w2.scalar_type() == weight_type && weights.scalar_type() == ScalarType::Float);
  refuse_unless(ids.scalar_type() == ScalarType::Int && start.scalar_type() == ScalarType::Int);
  refuse_unless(H > 0 && B > 0 && H % 16 == 0 && B % 16 == 0 && k >= 1 && k <= MAX_TOPK && E >= 1);
  refuse_unless(has_shape(x, {T, H}) && has_shape(weights, {T, k}) && has_shape(ids, {T, k}) && has_shape(w13, {n, 2, B, H}) && has_shape(w2, {n, B, H}) && has_shape(start, {E + 1}));
  for (const Tensor* tensor : {&x, &weights, &ids, &w13, &w2, &start}) refuse_unless(tensor->is_cpu());
  refuse_unless(scaled == w2_scales.has_value());
  if (scaled) {
    const int64_t groups = (H + sentinel::SCALED - 1) / sentinel::SCALED;
    refuse_unless(has_shape(*w13_scales, {n, 2, B, groups}) && has_shape(*w2_scales, {n, B, groups}));
    for (const Tensor* tensor : {&*w13_scales, &*w2_scales}) refuse_unless(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float);
  }
  const auto scales_of = [&](const std::optional<Tensor>& scales) { return scaled ? static_cast<const float*>(scales->data_ptr()) : nullptr; };
  const sentinel::DType dtype = type == ScalarType::Float ? sentinel::F32 : type == ScalarType::Half ? sentinel::F16 : sentinel::BF16;
  return {dtype, T, H, k, E, B, n, x.data_ptr(), static_cast<const float*>(weights.data_ptr()), static_cast<const int32_t*>(ids.data_ptr()), w13.data_ptr(), w2.data_ptr(), static_cast<const int32_t*>(start.data_ptr()), nullptr, scales_of(w13_scales), scales_of(w2_scales)};
}

Tensor sentinel_moe(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w2, Tensor start, std::optional<Tensor> w13_scales, std::optional<Tensor> w2_scales, std::optional<int64_t> max_blocks) {
  Call call = read_call(x, weights, ids, w13, w2, start, w13_scales, w2_scales);
  if (max_blocks.has_value() && *max_blocks < 1) throw std::invalid_argument("max_blocks_per_expert: expected at least 1, got " + std::to_string(*max_blocks));
  Tensor out = torch::stable::empty_like(x);
  call.out = out.data_ptr();
  const sentinel::Outcome outcome = sentinel::run(call, *chosen_path.load(std::memory_order_relaxed), make_team());
  if (outcome.status == sentinel::OK) return out;
  if (outcome.status == sentinel::NO_MEMORY) throw std::bad_alloc();
  const bool experts = outcome.status == sentinel::BAD_EXPERT;
  const std::string expected = experts ? "topk_ids: expected expert ids from 0 to " + std::to_string(call.E - 1) + ", or -1 for none" : "block_start: expected ascending numbers up to " + std::to_string(call.n);
  throw std::out_of_range(expected + ", got " + std::to_string(outcome.value) + (experts ? "; check the router" : "; check the checkpoint"));
}

int64_t read_blocks(Tensor x, Tensor weights, Tensor ids, Tensor w13, Tensor w2, Tensor start, std::optional<Tensor> w13_scales, std::optional<Tensor> w2_scales) {
  return static_cast<int64_t>(sentinel::read_blocks(read_call(x, weights, ids, w13, w2, start, w13_scales, w2_scales), make_team()));
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The path in use from now on: of this name, or, for null, the best.  Returns its name; null: not in this build or not in
// this processor, and nothing has changed.
EXPORTED const char* sentinel_use_path(const char* name) {
  const sentinel::Path* path = sentinel::find_path(name);
  if (path == nullptr) return nullptr;
  chosen_path = path;
  return path->name;
}

// "name\tneeds\t0 or 1\n" for each path of this build, best first; 1: the processor has it.
EXPORTED const char* sentinel_list_paths() {
  static const std::string text = [] {
    std::string lines;
    sentinel::visit_paths(
        [](const sentinel::Path& path, void* lines) {
          *static_cast<std::string*>(lines) += std::string(path.name) + '\t' + path.needs + '\t' + (path.is_supported() ? '1' : '0') + '\n';
        },
        &lines);
    return lines;
  }();
  return text.c_str();
}

STABLE_TORCH_LIBRARY_FRAGMENT(laguna_serve, library) { library.def("sentinel_moe_read(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13_blocks, Tensor w2_blocks, Tensor block_start, Tensor? w13_scales=None, Tensor? w2_scales=None) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(laguna_serve, CPU, library) {
  library.impl("sentinel_moe", TORCH_BOX(&sentinel_moe));
  library.impl("sentinel_moe_read", TORCH_BOX(&read_blocks));
}
