#pragma once

#include "attention/block_range.h"
#include "attention/packed_tiles.h"
#include "attention/sequence.h"

namespace tilewright::forward {

struct PrepareParams {
  const int32_t* cu_seqlens_q;  // (sequences + 1,)
  const int32_t* cu_seqlens_k;  // (sequences + 1,)
  int sequences;
  int total_q;
  int total_k;
  int tile_m;
  int tile_n;
  Window window;
  int* next_tile;
  int* num_tiles;
  int* first_row;     // scratch (sequences + 1,)
  int* first_tile;    // scratch (sequences + 3,)
  PackedTile* tiles;  // (max_packed_tiles,)
};

// Makes the work list of a packed batch, longest tiles first, by one block of threads:
//
//     first_row[i]  = max over j ≤ i of cu_seqlens_q[j]      rows of a part: [first_row[i], first_row[i + 1])
//     first_tile[i] = Σ over the parts before i of their tiles
//     a counting sort of the tiles by the number of key blocks they visit
//
// Parts are the rows before the first sequence, the sequences, and the rows behind the last. The running maximum keeps
// the parts disjoint whatever cu_seqlens_q holds, so the list can't outgrow its bound.
constexpr int kPrepareThreads = 512;
constexpr int kPrepareBuckets = 512;

struct Sum {
  static constexpr int kIdentity = 0;
  __device__ static int of(int a, int b) { return a + b; }
};
struct Maximum {
  static constexpr int kIdentity = 0;  // of numbers that are not negative
  __device__ static int of(int a, int b) { return max(a, b); }
};

// Inclusive scan over the block; `carry` is the result before this piece and becomes the one behind it.
template <class Op>
__device__ int block_scan(int value, int (&warp_results)[kPrepareThreads / 32], int& carry) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value = Op::of(value, before);
  }
  if (lane == 31) warp_results[warp] = value;
  __syncthreads();
  int before = carry, all = carry;
  for (int i = 0; i < kPrepareThreads / 32; ++i) {
    if (i < warp) before = Op::of(before, warp_results[i]);
    all = Op::of(all, warp_results[i]);
  }
  __syncthreads();
  carry = all;
  return Op::of(before, value);
}

struct PartRows {
  int begin;
  int length;
};
__device__ inline PartRows part_rows(const PrepareParams& p, int part) {
  const int begin = part == 0 ? 0 : p.first_row[part - 1];
  const int end = part == p.sequences + 1 ? p.total_q : p.first_row[part];
  return {begin, end - begin};
}

__device__ inline PackedTile packed_tile(const PrepareParams& p, int index, int& blocks) {
  int low = 0, high = p.sequences + 2;  // the last part whose first tile is not behind index
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.first_tile[middle] <= index ? low : high) = middle;
  }
  const PartRows rows = part_rows(p, low);
  PackedTile tile{(index - p.first_tile[low]) * p.tile_m, rows.begin, rows.length, -1, 0};
  if (low >= 1 && low <= p.sequences) {
    const SequenceBounds keys = SequenceBounds::packed(p.cu_seqlens_k, low - 1, p.total_k);
    tile.k_begin = keys.begin;
    tile.seqlen_k = keys.length;
  }
  const VisibleKeys visible(p.window, tile.seqlen_q, tile.seqlen_k);
  const int last_query = min_of(tile.first_query + p.tile_m, tile.seqlen_q) - 1;
  blocks = BlockRange::of(visible, tile.first_query, last_query, p.tile_n).count();
  return tile;
}

__global__ void __launch_bounds__(kPrepareThreads) prepare_packed(const PrepareParams p) {
  __shared__ int warp_results[kPrepareThreads / 32];
  __shared__ int bucket_end[kPrepareBuckets];  // first the number of tiles, then where the next of the bucket goes
  int carry = 0;
  for (int base = 0; base <= p.sequences; base += kPrepareThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    const int row = i <= p.sequences ? clamp(p.cu_seqlens_q[i], 0, p.total_q) : 0;
    const int first = block_scan<Maximum>(row, warp_results, carry);
    if (i <= p.sequences) p.first_row[i] = first;
  }
  __syncthreads();
  carry = 0;
  for (int base = 0; base <= p.sequences + 1; base += kPrepareThreads) {
    const int part = base + static_cast<int>(threadIdx.x);
    const int tiles = part <= p.sequences + 1 ? ceil_div(part_rows(p, part).length, p.tile_m) : 0;
    const int end = block_scan<Sum>(tiles, warp_results, carry);
    if (part <= p.sequences + 1) p.first_tile[part + 1] = end;
  }
  if (threadIdx.x == 0) {
    p.first_tile[0] = 0;
    *p.num_tiles = carry;
    *p.next_tile = 0;
  }
  for (int i = threadIdx.x; i < kPrepareBuckets; i += kPrepareThreads) bucket_end[i] = 0;
  __syncthreads();

  // Bucket 0 holds the longest tiles. Several lengths share a bucket where there are more lengths than buckets.
  const int lengths_a_bucket = ceil_div(p.total_k / p.tile_n + 2, kPrepareBuckets);
  const auto bucket_of = [&](int blocks) {
    return kPrepareBuckets - 1 - min_of(blocks / lengths_a_bucket, kPrepareBuckets - 1);
  };
  for (int i = threadIdx.x; i < carry; i += kPrepareThreads) {
    int blocks;
    packed_tile(p, i, blocks);
    atomicAdd(&bucket_end[bucket_of(blocks)], 1);
  }
  __syncthreads();
  int before = 0;
  static_assert(kPrepareBuckets == kPrepareThreads);
  const int tiles = bucket_end[threadIdx.x];
  const int end = block_scan<Sum>(tiles, warp_results, before);
  bucket_end[threadIdx.x] = end - tiles;
  __syncthreads();
  for (int i = threadIdx.x; i < carry; i += kPrepareThreads) {
    int blocks;
    const PackedTile tile = packed_tile(p, i, blocks);
    p.tiles[atomicAdd(&bucket_end[bucket_of(blocks)], 1)] = tile;
  }
}

}  // namespace tilewright::forward
