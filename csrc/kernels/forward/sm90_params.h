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

}  // namespace tilewright::forward
