#include "kernels/tensor_map.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

constexpr int kRank = 5;

// All that a map depends on; the rest of what the driver is told is the same for every map.
struct MapInputs {
  cuuint64_t address;
  cuuint64_t sizes[kRank];
  cuuint64_t strides[kRank - 1];  // in bytes, without the innermost
  cuuint32_t box_rows;
  cuuint32_t half;
};
static_assert(std::has_unique_object_representations_v<MapInputs>, "compared as bytes: no padding");

MapInputs map_inputs(const RowTensor& tensor) {
  // The stride of a dimension of size 1 is never used, but must be a multiple of 16 all the same.
  const auto bytes = [](int64_t stride, int size) { return size > 1 ? static_cast<cuuint64_t>(stride) * 2 : 16; };
  const auto extent = [](int size) { return static_cast<cuuint64_t>(std::max(size, 1)); };
  const cuuint64_t row = bytes(tensor.strides.row, tensor.rows);
  MapInputs inputs{
      reinterpret_cast<uintptr_t>(tensor.data),
      {extent(tensor.head_dim), extent(tensor.heads), extent(tensor.rows), extent(tensor.batch), 1},
      {bytes(tensor.strides.head, tensor.heads), row, bytes(tensor.strides.batch, tensor.batch), 16},
      static_cast<cuuint32_t>(tensor.box_rows),
      tensor.half,
  };
  if (tensor.packed) {
    constexpr cuuint64_t kRagged = cuuint64_t{1} << 30;
    inputs.sizes[2] = kRagged;
    inputs.sizes[3] = kRagged + 1;
    inputs.sizes[4] = kRagged + 1;
    inputs.strides[2] = row;
    inputs.strides[3] = (cuuint64_t{1} << 34) - row;
  }
  return inputs;
}

CUresult encode_map(Encode encode, CUtensorMap& map, const MapInputs& inputs) {
  const cuuint32_t box[kRank] = {64, 1, inputs.box_rows, 1, 1};
  const cuuint32_t element_strides[kRank] = {1, 1, 1, 1, 1};
  return encode(&map, inputs.half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank,
                reinterpret_cast<void*>(inputs.address), inputs.sizes, inputs.strides, box, element_strides,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// Maps that this thread has made. PyTorch's allocator hands out the same addresses again and again, so a program that
// repeats itself finds most maps here, and copying one is much cheaper than the driver's call. A map holds an address,
// sizes and strides, and nothing of the memory's content or owner: for the same inputs it is right for ever.
struct MapCache {
  static constexpr int kBits = 7;
  struct Entry {
    CUtensorMap map;
    MapInputs inputs;  // all zero where there is no map: a box has rows
  };
  Entry entries[1 << kBits];

  Entry& at(const MapInputs& inputs) {
    constexpr uint64_t kGoldenRatio = 0x9E3779B97F4A7C15;
    const uint64_t key = inputs.address + (inputs.sizes[2] << 40) + (uint64_t{inputs.box_rows} << 56);
    return entries[key * kGoldenRatio >> (64 - kBits)];
  }
};

}  // namespace

cudaError_t encode_tensor_map(CUtensorMap& map, const RowTensor& tensor) {
  static const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  thread_local MapCache cache{};
  const MapInputs inputs = map_inputs(tensor);
  MapCache::Entry& entry = cache.at(inputs);
  if (std::memcmp(&entry.inputs, &inputs, sizeof(inputs)) != 0) {
    entry.inputs = MapInputs{};
    if (encode_map(encode, entry.map, inputs) != CUDA_SUCCESS) {
      // The driver wants a current context, which a thread without a CUDA call of its own so far does not have (the
      // first call may be this one, when all memory comes out of a cache): cudaSetDevice gives it the runtime's.
      int device = 0;
      if (cudaGetDevice(&device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess ||
          encode_map(encode, entry.map, inputs) != CUDA_SUCCESS) {
        return cudaErrorInvalidValue;
      }
    }
    entry.inputs = inputs;
  }
  map = entry.map;
  return cudaSuccess;
}

}  // namespace tilewright
