#pragma once

#include "attention/block_range.h"
#include "attention/packed_list.cuh"
#include "kernels/backward/sm90_params.h"

namespace tilewright::backward {

struct PrepareParams {
  const int32_t* cu_seqlens_q;  // (sequences + 1,)
  const int32_t* cu_seqlens_k;  // (sequences + 1,)
  int sequences;
  int total_q;
  int total_k;
  int tile_m;
  int tile_n;
  Window window;
  int* first_row_q;              // (sequences + 1,): see PackedParts
  int* first_row_k;              // (sequences + 1,)
  int* first_tile;               // scratch (sequences + 3,)
  int* num_packed;               // of the two lists
  PackedPairTile* tiles;         // of keys: (max_packed_tiles,)
  PackedPairTile* second_tiles;  // of queries, of the second pass: (max_packed_tiles,), or null
};

__device__ inline PackedPairTile packed_pair_tile(const PrepareParams& p, int part, bool of_keys, int first_row) {
  const PackedParts queries{p.first_row_q, p.sequences, p.total_q}, keys{p.first_row_k, p.sequences, p.total_k};
  const bool pair = keys.is_sequence(part);
  const int q_begin = queries.begin(part);
  return {first_row,
          keys.begin(part),
          of_keys || pair ? keys.length(part) : 0,
          q_begin,
          !of_keys || pair ? queries.length(part) : 0,
          packed_first_tile(q_begin, part, p.tile_m)};
}

// `length`: how many tiles of queries it visits, at most. It never grows from one tile of a sequence to the next,
// so that the sorted list keeps these in order, as turns.cuh wants it.
__device__ inline PackedPairTile packed_key_tile(const PrepareParams& p, int index, int& length) {
  const int part = part_of_tile(p.first_tile, p.sequences + 2, index);
  const PackedPairTile tile = packed_pair_tile(p, part, true, (index - p.first_tile[part]) * p.tile_n);
  const VisibleQueries visible(p.window, tile.seqlen_q, tile.seqlen_k);
  const int first_query = clamp(visible.first(tile.first_row), 0, tile.seqlen_q);
  length = ceil_div(tile.seqlen_q, p.tile_m) - first_query / p.tile_m;
  if (tile.first_row >= p.window.sink_tokens && p.window.left < tile.seqlen_q && p.window.right < tile.seqlen_q) {
    const int64_t queries = int64_t{p.window.left} + p.window.right + p.tile_n;
    length = min_of(length, static_cast<int>(queries / p.tile_m) + 2);
  }
  return tile;
}

// `length`: how many blocks of keys it visits.
__device__ inline PackedPairTile packed_query_tile(const PrepareParams& p, int index, int& length) {
  const int part = part_of_tile(p.first_tile, p.sequences + 2, index);
  const PackedPairTile tile = packed_pair_tile(p, part, false, (index - p.first_tile[part]) * kSecondTileM);
  const int last_query = min_of(tile.first_row + kSecondTileM, tile.seqlen_q) - 1;
  const VisibleKeys visible(p.window, tile.seqlen_q, tile.seqlen_k);
  length = BlockRange::of(visible, tile.first_row, last_query, kSecondTileN).count();
  return tile;
}

// The work lists of a packed batch, by one block of kPrepareThreads; see attention/packed_list.cuh.
inline __global__ void __launch_bounds__(kPrepareThreads) prepare_packed(const PrepareParams p) {
  __shared__ PackedListMemory shared;
  find_parts(p.cu_seqlens_q, p.sequences, p.total_q, p.first_row_q, shared);
  find_parts(p.cu_seqlens_k, p.sequences, p.total_k, p.first_row_k, shared);
  const int tiles = count_tiles({p.first_row_k, p.sequences, p.total_k}, p.tile_n, p.first_tile, shared);
  if (threadIdx.x == 0) p.num_packed[0] = tiles;
  const auto key_tile = [&](int index, int& length) { return packed_key_tile(p, index, length); };
  sort_tiles<true>(p.tiles, tiles, p.total_q / p.tile_m + 1, key_tile, shared);
  if (!p.second_tiles) return;
  __syncthreads();
  const int second = count_tiles({p.first_row_q, p.sequences, p.total_q}, kSecondTileM, p.first_tile, shared);
  if (threadIdx.x == 0) p.num_packed[1] = second;
  const auto query_tile = [&](int index, int& length) { return packed_query_tile(p, index, length); };
  sort_tiles<false>(p.second_tiles, second, p.total_k / kSecondTileN + 1, query_tile, shared);
}

}  // namespace tilewright::backward
