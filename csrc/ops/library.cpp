// Every operator's schema, and which function answers for it on which device.

#include <torch/csrc/stable/library.h>

#include "ops/operators.h"

// The keywords that every attention operator has; Stack::options reads them.
#define ATTENTION_KEYWORDS                                                                \
  "bool causal=False, int? window_left=None, int? window_right=None, float? scale=None, " \
  "float softcap=0.0, int sink_tokens=0, bool deterministic=False"
#define PACKED_KEYWORDS ATTENTION_KEYWORDS ", int? max_seqlen_q=None, int? max_seqlen_k=None"

STABLE_TORCH_LIBRARY(tilewright, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, Tensor? sinks=None, *, " ATTENTION_KEYWORDS
              ") -> (Tensor out, Tensor lse)");
  library.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? sinks=None, *, " ATTENTION_KEYWORDS ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
  library.def(
      "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? sinks=None, "
      "*, " PACKED_KEYWORDS ") -> (Tensor out, Tensor lse)");
  library.def(
      "attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? sinks=None, *, " PACKED_KEYWORDS
      ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, library) {
  using namespace tilewright::ops;
  library.impl("attention", attention_cpu);
  library.impl("attention_varlen", attention_varlen_cpu);
  library.impl("attention_backward", attention_backward_cpu);
  library.impl("attention_varlen_backward", attention_varlen_backward_cpu);
}

#ifdef TILEWRIGHT_CUDA
STABLE_TORCH_LIBRARY_IMPL(tilewright, CUDA, library) {
  using namespace tilewright::ops;
  library.impl("attention", attention_cuda);
  library.impl("attention_varlen", attention_varlen_cuda);
  library.impl("attention_backward", attention_backward_cuda);
  library.impl("attention_varlen_backward", attention_varlen_backward_cuda);
}
#endif
