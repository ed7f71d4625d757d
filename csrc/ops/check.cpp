#include "ops/check.h"

#include <cmath>
#include <sstream>
#include <stdexcept>

namespace tilewright::ops {
namespace {

// Positions, those of a tile behind the last row too, and Window::kUnbounded together fit in an int.
constexpr int64_t kMostRows = 1'000'000'000;
static_assert(kMostRows + Window::kUnbounded < INT32_MAX - 1024);
constexpr int64_t kMaxHeadDim = 256;
constexpr double kMostScale = 1e30;  // what is done in float32 stays far from its ends

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

void check_rank(const Argument& argument, int64_t rank, const char* dims) {
  if (argument.rank != rank) {
    fail(argument.name, " must have rank ", rank, " ", dims, ", got rank ", argument.rank, " with shape ",
         shape_text(argument.sizes, argument.rank));
  }
}

void check_like(const Argument& argument, const Argument& model) {
  if (argument.device_type != model.device_type || argument.device_index != model.device_index) {
    fail(argument.name, " must be on the device of ", model.name, ", ", device_name(model), ", got ",
         device_name(argument));
  }
}

void check_dtype(const Argument& argument, int32_t dtype, const char* why) {
  if (argument.dtype != dtype) {
    fail(argument.name, " must be ", dtype_name(dtype), why, ", got ", dtype_name(argument.dtype));
  }
}

void check_shape(const Argument& argument, std::initializer_list<int64_t> shape, const char* dims) {
  bool same = argument.rank == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < argument.rank; ++i) same = argument.sizes[i] == shape.begin()[i];
  if (!same) {
    fail(argument.name, " must have shape ", dims, " = ", shape_text(shape.begin(), shape.size()), ", got ",
         shape_text(argument.sizes, argument.rank));
  }
}

void check_size(const Argument& argument, int64_t dim, const char* what, const Argument& model, int64_t model_dim) {
  if (argument.sizes[dim] != model.sizes[model_dim]) {
    fail(argument.name, " must have the ", what, " of ", model.name, ", ", model.sizes[model_dim], ", got ",
         argument.sizes[dim]);
  }
}

void check_contiguous_vector(const Argument& argument) {
  if (argument.sizes[0] > 1 && argument.strides[0] != 1) {
    fail(argument.name, " must be contiguous, got stride ", argument.strides[0]);
  }
}

void check_rows_and_head_dim(const Argument& argument) {
  const int64_t head_dim = argument.last_size();
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    fail(argument.name, " must have a head_dim (last dimension) that is a multiple of 8 from 8 to ", kMaxHeadDim,
         ", got ", head_dim);
  }
  if (argument.last_stride() != 1) {
    fail(argument.name, " must have a contiguous last dimension (stride 1), got stride ", argument.last_stride());
  }
  for (int64_t dim = 0; dim + 1 < argument.rank; ++dim) {
    if (argument.sizes[dim] > kMostRows) {
      fail(argument.name, " must have at most 1,000,000,000 in every dimension but the last, got shape ",
           shape_text(argument.sizes, argument.rank));
    }
  }
}

Element check_element(const Argument& q) {
  if (q.dtype == aoti_torch_dtype_bfloat16()) return Element::kBFloat16;
  if (q.dtype == aoti_torch_dtype_float16()) return Element::kFloat16;
  if (q.is_cuda()) fail("q must be bfloat16 or float16 on CUDA, got ", dtype_name(q.dtype));
  if (q.dtype == aoti_torch_dtype_float32()) return Element::kFloat32;
  if (q.dtype == aoti_torch_dtype_float64()) return Element::kFloat64;
  fail("q must be float64, float32, bfloat16 or float16, got ", dtype_name(q.dtype));
}

void check_cu_seqlens(const Argument& cu_seqlens, const Argument& rows) {
  check_rank(cu_seqlens, 1, "(batch + 1,)");
  check_like(cu_seqlens, rows);
  check_dtype(cu_seqlens, aoti_torch_dtype_int32(), "");
  check_contiguous_vector(cu_seqlens);
  if (cu_seqlens.sizes[0] < 1) fail(cu_seqlens.name, " must have shape (batch + 1,), got ", "(0,)");
  // What is on a device is not read back; there the kernels clamp.
  if (cu_seqlens.is_cuda()) return;
  const auto* values = static_cast<const int32_t*>(cu_seqlens.data());
  int32_t previous = 0;
  for (int64_t i = 0; i < cu_seqlens.sizes[0]; ++i) {
    if (values[i] < previous) {
      fail(cu_seqlens.name, " must start at 0 or above and never decrease, got ", values[i], " at index ", i);
    }
    previous = values[i];
  }
  if (previous > rows.sizes[0]) {
    fail(cu_seqlens.name, " must end within the ", rows.sizes[0], " rows of ", rows.name, ", got ", previous);
  }
}

int check_bound(const char* name, const std::optional<int64_t>& bound) {
  if (!bound) return Window::kUnbounded;
  if (*bound < 0) fail(name, " must be 0 or above, or None, got ", *bound);
  return *bound < Window::kUnbounded ? static_cast<int>(*bound) : Window::kUnbounded;
}

void check_options(const Options& options, Problem& problem) {
  problem.window.left = check_bound("window_left", options.window_left);
  problem.window.right = check_bound("window_right", options.window_right);
  if (options.causal) problem.window.right = 0;
  if (options.sink_tokens < 0) fail("sink_tokens must be 0 or above, got ", options.sink_tokens);
  problem.window.sink_tokens = check_bound("sink_tokens", options.sink_tokens);

  problem.scale = options.scale ? *options.scale : 1.0 / std::sqrt(static_cast<double>(problem.head_dim));
  if (!(std::abs(problem.scale) <= kMostScale)) fail("scale must be from -1e30 to 1e30, got ", problem.scale);
  problem.softcap = options.softcap;
  if (problem.softcap != 0 && !(problem.softcap >= 1 / kMostScale && problem.softcap <= kMostScale)) {
    fail("softcap must be 0 or from 1e-30 to 1e30, got ", problem.softcap);
  }
}

void check_hint(const char* name, const std::optional<int64_t>& max_seqlen) {
  if (max_seqlen && *max_seqlen < 0) fail(name, " must be 0 or above, or None, got ", *max_seqlen);
}

// The argument's rows and heads as q has them, with head_dim_v.
void check_like_out(const Argument& argument, const ForwardCall& call, const Problem& problem) {
  check_like(argument, call.q);
  check_dtype(argument, call.q.dtype, " like q");
  const int64_t batch = problem.batch, seqlen = problem.seqlen_q, heads = problem.heads_q, dim = problem.head_dim_v;
  if (call.packed()) {
    check_shape(argument, {seqlen, heads, dim}, "(total_q, heads_q, head_dim_v)");
  } else {
    check_shape(argument, {batch, seqlen, heads, dim}, "(batch, seqlen_q, heads_q, head_dim_v)");
  }
}

void check_like_lse(const Argument& argument, const ForwardCall& call, const Problem& problem) {
  check_like(argument, call.q);
  check_dtype(argument, problem.lse_dtype, " with this q");
  const int64_t batch = problem.batch, seqlen = problem.seqlen_q, heads = problem.heads_q;
  if (call.packed()) {
    check_shape(argument, {heads, seqlen}, "(heads_q, total_q)");
  } else {
    check_shape(argument, {batch, heads, seqlen}, "(batch, heads_q, seqlen_q)");
  }
}

}  // namespace

Problem check_forward(const ForwardCall& call) {
  const Argument &q = call.q, &k = call.k, &v = call.v;
  const bool packed = call.packed();
  const int64_t row = packed ? 0 : 1, head = row + 1, last = row + 2;
  Problem problem;

  check_rank(q, last + 1, packed ? "(total_q, heads_q, head_dim)" : "(batch, seqlen_q, heads_q, head_dim)");
  check_rank(k, last + 1, packed ? "(total_k, heads_kv, head_dim)" : "(batch, seqlen_k, heads_kv, head_dim)");
  check_rank(v, last + 1, packed ? "(total_k, heads_kv, head_dim_v)" : "(batch, seqlen_k, heads_kv, head_dim_v)");
  check_like(k, q);
  check_like(v, q);
  problem.element = check_element(q);
  check_dtype(k, q.dtype, " like q");
  check_dtype(v, q.dtype, " like q");
  check_rows_and_head_dim(q);
  check_rows_and_head_dim(k);
  check_rows_and_head_dim(v);
  if (!packed) {
    check_size(k, 0, "batch size", q, 0);
    check_size(v, 0, "batch size", q, 0);
  }
  check_size(k, last, "head_dim", q, last);
  check_size(v, row, packed ? "number of rows" : "seqlen_k", k, row);
  check_size(v, head, "number of heads", k, head);
  if (q.sizes[head] < 1) fail("q must have at least one head, got ", q.sizes[head]);
  if (k.sizes[head] < 1 || q.sizes[head] % k.sizes[head] != 0) {
    fail("k must have a number of heads that divides that of q, ", q.sizes[head], ", got ", k.sizes[head]);
  }
  problem.seqlen_q = static_cast<int>(q.sizes[row]);
  problem.seqlen_k = static_cast<int>(k.sizes[row]);
  problem.heads_q = static_cast<int>(q.sizes[head]);
  problem.heads_kv = static_cast<int>(k.sizes[head]);
  problem.head_dim = static_cast<int>(q.sizes[last]);
  problem.head_dim_v = static_cast<int>(v.sizes[last]);

  const bool wide = problem.element == Element::kFloat64;
  problem.lse_dtype = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  if (call.sinks) {
    check_like(call.sinks, q);
    check_dtype(call.sinks, problem.lse_dtype, wide ? " with float64 q" : "");
    check_shape(call.sinks, {q.sizes[head]}, "(heads_q,)");
    check_contiguous_vector(call.sinks);
  }
  if (packed) {
    check_cu_seqlens(call.cu_seqlens_q, q);
    check_cu_seqlens(call.cu_seqlens_k, k);
    check_size(call.cu_seqlens_k, 0, "length", call.cu_seqlens_q, 0);
    if (call.cu_seqlens_q.sizes[0] > kMostRows) fail("cu_seqlens_q must have at most 1,000,000,000 elements");
    check_hint("max_seqlen_q", call.max_seqlen_q);
    check_hint("max_seqlen_k", call.max_seqlen_k);
  }
  problem.batch = static_cast<int>(packed ? call.cu_seqlens_q.sizes[0] - 1 : q.sizes[0]);
  check_options(call.options, problem);
  return problem;
}

Problem check_backward(const BackwardCall& call) {
  const Problem problem = check_forward(call.forward);
  check_like_out(call.dout, call.forward, problem);
  check_like_out(call.out, call.forward, problem);
  check_like_lse(call.lse, call.forward, problem);
  if (call.dlse) check_like_lse(call.dlse, call.forward, problem);
  return problem;
}

}  // namespace tilewright::ops
