#pragma once

#include <cuda.h>

#include "attention/packed_tiles.h"
#include "attention/query_range.h"
#include "attention/scheduler.h"
#include "kernels/backward/params.h"
#include "kernels/backward/select.h"
#include "tile/row_coordinates.h"

namespace tilewright::backward {

// dQ of a step comes in units, a product each: 64 columns of Q × all its queries, transposed as everything else. Where
// it takes fewer reads of shared memory, 64 queries × all columns instead.
TILEWRIGHT_HOST_DEVICE constexpr bool dq_by_rows(int head_dim, int tile_m) { return head_dim == 64 && tile_m == 128; }
// Of a unit's accumulators: of dQ by rows, else of dQᵀ.
TILEWRIGHT_HOST_DEVICE constexpr int dq_unit_columns(int head_dim, int tile_m) {
  return dq_by_rows(head_dim, tile_m) ? head_dim : tile_m;
}

// A tile of keys of a packed batch, or in the second pass of queries. Rows that belong to no sequence have none of the
// other: their gradients are zero.
struct PackedPairTile {
  int first_row;  // within the part
  int k_begin;    // of the part in the packed tensor
  int seqlen_k;
  int q_begin;
  int seqlen_q;
  int first_tile;  // of the part in the list of its head's query tiles of tile_m
};

// lse, delta and dQ's sums lie in tiles of tile_m rows of one head: tile t of head h of a plain batch b is number
// (b heads_q + h) head_tiles + t, of a packed one h head_tiles + first_tile + t. A part of a packed tensor starts at
// first_tile = its first row / tile_m + its number, so that no two share a tile; so there are at most
// max_packed_tiles() of them.
TILEWRIGHT_HOST_DEVICE constexpr int packed_first_tile(int first_row, int part, int tile) {
  return first_row / tile + part;
}

// Zeros for dQ's sums, see zeros.cuh.
struct Zeros {
  int* shares;  // (groups of heads,): of a group's sums, that have been written
  int ahead;    // groups from the one that is added up to the one whose zeros are written meanwhile
};
constexpr int kZeros = 64;  // times 16 bytes: the copy engine's source

constexpr int kConsumerWarps = 8;  // of a block

// What the launch hands to the main kernel.
struct KernelParams {
  CUtensorMap q;       // boxes of 64 columns × tile_m rows
  CUtensorMap dout;    // 64 × tile_m
  CUtensorMap k;       // 64 × tile_n
  CUtensorMap v;       // 64 × tile_n
  CUtensorMap dk;      // 64 × 16: of a warp. Not everywhere: BackwardTile::stores_by_copy
  CUtensorMap dv;      // 64 × 16
  const float* lse2;   // (tiles, tile_m): lse log2(e); +inf where a row sees nothing or is no row
  const float* delta;  // (tiles, tile_m)
  float* dq_sum;  // null with a second pass, else (tiles, units, 4, columns of a unit / 8, 32, 4): in the order of the
                  // accumulators, see part_of_sum; whole heads: (blocks, tiles of a key head, …), see whole_heads.cuh.
                  // At head_dim 96 the second unit has two parts instead of 4
  int2* turns;    // (tiles,): see turns.cuh; null where the order of dQ's sums is free
  void* dq;       // (batch, seqlen_q, heads_q, head_dim) where blocks take whole heads, else null
  void* dk_rows;  // dK, for kernels that store without the copy engine
  void* dv_rows;
  Strides dq_stride;
  Strides dk_stride;
  Strides dv_stride;
  Window window;
  Zeros zeros;
  TileOrder order;               // of tiles of keys
  bool overlapping;              // groups of heads, see TileOrder::at_overlapping
  int tiles;                     // of keys, of one head; packed: see num_packed
  int head_tiles;                // of queries, of one head; packed: of all parts
  int* next_tile;                // the counter that blocks take tiles from; whole heads: not used
  bool waiting;                  // a block may wait for what comes with a tile that another has taken
  const PackedPairTile* packed;  // the work list of a packed batch, or null
  const int* num_packed;         // its length
  Divisor heads_kv;
  int group;  // query heads a key head
  int seqlen_q;
  int seqlen_k;
  int head_dim;
  int head_dim_v;
  float scale;
  float dq_scale;     // scale with its sign, which is in q otherwise
  float score_scale;  // softcap only: scale / softcap
  float to_log2;      // scale log2(e); with softcap: softcap log2(e)
  int all_kv;         // key heads, times batch
  int splits;         // of a key head's query heads, see splits.cuh; 1 is none
  int split_heads;    // query heads a split; the first has fewer if they do not go in evenly
  float* split_sum;   // (key heads, tiles, dV and dK in the order of the accumulators), or null
  int* splits_done;   // (key heads, tiles, kConsumerWarps): how many splits are in the sum

  // Query heads of a split, and in those of the key head the first of them.
  __device__ __forceinline__ int heads_of(int split) const { return first_head(split + 1) - first_head(split); }
  __device__ __forceinline__ int first_head(int split) const {
    return max_of(group - (splits - split) * split_heads, 0);
  }
  // Tiles of keys.
  __device__ __forceinline__ int tiles_of_head() const { return packed ? *num_packed : tiles; }
  __device__ __forceinline__ int tiles_of_group() const {
    return static_cast<int>(order.head_group.divisor) * tiles_of_head();
  }
};

// The sequences of a tile of work.
struct Sequences {
  int batch;  // packed: 0
  int q_begin;
  int seqlen_q;
  int k_begin;
  int seqlen_k;

  __device__ __forceinline__ RowCoordinates query(bool packed, int row) const {
    return packed ? RowCoordinates::packed(q_begin, seqlen_q, row) : RowCoordinates::plain(row, batch);
  }
  __device__ __forceinline__ RowCoordinates key(bool packed, int row) const {
    return packed ? RowCoordinates::packed(k_begin, seqlen_k, row) : RowCoordinates::plain(row, batch);
  }
};

// A tile of work, as the producer announces it to the consumers.
struct TileWork : Sequences {
  int first_key;
  int head_kv;
  int first_tile;   // of queries: the number of tile 0 of the first head that the tile walks
  int first_sum;    // the same in dq_sum
  int first_fresh;  // these tiles of queries and those behind have no part of dQ yet, and no zeros: whole heads, turns
  uint32_t number;  // tiles announced before
  uint32_t loaded;  // tiles of K and V loaded before
  int index;        // in the order
  union {
    int next;        // whole heads: the index of the block's tile after this one
    int split_tile;  // splits: in split_sum
  };
  bool last;       // no work: the end
  uint16_t split;  // of KernelParams::splits
  QueryWalk walk;
};

constexpr int kTurnSlots = 4;  // steps that are on their way to their additions, at most; see turns.cuh

// A tile of queries, as the producer announces it with its Q.
struct alignas(16) StepWork {
  float* sums;  // of the tile
  int fresh;    // nothing has been added up there yet, and it is not zero either
  int masked;   // the tile's first query if not every query sees every key, else -1
};

constexpr int kSecondTileN = 64;  // keys a block of the second pass

// What the launch hands to the second pass (sm90_second_pass.cuh).
struct SecondPassParams {
  KernelParams first;  // of the first pass
  CUtensorMap k;       // boxes of 64 columns × 64 rows
  CUtensorMap v;
  void* dq;
  Strides dq_stride;
  TileOrder order;  // of tiles of queries
  int tiles;        // of one head; packed: see num_packed
  int* next_tile;
  const PackedPairTile* packed;  // or null
  const int* num_packed;
  Divisor heads_q;
  Divisor heads_per_kv;
};

}  // namespace tilewright::backward
