#pragma once

#include "kernels/backward/fragment_gradient.h"
#include "kernels/backward/sm90_config.cuh"
#include "kernels/backward/sm90_role.cuh"
#include "ptx/ldmatrix.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
#include "tile/fragment.h"
#include "tile/unhoisted.h"

namespace tilewright::backward {

// A warpgroup: 64 keys of each tile, their dK and dV, and its share of dQ.
template <class C>
struct Consumer : ConsumerRole<C, SharedStorage<C>> {
  using Base = ConsumerRole<C, SharedStorage<C>>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using ProductS = ptx::Wgmma<Element, C::kTileM>;
  using ProductDk = ptx::Wgmma<Element, C::kHeadDim>;
  using ProductDv = ptx::Wgmma<Element, C::kHeadDimV>;
  static constexpr ptx::Major kK = ptx::Major::kK, kMN = ptx::Major::kMN;
  using Base::p, Base::shared, Base::warpgroup, Base::steps, Base::work, Base::stage, Base::parity, Base::stage_k,
      Base::release, Base::thread;

  OperandA<Element, C::kVInRegisters ? C::kHeadDimV : 16> V;
  Accumulator<C::kHeadDim> dK;
  Accumulator<C::kHeadDimV> dV;
  OperandA<Element, C::kTileM> P;
  OperandA<Element, C::kTileM> dS;
  OperandA<Element, C::kSoftcap ? C::kTileM : 16> slope;  // of the softcap: 1 - t²

  __device__ __forceinline__ void run() {
    this->first_tile();
    while (!work().last) {
      dK.fill(0.f);
      dV.fill(0.f);
      if (work().walk.count > 0) walk_queries();
      this->store(dV, 1.f, p.dv, p.dv_stride, p.head_dim_v);
      this->store(dK, p.scale, p.dk, p.dk_stride, p.head_dim);
      this->next_tile();
    }
    if (C::kBulk && thread() % 32 == 0) ptx::bulk_wait_group_read();
  }

  // --- one tile of keys ---------------------------------------------------------------------------------------------

  __device__ __forceinline__ void walk_queries() {
    wait_keys();
    this->begin_head(0);
    int i = 0;
    int left = count();
    if constexpr (C::kOverlapDq) {
      compute_P(i);
#pragma unroll 1
      for (; left > 1; --left) overlapped_step<false>(i, left);
      overlapped_step<true>(i, left);
    } else {
#pragma unroll 1
      for (; left > 0; --left) step(i, left);
    }
    if constexpr (!C::kVInRegisters) release(shared.v_empty);
#pragma unroll 1
    for (int late = C::kOverlapDq ? 1 : C::kDsBuffers; late > 0; --late) {
      if (C::kBulk && p.turns) this->end_pending_turn();
      if (count() >= late) finish_dq(steps - late);
    }
    if (C::kBulk && p.turns) this->end_pending_turn();
    release(shared.k_empty[stage_k()]);
  }

  // Of the tile of keys. Read anew for each use.
  __device__ __forceinline__ int count() const { return p.group * work().walk.count; }

  __device__ __forceinline__ void wait_keys() {
    this->wait_k();
    ptx::mbarrier_wait(&shared.v_full, work().loaded % 2);
    if constexpr (C::kVInRegisters) {
      const int t = this->thread_of_tile();
      const int row = t / 32 * 16 + t % 16;
#pragma unroll
      for (int i = 0; i < V.kSteps; ++i) {
        ptx::ldmatrix_x4(V.steps[i], shared.v.address() + shared.v.piece_offset(row, 2 * i + t % 32 / 16));
      }
      __syncwarp();
      release(shared.v_empty);
    }
  }

  // Step i of a head, the tile of queries walk.tile_at(i), is step number `steps` of the warpgroup:
  //
  //     S = K Qᵀ    P = exp(S - lse)    dP = V dOᵀ    dV += P dO    dS = P ∘ (dP - delta) → shared memory    dK += dS Q
  //
  // dQ needs the dS of all warpgroups. It comes later, so that nobody waits for it: the warpgroups drift apart until
  // the exponentials of one run while the products of another do.
  __device__ __forceinline__ void step(int& i, int left) {
    if (count() - left >= C::kDsBuffers) finish_dq(steps - C::kDsBuffers);
    compute_P(i);
    compute_dS();
    issue_dK();
    ptx::wgmma_wait<1>();
    dV.pin();
    release(shared.dout_empty[stage()]);
    ptx::wgmma_wait<0>();
    dK.pin();
    release(shared.q_empty[stage()]);
    ++steps;
    next_query_tile(i);
  }

  // The same with products of three steps in one row, dK_n S_{n+1} dQ_{n-1}, so that the exponentials of S_{n+1} run
  // under dQ_{n-1}. P_n is there already.
  template <bool kLast>
  __device__ __forceinline__ void overlapped_step(int& i, int left) {
    compute_dS();
    issue_dK();
    const bool late = left < count();
    const uint32_t before = steps - 1;
    const int done = stage();
    ++steps;
    ptx::wgmma_wait<1>();
    dV.pin();
    release(shared.dout_empty[done]);
    Scores S;
    if constexpr (!kLast) {
      next_query_tile(i);
      ptx::mbarrier_wait(&shared.q_full[stage()], parity());
      S.pin();
      issue_S(S);
    }
    ptx::wgmma_wait<kLast ? 0 : 1>();
    dK.pin();
    release(shared.q_empty[done]);
    // The first time there is nothing to add up yet, and the product of whatever the buffer holds is forgotten: without
    // a condition the compiler keeps it asynchronous.
    if (C::kBulk && p.turns) this->end_pending_turn();  // of the dQ before
    if (late) wait_dS(before);
    typename Base::DqUnit dQ;
    ptx::wgmma_fence();
    dQ.pin();
    this->issue_dQ(dQ, warpgroup, before % C::kDsBuffers);
    if constexpr (!kLast) {
      ptx::wgmma_wait<1>();
      S.pin();
      take_exponentials(S, i);
    }
    ptx::wgmma_wait<0>();
    dQ.pin();
    if (late) {
      release(shared.ds_empty[before % C::kDsBuffers]);
      add_dq(dQ, this->notes().tile[before % C::kDsBuffers], warpgroup, before);
    }
    if constexpr (!kLast) note_tile(i);
  }

  __device__ __forceinline__ void next_query_tile(int& i) {
    if (++i < work().walk.count) return;
    i = 0;
    this->begin_head(this->head() + 1);
  }
  // Where dQ of this step goes.
  __device__ __forceinline__ void note_tile(int i) {
    __syncwarp();
    if (thread() % 32 == 0) this->notes().tile[steps % C::kDsBuffers] = this->tile_number(i);
    __syncwarp();
  }

  __device__ __forceinline__ void compute_P(int i) {
    Scores S;
    ptx::mbarrier_wait(&shared.q_full[stage()], parity());
    ptx::wgmma_fence();
    S.pin();
    issue_S(S);
    ptx::wgmma_wait<0>();
    S.pin();
    take_exponentials(S, i);
    note_tile(i);
  }
  __device__ __forceinline__ void take_exponentials(Scores& S, int i) {
    if constexpr (C::kSoftcap) cap_scores(S, slope, p.score_scale);
    if (!work().walk.is_full(i)) {
      const VisibleQueries queries(p.window, work().seqlen_q, work().seqlen_k);
      mask_scores(S, queries, work().walk.tile_at(i) * C::kTileM, work().first_key, this->thread_of_tile());
    }
    exponentiate(S, P, shared.lse2[stage()], p.to_log2, S.column(thread()));
  }

  // dS, also in shared memory. dV is still on its way.
  __device__ __forceinline__ void compute_dS() {
    {
      Scores dP;
      ptx::mbarrier_wait(&shared.dout_full[stage()], parity());
      ptx::wgmma_fence();
      dP.pin();
      dV.pin();
      issue_dP(dP);
      issue_dV();
      ptx::wgmma_wait<1>();
      dP.pin();
      differentiate<C::kPackedProduct>(dP, P, dS, shared.delta[stage()], dP.column(thread()));
    }
    if constexpr (C::kSoftcap) multiply(dS, slope);
    hand_over_dS();
  }

  // --- products -----------------------------------------------------------------------------------------------------

  // S = K Qᵀ: this warpgroup's 64 keys × the tile's queries
  __device__ __forceinline__ void issue_S(Scores& S) {
    const uint32_t q = shared.q[stage()].address();
    const uint32_t k = unhoisted(shared.k[stage_k()].address() + warpgroup * 64 * 128);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      ProductS::template ss<kK>(S.values, shared.k[0].k_major(k, i), shared.q[0].k_major(q, i), i > 0);
    }
    ptx::wgmma_commit();
  }

  // dP = V dOᵀ
  __device__ __forceinline__ void issue_dP(Scores& dP) {
    const uint32_t dout = shared.dout[stage()].address();
    const uint32_t v = unhoisted(shared.v.address() + warpgroup * 64 * 128);
#pragma unroll
    for (int i = 0; i < C::kHeadDimV / 16; ++i) {
      const uint64_t b = shared.dout[0].k_major(dout, i);
      if constexpr (C::kVInRegisters) {
        ProductS::template rs<kK>(dP.values, V.steps[i], b, i > 0);
      } else {
        ProductS::template ss<kK>(dP.values, shared.v.k_major(v, i), b, i > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // dV += P dO
  __device__ __forceinline__ void issue_dV() {
    const uint32_t dout = shared.dout[stage()].address();
#pragma unroll
    for (int i = 0; i < C::kTileM / 16; ++i) {
      ProductDv::template rs<kMN>(dV.values, P.steps[i], shared.dout[0].mn_major(dout, i), true);
    }
    ptx::wgmma_commit();
  }

  // dK += dS Q
  __device__ __forceinline__ void issue_dK() {
    ptx::wgmma_fence();
    dK.pin();
    const uint32_t q = shared.q[stage()].address();
#pragma unroll
    for (int i = 0; i < C::kTileM / 16; ++i) {
      ProductDk::template rs<kMN>(dK.values, dS.steps[i], shared.q[0].mn_major(q, i), true);
    }
    ptx::wgmma_commit();
  }

  // --- dS and dQ ----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void hand_over_dS() {
    if (C::kBulk && !C::kOverlapDq && p.turns) this->end_pending_turn();  // of the dQ before
    const int buffer = steps % C::kDsBuffers;
    ptx::mbarrier_wait(&shared.ds_empty[buffer], (steps / C::kDsBuffers + 1) % 2);
    this->write_dS(dS, buffer);
    __syncwarp();
    release(shared.ds_full[buffer]);
  }
  __device__ __forceinline__ void wait_dS(uint32_t of_step) {
    ptx::mbarrier_wait(&shared.ds_full[of_step % C::kDsBuffers], of_step / C::kDsBuffers % 2);
  }

  // This warpgroup's share of dQ of an earlier step. The units go round the warpgroups from step to step, unless each
  // has as many.
  __device__ __forceinline__ void finish_dq(uint32_t of_step) {
    int unit = warpgroup;
    if (C::kUnits % C::kWarpgroups != 0) unit = (warpgroup + of_step) % C::kWarpgroups;
    if (C::kUnits < C::kWarpgroups && unit >= C::kUnits) {
      this->wait_turn(of_step);
      this->end_turn(of_step);
      return;
    }
    const int buffer = of_step % C::kDsBuffers;
    wait_dS(of_step);
    const int tile = this->notes().tile[buffer];
    if constexpr (C::kUnits <= C::kWarpgroups) {
      finish_unit(tile, unit, of_step, true);
    } else {
#pragma unroll 1
      for (; unit < C::kUnits; unit += C::kWarpgroups) {
        finish_unit(tile, unit, of_step, unit + C::kWarpgroups >= C::kUnits);
      }
    }
  }
  __device__ __forceinline__ void finish_unit(int tile, int unit, uint32_t of_step, bool last) {
    const int buffer = of_step % C::kDsBuffers;
    typename Base::DqUnit dQ;
    ptx::wgmma_fence();
    dQ.pin();
    this->issue_dQ(dQ, unit, buffer);
    ptx::wgmma_wait<0>();
    dQ.pin();
    if (last) release(shared.ds_empty[buffer]);
    add_dq(dQ, tile, unit, of_step);
  }

  __device__ __forceinline__ void add_dq(const typename Base::DqUnit& dQ, int tile, int unit, uint32_t of_step) {
    const int t = thread();
    const int64_t part = this->part_of_sum(tile, unit);
    if constexpr (C::kBulk) {
      // Each warp by itself: its first lane knows when its last addition has read the buffer.
      constexpr int kWarpFloats = Base::kWarpFloats;
      float* staged = shared.dq.data + this->thread_of_tile() / 32 * kWarpFloats;
      if (t % 32 == 0) ptx::bulk_wait_group_read();
      __syncwarp();
#pragma unroll
      for (int j = 0; j < dQ.kColumns / 8; ++j) {
        const float* x = &dQ.values[4 * j];
        *reinterpret_cast<float4*>(staged + j * 128 + t % 32 * 4) = make_float4(x[0], x[1], x[2], x[3]);
      }
      ptx::fence_proxy_async();
      __syncwarp();
      this->wait_turn(of_step);
      if (t % 32 == 0) {
        if (p.turns) {
          ptx::fence_proxy_async_global();
          this->notes().pending = of_step + 1;
        }
        ptx::bulk_reduce_add(p.dq_sum + part * kWarpFloats, staged, kWarpFloats * sizeof(float));
        ptx::bulk_commit_group();
      }
    } else {
      this->wait_turn(of_step);
      this->add_from_registers(dQ, part);
      if (C::kUnitsEach == 1 || unit + C::kWarpgroups >= C::kUnits) this->end_turn(of_step);
    }
  }
};

}  // namespace tilewright::backward
