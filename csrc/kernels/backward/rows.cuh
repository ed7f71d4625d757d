#pragma once

#include "attention/packed_tiles.h"
#include "kernels/backward/sm90_params.h"
#include "ptx/grid_dependency.h"
#include "ptx/math.h"

// The kernels around the main one. Both work on tiles of tile_m rows of one head, numbered as in KernelParams, and
// neighbouring blocks on neighbouring heads, whose rows lie side by side in memory.
namespace tilewright::backward {

struct RowParams {
  const void* out;   // (batch, seqlen_q, heads_q, head_dim_v)
  const void* dout;  // like out
  void* dq;          // (batch, seqlen_q, heads_q, head_dim), or null where another kernel writes it
  Strides out_stride;
  Strides dout_stride;
  Strides dq_stride;
  const float* lse;    // (batch, heads_q, seqlen_q)
  const float* dlse;   // like lse, or null
  const float* sinks;  // (heads_q,) or null
  float* dsinks;       // (heads_q,)
  float* lse2;         // (tiles, tile_m)
  float* delta;        // (tiles, tile_m)
  float* dq_sum;       // see KernelParams
  int zero_tiles;      // of it, that this kernel fills with zeros
  int* zero_shares;    // see Zeros; or null
  int head_groups;     // how many of these counters
  int2* turns;         // see KernelParams
  int* splits_done;    // see KernelParams
  int64_t split_counters;
  PackedParts parts;  // of a packed q, else null
  int* next_tile;     // two: see KernelParams and SecondPassParams
  int batch;          // sequences; packed: 1
  int seqlen_q;       // packed: total_q
  int heads_q;
  int head_tiles;
  int head_dim;
  int head_dim_v;
  float scale;
};

constexpr int kRowThreads = 256;

// The rows of a tile.
struct RowTile {
  int number;
  int batch;  // packed: 0
  int head;
  int first_row;  // of the tensor
  int rows;       // none if not positive
  bool in_sequence;

  // Of this block. From the last to the first: the main kernel begins with the first heads and ends with the last, and
  // what was written last is still in the L2 cache.
  template <int kTileM>
  __device__ __forceinline__ static RowTile of(const RowParams& p) {
    const int block = gridDim.x - 1 - blockIdx.x;
    const int head = block % p.heads_q;
    const int rest = block / p.heads_q;
    const int batch = rest / p.head_tiles;
    const int tile = rest - batch * p.head_tiles;
    RowTile at{(batch * p.heads_q + head) * p.head_tiles + tile, batch, head, tile * kTileM, 0, true};
    if (!p.parts.first_row) {
      at.rows = min_of(p.seqlen_q - at.first_row, kTileM);
      return at;
    }
    int low = 0, high = p.parts.count();  // the last part that does not start behind the tile
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (packed_first_tile(p.parts.begin(middle), middle, kTileM) <= tile ? low : high) = middle;
    }
    const int begin = p.parts.begin(low);
    const int row = (tile - packed_first_tile(begin, low, kTileM)) * kTileM;
    at.first_row = begin + row;
    at.rows = min_of(p.parts.length(low) - row, kTileM);
    at.in_sequence = p.parts.is_sequence(low);
    return at;
  }

  // When the kernels before have ended. The parts are made by one of them; without parts all is known already.
  template <int kTileM>
  __device__ __forceinline__ static RowTile after_wait(const RowParams& p) {
    if (p.parts.first_row) ptx::wait_for_prerequisite_grids();
    const RowTile tile = of<kTileM>(p);
    ptx::wait_for_prerequisite_grids();
    return tile;
  }
};

template <class Element>
__device__ __forceinline__ float dot(uint4 a, uint4 b) {
  float sum = 0.f;
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = ptx::unpack<Element>(x[i]), v = ptx::unpack<Element>(y[i]);
    sum = fmaf(u.x, v.x, sum);
    sum = fmaf(u.y, v.y, sum);
  }
  return sum;
}

// What the forward and the gradient say of a row; -inf where it sees nothing or is none.
struct RowStats {
  float lse = -INFINITY;
  float dlse = 0.f;

  __device__ __forceinline__ static RowStats of(const RowParams& p, const RowTile& tile, int row) {
    if (!tile.in_sequence || row >= tile.rows) return {};
    const int64_t line = int64_t{tile.batch} * p.heads_q + tile.head;
    const int64_t at = line * p.seqlen_q + tile.first_row + row;
    return {p.lse[at], p.dlse ? p.dlse[at] : 0.f};
  }
};

// delta = rowsum(dO ∘ O) - dlse, lse in powers of two; the first zero_tiles of dQ's sums and all counters ← 0. A block
// a tile.
template <class Element, int kHeadDim, int kHeadDimV, int kTileM>
__global__ void __launch_bounds__(kRowThreads) prepare_rows(const __grid_constant__ RowParams p) {
  // The call before may still read what is written here; and the next kernel loads at once what this call was given.
  const RowTile tile = RowTile::after_wait<kTileM>(p);
  ptx::launch_dependent_grids();
  if (threadIdx.x == 0) {
    if (tile.number == 0) p.next_tile[0] = p.next_tile[1] = 0;
    if (p.zero_shares && tile.number < p.head_groups) p.zero_shares[tile.number] = 0;
    if (p.turns) p.turns[tile.number] = make_int2(0, 0);
  }
  for (int64_t i = int64_t{blockIdx.x} * kRowThreads + threadIdx.x; i < p.split_counters;
       i += int64_t{gridDim.x} * kRowThreads) {
    p.splits_done[i] = 0;
  }
  const int rows = tile.in_sequence ? tile.rows : 0;

  constexpr int kLanes = kHeadDimV <= 64 ? 8 : kHeadDimV <= 128 ? 16 : 32;  // of a row, 8 columns each
  constexpr int kRows = kRowThreads / kLanes;
  const int column = threadIdx.x % kLanes * 8;
  const int first = threadIdx.x / kLanes;
  const auto row_of = [&](const void* data, const Strides& stride, int row) {
    return reinterpret_cast<const uint4*>(static_cast<const Element*>(data) + tile.batch * stride.batch +
                                          int64_t{tile.first_row + row} * stride.row + tile.head * stride.head +
                                          column);
  };
  constexpr int kPasses = ceil_div(kTileM, kRows);
  uint4 out[kPasses], dout[kPasses];
  RowStats stats[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int row = first + i * kRows;
    if (column == 0) stats[i] = RowStats::of(p, tile, row);
    const bool there = row < rows && column < p.head_dim_v;
    out[i] = there ? __ldcs(row_of(p.out, p.out_stride, row)) : make_uint4(0, 0, 0, 0);
    dout[i] = there ? *row_of(p.dout, p.dout_stride, row) : make_uint4(0, 0, 0, 0);
  }
  float4* sums = reinterpret_cast<float4*>(p.dq_sum + int64_t{tile.number} * kTileM * kHeadDim);
#pragma unroll 4
  for (int i = threadIdx.x; tile.number < p.zero_tiles && i < kTileM * kHeadDim / 4; i += kRowThreads)
    sums[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    float sum = dot<Element>(out[i], dout[i]);
#pragma unroll
    for (int x = kLanes / 2; x > 0; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
    const int row = first + i * kRows;
    if (column != 0 || row >= kTileM) continue;
    const bool sees = stats[i].lse != -INFINITY;  // else P = 0
    constexpr float kLog2e = 1.44269504088896f;
    const int64_t to = int64_t{tile.number} * kTileM + row;
    p.lse2[to] = sees ? stats[i].lse * kLog2e : INFINITY;
    p.delta[to] = sees ? sum - stats[i].dlse : 0.f;
  }
}

// dQ = scale × its sums, in rows and 16 bits; 0 in rows of no sequence, and where turns say that nothing has been added
// up. A block a tile.
template <class Element, int kHeadDim, int kTileM>
__global__ void __launch_bounds__(kRowThreads) finish_dq_rows(const __grid_constant__ RowParams p) {
  // A row is 16 bytes longer than it need be: two rows below lie 8 banks further.
  __shared__ __align__(16) Element rows[kTileM][kHeadDim + 8];
  ptx::launch_dependent_grids();
  const RowTile tile = RowTile::after_wait<kTileM>(p);
  if (tile.rows <= 0) return;
  constexpr int kPieces = kHeadDim / 8;
  const auto row_of = [&](int row) {
    return static_cast<Element*>(p.dq) + tile.batch * p.dq_stride.batch +
           int64_t{tile.first_row + row} * p.dq_stride.row + tile.head * p.dq_stride.head;
  };
  if (!tile.in_sequence || (p.turns && p.turns[tile.number].x == 0)) {
    for (int i = threadIdx.x; i < tile.rows * kPieces; i += kRowThreads) {
      const int column = i % kPieces * 8;
      if (column < p.head_dim) *reinterpret_cast<uint4*>(row_of(i / kPieces) + column) = make_uint4(0, 0, 0, 0);
    }
    return;
  }
  const float4* sums = reinterpret_cast<const float4*>(p.dq_sum + int64_t{tile.number} * kTileM * kHeadDim);
  constexpr int kCount = kTileM * kHeadDim / 4;
  constexpr int kPasses = ceil_div(kCount, kRowThreads);
  float4 loaded[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int i = pass * kRowThreads + threadIdx.x;
    if (i < kCount) loaded[pass] = sums[i];
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int i = pass * kRowThreads + threadIdx.x;
    if (i >= kCount) break;
    const float4 x = loaded[pass];
    constexpr bool kByRows = dq_by_rows(kHeadDim, kTileM);
    constexpr int kColumns = dq_unit_columns(kHeadDim, kTileM);
    constexpr int kWarpsDown = (kByRows ? kTileM : kHeadDim) / 16;
    const int lane = i % 32, j = i / 32 % (kColumns / 8), warp = i / (4 * kColumns);  // of all units
    const int across = warp / kWarpsDown * kColumns + 8 * j + lane % 4 * 2;
    const int down = warp % kWarpsDown * 16 + lane / 4;
    const auto at = [&](int d, int a) -> Element& { return kByRows ? rows[d][a] : rows[a][d]; };
    at(down, across) = static_cast<Element>(x.x * p.scale);
    at(down, across + 1) = static_cast<Element>(x.y * p.scale);
    at(down + 8, across) = static_cast<Element>(x.z * p.scale);
    at(down + 8, across + 1) = static_cast<Element>(x.w * p.scale);
  }
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < kTileM * kPieces; i += kRowThreads) {
    const int row = i / kPieces, column = i % kPieces * 8;
    if (row >= tile.rows || column >= p.head_dim) continue;
    __stcs(reinterpret_cast<uint4*>(row_of(row) + column), *reinterpret_cast<const uint4*>(&rows[row][column]));
  }
}

}  // namespace tilewright::backward
