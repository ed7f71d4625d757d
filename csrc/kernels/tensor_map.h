#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "kernels/forward/params.h"

namespace tilewright {

// A tensor of rows × heads × head_dim 16-bit elements, as the copy engine sees it: boxes of 64 columns × box_rows rows
// of one head, swizzled by 128 bytes, in the five dimensions that RowCoordinates (tile/row_coordinates.h) addresses.
struct RowTensor {
  const void* data;
  bool half;  // float16, else bfloat16
  int head_dim;
  int heads;
  int rows;
  int batch;  // packed: not used
  Strides strides;
  bool packed;
  int box_rows;
};

cudaError_t encode_tensor_map(CUtensorMap& map, const RowTensor& tensor);

}  // namespace tilewright
