#pragma once

#include "kernels/backward/sm90_config.cuh"
#include "ptx/load.h"
#include "ptx/mbarrier.h"
#include "ptx/reduce.h"
#include "ptx/tma.h"

namespace tilewright::backward {

// Zeros for dQ's sums where blocks share heads: not all of them before the main kernel, but shortly before they are
// needed, by the copy engine, so that they are still in the L2 cache then.
//
// With each tile of keys of a group of heads (TileOrder) comes a share of the sums of the group Zeros::ahead groups
// later; the kernel before has done the first groups. A warp beside the producer writes it, a thread is enough, and
// counts it when it is done. The producer waits for all shares of a group before the consumers add to its sums.
//
// No race: a share is written before it is counted (release), and seen to be (acquire) before what is added.
//
// No deadlock: a share comes with a tile of an earlier group, which a block at work has taken before, and waits for
// nothing.
__device__ __forceinline__ void wait_for_zeros(const KernelParams& p, const TileWork& work) {
  if (p.dq) return;
  const int shares = p.tiles_of_group();
  const int group = work.index / shares;
  if (group < p.zeros.ahead) return;
  while (ptx::load_acquire(p.zeros.shares + group) < shares) {
  }
}

template <class C>
struct ZeroWriter {
  const KernelParams& p;
  SharedStorage<C>& shared;

  __device__ __forceinline__ void run() const {
    for (float4& zero : shared.zeros) zero = make_float4(0.f, 0.f, 0.f, 0.f);
    ptx::fence_proxy_async();
    for (uint32_t number = 0;; ++number) {
      const int slot = number % C::kTileSlots;
      ptx::mbarrier_wait(&shared.tile_full[slot], number / C::kTileSlots % 2);
      const TileWork& work = shared.tile[slot];
      if (work.last) return;
      const int index = work.index;
      ptx::mbarrier_arrive(&shared.tile_empty[slot]);
      write_share(index);
    }
  }

 private:
  __device__ __forceinline__ void write_share(int index) const {
    const int shares = p.tiles_of_group(), group_heads = static_cast<int>(p.order.head_group.divisor);
    const int group = index / shares + p.zeros.ahead;
    const int heads = min_of(p.order.heads - group * group_heads, group_heads);
    if (heads <= 0) return;
    const int head_sums = p.group * p.head_tiles;  // tiles of sums, of a key head
    const int size = ceil_div(heads * head_sums, shares);
    const int begin = index % shares * size;
    const int end = min_of(begin + size, heads * head_sums);
    constexpr int kPieces = C::kTileM * C::kHeadDim / (4 * kZeros);  // of a tile
    static_assert(C::kTileM * C::kHeadDim % (4 * kZeros) == 0);
    float* to = p.dq_sum + (int64_t{group * group_heads} * head_sums + begin) * (C::kTileM * C::kHeadDim);
    for (int i = (end - begin) * kPieces; i > 0; --i, to += 4 * kZeros) {
      ptx::bulk_store(to, shared.zeros, sizeof(shared.zeros));
    }
    ptx::bulk_commit_group();
    ptx::bulk_wait_group();
    ptx::reduce_add_release(p.zeros.shares + group, 1);
  }
};

}  // namespace tilewright::backward
