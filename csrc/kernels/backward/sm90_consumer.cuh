#pragma once

#include "kernels/backward/fragment_gradient.h"
#include "kernels/backward/sm90_config.cuh"
#include "kernels/backward/sm90_role.cuh"
#include "kernels/backward/whole_heads.cuh"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
#include "tile/fragment.h"
#include "tile/unhoisted.h"

namespace tilewright::backward {

// A warpgroup: 64 keys of each tile, their dK and dV, and its share of dQ.
template <class C>
struct Consumer : ConsumerRole<C> {
  using Base = ConsumerRole<C>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using ProductS = ptx::Wgmma<Element, C::kTileM>;
  using ProductDk = ptx::Wgmma<Element, C::kHeadDim>;
  using ProductDv = ptx::Wgmma<Element, C::kHeadDimV>;
  static constexpr ptx::Major kK = ptx::Major::kK, kMN = ptx::Major::kMN;
  using Base::p, Base::shared, Base::warpgroup, Base::steps, Base::work, Base::stage, Base::parity, Base::stage_k,
      Base::thread, Base::warp_of_all, Base::staging, Base::free_staging;

  // dK and dV start with the first product, or from zeros where ptxas runs out of registers otherwise.
  static constexpr bool kFromZeros = !C::kTogether;

  Accumulator<C::kHeadDim> dK;
  Accumulator<C::kHeadDimV> dV;
  OperandA<Element, C::kTileM> P;
  OperandA<Element, C::kTileM> dS;
  OperandA<Element, C::kSoftcap ? C::kTileM : 16> slope;  // of the softcap: 1 - t²

  // dQ comes in units, one for each warpgroup; of a third unit each takes half of the queries.
  struct ShareOfDq {
    typename Base::DqUnit unit;
    Accumulator<C::kTileM / 2> half;

    __device__ __forceinline__ void pin() {
      unit.pin();
      if constexpr (C::kSplitUnit) half.pin();
    }
  };

  __device__ __forceinline__ void run() {
    this->first_tile();
    while (!work().last) {
      if (kFromZeros || work().walk.count == 0) {
        dK.fill(0.f);
        dV.fill(0.f);
      }
      if (work().walk.count > 0) walk_queries();
      if (work().walk.count == 0) this->store_dV(dV);
      this->store_dK(dK);
      if (p.dq) WholeHeads<C>{p, work(), warpgroup, thread(), this->has_part()}.end_tile();
      this->next_tile();
    }
    if (C::kBulk && ptx::elect_one()) ptx::bulk_wait_group_read();
  }

  // --- one tile of keys ---------------------------------------------------------------------------------------------

  __device__ __forceinline__ void walk_queries() {
    this->wait_k();
    ptx::mbarrier_wait(&shared.v_full, work().loaded % 2);
    const int count = this->count();
#pragma unroll 1
    for (int done = 0; done < count; ++done) step(done);
    release(shared.v_empty);
    hand_over(count);
    last_dq();
  }

  // Step n, a tile of queries; `done` of them came before, in this tile of keys:
  //
  //     S = K Qᵀ   dP = V dOᵀ     meanwhile dS_{n-1} and dQ_{n-2} go out   exponentials → P, under dP
  //     dV += P dO                meanwhile dS = P ∘ (dP - delta) → shared memory
  //     dQ_{n-1} = dS_{n-1} K     dK += dS Q     meanwhile dQ_{n-1} → shared memory
  //
  // dQ needs the dS of all warpgroups. It comes a step late, so that nobody waits for it.
  __device__ __forceinline__ void step(int done) {
    {
      Scores dP;
      {
        Scores S;
        ptx::mbarrier_wait(&shared.q_full[stage()], parity());
        const int masked = shared.step[steps % C::kStepSlots].masked;
        ptx::wgmma_fence();
        S.pin();
        issue_S(S);
        if constexpr (C::kTogether) issue_dP(dP);
        if (done > 0) hand_over(done);
        ptx::wgmma_wait<C::kTogether ? 1 : 0>();
        S.pin();
        if constexpr (C::kSoftcap) cap_scores(S, slope, p.score_scale);
        if (masked >= 0) {
          const VisibleQueries queries(p.window, work().seqlen_q, work().seqlen_k);
          mask_scores(S, queries, masked, work().first_key, this->thread_of_tile());
        }
        exponentiate(S, P, shared.lse2[stage()], p.to_log2, S.column(thread()));
      }
      ptx::wgmma_fence();
      if constexpr (!C::kTogether) issue_dP(dP);
      dV.pin();
      issue_dV(kFromZeros || done > 0);
      ptx::wgmma_wait<1>();
      dP.pin();
      differentiate<C::kPackedProduct>(dP, P, dS, shared.delta[stage()], dP.column(thread()));
    }
    if constexpr (C::kSoftcap) multiply(dS, slope);
    const int buffer = steps % C::kDsBuffers;
    ptx::mbarrier_wait(&shared.ds_empty[buffer], (steps / C::kDsBuffers + 1) % 2);
    this->write_dS(dS, buffer);
    if constexpr (!C::kTogether) {
      issue_dK(kFromZeros || done > 0);
      ptx::wgmma_wait<0>();
      dV.pin();
      dK.pin();
    }

    // The first time there is nothing to add up yet, and the product of whatever the buffer holds is forgotten: without
    // a condition the compiler keeps it asynchronous.
    const bool late = done > 0;
    if (late) wait_dS(steps - 1);
    ShareOfDq dQ;
    ptx::wgmma_fence();
    dQ.pin();
    issue_share(dQ, steps - 1);
    if constexpr (C::kTogether) issue_dK(kFromZeros || done > 0);
    ptx::wgmma_wait<C::kTogether ? 1 : 0>();
    dV.pin();
    dQ.pin();
    release(shared.dout_empty[stage()]);
    if (late) {
      release(shared.ds_empty[(steps - 1) % C::kDsBuffers]);
      if constexpr (C::kBulk) {
        stage(dQ);
      } else {
        add(dQ, steps - 1);
      }
    }
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
    ptx::mbarrier_wait(&shared.dout_full[stage()], parity());
    dP.pin();
    const uint32_t dout = shared.dout[stage()].address();
    const uint32_t v = unhoisted(shared.v.address() + warpgroup * 64 * 128);
#pragma unroll
    for (int i = 0; i < C::kHeadDimV / 16; ++i) {
      ProductS::template ss<kK>(dP.values, shared.v.k_major(v, i), shared.dout[0].k_major(dout, i), i > 0);
    }
    ptx::wgmma_commit();
  }

  // dV (+)= P dO
  __device__ __forceinline__ void issue_dV(bool accumulate) {
    const uint32_t dout = shared.dout[stage()].address();
#pragma unroll
    for (int i = 0; i < C::kTileM / 16; ++i) {
      ProductDv::template rs<kMN>(dV.values, P.steps[i], shared.dout[0].mn_major(dout, i), i > 0 || accumulate);
    }
    ptx::wgmma_commit();
  }

  // dK (+)= dS Q
  __device__ __forceinline__ void issue_dK(bool accumulate) {
    ptx::wgmma_fence();
    dK.pin();
    const uint32_t q = shared.q[stage()].address();
#pragma unroll
    for (int i = 0; i < C::kTileM / 16; ++i) {
      ProductDk::template rs<kMN>(dK.values, dS.steps[i], shared.q[0].mn_major(q, i), i > 0 || accumulate);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void issue_share(ShareOfDq& dQ, uint32_t of_step) {
    const int buffer = of_step % C::kDsBuffers;
    this->issue_dQ(dQ.unit, warpgroup, 0, buffer);
    if constexpr (C::kSplitUnit) this->issue_dQ(dQ.half, 2, first_of_half(), buffer);
  }
  __device__ __forceinline__ int first_of_half() const { return warpgroup * (C::kTileM / 2); }

  // --- dS and dQ on their way out -----------------------------------------------------------------------------------

  // What this warp left in shared memory in the step before goes to those who wait for it: dS to the warpgroups, dQ to
  // its sums. Only now, because the fence waits until the last store has arrived: by now it has.
  __device__ __forceinline__ void hand_over(int done) {
    const StepWork before = shared.step[(steps - 2) % C::kStepSlots];  // loaded under the fence
    ptx::fence_proxy_async();
    __syncwarp();
    release(shared.ds_full[(steps - 1) % C::kDsBuffers]);
    if (C::kBulk && done > 1) add_staged(before);
  }

  __device__ __forceinline__ void wait_dS(uint32_t of_step) {
    ptx::mbarrier_wait(&shared.ds_full[of_step % C::kDsBuffers], of_step / C::kDsBuffers % 2);
  }

  // Of a tile of keys: straight to its sums, for the way through shared memory would take longer. dV goes out under the
  // product.
  __device__ __forceinline__ void last_dq() {
    const uint32_t last = steps - 1;
    wait_dS(last);
    ShareOfDq dQ;
    ptx::wgmma_fence();
    dQ.pin();
    issue_share(dQ, last);
    if constexpr (C::kBulk) this->wait_unstaged(last);
    // Under the product, unless the next tile's K waits for it.
    if constexpr (C::kStagesK > 1) this->store_dV(dV);
    ptx::wgmma_wait<0>();
    dQ.pin();
    release(shared.ds_empty[last % C::kDsBuffers]);
    release(shared.k_empty[stage_k()]);
    add(dQ, last);
    if constexpr (C::kStagesK == 1) this->store_dV(dV);
  }

  __device__ __forceinline__ void add(const ShareOfDq& dQ, uint32_t of_step) {
    float* const sums = shared.step[of_step % C::kStepSlots].sums;
    const bool fresh = shared.step[of_step % C::kStepSlots].fresh;
    this->wait_turn(of_step);
    if (this->has_part()) this->add_from_registers(dQ.unit, this->part_of_sum(sums, warpgroup), fresh);
    if constexpr (C::kSplitUnit) {
      this->add_from_registers(dQ.half, this->part_of_sum(sums, 2), fresh, first_of_half());
    }
    if (p.turns) this->end_turn();
  }

  // To shared memory, on its way to its sums: add_staged().
  __device__ __forceinline__ void stage(const ShareOfDq& dQ) {
    this->wait_unstaged(steps - 1);
    free_staging();
    float* to = staging() + thread() % 32 * 4;
#pragma unroll
    for (int j = 0; j < dQ.unit.kColumns / 8; ++j) {
      const float* x = &dQ.unit.values[4 * j];
      *reinterpret_cast<float4*>(to + j * 128) = make_float4(x[0], x[1], x[2], x[3]);
    }
  }

  __device__ __forceinline__ void add_staged(const StepWork& of) {
    if (p.turns) {
      this->end_turn();
    } else if (this->has_part() && ptx::elect_one()) {
      float* to = of.sums + warp_of_all() * Base::kWarpFloats;
      // Each with its own commit: without, the compiler goes through both under predicates, instead of a branch.
      if (of.fresh) {
        ptx::bulk_store(to, staging(), Base::kWarpFloats * sizeof(float));
        ptx::bulk_commit_group();
      } else {
        ptx::bulk_reduce_add(to, staging(), Base::kWarpFloats * sizeof(float));
        ptx::bulk_commit_group();
      }
    }
  }
};

}  // namespace tilewright::backward
