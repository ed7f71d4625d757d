#include "ops/arguments.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <utility>

namespace tilewright::ops {

Argument::Argument(const char* name, Tensor value) : name(name), tensor(std::move(value)) {
  const AtenTensorHandle handle = tensor->get();
  bool defined = false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle, &defined));
  if (!defined) throw std::invalid_argument(std::string(name) + " must be a tensor, got None");
  int64_t* borrowed = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &rank));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &borrowed));
  sizes = borrowed;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &borrowed));
  strides = borrowed;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
}

Options Stack::options() {
  Options options;
  options.causal = value<bool>();
  options.window_left = value<std::optional<int64_t>>();
  options.window_right = value<std::optional<int64_t>>();
  options.scale = value<std::optional<double>>();
  options.softcap = value<double>();
  options.sink_tokens = value<int64_t>();
  options.deterministic = value<bool>();
  return options;
}

std::string dtype_name(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
  };
  for (const auto& [number, name] : names) {
    if (number == dtype) return name;
  }
  return "dtype number " + std::to_string(dtype);
}

std::string device_name(const Argument& argument) {
  if (argument.device_type == aoti_torch_device_type_cpu()) return "cpu";
  if (argument.is_cuda()) return "cuda:" + std::to_string(argument.device_index);
  return "device type number " + std::to_string(argument.device_type);
}

std::string shape_text(const int64_t* sizes, int64_t rank) {
  std::string text = "(";
  for (int64_t i = 0; i < rank; ++i) text += std::to_string(sizes[i]) + (i + 1 < rank ? ", " : rank == 1 ? "," : "");
  return text + ")";
}

namespace {

constexpr int64_t kMaxRank = 4;

struct Contiguous {
  int64_t strides[kMaxRank];
  int64_t elements = 1;

  Contiguous(const int64_t* sizes, int64_t rank) {
    int64_t stride = 1;
    for (int64_t i = rank - 1; i >= 0; --i) {
      strides[i] = stride;
      stride *= sizes[i] > 1 ? sizes[i] : 1;
      elements *= sizes[i];
    }
  }
};

}  // namespace

Tensor new_tensor(const Argument& like, const int64_t* sizes, int64_t rank, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes, Contiguous(sizes, rank).strides, dtype, like.device_type,
                                                  like.device_index, &handle));
  return Tensor(handle);
}

TensorAndWorkspace new_tensor_and_workspace(const Argument& like, std::initializer_list<int64_t> sizes, int32_t dtype,
                                            size_t workspace_bytes) {
  if (workspace_bytes == 0) return {new_tensor(like, sizes, dtype), nullptr};
  constexpr size_t kAlignment = 16;
  const int64_t rank = static_cast<int64_t>(sizes.size());
  const Contiguous shape(sizes.begin(), rank);
  const size_t element = aoti_torch_dtype_element_size(dtype);
  const size_t start = (shape.elements * element + kAlignment - 1) / kAlignment * kAlignment;
  const Tensor both =
      new_tensor(like, {static_cast<int64_t>((start + workspace_bytes + element - 1) / element)}, dtype);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(both.get(), rank, sizes.begin(), shape.strides, 0, &handle));
  return {Tensor(handle), static_cast<char*>(both.mutable_data_ptr()) + start};
}

Argument contiguous_copy(const Argument& argument) {
  Tensor copy = new_tensor(argument, argument.sizes, argument.rank, argument.dtype);
  torch::stable::copy_(copy, *argument.tensor);
  return Argument(argument.name, std::move(copy));
}

Argument negated_copy(const Argument& argument) {
  StableIValue stack[1] = {torch::stable::detail::from(*argument.tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::neg", "", stack, TORCH_ABI_VERSION));
  return Argument(argument.name, torch::stable::detail::to<Tensor>(stack[0]));
}

Strides strides_of(const Argument& argument) {
  const int64_t batch_dims = argument.rank - 3;
  const int64_t* sizes = argument.sizes + batch_dims;  // (row, head, element)
  const int64_t* strides = argument.strides + batch_dims;
  Strides result{0, strides[0], strides[1]};
  if (sizes[1] == 1) result.head = sizes[2];
  if (sizes[0] == 1) result.row = sizes[1] * sizes[2];
  if (batch_dims == 1) result.batch = argument.sizes[0] == 1 ? sizes[0] * sizes[1] * sizes[2] : argument.strides[0];
  return result;
}

}  // namespace tilewright::ops
