// attention_backward and attention_varlen_backward: check, params, launch.

#include <utility>

#include "kernels/backward/cpu.h"
#include "ops/check.h"
#include "ops/operators.h"
#include "ops/parallel.h"
#ifdef TILEWRIGHT_CUDA
#include "ops/cuda.h"
#endif

namespace tilewright::ops {
namespace {

BackwardCall read(Stack stack, bool packed) {
  Argument dout = stack.tensor("dout"), dlse = stack.optional_tensor("dlse");
  Argument q = stack.tensor("q"), k = stack.tensor("k"), v = stack.tensor("v");
  Argument out = stack.tensor("out"), lse = stack.tensor("lse");
  Argument cu_seqlens_q = packed ? stack.tensor("cu_seqlens_q") : Argument("cu_seqlens_q");
  Argument cu_seqlens_k = packed ? stack.tensor("cu_seqlens_k") : Argument("cu_seqlens_k");
  Argument sinks = stack.optional_tensor("sinks");
  Options options = stack.options();
  std::optional<int64_t> max_seqlen_q, max_seqlen_k;
  if (packed) {
    max_seqlen_q = stack.value<std::optional<int64_t>>();
    max_seqlen_k = stack.value<std::optional<int64_t>>();
  }
  return {std::move(dout),
          std::move(dlse),
          std::move(out),
          std::move(lse),
          {std::move(q), std::move(k), std::move(v), std::move(cu_seqlens_q), std::move(cu_seqlens_k), std::move(sinks),
           options, max_seqlen_q, max_seqlen_k}};
}

// Autograd hands over gradients with any strides, those of an expanded scalar for instance.
void make_contiguous(Argument& argument) {
  if (argument && !argument.tensor->is_contiguous()) argument = contiguous_copy(argument);
}

Argument new_like(const Argument& argument, const char* name) {
  return Argument(name, new_tensor(argument, argument.sizes, argument.rank, argument.dtype));
}

// A device's backward.
struct Kernel {
  void (*prepare)(BackwardCall& call, Problem& problem);
  void (*launch)(const BackwardParams& params, const Argument& q);
};

void run(BackwardCall call, StableIValue* stack, const Kernel& kernel) {
  Problem problem = check_backward(call);
  make_contiguous(call.lse);
  make_contiguous(call.dlse);
  if (call.dout.last_stride() != 1) make_contiguous(call.dout);
  if (call.out.last_stride() != 1) make_contiguous(call.out);
  const double scale = problem.scale;
  kernel.prepare(call, problem);
  const ForwardCall& forward = call.forward;

  Argument dq = new_like(forward.q, "dq"), dk = new_like(forward.k, "dk"), dv = new_like(forward.v, "dv");
  const int64_t sinks = forward.sinks ? problem.heads_q : 0;
  Argument dsinks("dsinks", new_tensor(forward.q, {sinks}, problem.lse_dtype));

  BackwardParams params{};
  set_inputs(params, forward, problem);
  params.scale = scale;
  params.deterministic = forward.options.deterministic;
  params.out = call.out.data();
  params.dout = call.dout.data();
  params.lse = call.lse.data();
  params.dlse = call.dlse.data();
  params.dq = dq.tensor->mutable_data_ptr();
  params.dk = dk.tensor->mutable_data_ptr();
  params.dv = dv.tensor->mutable_data_ptr();
  params.dsinks = sinks > 0 ? dsinks.tensor->mutable_data_ptr() : nullptr;
  params.out_stride = strides_of(call.out);
  params.dout_stride = strides_of(call.dout);
  params.dq_stride = strides_of(dq);
  params.dk_stride = strides_of(dk);
  params.dv_stride = strides_of(dv);
  kernel.launch(params, forward.q);

  stack[0] = torch::stable::detail::from(*dq.tensor);
  stack[1] = torch::stable::detail::from(*dk.tensor);
  stack[2] = torch::stable::detail::from(*dv.tensor);
  stack[3] = torch::stable::detail::from(*dsinks.tensor);
}

constexpr Kernel kCpu = {
    [](BackwardCall&, Problem&) {},
    [](const BackwardParams& params, const Argument&) { backward_cpu(params, parallel_for); },
};
#ifdef TILEWRIGHT_CUDA
constexpr Kernel kCuda = {prepare_backward_cuda, launch_backward_cuda};
#endif

}  // namespace

void attention_backward_cpu(StableIValue* stack, uint64_t, uint64_t) { run(read(Stack(stack), false), stack, kCpu); }
void attention_varlen_backward_cpu(StableIValue* stack, uint64_t, uint64_t) {
  run(read(Stack(stack), true), stack, kCpu);
}

#ifdef TILEWRIGHT_CUDA
void attention_backward_cuda(StableIValue* stack, uint64_t, uint64_t) { run(read(Stack(stack), false), stack, kCuda); }
void attention_varlen_backward_cuda(StableIValue* stack, uint64_t, uint64_t) {
  run(read(Stack(stack), true), stack, kCuda);
}
#endif

}  // namespace tilewright::ops
