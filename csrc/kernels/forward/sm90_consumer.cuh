#pragma once

#include <math_constants.h>

#include "attention/softcap.h"
#include "kernels/forward/fragment_edge.h"
#include "kernels/forward/sm90_config.cuh"
#include "ptx/ldmatrix.h"
#include "ptx/mbarrier.h"
#include "ptx/mma.h"
#include "ptx/named_barrier.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
#include "tile/fragment.h"
#include "tile/pipeline.h"
#include "tile/row_coordinates.h"
#include "tile/unhoisted.h"

namespace tilewright::forward {

// A warpgroup: 64 rows of each tile, from S to out.
template <class C>
struct Consumer {
  using Element = typename C::Element;
  using ProductS = ptx::Wgmma<Element, C::kTileN>;
  using ProductO = ptx::Wgmma<Element, C::kHeadDimV>;

  const KernelParams& p;
  SharedStorage<C>& shared;
  const int warpgroup;
  const int thread;  // of the warpgroup

  PipelineState<C::kStagesK> k_at{};
  PipelineState<C::kStagesV> v_at{};
  PipelineState<C::kTileSlots> tile_at{};
  PipelineState<1> q_at{};

  OperandA<Element, C::kQInRegisters ? C::kHeadDim : 16> Q;
  Accumulator<C::kTileN> S;
  OperandA<Element, C::kTileN> P;
  Accumulator<C::kHeadDimV> O;
  FragmentSoftmax<Element> softmax;

  bool out_in_v = false;  // O of the tile before is, or may be, in buffers of V
  int finished;           // the slot of the tile whose O is to be stored
  float normalize[2];
  float lse[2];

  __device__ __forceinline__ void run() {
    if (warpgroup == C::kWarpgroups - 1) your_turn();
    while (next_tile()) {
      if constexpr (C::kQInRegisters) {
        // A row of tiles that see keys: the first block of the next comes together with the last product of this one.
        O.fill(0.f);
        first_step<false>();
        for (;;) {
          walk_blocks();
          finish_tile();
          if (!next_sees_keys()) break;
          if constexpr (!C::kEarlyEndRows) end_rows();
          first_step<true>();
        }
      } else {
        walk_blocks();
        finish_tile();
      }
      end_step();
    }
    // The turn given away last comes back: a barrier must not be left with arrivals.
    if (warpgroup == 0) my_turn();
    if (thread == 0) ptx::bulk_wait_group_read();
  }

  // The blocks of a tile, or those behind its first_step(): right edge, full, left edge.
  __device__ __forceinline__ void walk_blocks() {
    const BlockRange& range = shared.tile[tile_at.stage].range;
    int at = 1, first = -1;
    if constexpr (!C::kQInRegisters) {
      for (at = 0; at + 1 < range.count() && !sees_block(at); ++at) idle_step(at);
      first = at;
      softmax.reset();
      O.fill(0.f);
    }
    for (int masked_end = max_of(range.right_edge_steps(), first + 1);; masked_end = range.count()) {
#pragma unroll 1
      for (; at < masked_end; ++at) edge_step(at, !C::kQInRegisters && at == first);
      if (at >= range.count()) break;
#pragma unroll 1
      for (int left = range.full_steps_end() - at; left > 0; --left, ++at) full_step(at);
    }
  }

  // --- hand-overs ---------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void my_turn() { ptx::named_barrier_sync(kTurn + warpgroup, 256); }
  __device__ __forceinline__ void your_turn() {
    ptx::named_barrier_arrive(kTurn + (warpgroup + 1 == C::kWarpgroups ? 0 : warpgroup + 1), 256);
  }

  __device__ __forceinline__ void wait_k() { ptx::mbarrier_wait(&shared.k_full[k_at.stage], k_at.parity); }
  __device__ __forceinline__ void wait_v() { ptx::mbarrier_wait(&shared.v_full[v_at.stage], v_at.parity); }
  // One arrival a warp: only then is its own wait surely over.
  __device__ __forceinline__ void release(uint64_t& empty) {
    if (thread % 32 == 0) ptx::mbarrier_arrive(&empty);
  }
  // The last S of a tile is also the last that needs Q's buffer.
  __device__ __forceinline__ void release_k(int at) {
    release(shared.k_empty[k_at.stage]);
    k_at.advance();
    if constexpr (!C::kQInRegisters) {
      if (at + 1 == shared.tile[tile_at.stage].range.count()) release(shared.q_empty[warpgroup]);
    }
  }
  // O += P V is done: V's buffer and the registers of P are free.
  __device__ __forceinline__ void release_v() {
    release(shared.v_empty[v_at.stage]);
    v_at.advance();
  }

  __device__ __forceinline__ void finish_tile() {
    finished = tile_at.stage;
    tile_at.advance();
  }
  // Whether the tile at tile_at does. The finished one keeps its slot until its O is stored, which must not wait for a
  // tile behind one that sees no key: there may be more of those than slots.
  __device__ __forceinline__ bool next_sees_keys() {
    ptx::mbarrier_wait(&shared.tile_full[tile_at.stage], tile_at.parity);
    const TileWork& work = shared.tile[tile_at.stage];
    return !work.last && work.range.count() > 0;
  }
  // The tile at tile_at, which stays announced until release_tile; false at the end of the work. Tiles that see no key
  // are dealt with on the way.
  __device__ __forceinline__ bool next_tile() {
    for (;;) {
      ptx::mbarrier_wait(&shared.tile_full[tile_at.stage], tile_at.parity);
      const TileWork& work = shared.tile[tile_at.stage];
      if (work.last) return false;
      if (work.range.count() > 0) return true;
      write_empty(work);
      release_tile(tile_at.stage);
      tile_at.advance();
    }
  }
  __device__ __forceinline__ void release_tile(int slot) {
    __syncwarp();
    release(shared.tile_empty[slot]);
  }

  // --- steps --------------------------------------------------------------------------------------------------------

  // S_n, and behind it O += P_{n-1} V_{n-1}.
  __device__ __forceinline__ void issue_products(bool with_O) {
    ptx::wgmma_fence();
    S.pin();
    O.pin();
    issue_S();
    ptx::wgmma_commit();
    if (with_O) {
      wait_v();
      issue_O();
    }
    ptx::wgmma_commit();
  }

  // A block that no row of the warpgroup sees, before the first one.
  __device__ __forceinline__ void idle_step(int at) {
    if (at == 0) wait_q();
    wait_k();
    if (at > 0) {
      my_turn();
      your_turn();
    }
    release_k(at);
    if (at > 0) pass_v();
  }
  // V of a block that was not seen.
  __device__ __forceinline__ void pass_v() {
    if (out_in_v) pass_out();
    wait_v();
    release_v();
  }
  // The buffers of V that held O of the tile before, this warpgroup's once the copy engine has read it.
  __device__ __forceinline__ void pass_out() {
    if (thread == 0) ptx::bulk_wait_group_read();
    __syncwarp();
    for (int i = 0; i < C::kOutInV; ++i) {
      wait_v();
      release_v();
    }
    out_in_v = false;
  }

  // The first block of a tile, with Q in registers: together with the last O += P V of the tile before.
  template <bool kEndsTile>
  __device__ __forceinline__ void first_step() {
    // The turn orders this wait before all writes to shared.out.
    if (thread == 0) ptx::bulk_wait_group_read();
    wait_q();
    wait_k();
    my_turn();
    issue_products(kEndsTile);
    your_turn();
    if constexpr (kEndsTile && C::kEarlyEndRows) end_rows();
    const Edge edge = edge_of(0);
    ptx::wgmma_wait<1>();
    S.pin();
    release_k(0);
    softmax.reset();
    transform_scores();
    mask(S, edge);
    float correction[2];
    softmax.raise(S, p.to_log2, correction);
    if constexpr (kEndsTile) {
      ptx::wgmma_wait<0>();
      O.pin();
      release_v();
    }
    exponentiate(edge.end);
    if constexpr (kEndsTile) store_O();
    softmax.settle_block();
    O.fill(0.f);
  }

  // The last O += P V of a tile alone.
  __device__ __forceinline__ void end_step() {
    if (!C::kOutInV && thread == 0) ptx::bulk_wait_group_read();
    wait_v();
    my_turn();
    ptx::wgmma_fence();
    O.pin();
    issue_O();
    ptx::wgmma_commit();
    your_turn();
    end_rows();
    ptx::wgmma_wait<0>();
    O.pin();
    release_v();
    store_O();
  }

  // A block on an edge. Without Q in registers also the first one, which has no product to catch up with. (One code for
  // both: instructions come from memory the first time, and short problems wait for them.) Block 0 needs no turn there:
  // both warpgroups come from the end of a tile, and the tensor cores have nothing else to do.
  __device__ __forceinline__ void edge_step(int at, bool first) {
    const bool in_turn = C::kQInRegisters || at > 0;
    if (!C::kQInRegisters && at == 0) wait_q();
    wait_k();
    if (in_turn) my_turn();
    issue_products(!first);
    if (in_turn) your_turn();
    if (first && out_in_v) pass_out();
    ptx::wgmma_wait<1>();
    S.pin();
    release_k(at);
    transform_scores();
    const Edge edge = !C::kQInRegisters && is_full(at) ? Edge::none(C::kTileN) : edge_of(at);
    mask(S, edge);
    float correction[2];
    softmax.raise(S, p.to_log2, correction);
    ptx::wgmma_wait<0>();
    O.pin();
    if (!first) release_v();
    exponentiate(edge.end);
    if (__any_sync(~0u, correction[0] != 1.f || correction[1] != 1.f)) O.scale_rows(correction);
    softmax.settle_block();
    if (first && at > 0) pass_v();
  }

  // A block that all rows see.
  __device__ __forceinline__ void full_step(int at) {
    wait_k();
    my_turn();
    issue_products(true);
    your_turn();
    ptx::wgmma_wait<1>();
    S.pin();
    transform_full_scores();
    ptx::wgmma_wait<0>();
    O.pin();
    release_v();
    exponentiate(C::kTileN);
    if (__any_sync(~0u, softmax.block_overflowed())) {
      compute_S_again();
      transform_full_scores();
      float correction[2];
      softmax.raise(S, p.to_log2, correction);
      exponentiate(C::kTileN);
      O.scale_rows(correction);
    }
    release_k(at);
    softmax.settle_block();
  }

  // P_n, its sum ← S_n. P_{n-1} is no longer read. From column `end` on no row of the warp sees a key.
  __device__ __forceinline__ void exponentiate(int end) {
    softmax.begin_block();
#pragma unroll
    for (int first = 0; first < P.kSteps; first += C::kSkippedSteps) {
      if (16 * first < end) {
#pragma unroll
        for (int i = first; i < first + C::kSkippedSteps; ++i) {
          softmax.exponentiate(S, i, p.to_log2);
          P.pack_step(S, i);
        }
      } else {
#pragma unroll
        for (int i = first; i < first + C::kSkippedSteps; ++i) P.fill_step(i, 0);
      }
    }
  }

  // --- products -----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void wait_q() {
    ptx::mbarrier_wait(&shared.q_full[warpgroup], q_at.parity);
    q_at.advance();
    if constexpr (C::kQInRegisters) {
      const int t = unhoisted(thread);
      const auto& tile = shared.q[warpgroup];
#pragma unroll
      for (int i = 0; i < Q.kSteps; ++i) {
        ptx::ldmatrix_x4(Q.steps[i], tile.address() + tile.piece_offset(t / 32 * 16 + t % 16, 2 * i + t % 32 / 16));
      }
      __syncwarp();
      release(shared.q_empty[warpgroup]);
    }
  }

  // S = Q Kᵀ
  __device__ __forceinline__ void issue_S() {
    const uint32_t k = shared.k[k_at.stage].address();
    uint32_t q = 0;
    if constexpr (!C::kQInRegisters) q = unhoisted(shared.q[warpgroup].address());
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      const uint64_t b = shared.k[0].k_major(k, i);
      if constexpr (C::kQInRegisters) {
        ProductS::template rs<ptx::Major::kK>(S.values, Q.steps[i], b, i > 0);
      } else {
        ProductS::template ss<ptx::Major::kK>(S.values, shared.q[0].k_major(q, i), b, i > 0);
      }
    }
  }

  // S = Q Kᵀ once more, by this warp alone: the fragments of mma.sync are laid out like those of wgmma.
  __device__ __forceinline__ void compute_S_again() {
    static_assert(C::kTileN % 16 == 0);
    const auto& tile = shared.k[k_at.stage];
    const int lane = unhoisted(thread) % 32;
    S.fill(0.f);
#pragma unroll(C::kQInRegisters ? C::kHeadDim / 16 : 1)
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      const uint32_t k = tile.address() + tile.piece_offset(lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2);
      uint32_t q[4];
      if constexpr (C::kQInRegisters) {
        for (int j = 0; j < 4; ++j) q[j] = Q.steps[i][j];
      } else {
        const auto& from = shared.q[warpgroup];
        ptx::ldmatrix_x4(
            q, from.address() + from.piece_offset(unhoisted(thread) / 32 * 16 + lane % 16, 2 * i + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < C::kTileN / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, k + n * 16 * 128);
        ptx::mma_m16n8k16<Element>(&S.values[8 * n], q, b[0], b[1]);
        ptx::mma_m16n8k16<Element>(&S.values[8 * n + 4], q, b[2], b[3]);
      }
    }
  }

  // O += P V
  __device__ __forceinline__ void issue_O() {
    const uint32_t v = shared.v[v_at.stage].address();
#pragma unroll
    for (int i = 0; i < C::kTileN / 16; ++i) {
      ProductO::template rs<ptx::Major::kMN>(O.values, P.steps[i], shared.v[0].mn_major(v, i), true);
    }
  }

  // --- scores -------------------------------------------------------------------------------------------------------

  // softcap, of a tile's first block and of those that not all rows see.
  __device__ __forceinline__ void transform_scores() {
    if constexpr (C::kSoftcap) Softcap::of(p.score_scale).each(S);
  }
  __device__ __forceinline__ void transform_full_scores() {
    if constexpr (C::kSoftcap) Softcap::of(p.score_scale).by_fours(S);
  }

  // Whether any row of the warpgroup sees a key of the block of step `at`.
  __device__ __forceinline__ bool sees_block(int at) const {
    const TileWork& work = shared.tile[tile_at.stage];
    const VisibleKeys keys(p.window, work.seqlen_q, work.seqlen_k);
    const int last_query = min_of(work.first_query + warpgroup * 64 + 64, work.seqlen_q) - 1;
    return keys.end(last_query) > work.range.block_at(at) * C::kTileN;
  }

  // Whether all rows of the tile see the block of step `at`.
  __device__ __forceinline__ bool is_full(int at) const {
    const BlockRange& range = shared.tile[tile_at.stage].range;
    return at >= range.right_edge_steps() && at < range.full_steps_end();
  }

  __device__ __forceinline__ Edge edge_of(int at) const {
    const TileWork& work = shared.tile[tile_at.stage];
    const VisibleKeys keys(p.window, work.seqlen_q, work.seqlen_k);
    return Edge::of(keys, work.first_query + warpgroup * 64, work.range.block_at(at) * C::kTileN, C::kTileN,
                    unhoisted(thread));
  }

  // --- epilogue -----------------------------------------------------------------------------------------------------

  // The first row of a thread in the tile; its second is 8 below.
  __device__ __forceinline__ int row(int thread) const { return warpgroup * 64 + S.row(thread); }

  __device__ __forceinline__ float sink_log2(int head) const {
    constexpr float kLog2e = 1.44269504088896f;
    return p.sinks ? p.sinks[head] * kLog2e : -CUDART_INF_F;
  }
  __device__ __forceinline__ float* lse_of(const TileWork& work) const {
    return p.lse + work.batch * p.lse_batch_stride + work.head * p.lse_head_stride + work.q_begin;
  }

  // What O is to be multiplied by, and lse.
  __device__ __forceinline__ void end_rows() { softmax.finish(sink_log2(shared.tile[finished].head), normalize, lse); }

  __device__ __forceinline__ void store_O() {
    O.scale_rows(normalize);
    OperandA<Element, C::kHeadDimV> packed;
    packed.pack(O);
    const TileWork& work = shared.tile[finished];
    if constexpr (C::kOutInV) {
      // The ring of V lends a tile's last buffers to O: warpgroup after warpgroup takes kTileN rows, once the product
      // that read them is done in all warpgroups, and says so by the barrier that otherwise says that V is there.
      PipelineState<C::kStagesV> at = v_at;
      if (warpgroup * 64 >= C::kTileN) at.advance();
      ptx::mbarrier_wait(&shared.v_empty[at.stage], at.parity ^ 1);
      const int first_row = warpgroup * 64 % C::kTileN;
      if (thread == 0 && first_row == 0) ptx::mbarrier_arrive(&shared.v_full[at.stage]);
      out_in_v = true;
      store_rows(work, packed, shared.v[at.stage], first_row);
    } else {
      store_rows(work, packed, shared.out, warpgroup * 64);
    }
    // Behind the fence of the copy engine, which would wait for it.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = work.first_query + row(thread) + 8 * r;
      if (thread % 4 == 0 && query < work.seqlen_q) lse_of(work)[query] = lse[r];
    }
    release_tile(finished);
  }

  // Through rows [first_row, first_row + 64) of a tile in shared memory; the copy engine leaves out what lies behind
  // the sequence's end.
  template <class Tile>
  __device__ __forceinline__ void store_rows(const TileWork& work, const OperandA<Element, C::kHeadDimV>& packed,
                                             Tile& tile, int first_row) {
    const int t = unhoisted(thread);
    const int in_tile = first_row + t / 32 * 16 + t % 16;
#pragma unroll
    for (int i = 0; i < packed.kSteps; ++i) {
      const auto& x = packed.steps[i];
      const uint32_t to = tile.address() + tile.piece_offset(in_tile, 2 * i + t % 32 / 16);
      ptx::stmatrix_x4(to, x[0], x[1], x[2], x[3]);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kEpilogue + warpgroup, 128);
    if (thread == 0) {
      const int query = work.first_query + warpgroup * 64;
      const RowCoordinates rows = p.packed_tiles ? RowCoordinates::packed(work.q_begin, work.seqlen_q, query)
                                                 : RowCoordinates::plain(query, work.batch);
      if (query < work.seqlen_q) {
        for (int i = 0; i < tile.kChunks; ++i) {
          ptx::tma_store_5d(&p.out, tile.chunk(i) + first_row * 64, i * 64, work.head, rows.row, rows.outer, rows.wrap);
        }
      }
      ptx::bulk_commit_group();
    }
  }

  // A tile whose rows see no key: out 0, lse -inf or, in a sequence, the sink.
  __device__ __forceinline__ void write_empty(const TileWork& work) {
    const int first = work.first_query + warpgroup * 64;
    const int rows = min_of(work.seqlen_q - first, 64);
    Element* out = static_cast<Element*>(p.out_rows) + work.batch * p.out_stride.batch +
                   int64_t{work.q_begin + first} * p.out_stride.row + work.head * p.out_stride.head;
    const int t = unhoisted(thread);
    const int column = t % 32 * 8;
#pragma unroll 1
    for (int i = t / 32; i < rows; i += 4) {
      if (column < p.head_dim_v)
        *reinterpret_cast<uint4*>(out + i * p.out_stride.row + column) = make_uint4(0, 0, 0, 0);
    }
    const bool sink = p.sinks && work.k_begin >= 0;
    if (t < rows) lse_of(work)[first + t] = sink ? p.sinks[work.head] : -CUDART_INF_F;
  }
};

}  // namespace tilewright::forward
