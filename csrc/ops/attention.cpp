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

using Launch = void(const ForwardParams& params, const Argument& q);

void run(ForwardCall call, StableIValue* stack, Launch* launch) {
  Problem problem = check_forward(call);
#ifdef TILEWRIGHT_CUDA
  if (call.q.is_cuda()) prepare_inputs_cuda(call, problem);
#endif
  ForwardParams params;
  set_inputs(params, call, problem);

  const int64_t batch = problem.batch, seqlen = problem.seqlen_q, heads = problem.heads_q, dim = problem.head_dim_v;
  Argument out("out", call.packed() ? new_tensor(call.q, {seqlen, heads, dim}, call.q.dtype)
                                    : new_tensor(call.q, {batch, seqlen, heads, dim}, call.q.dtype));
  Argument lse("lse", call.packed() ? new_tensor(call.q, {heads, seqlen}, problem.lse_dtype)
                                    : new_tensor(call.q, {batch, heads, seqlen}, problem.lse_dtype));
  params.out = out.tensor->mutable_data_ptr();
  params.lse = lse.tensor->mutable_data_ptr();
  params.out_stride = strides_of(out);
  if (seqlen > 0 && (call.packed() || batch > 0)) launch(params, call.q);

  stack[0] = torch::stable::detail::from(*out.tensor);
  stack[1] = torch::stable::detail::from(*lse.tensor);
}

void launch_cpu(const ForwardParams& params, const Argument&) { forward_cpu(params, parallel_for); }

}  // namespace

void attention_cpu(StableIValue* stack, uint64_t, uint64_t) { run(read_plain(Stack(stack)), stack, launch_cpu); }
void attention_varlen_cpu(StableIValue* stack, uint64_t, uint64_t) {
  run(read_packed(Stack(stack)), stack, launch_cpu);
}

#ifdef TILEWRIGHT_CUDA
void attention_cuda(StableIValue* stack, uint64_t, uint64_t) { run(read_plain(Stack(stack)), stack, launch_cuda); }
void attention_varlen_cuda(StableIValue* stack, uint64_t, uint64_t) {
  run(read_packed(Stack(stack)), stack, launch_cuda);
}
#endif

}  // namespace tilewright::ops
