#pragma once

#include "attention/packed_tiles.h"
#include "tile/block_scan.h"

namespace tilewright {

// Makes the work list of a packed batch, longest tiles first, by one block of threads:
//
//     first_row[i]  the parts of the packed tensor (PackedParts)
//     first_tile[i] = Σ over the parts before i of their tiles
//     a counting sort of the tiles by their length
//
// Parts are disjoint whatever cu_seqlens holds, so the list can't outgrow max_packed_tiles().
constexpr int kPrepareThreads = 512;
constexpr int kPrepareBuckets = 512;

struct PackedListMemory {
  int warp_results[kPrepareThreads / 32];
  int bucket_end[kPrepareBuckets];  // first the number of tiles, then where the next of the bucket goes
};

__device__ inline void find_parts(const int32_t* cu_seqlens, int sequences, int total, int* first_row,
                                  PackedListMemory& shared) {
  int carry = 0;
  for (int base = 0; base <= sequences; base += kPrepareThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    const int row = i <= sequences ? clamp(cu_seqlens[i], 0, total) : 0;
    const int first = block_scan<Maximum>(row, shared.warp_results, carry);
    if (i <= sequences) first_row[i] = first;
  }
  __syncthreads();
}

// first_tile: (parts + 1,). Returns the number of all tiles.
__device__ inline int count_tiles(const PackedParts& parts, int tile, int* first_tile, PackedListMemory& shared) {
  int carry = 0;
  for (int base = 0; base < parts.count(); base += kPrepareThreads) {
    const int part = base + static_cast<int>(threadIdx.x);
    const int tiles = part < parts.count() ? ceil_div(parts.length(part), tile) : 0;
    const int end = block_scan<Sum>(tiles, shared.warp_results, carry);
    if (part < parts.count()) first_tile[part + 1] = end;
  }
  if (threadIdx.x == 0) first_tile[0] = 0;
  __syncthreads();
  return carry;
}

// The last part whose first tile is not behind `index`.
__device__ inline int part_of_tile(const int* first_tile, int parts, int index) {
  int low = 0, high = parts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_tile[middle] <= index ? low : high) = middle;
  }
  return low;
}

// tile_at(index, length) gives a tile and its length, 0 … max_length. Tiles of about the same length (several share a
// bucket where there are more lengths than buckets) stand in any order, or with kStable in that of their index.
template <bool kStable, class Tile, class TileAt>
__device__ void sort_tiles(Tile* sorted, int count, int max_length, const TileAt& tile_at, PackedListMemory& shared) {
  for (int i = threadIdx.x; i < kPrepareBuckets; i += kPrepareThreads) shared.bucket_end[i] = 0;
  __syncthreads();
  // Bucket 0 holds the longest tiles.
  const int lengths_a_bucket = ceil_div(max_length + 1, kPrepareBuckets);
  const auto bucket_of = [&](int length) {
    return kPrepareBuckets - 1 - min_of(length / lengths_a_bucket, kPrepareBuckets - 1);
  };
  for (int i = threadIdx.x; i < count; i += kPrepareThreads) {
    int length;
    tile_at(i, length);
    atomicAdd(&shared.bucket_end[bucket_of(length)], 1);
  }
  __syncthreads();
  int before = 0;
  static_assert(kPrepareBuckets == kPrepareThreads);
  const int tiles = shared.bucket_end[threadIdx.x];
  const int end = block_scan<Sum>(tiles, shared.warp_results, before);
  shared.bucket_end[threadIdx.x] = end - tiles;
  __syncthreads();
  if constexpr (!kStable) {
    for (int i = threadIdx.x; i < count; i += kPrepareThreads) {
      int length;
      const Tile tile = tile_at(i, length);
      sorted[atomicAdd(&shared.bucket_end[bucket_of(length)], 1)] = tile;
    }
  } else {
    // One warp after the other takes its places; in a warp the lanes of one bucket by their number.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int base = 0; base < count; base += kPrepareThreads) {
      const int i = base + static_cast<int>(threadIdx.x);
      int length = -1;
      Tile tile{};
      if (i < count) tile = tile_at(i, length);
      const int bucket = length < 0 ? -1 : bucket_of(length);
      const unsigned same = __match_any_sync(~0u, bucket);
      const int leader = __ffs(same) - 1;
      int place = 0;
      for (int turn = 0; turn < kPrepareThreads / 32; ++turn) {
        if (warp == turn && lane == leader && bucket >= 0) {
          place = shared.bucket_end[bucket];
          shared.bucket_end[bucket] = place + __popc(same);
        }
        __syncthreads();
      }
      place = __shfl_sync(~0u, place, leader) + __popc(same & ((1u << lane) - 1));
      if (bucket >= 0) sorted[place] = tile;
    }
  }
}

}  // namespace tilewright
