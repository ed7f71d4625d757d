#pragma once

#include "attention/query_range.h"
#include "kernels/backward/sm90_params.h"
#include "ptx/elect.h"
#include "ptx/ldmatrix.h"
#include "ptx/load.h"
#include "ptx/math.h"
#include "ptx/tma.h"
#include "tile/fragment.h"
#include "tile/store_rows.h"

namespace tilewright::backward {

// A block that takes whole heads (KernelParams::dq): all tiles of keys of a key head, one after the other, then the
// next head. It keeps dQ's sums of the head in a part of dq_sum of its own, which stays in the L2 cache: the first tile
// of keys that visits a tile of queries stores its part (StepWork::fresh), the later ones add theirs, and after the
// last one the sums become rows of dQ. So nothing is zeroed before and converted after, and the sums never see another
// order.
//
// No race: what one warp adds to, no other warp touches, for which part of dQ a warp computes does not depend on the
// step. So the same warp stores the first part, adds the others and converts the sum.
//
//     from registers    The same lane stores, adds and reads the same 16 bytes, in this order in its program.
//     in bulk           One lane issues all but the last step's, which comes from registers. The copy engine keeps no
//                       order of its own. So between two tiles of keys that lane waits until what it has issued is
//                       done, all fence what they did off against the copy engine, and the warp meets (end_tile);
//                       within one, every part is another. So it is before the sums are read and after.
template <class C>
struct WholeHeads {
  using Element = typename C::Element;
  static constexpr int kColumns = C::kUnitFloats / 64;  // of a unit's accumulator

  const KernelParams& p;
  const TileWork& work;
  const int warpgroup;
  const int thread;     // of the warpgroup
  const bool has_part;  // ConsumerRole::has_part

  // After a tile of keys, by all consumers.
  __device__ __forceinline__ void end_tile() const {
    if constexpr (C::kBulk) {
      if (ptx::elect_one()) ptx::bulk_wait_group<2>();  // all but dV and dK
      ptx::fence_proxy_async_global();
    }
    if (work.first_key + C::kTileN < work.seqlen_k) return;
    __syncwarp();
    if (has_part) convert();
    if constexpr (C::kBulk) ptx::fence_proxy_async_global();
    __syncwarp();
  }

 private:
  // dQ = scale × its sums, 0 where no key is seen. Two tiles at a time, for loads take long.
  __device__ __forceinline__ void convert() const {
    const QueryRange visited = QueryRange::of(p.window, work.seqlen_q, work.seqlen_k, 0, work.seqlen_k, C::kTileM);
#pragma unroll 1
    for (int head = 0; head < p.group; ++head) {
      const float* sums = p.dq_sum + int64_t{work.first_sum + head * p.head_tiles} * kTileFloats;
      Element* rows = static_cast<Element*>(p.dq) + work.batch * p.dq_stride.batch +
                      int64_t{work.head_kv * p.group + head} * p.dq_stride.head;
#pragma unroll 1
      for (int tile = 0; tile < p.head_tiles; tile += 2) {
        convert_units<2>(sums, rows, tile, visited);
      }
    }
  }

  static constexpr int kTileFloats = C::kTileM * C::kHeadDim;

  // This warp's part of some tiles.
  template <int kTiles>
  __device__ __forceinline__ void convert_units(const float* sums, Element* rows, int tile,
                                                const QueryRange& visited) const {
    Accumulator<kColumns> unit[kTiles];
    Accumulator<C::kSplitUnit ? C::kTileM / 2 : 32> half[kTiles];
    const int first_of_half = warpgroup * (C::kTileM / 2);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const bool seen = tile + i >= visited.begin && tile + i < visited.end;
      const float* from = sums + int64_t{tile + i} * kTileFloats + thread % 32 * 4;
      load(unit[i], from + part(warpgroup), seen);
      if constexpr (C::kSplitUnit) load(half[i], from + part(2) + first_of_half * 16, seen);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int row = (tile + i) * C::kTileM;
      if constexpr (C::kDqByRows) {
        store(unit[i], rows, row + warpgroup * 64, 0);
      } else {
        store_transposed(unit[i], rows, row, warpgroup * 64);
        if constexpr (C::kSplitUnit) store_transposed(half[i], rows, row + first_of_half, 128);
      }
    }
  }

  // See ConsumerRole::part_of_sum.
  __device__ __forceinline__ int part(int unit) const { return (unit * 4 + thread / 32) * (C::kUnitFloats / 4); }

  template <int kCols>
  __device__ __forceinline__ static void load(Accumulator<kCols>& to, const float* from, bool seen) {
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const float4 x = seen ? ptx::load_relaxed(from + j * 128) : make_float4(0, 0, 0, 0);
      to.values[4 * j] = x.x, to.values[4 * j + 1] = x.y, to.values[4 * j + 2] = x.z, to.values[4 * j + 3] = x.w;
    }
  }

  // The rows of a unit, from first_row and first_column on.
  template <int kCols>
  __device__ __forceinline__ void store(const Accumulator<kCols>& from, Element* rows, int first_row,
                                        int first_column) const {
    const int row = first_row + from.row(thread);
    const int left = work.seqlen_q - row;
    const int rows_left = left <= 0 ? 0 : left <= 8 ? 1 : 2;
    store_rows(from, p.dq_scale, rows + int64_t{row} * p.dq_stride.row + first_column, 8 * p.dq_stride.row, rows_left,
               p.head_dim - first_column, thread);
  }

  // The accumulator's rows are columns of dQ, from first_column on, and its columns rows. In 16 bits a transpose of 8 ×
  // 8 gives a lane two columns of one row of dQ, a second one, of 4 × 4 pairs, 8 of them.
  template <int kCols>
  __device__ __forceinline__ void store_transposed(const Accumulator<kCols>& from, Element* rows, int first_row,
                                                   int first_column) const {
    const int lane = thread % 32;
    const int column = first_column + thread / 32 * 16 + lane % 2 * 8;
#pragma unroll
    for (int first = 0; first < kCols; first += 16) {
      uint32_t pieces[4] = {};  // 8 rows × 8 columns of dQ each: the columns behind each other, then the rows
#pragma unroll
      for (int i = 0; i < 4 && first + i / 2 * 8 < kCols; ++i) {
        const float* pair = &from.values[first / 2 + 2 * i];
        pieces[i] = ptx::transpose(ptx::pack<Element>(pair[0] * p.dq_scale, pair[1] * p.dq_scale));
      }
      const uint4 piece = gather_row(pieces, thread);
      const int eight = first + lane % 4 / 2 * 8;
      const int row = first_row + eight + lane / 4;
      if (eight < kCols && row < work.seqlen_q && column < p.head_dim) {
        *reinterpret_cast<uint4*>(rows + int64_t{row} * p.dq_stride.row + column) = piece;
      }
    }
  }
};

}  // namespace tilewright::backward
