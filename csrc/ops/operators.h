#pragma once

#include <torch/csrc/stable/library.h>

namespace tilewright::ops {

// The operators, boxed: they take their arguments off the stack in the order of their schema in library.cpp.
using Boxed = void(StableIValue* stack, uint64_t arguments, uint64_t results);

Boxed attention_cpu;
Boxed attention_cuda;
Boxed attention_varlen_cpu;
Boxed attention_varlen_cuda;
Boxed attention_backward_cpu;
Boxed attention_backward_cuda;
Boxed attention_varlen_backward_cpu;
Boxed attention_varlen_backward_cuda;

}  // namespace tilewright::ops
