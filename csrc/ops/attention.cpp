// attention and attention_varlen: check, params, launch.

#include <utility>

#include "kernels/forward/cpu.h"
#include "ops/check.h"
#include "ops/operators.h"
#include "ops/parallel.h"
#ifdef TILEWRIGHT_CUDA
#include "ops/cuda.h"
#endif

namespace tilewright::ops {
namespace {

ForwardCall read_plain(Stack stack) {
  Argument q = stack.tensor("q"), k = stack.tensor("k"), v = stack.tensor("v");
  Argument sinks = stack.optional_tensor("sinks");
  Options options = stack.options();
  return {
      std::move(q), std::move(k), std::move(v), Argument("cu_seqlens_q"), Argument("cu_seqlens_k"), std::move(sinks),
      options,      std::nullopt, std::nullopt};
}

ForwardCall read_packed(Stack stack) {
  Argument q = stack.tensor("q"), k = stack.tensor("k"), v = stack.tensor("v");
  Argument cu_seqlens_q = stack.tensor("cu_seqlens_q"), cu_seqlens_k = stack.tensor("cu_seqlens_k");
  Argument sinks = stack.optional_tensor("sinks");
  Options options = stack.options();
  auto max_seqlen_q = stack.value<std::optional<int64_t>>();
  auto max_seqlen_k = stack.value<std::optional<int64_t>>();
  return {std::move(q), std::move(k), std::move(v), std::move(cu_seqlens_q), std::move(cu_seqlens_k), std::move(sinks),
          options,      max_seqlen_q, max_seqlen_k};
}

// A device's forward.
struct Kernel {
  size_t (*workspace_bytes)(const ForwardParams& params, const Argument& q);
  void (*launch)(const ForwardParams& params, void* workspace, const Argument& q);
};

void run(ForwardCall call, StableIValue* stack, const Kernel& kernel) {
  Problem problem = check_forward(call);
#ifdef TILEWRIGHT_CUDA
  if (call.q.is_cuda()) prepare_inputs_cuda(call, problem);
#endif
  ForwardParams params{};
  set_inputs(params, call, problem);

  const int64_t batch = problem.batch, seqlen = problem.seqlen_q, heads = problem.heads_q, dim = problem.head_dim_v;
  Argument out("out", call.packed() ? new_tensor(call.q, {seqlen, heads, dim}, call.q.dtype)
                                    : new_tensor(call.q, {batch, seqlen, heads, dim}, call.q.dtype));
  const bool empty = seqlen == 0 || (!call.packed() && batch == 0);
  const size_t bytes = empty ? 0 : kernel.workspace_bytes(params, call.q);
  const auto [lse, workspace] =
      call.packed() ? new_tensor_and_workspace(call.q, {heads, seqlen}, problem.lse_dtype, bytes)
                    : new_tensor_and_workspace(call.q, {batch, heads, seqlen}, problem.lse_dtype, bytes);
  params.out = out.tensor->mutable_data_ptr();
  params.lse = lse.mutable_data_ptr();
  params.out_stride = strides_of(out);
  if (!empty) kernel.launch(params, workspace, call.q);

  stack[0] = torch::stable::detail::from(*out.tensor);
  stack[1] = torch::stable::detail::from(lse);
}

constexpr Kernel kCpu = {
    [](const ForwardParams&, const Argument&) -> size_t { return 0; },
    [](const ForwardParams& params, void*, const Argument&) { forward_cpu(params, parallel_for); },
};
#ifdef TILEWRIGHT_CUDA
constexpr Kernel kCuda = {workspace_bytes_cuda, launch_cuda};
#endif

}  // namespace

void attention_cpu(StableIValue* stack, uint64_t, uint64_t) { run(read_plain(Stack(stack)), stack, kCpu); }
void attention_varlen_cpu(StableIValue* stack, uint64_t, uint64_t) { run(read_packed(Stack(stack)), stack, kCpu); }

#ifdef TILEWRIGHT_CUDA
void attention_cuda(StableIValue* stack, uint64_t, uint64_t) { run(read_plain(Stack(stack)), stack, kCuda); }
void attention_varlen_cuda(StableIValue* stack, uint64_t, uint64_t) { run(read_packed(Stack(stack)), stack, kCuda); }
#endif

}  // namespace tilewright::ops
