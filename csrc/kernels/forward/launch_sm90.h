#pragma once

#include <cuda_runtime_api.h>

#include "kernels/forward/sm90_params.h"

namespace tilewright::forward {

// Launches the instance of a row of kForwardTiles; defined in the .cu that CMake makes from instance.cu.in.
template <class Element, int kIndex>
cudaError_t launch_instance(const KernelParams& params, int blocks, cudaStream_t stream);

}  // namespace tilewright::forward
