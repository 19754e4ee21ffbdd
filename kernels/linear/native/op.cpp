// The op for torch, by its stable interface (2.10 and later): registered for the CPU as soon as the library is loaded,
// so that no Python runs between a compiled graph and the product.  The product itself, compiled for one instruction
// set, comes as a pointer (linear_use), without which the op is refused.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <optional>
#include <stdexcept>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// linear_bf16 of product.cpp or tiles.cpp.
using Product = int (*)(int64_t M, int64_t N, int64_t K, const void* x, int64_t x_stride, const void* w, int64_t w_stride, const void* bias, void* y, int threads);
std::atomic<Product> product{nullptr};

bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16 && tensor.is_cpu(); }

void require(bool good) {
  if (!good) throw std::invalid_argument("linear: expected tensors as its documentation has them, got others; see linear's arguments");
}

// A tensor like x of other sizes, without the dispatcher, which takes a small product's time.
Tensor make_empty(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t dim = shape.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(shape[dim], 1);
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), aoti_torch_dtype_bfloat16(), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  require(is_bf16(x) && is_bf16(weight) && x.dim() >= 1 && weight.dim() == 2);
  const int64_t dims = x.dim(), N = weight.size(0), K = weight.size(1);
  require(x.size(dims - 1) == K && (K <= 1 || weight.stride(1) == 1));
  require(!bias.has_value() || (is_bf16(*bias) && bias->dim() == 1 && bias->size(0) == N && bias->is_contiguous()));
  const Product run = product.load(std::memory_order_relaxed);
  if (run == nullptr) throw std::runtime_error("linear: expected a library to multiply with, got none; call load_library()");
  const bool rows_apart = dims == 2 && (K <= 1 || x.stride(1) == 1);
  const Tensor rows = rows_apart ? x : torch::stable::contiguous(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  int64_t M = 1;
  for (int64_t dim = 0; dim + 1 < dims; ++dim) M *= shape[dim];
  const Tensor out = make_empty(shape);
  const void* added = bias.has_value() ? bias->const_data_ptr() : nullptr;
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  const int64_t x_stride = dims == 2 && rows_apart ? rows.stride(0) : K;
  const int status = run(M, N, K, rows.const_data_ptr(), x_stride, weight.const_data_ptr(), weight.stride(0), added, out.mutable_data_ptr(), threads);
  if (status == 2) throw std::runtime_error("linear: expected Linux to give this process AMX's tiles, got none; set LAGUNA_CPU_ISA=avx512");
  if (status != 0) throw std::bad_alloc();
  return out;
}

}  // namespace

// What multiplies from now on.
extern "C" __attribute__((visibility("default"))) void linear_use(Product run) { product = run; }

STABLE_TORCH_LIBRARY_IMPL(laguna_serve, CPU, library) { library.impl("linear", TORCH_BOX(&linear)); }
