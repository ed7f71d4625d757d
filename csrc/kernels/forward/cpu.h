#pragma once

#include "kernels/forward/params.h"
#include "kernels/parallel.h"

namespace tilewright {

// Attention on the host: tiled, online softmax, all elements. Writes every row of out and lse; rows of a packed tensor
// that belong to no sequence become out 0, lse -inf.
void forward_cpu(const ForwardParams& params, ParallelFor parallel_for);

}  // namespace tilewright
