#pragma once

#include <cuda.h>

#include "attention/block_range.h"
#include "attention/packed_tiles.h"
#include "attention/scheduler.h"
#include "kernels/forward/params.h"

namespace tilewright::forward {

// What the launch hands to the kernel: ForwardParams made ready for the copy engine and the scheduler.
struct KernelParams {
  CUtensorMap q;    // boxes of 64 columns × 64 rows: those of a warpgroup
  CUtensorMap k;    // 64 × tile_n
  CUtensorMap v;    // 64 × tile_n
  CUtensorMap out;  // 64 × 64
  void* out_rows;   // out, for kernels that store without the copy engine
  Strides out_stride;
  float* lse;          // + batch lse_batch_stride + head lse_head_stride + row
  const float* sinks;  // (heads_q,) or null
  int64_t lse_batch_stride;
  int64_t lse_head_stride;
  Window window;
  TileOrder order;
  int tiles;                       // of one head; packed: see num_packed_tiles
  int* next_tile;                  // the counter of the dynamic order, or null: a static order
  const PackedTile* packed_tiles;  // the work list of a packed batch, or null
  const int* num_packed_tiles;
  Divisor heads_q;
  Divisor heads_per_kv;
  int seqlen_q;
  int seqlen_k;
  int head_dim_v;
  float score_scale;  // softcap only: scale / softcap
  float to_log2;      // scale log2(e); with softcap: softcap log2(e)
};

// A tile of work, as the producer announces it to the consumers.
struct TileWork {
  int first_query;
  int head;
  int batch;  // packed: 0
  int q_begin;
  int seqlen_q;
  int k_begin;
  int seqlen_k;
  bool last;  // no work: the end
  BlockRange range;
};

// Rows are addressed by three coordinates. In a plain tensor these are (row, batch, 0). In a packed one the tensor map
// has the row dimension three times, as (x, y, z) with strides (s, s, 2^34 - s) bytes and x < 2^30: at z = 2^30 the
// address is base + (x + y - 2^30) s, modulo 2^64, and with y the end of a sequence and x = 2^30 - length + row the
// bound on x is the end of the sequence. So the copy engine itself keeps to the sequence: rows behind its end are read
// as zero and never written, and what the next sequence holds can't reach this one.
struct RowCoordinates {
  static constexpr int kRagged = 1 << 30;
  int row;
  int outer;
  int wrap;

  __device__ __forceinline__ static RowCoordinates plain(int row, int batch) { return {row, batch, 0}; }
  __device__ __forceinline__ static RowCoordinates packed(int begin, int length, int row) {
    return {kRagged - length + row, begin + length, kRagged};
  }
};

}  // namespace tilewright::forward
