#pragma once

#include <cstdint>

#include "ptx/address.h"

namespace tilewright {

// A tile of 16-bit elements in shared memory as the copy engine writes it and the tensor cores read it: chunks of 64
// columns, each chunk `kRows` rows of 128 bytes, the 16-byte pieces of a row permuted by the 128-byte swizzle (piece ^
// row % 8).
template <class Element, int kRows, int kCols>
struct alignas(1024) SharedTile {
  static_assert(sizeof(Element) == 2 && kRows % 8 == 0 && kCols % 64 == 0);
  static constexpr int kChunkColumns = 64;
  static constexpr int kChunks = kCols / kChunkColumns;
  static constexpr int kChunkBytes = kRows * 128;
  static constexpr uint32_t kBytes = kChunks * kChunkBytes;

  Element data[kRows * kCols];

  __device__ __forceinline__ Element* chunk(int index) { return data + index * kRows * kChunkColumns; }
  __device__ __forceinline__ uint32_t address() const { return ptx::shared_address(data); }
  // Of the 16-byte piece that holds columns [8 piece, 8 piece + 8) of a row.
  __device__ __forceinline__ static uint32_t piece_offset(int row, int piece) {
    return piece / 8 * kChunkBytes + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
  }

  // Matrix descriptors (PTX, "Asynchronous warpgroup level matrix shared memory layout"): 128-byte swizzle, start
  // address, leading and stride offsets in units of 16 bytes.
  //
  // Contraction along the columns (Q and K in Q Kᵀ): groups of 8 rows lie 1,024 bytes apart, a step of 16 columns is 32
  // bytes within the swizzled row.
  __device__ __forceinline__ static uint64_t k_major(uint32_t address, int step) {
    return descriptor(address + step / 4 * kChunkBytes + step % 4 * 32, 16);
  }
  // Contraction along the rows (V in P V): a step of 16 rows is 2,048 bytes, chunks of 64 columns lie kChunkBytes
  // apart.
  __device__ __forceinline__ static uint64_t mn_major(uint32_t address, int step) {
    return descriptor(address + step * 2048, kChunkBytes);
  }

 private:
  __device__ __forceinline__ static uint64_t descriptor(uint32_t address, uint32_t leading) {
    constexpr uint64_t kSwizzle128 = 1ull << 62;
    constexpr uint64_t kStride = uint64_t{1024 >> 4} << 32;
    return kSwizzle128 | kStride | uint64_t{leading >> 4} << 16 | (address & 0x3FFFF) >> 4;
  }
};

}  // namespace tilewright
