#pragma once

#include <cstdint>

#include "ptx/address.h"

namespace tilewright {

// A tile of 16-bit elements in shared memory as the copy engine writes it and the tensor cores read it: chunks of 64
// columns, each chunk `kRows` rows of 128 bytes, the 16-byte pieces of a row permuted by the 128-byte swizzle (piece ^
// row % 8). The last chunk is whole even where the tile ends in its middle.
template <class Element, int kRows, int kCols>
struct alignas(1024) SharedTile {
  static_assert(sizeof(Element) == 2 && kRows % 8 == 0 && kCols % 16 == 0);
  static constexpr int kChunkColumns = 64;
  static constexpr int kChunks = (kCols + kChunkColumns - 1) / kChunkColumns;
  static constexpr int kChunkBytes = kRows * 128;
  static constexpr uint32_t kBytes = kChunks * kChunkBytes;

  Element data[kRows * kChunks * kChunkColumns];

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
    return descriptor(address, 16, step / 4 * kChunkBytes + step % 4 * 32);
  }
  // Contraction along the rows (V in P V): a step of 16 rows is 2,048 bytes, chunks of 64 columns lie kChunkBytes
  // apart.
  __device__ __forceinline__ static uint64_t mn_major(uint32_t address, int step) {
    return descriptor(address, kChunkBytes, step * 2048);
  }

 private:
  // Addresses end below 2^18, so that an offset in the tile is one addition to the low word.
  __device__ __forceinline__ static uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t offset) {
    constexpr uint32_t kSwizzle128 = 1u << 30, kStride = 1024 >> 4;
    const uint32_t low = (leading >> 4 << 16 | address >> 4) + (offset >> 4);
    return uint64_t{kSwizzle128 | kStride} << 32 | low;
  }
};

}  // namespace tilewright
