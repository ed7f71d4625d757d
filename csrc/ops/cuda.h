#pragma once

#include "kernels/backward/params.h"
#include "kernels/forward/params.h"
#include "ops/check.h"

namespace tilewright::ops {

// Throws when q's GPU is not the one the kernels are compiled for, and replaces inputs that TMA cannot address by
// copies. The kernels want a scale that is not negative: the sign moves into a copy of q.
void prepare_inputs_cuda(ForwardCall& call, Problem& problem);

// What the launch needs beside the tensors; the pointers to out and lse are not asked for yet.
size_t workspace_bytes_cuda(const ForwardParams& params, const Argument& q);
// Launches the forward on q's device and PyTorch's current stream there.
void launch_cuda(const ForwardParams& params, void* workspace, const Argument& q);

// The same for the backward, whose kernels take the sign of the scale beside the copy of q; and its launch, which
// allocates what it needs beside the tensors.
void prepare_backward_cuda(BackwardCall& call, Problem& problem);
void launch_backward_cuda(const BackwardParams& params, const Argument& q);

}  // namespace tilewright::ops
