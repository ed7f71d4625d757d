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
    for (this->begin_head(0); this->head() < p.group; this->begin_head(this->head() + 1)) {
#pragma unroll 1
      for (int i = 0; i < work().walk.count; ++i) {
        if (work().walk.is_full(i)) {
          step<false>(i);
        } else {
          step<true>(i);
        }
      }
    }
    if constexpr (!C::kVInRegisters) release(shared.v_empty);
#pragma unroll 1
    for (int late = C::kDsBuffers; late > 0; --late) {
      if (p.group * work().walk.count >= late) finish_dq(steps - late);
      if (p.turns) this->template end_turns<C::kBulk>();
    }
    release(shared.k_empty[stage_k()]);
  }

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

  // Step i of a head: the tile of queries walk.tile_at(i).
  //
  //     dQ of an earlier step    S = K Qᵀ    P = exp(S - lse)    dP = V dOᵀ    dV += P dO
  //     dS = P ∘ (dP - delta)    dS → shared memory    dK += dS Q
  //
  // dQ needs the dS of all warpgroups. Left for the step after the next, it is no reason to wait: the warpgroups drift
  // apart until the exponentials of one run while the products of another do.
  template <bool kMasked>
  __device__ __forceinline__ void step(int i) {
    if (this->steps_before(i) >= C::kDsBuffers) finish_dq(steps - C::kDsBuffers);
    OperandA<Element, C::kSoftcap ? C::kTileM : 16> slope;  // of the softcap: 1 - t²
    {
      Scores S;
      ptx::mbarrier_wait(&shared.q_full[stage()], parity());
      ptx::wgmma_fence();
      S.pin();
      issue_S(S);
      ptx::wgmma_wait<0>();
      S.pin();
      if constexpr (C::kSoftcap) cap_scores(S, slope, p.score_scale);
      if constexpr (kMasked) {
        const VisibleQueries queries(p.window, work().seqlen_q, work().seqlen_k);
        mask_scores(S, queries, work().walk.tile_at(i) * C::kTileM, work().first_key, this->thread_of_tile());
      }
      exponentiate(S, P, shared.lse2[stage()], p.to_log2, S.column(thread()));
    }
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
    ptx::wgmma_wait<0>();
    dV.pin();
    release(shared.dout_empty[stage()]);
    hand_over_dS(this->tile_number(i));
    ptx::wgmma_fence();
    dK.pin();
    issue_dK();
    ptx::wgmma_wait<0>();
    dK.pin();
    release(shared.q_empty[stage()]);
    ++steps;
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
    const uint32_t q = shared.q[stage()].address();
#pragma unroll
    for (int i = 0; i < C::kTileM / 16; ++i) {
      ProductDk::template rs<kMN>(dK.values, dS.steps[i], shared.q[0].mn_major(q, i), true);
    }
    ptx::wgmma_commit();
  }

  // --- dS and dQ ----------------------------------------------------------------------------------------------------

  // `tile`: of queries.
  __device__ __forceinline__ void hand_over_dS(int tile) {
    if (p.turns) this->template end_turns<C::kBulk>();  // of dQ at the beginning of the step
    const int buffer = steps % C::kDsBuffers;
    ptx::mbarrier_wait(&shared.ds_empty[buffer], (steps / C::kDsBuffers + 1) % 2);
    this->write_dS(dS, buffer);
    if (thread() % 32 == 0) this->notes().tile[buffer] = tile;
    __syncwarp();
    release(shared.ds_full[buffer]);
  }

  // This warpgroup's share of dQ of an earlier step. The units go round the warpgroups from step to step, unless each
  // has as many.
  __device__ __forceinline__ void finish_dq(uint32_t of_step) {
    int unit = warpgroup;
    if (C::kUnits % C::kWarpgroups != 0) unit = (warpgroup + of_step) % C::kWarpgroups;
    if (C::kUnits < C::kWarpgroups && unit >= C::kUnits) return;
    const int buffer = of_step % C::kDsBuffers;
    ptx::mbarrier_wait(&shared.ds_full[buffer], of_step / C::kDsBuffers % 2);
    const int tile = this->notes().tile[buffer];
    if constexpr (C::kUnits <= C::kWarpgroups) {
      finish_unit(tile, unit, buffer, true);
    } else {
#pragma unroll 1
      for (; unit < C::kUnits; unit += C::kWarpgroups) {
        finish_unit(tile, unit, buffer, unit + C::kWarpgroups >= C::kUnits);
      }
    }
  }
  __device__ __forceinline__ void finish_unit(int tile, int unit, int buffer, bool last) {
    Scores dQ;
    ptx::wgmma_fence();
    dQ.pin();
    this->issue_dQ(dQ, unit, buffer);
    ptx::wgmma_wait<0>();
    dQ.pin();
    if (last) release(shared.ds_empty[buffer]);
    add_dq(dQ, tile, unit);
  }

  __device__ __forceinline__ void add_dq(const Scores& dQ, int tile, int unit) {
    const int t = thread();
    const int64_t part = this->part_of_sum(tile, unit);
    const int slot = C::kUnitsEach > 1 ? unit / C::kWarpgroups : 0;
    if constexpr (C::kBulk) {
      // Each warp by itself: its first lane knows when its last addition has read the buffer.
      constexpr int kWarpFloats = Base::kWarpFloats;
      float* staged = shared.dq.data + this->thread_of_tile() / 32 * kWarpFloats;
      if (t % 32 == 0) ptx::bulk_wait_group_read();
      __syncwarp();
#pragma unroll
      for (int j = 0; j < C::kTileM / 8; ++j) {
        const float* x = &dQ.values[4 * j];
        *reinterpret_cast<float4*>(staged + j * 128 + t % 32 * 4) = make_float4(x[0], x[1], x[2], x[3]);
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (t % 32 == 0) {
        if (p.turns) this->template wait_turn<true>(part, tile, slot);
        ptx::bulk_reduce_add(p.dq_sum + part * kWarpFloats, staged, kWarpFloats * sizeof(float));
        ptx::bulk_commit_group();
      }
    } else {
      if (p.turns) {
        if (t % 32 == 0) this->template wait_turn<false>(part, tile, slot);
        __syncwarp();
      }
      this->add_from_registers(dQ, part);
    }
  }
};

}  // namespace tilewright::backward
