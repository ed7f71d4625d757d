#pragma once

#include "kernels/backward/params.h"
#include "kernels/parallel.h"

namespace tilewright {

// The gradient of attention on the host. Writes every row of dq, dk, dv (zero where a row belongs to no sequence) and
// dsinks; the order of every sum is fixed, so the bits do not depend on the number of threads.
void backward_cpu(const BackwardParams& params, ParallelFor parallel_for);

}  // namespace tilewright
