#pragma once

#include "kernels/backward/fragment_gradient.h"
#include "kernels/backward/sm90_config.cuh"
#include "kernels/backward/sm90_role.cuh"
#include "ptx/mbarrier.h"
#include "ptx/named_barrier.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
#include "tile/fragment.h"
#include "tile/unhoisted.h"

namespace tilewright::backward {

// What the consumers of a first pass have in common: dQ is the second pass's.
template <class C>
struct FirstPassRole : ConsumerRole<C> {
  using Element = typename C::Element;
  using Operand = OperandA<Element, C::kTileM>;

  // The warpgroups take turns at the tensor cores: one issues the gradients of the step before and the scores of this
  // one in a row, and the other's exponentials and dS run under them.
  __device__ __forceinline__ void my_turn() { ptx::named_barrier_sync(kTurn + this->warpgroup, 256); }
  __device__ __forceinline__ void your_turn() { ptx::named_barrier_arrive(kTurn + 1 - this->warpgroup, 256); }

  // D += operand rows, over the tile's queries
  template <int kColumns, class Rows>
  __device__ __forceinline__ void issue_gradient(Accumulator<kColumns>& D, const Operand& operand, const Rows& rows) {
    D.pin();
    const uint32_t b = rows.address();
#pragma unroll
    for (int i = 0; i < C::kTileM / 16; ++i) {
      ptx::Wgmma<Element, kColumns>::template rs<ptx::Major::kMN>(D.values, operand.steps[i], rows.mn_major(b, i),
                                                                  true);
    }
    ptx::wgmma_commit();
  }
};

// A warpgroup: 64 keys of each tile, their dK and dV.
template <class C>
struct FirstPassConsumer : FirstPassRole<C> {
  using Base = FirstPassRole<C>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using Operand = typename Base::Operand;
  using Base::p, Base::shared, Base::warpgroup, Base::steps, Base::work, Base::stage, Base::parity, Base::thread;

  static_assert(!C::kSoftcap);

  Accumulator<C::kHeadDim> dK;
  Accumulator<C::kHeadDimV> dV;
  Operand P;
  Operand dS;

  __device__ __forceinline__ void run() {
    if (warpgroup == 1) this->your_turn();
    this->first_tile();
    while (!work().last) {
      dK.fill(0.f);
      dV.fill(0.f);
      if (work().walk.count > 0) walk_queries();
      this->store_dV(dV);
      this->store_dK(dK);
      this->next_tile();
    }
    // The turn given away last comes back: a barrier must not be left with arrivals.
    if (warpgroup == 0) this->my_turn();
    if (ptx::elect_one()) ptx::bulk_wait_group_read();
  }

  __device__ __forceinline__ void walk_queries() {
    this->wait_k();
    ptx::mbarrier_wait(&shared.v_full, work().loaded % 2);
    step<false, true>();
#pragma unroll 1
    for (int left = this->count() - 1; left > 0; --left) step<true, true>();
    release(shared.v_empty);
    release(shared.k_empty[this->stage_k()]);
    step<true, false>();
  }

  // The gradients of the step before, the scores of this one.
  template <bool kGradients, bool kScores>
  __device__ __forceinline__ void step() {
    [[maybe_unused]] Scores S, dP;
    [[maybe_unused]] int masked = -1;
    this->my_turn();
    ptx::wgmma_fence();
    if constexpr (kGradients) {
      this->issue_gradient(dV, P, shared.dout[(steps - 1) % C::kStages]);
      this->issue_gradient(dK, dS, shared.q[(steps - 1) % C::kStages]);
    }
    if constexpr (kScores) {
      ptx::mbarrier_wait(&shared.q_full[stage()], parity());
      masked = shared.step[steps % C::kStepSlots].masked;
      issue_scores<C::kHeadDim>(S, shared.k[this->stage_k()], shared.q[stage()]);
    }
    // P's registers are dP's.
    if constexpr (kGradients) {
      ptx::wgmma_wait<kScores ? 2 : 1>();
      dV.pin();
      release(shared.dout_empty[(steps - 1) % C::kStages]);
    }
    if constexpr (kScores) {
      ptx::mbarrier_wait(&shared.dout_full[stage()], parity());
      ptx::wgmma_fence();
      issue_scores<C::kHeadDimV>(dP, shared.v, shared.dout[stage()]);
    }
    this->your_turn();
    if constexpr (kGradients) {
      ptx::wgmma_wait<kScores ? 2 : 0>();
      dK.pin();
      release(shared.q_empty[(steps - 1) % C::kStages]);
    }
    if constexpr (kScores) {
      ptx::wgmma_wait<1>();
      S.pin();
      if (masked >= 0) {
        const VisibleQueries queries(p.window, work().seqlen_q, work().seqlen_k);
        mask_scores(S, queries, masked, work().first_key, this->thread_of_tile());
      }
      exponentiate(S, P, shared.lse2[stage()], p.to_log2, S.column(thread()));
      P.pin();
      ptx::wgmma_wait<0>();
      dP.pin();
      differentiate<C::kPackedProduct>(dP, P, dS, shared.delta[stage()], dP.column(thread()));
      dS.pin();
      ++steps;
    }
  }

  // X = rows Yᵀ: this warpgroup's 64 keys × the tile's queries
  template <int kColumns, class Keys, class Queries>
  __device__ __forceinline__ void issue_scores(Scores& X, const Keys& keys, const Queries& queries) {
    X.pin();
    const uint32_t a = unhoisted(keys.address() + warpgroup * 64 * 128);
    const uint32_t b = queries.address();
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      ptx::Wgmma<Element, C::kTileM>::template ss<ptx::Major::kK>(X.values, keys.k_major(a, i), queries.k_major(b, i),
                                                                  i > 0);
    }
    ptx::wgmma_commit();
  }
};

}  // namespace tilewright::backward
