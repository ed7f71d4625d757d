#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/forward/params.h"

namespace tilewright {

// Bytes of device memory the launch needs for itself (tile counters, the work list of a packed batch); often 0.
// The caller allocates them, uninitialised, aligned to 16.
size_t forward_workspace_bytes(const ForwardParams& params);

// Launches the forward on a Hopper GPU (compute capability 9.0), on `stream`; reads nothing back. The current device is
// the tensors' device. The caller has checked every argument; kernels/forward/select.h says which problems have a
// kernel.
cudaError_t forward_sm90(const ForwardParams& params, void* workspace, cudaStream_t stream);

}  // namespace tilewright
