#include "kernels/tensor_map.h"

#include <algorithm>
#include <cstdint>

namespace tilewright {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found through the runtime: nothing links to the driver.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

cudaError_t encode_tensor_map(CUtensorMap& map, const RowTensor& tensor) {
  static const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  // Strides are in bytes. One of a dimension of size 1 is never used, but must be a multiple of 16 all the same.
  const auto bytes = [](int64_t stride, int size) { return size > 1 ? static_cast<cuuint64_t>(stride) * 2 : 16; };
  const auto extent = [](int size) { return static_cast<cuuint64_t>(std::max(size, 1)); };
  const cuuint64_t row = bytes(tensor.strides.row, tensor.rows);
  cuuint64_t sizes[5] = {extent(tensor.head_dim), extent(tensor.heads), extent(tensor.rows), extent(tensor.batch), 1};
  cuuint64_t strides[4] = {bytes(tensor.strides.head, tensor.heads), row, bytes(tensor.strides.batch, tensor.batch),
                           16};
  if (tensor.packed) {
    constexpr cuuint64_t kRagged = cuuint64_t{1} << 30;
    sizes[2] = kRagged;
    sizes[3] = kRagged + 1;
    sizes[4] = kRagged + 1;
    strides[2] = row;
    strides[3] = (cuuint64_t{1} << 34) - row;
  }
  const cuuint32_t box[5] = {64, 1, static_cast<cuuint32_t>(tensor.box_rows), 1, 1};
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&map, tensor.half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
             const_cast<void*>(tensor.data), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace tilewright
