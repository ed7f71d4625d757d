#pragma once

#include "kernels/backward/sm90_config.cuh"
#include "ptx/load.h"
#include "ptx/reduce.h"
#include "tile/fragment.h"

namespace tilewright::backward {

// Where key heads are few, the query heads of each are cut into splits, and a tile of keys is a tile of work for every
// split (select_splits). dV and dK are then summed up in float32 in global memory (KernelParams::split_sum): the first
// split stores its part, the others add theirs, the last one takes the sum and goes on with it.
//
// One order of the sums, that of the splits: a warp adds when the warp that had the same keys in the split before has
// counted itself. What one warp of a tile adds to no other warp of it touches, and the same lane stores, loads and adds
// the same 16 bytes.
//
// No deadlock, as in turns.cuh: blocks take tiles in an order in which a tile of one split comes before the same tile
// of the next. Where that is a group of heads before, nobody waits.
template <class C>
struct Splits {
  const KernelParams& p;
  const TileWork& work;
  const int thread;  // of all consumers

  // A warp that has both adds dV first. Whether the sum, in dV and dK, is whole.
  __device__ __forceinline__ bool add_up_dV(Accumulator<C::kHeadDimV>& dV) const {
    return add_up<true, C::kWide>(dV, 0);
  }
  __device__ __forceinline__ bool add_up_dK(Accumulator<C::kHeadDim>& dK) const {
    return add_up<C::kWide, true>(dK, C::kTileN * C::kHeadDimV);
  }

 private:
  template <bool kFirst, bool kLast, int kColumns>
  __device__ __forceinline__ bool add_up(Accumulator<kColumns>& X, int offset) const {
    // The shuffle: see ConsumerRole::count.
    const int split = __shfl_sync(~0u, static_cast<int>(work.split), 0);
    const int warp = thread / 32, lane = thread % 32;
    int* done = p.splits_done + int64_t{work.split_tile} * C::kWarps + warp;
    float* sum = p.split_sum + int64_t{work.split_tile} * (C::kTileN * (C::kHeadDim + C::kHeadDimV)) + offset +
                 warp % (C::kTileN / 16) * (16 * kColumns) + lane * 4;
    if (split > 0) {
      if (kFirst) wait(done, split);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const float4 x = ptx::load_relaxed(sum + j * 128);
        float* to = &X.values[4 * j];
        to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
      }
    }
    if (split + 1 == p.splits) return true;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float* x = &X.values[4 * j];
      *reinterpret_cast<float4*>(sum + j * 128) = make_float4(x[0], x[1], x[2], x[3]);
    }
    if (kLast) {
      __syncwarp();
      if (lane == 0) ptx::reduce_add_release(done, 1);
    }
    return false;
  }

  // The vote tells the compiler that the warp leaves the loop as one. Else nothing behind it, nor in the loop over the
  // queries, would stay in uniform registers.
  __device__ __forceinline__ void wait(const int* done, int split) const {
    while (!__all_sync(~0u, ptx::load_acquire(done) >= split)) {
    }
  }
};

}  // namespace tilewright::backward
