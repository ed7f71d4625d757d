#pragma once

#include <cstdint>

#include "attention/window.h"

namespace tilewright {

enum class Element { kFloat64, kFloat32, kBFloat16, kFloat16 };

// In elements. The last dimension is contiguous; `batch` is 0 in a packed tensor.
struct Strides {
  int64_t batch;
  int64_t row;
  int64_t head;
};

// One call of attention. Shapes are of the plain operator; of the packed one (cu_seqlens_q != nullptr) the batch
// dimension is gone and the row dimension holds all sequences: (total_q, heads_q, head_dim), lse (heads_q, total_q).
struct ForwardParams {
  Element element;              // of q, k, v, out
  const void* q;                // (batch, seqlen_q, heads_q, head_dim)
  const void* k;                // (batch, seqlen_k, heads_kv, head_dim)
  const void* v;                // (batch, seqlen_k, heads_kv, head_dim_v)
  void* out;                    // (batch, seqlen_q, heads_q, head_dim_v)
  void* lse;                    // (batch, heads_q, seqlen_q), contiguous: float, or double for float64
  const void* sinks;            // (heads_q,) or null: float, or double for float64
  const int32_t* cu_seqlens_q;  // (batch + 1,) or null
  const int32_t* cu_seqlens_k;  // (batch + 1,) or null
  Strides q_stride;
  Strides k_stride;
  Strides v_stride;
  Strides out_stride;
  int batch;     // sequences
  int seqlen_q;  // packed: total_q
  int seqlen_k;  // packed: total_k
  int heads_q;
  int heads_kv;
  int head_dim;
  int head_dim_v;
  Window window;
  double scale;
  double softcap;  // 0: off
};

}  // namespace tilewright
