#pragma once

#include "attention/block_range.h"
#include "attention/packed_list.cuh"
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

// `blocks`: how many blocks of keys the tile visits.
__device__ inline PackedTile packed_tile(const PrepareParams& p, int index, int& blocks) {
  const PackedParts parts{p.first_row, p.sequences, p.total_q};
  const int part = part_of_tile(p.first_tile, parts.count(), index);
  PackedTile tile{(index - p.first_tile[part]) * p.tile_m, parts.begin(part), parts.length(part), -1, 0};
  if (parts.is_sequence(part)) {
    const SequenceBounds keys = SequenceBounds::packed(p.cu_seqlens_k, part - 1, p.total_k);
    tile.k_begin = keys.begin;
    tile.seqlen_k = keys.length;
  }
  const VisibleKeys visible(p.window, tile.seqlen_q, tile.seqlen_k);
  const int last_query = min_of(tile.first_query + p.tile_m, tile.seqlen_q) - 1;
  blocks = BlockRange::of(visible, tile.first_query, last_query, p.tile_n).count();
  return tile;
}

// The work list of a packed batch, by one block of kPrepareThreads; see attention/packed_list.cuh.
__global__ void __launch_bounds__(kPrepareThreads) prepare_packed(const PrepareParams p) {
  __shared__ PackedListMemory shared;
  find_parts(p.cu_seqlens_q, p.sequences, p.total_q, p.first_row, shared);
  const int tiles = count_tiles({p.first_row, p.sequences, p.total_q}, p.tile_m, p.first_tile, shared);
  if (threadIdx.x == 0) {
    *p.num_tiles = tiles;
    *p.next_tile = 0;
  }
  const auto tile_at = [&](int index, int& blocks) { return packed_tile(p, index, blocks); };
  sort_tiles<false>(p.tiles, tiles, p.total_k / p.tile_n + 1, tile_at, shared);
}

}  // namespace tilewright::forward
