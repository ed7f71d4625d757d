#pragma once

#include "kernels/forward/params.h"

namespace tilewright {

// The gradient of one call of attention: S = scale Q Kᵀ (softcapped, masked), P = exp(S - lse), O = P V.
//
//     dV = Pᵀ dO      dP = dO Vᵀ      dS = P ∘ (dP - delta)      delta = rowsum(dO ∘ O) - dlse
//     dQ = scale dS K      dK = scale dSᵀ Q      dsinks = - Σ exp(sink - lse) delta
struct BackwardParams {
  Element element;              // of q, k, v, out, dout, dq, dk, dv
  const void* q;                // (batch, seqlen_q, heads_q, head_dim)
  const void* k;                // (batch, seqlen_k, heads_kv, head_dim)
  const void* v;                // (batch, seqlen_k, heads_kv, head_dim_v)
  const void* out;              // (batch, seqlen_q, heads_q, head_dim_v)
  const void* dout;             // like out
  const void* lse;              // (batch, heads_q, seqlen_q), contiguous: float, or double for float64
  const void* dlse;             // like lse, or null
  const void* sinks;            // (heads_q,) or null: float, or double for float64
  void* dq;                     // like q
  void* dk;                     // like k
  void* dv;                     // like v
  void* dsinks;                 // like sinks, or null
  const int32_t* cu_seqlens_q;  // (batch + 1,) or null
  const int32_t* cu_seqlens_k;  // (batch + 1,) or null
  Strides q_stride;
  Strides k_stride;
  Strides v_stride;
  Strides out_stride;
  Strides dout_stride;
  Strides dq_stride;
  Strides dk_stride;
  Strides dv_stride;
  int batch;     // sequences
  int seqlen_q;  // packed: total_q
  int seqlen_k;  // packed: total_k
  int heads_q;
  int heads_kv;
  int head_dim;
  int head_dim_v;
  Window window;
  double scale;
  double softcap;      // 0: off
  bool deterministic;  // the same bits every run; on the host they are always the same
};

}  // namespace tilewright
