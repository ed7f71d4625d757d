#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "kernels/forward/params.h"

namespace tilewright::ops {

using torch::stable::Tensor;

// A tensor argument: what the checks and the kernels ask of it, read once through the stable ABI.
struct Argument {
  const char* name;
  std::optional<Tensor> tensor;  // empty when the caller passed None
  int64_t rank = 0;
  const int64_t* sizes = nullptr;  // owned by `tensor`
  const int64_t* strides = nullptr;
  int32_t dtype = -1;  // in torch's numbering: compare with aoti_torch_dtype_*()
  int32_t device_type = -1;
  int32_t device_index = -1;

  explicit Argument(const char* name) : name(name) {}
  Argument(const char* name, Tensor tensor);

  explicit operator bool() const { return tensor.has_value(); }
  const void* data() const { return tensor ? tensor->const_data_ptr() : nullptr; }
  bool is_cuda() const { return device_type == aoti_torch_device_type_cuda(); }
  int64_t last_size() const { return sizes[rank - 1]; }
  int64_t last_stride() const { return strides[rank - 1]; }
};

// The keywords that every attention operator has.
struct Options {
  bool causal;
  std::optional<int64_t> window_left;
  std::optional<int64_t> window_right;
  std::optional<double> scale;
  double softcap;
  int64_t sink_tokens;
  bool deterministic;
};

// What an operator was called with; it is packed when cu_seqlens_q is there.
struct ForwardCall {
  Argument q, k, v;
  Argument cu_seqlens_q, cu_seqlens_k;
  Argument sinks;
  Options options;
  std::optional<int64_t> max_seqlen_q, max_seqlen_k;

  bool packed() const { return static_cast<bool>(cu_seqlens_q); }
};

struct BackwardCall {
  Argument dout, dlse, out, lse;
  ForwardCall forward;
};

// Takes the arguments off the dispatcher's stack, in the schema's order. The stack owns what it holds, so an operator
// reads all of it before anything can throw.
class Stack {
 public:
  explicit Stack(StableIValue* values) : next_(values) {}

  Argument tensor(const char* name) { return Argument(name, value<Tensor>()); }
  Argument optional_tensor(const char* name) {
    std::optional<Tensor> tensor = value<std::optional<Tensor>>();
    return tensor ? Argument(name, *std::move(tensor)) : Argument(name);
  }
  template <typename T>
  T value() {
    return torch::stable::detail::to<T>(*next_++);
  }
  Options options();

 private:
  StableIValue* next_;
};

std::string dtype_name(int32_t dtype);
std::string device_name(const Argument& argument);
std::string shape_text(const int64_t* sizes, int64_t rank);

// A new contiguous tensor on the device of `like`.
Tensor new_tensor(const Argument& like, const int64_t* sizes, int64_t rank, int32_t dtype);
inline Tensor new_tensor(const Argument& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  return new_tensor(like, sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

// A new contiguous tensor with memory for a kernel's own use behind it, uninitialised, aligned to 16 bytes: a second
// allocation would cost the host a microsecond. The tensor keeps that memory.
struct TensorAndWorkspace {
  Tensor tensor;
  void* workspace;  // null when there are no bytes
};
TensorAndWorkspace new_tensor_and_workspace(const Argument& like, std::initializer_list<int64_t> sizes, int32_t dtype,
                                            size_t workspace_bytes);

// A contiguous copy of an argument.
Argument contiguous_copy(const Argument& argument);
Argument negated_copy(const Argument& argument);

// The strides of (batch, row, head, element), or of (row, head, element) when packed. A dimension of size 1 has no
// stride that anything could depend on; it is given that of a contiguous tensor, which meets every alignment rule.
Strides strides_of(const Argument& argument);

}  // namespace tilewright::ops
