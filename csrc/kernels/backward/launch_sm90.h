#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backward/rows.cuh"
#include "kernels/backward/sm90_params.h"

namespace tilewright::backward {

// What one call launches: the main kernel; before it one with a block for each tile of rows; after it a second pass, or
// another with a block for each tile of rows, unless the main kernel writes dQ itself.
struct Launch {
  KernelParams main;
  RowParams rows;
  SecondPassParams second;
  int64_t blocks;         // of the main kernel
  int64_t row_tiles;      // of all heads
  int64_t second_blocks;  // of the second pass
};

// Launches the instance of a row of kBackwardTiles; defined in the .cu that CMake makes from instance.cu.in.
template <class Element, int kIndex>
cudaError_t launch_instance(const Launch& launch, cudaStream_t stream);

}  // namespace tilewright::backward
