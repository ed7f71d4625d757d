#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/backward/params.h"

namespace tilewright {

// Bytes of device memory the launch needs for itself: dQ's sums in float32, those of dK and dV where query heads of a
// key head are cut into splits, two floats a row, counters, and the work list of a packed batch. The caller allocates
// them, uninitialised, aligned to 256.
size_t backward_workspace_bytes(const BackwardParams& params);

// Launches the backward on a Hopper GPU (compute capability 9.0), on `stream`; reads nothing back. The current device
// is the tensors' device. The caller has checked every argument; kernels/backward/select.h says which problems have a
// kernel. dq, dk and dv are contiguous. Where params.scale is negative, params.q holds -q.
cudaError_t backward_sm90(const BackwardParams& params, void* workspace, cudaStream_t stream);

}  // namespace tilewright
