#pragma once

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
  int* num_packed;
  int* first_row_q;      // (sequences + 1,): see PackedParts
  int* first_row_k;      // (sequences + 1,)
  int* first_tile;       // scratch (sequences + 3,)
  PackedKeyTile* tiles;  // (max_packed_tiles,)
};

// `length`: how many tiles of queries it visits, at most. It never grows from one tile of a sequence to the next,
// so that the sorted list keeps these in order, as turns.cuh wants it.
__device__ inline PackedKeyTile packed_key_tile(const PrepareParams& p, int index, int& length) {
  const PackedParts queries{p.first_row_q, p.sequences, p.total_q}, keys{p.first_row_k, p.sequences, p.total_k};
  const int part = part_of_tile(p.first_tile, keys.count(), index);
  const int q_begin = queries.begin(part);
  const int seqlen_q = keys.is_sequence(part) ? queries.length(part) : 0;
  const PackedKeyTile tile{
      (index - p.first_tile[part]) * p.tile_n,   keys.begin(part), keys.length(part), q_begin, seqlen_q,
      packed_first_tile(q_begin, part, p.tile_m)};
  const VisibleQueries visible(p.window, seqlen_q, tile.seqlen_k);
  const int first_query = clamp(visible.first(tile.first_key), 0, seqlen_q);
  length = ceil_div(seqlen_q, p.tile_m) - first_query / p.tile_m;
  if (tile.first_key >= p.window.sink_tokens && p.window.left < seqlen_q && p.window.right < seqlen_q) {
    length = min_of(length, (p.window.left + p.window.right + p.tile_n) / p.tile_m + 2);
  }
  return tile;
}

// The work list of a packed batch, by one block of kPrepareThreads; see attention/packed_list.cuh.
inline __global__ void __launch_bounds__(kPrepareThreads) prepare_packed(const PrepareParams p) {
  __shared__ PackedListMemory shared;
  find_parts(p.cu_seqlens_q, p.sequences, p.total_q, p.first_row_q, shared);
  find_parts(p.cu_seqlens_k, p.sequences, p.total_k, p.first_row_k, shared);
  const int tiles = count_tiles({p.first_row_k, p.sequences, p.total_k}, p.tile_n, p.first_tile, shared);
  if (threadIdx.x == 0) *p.num_packed = tiles;
  const auto tile_at = [&](int index, int& length) { return packed_key_tile(p, index, length); };
  sort_tiles<true>(p.tiles, tiles, p.total_q / p.tile_m + 1, tile_at, shared);
}

}  // namespace tilewright::backward
