#pragma once

#include "kernels/backward/params.h"
#include "kernels/forward/params.h"
#include "ops/arguments.h"

namespace tilewright::ops {

// The numbers of a call whose arguments have all been checked.
struct Problem {
  Element element;
  int batch;     // sequences
  int seqlen_q;  // packed: all rows of q
  int seqlen_k;
  int heads_q;
  int heads_kv;
  int head_dim;
  int head_dim_v;
  Window window;
  double scale;
  double softcap;
  int32_t lse_dtype;  // in torch's numbering
};

// Throw std::invalid_argument, a ValueError in Python, that names the argument, what it wants and what it got. Nothing
// is read from a device; cu_seqlens on the CPU are looked into.
Problem check_forward(const ForwardCall& call);
Problem check_backward(const BackwardCall& call);

// Fills what the params of the forward and of the backward have in common.
template <typename Params>
void set_inputs(Params& params, const ForwardCall& call, const Problem& problem) {
  params.element = problem.element;
  params.q = call.q.data();
  params.k = call.k.data();
  params.v = call.v.data();
  params.sinks = call.sinks.data();
  params.cu_seqlens_q = static_cast<const int32_t*>(call.cu_seqlens_q.data());
  params.cu_seqlens_k = static_cast<const int32_t*>(call.cu_seqlens_k.data());
  params.q_stride = strides_of(call.q);
  params.k_stride = strides_of(call.k);
  params.v_stride = strides_of(call.v);
  params.batch = problem.batch;
  params.seqlen_q = problem.seqlen_q;
  params.seqlen_k = problem.seqlen_k;
  params.heads_q = problem.heads_q;
  params.heads_kv = problem.heads_kv;
  params.head_dim = problem.head_dim;
  params.head_dim_v = problem.head_dim_v;
  params.window = problem.window;
  params.scale = problem.scale;
  params.softcap = problem.softcap;
}

}  // namespace tilewright::ops
