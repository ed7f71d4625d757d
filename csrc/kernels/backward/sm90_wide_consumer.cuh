#pragma once

#include "kernels/backward/fragment_gradient.h"
#include "kernels/backward/sm90_role.cuh"
#include "kernels/backward/sm90_wide_config.cuh"
#include "ptx/ldmatrix.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
#include "tile/fragment.h"
#include "tile/unhoisted.h"

namespace tilewright::backward {

// What the two warpgroups of the wide kernel have in common.
template <class C>
struct WideConsumer : ConsumerRole<C, WideStorage<C>> {
  using Base = ConsumerRole<C, WideStorage<C>>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using Base::p, Base::shared, Base::warpgroup, Base::release, Base::thread;

  OperandA<Element, C::kTileM> P;

  // X = rows Yᵀ: the 64 keys of a tile × the tile's queries
  template <class Keys, class Queries>
  __device__ __forceinline__ void issue_scores(Scores& X, const Keys& keys, const Queries& queries) {
    constexpr int kSteps = Keys::kChunks * 4;
    const uint32_t a = unhoisted(keys.address());
    const uint32_t b = queries.address();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      ptx::Wgmma<Element, C::kTileM>::template ss<ptx::Major::kK>(X.values, keys.k_major(a, i), queries.k_major(b, i),
                                                                  i > 0);
    }
    ptx::wgmma_commit();
  }

  // D += operand rows, over the tile's queries
  template <int kColumns, class Rows>
  __device__ __forceinline__ void issue_gradient(Accumulator<kColumns>& D, const OperandA<Element, C::kTileM>& operand,
                                                 const Rows& rows) {
    const uint32_t b = rows.address();
#pragma unroll
    for (int i = 0; i < C::kTileM / 16; ++i) {
      ptx::Wgmma<Element, kColumns>::template rs<ptx::Major::kMN>(D.values, operand.steps[i], rows.mn_major(b, i),
                                                                  true);
    }
    ptx::wgmma_commit();
  }

  // This warpgroup's half of dQ: the units from first_unit() on.
  struct HalfOfDq {
    typename Base::DqUnit units[C::kUnitsEach];

    __device__ __forceinline__ void pin() {
#pragma unroll
      for (auto& unit : units) unit.pin();
    }
  };
  __device__ __forceinline__ int first_unit() const { return warpgroup * C::kUnitsEach; }
  __device__ __forceinline__ void issue_half(HalfOfDq& dQ, int buffer) {
#pragma unroll
    for (int i = 0; i < C::kUnitsEach; ++i) this->issue_dQ(dQ.units[i], first_unit() + i, 0, buffer);
  }
  __device__ __forceinline__ void add_half(const HalfOfDq& dQ, int tile, uint32_t of_step) {
    this->wait_turn(of_step);
#pragma unroll
    for (int i = 0; i < C::kUnitsEach; ++i) {
      this->add_from_registers(dQ.units[i], this->part_of_sum(tile, first_unit() + i));
    }
    this->end_turn(of_step);
  }
};

// S = K Qᵀ    P = exp(S - lse), for this warpgroup and the other    dV += P dO    a half of dQ, one step late
template <class C>
struct ProbabilityConsumer : WideConsumer<C> {
  using Base = WideConsumer<C>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using Base::p, Base::shared, Base::steps, Base::P, Base::work, Base::stage, Base::parity, Base::release, Base::thread;

  Accumulator<C::kHeadDimV> dV;

  __device__ __forceinline__ void run() {
    this->first_tile();
    while (!work().last) {
      dV.fill(0.f);
      if (work().walk.count > 0) walk_queries();
      this->store(dV, 1.f, p.dv, p.dv_stride, p.head_dim_v);
      this->next_tile();
    }
  }

  __device__ __forceinline__ void walk_queries() {
    this->wait_k();
    for (this->begin_head(0); this->head() < p.group; this->begin_head(this->head() + 1)) {
#pragma unroll 1
      for (int i = 0; i < work().walk.count; ++i) {
        if (this->steps_before(i) > 0) finish_dq();
        if (work().walk.is_full(i)) {
          step<false>(i);
        } else {
          step<true>(i);
        }
      }
    }
    finish_dq();
    release(shared.k_empty[this->stage_k()]);
  }

  template <bool kMasked>
  __device__ __forceinline__ void step(int i) {
    OperandA<Element, C::kSoftcap ? C::kTileM : 16> slope;
    {
      Scores S;
      ptx::mbarrier_wait(&shared.q_full[stage()], parity());
      ptx::wgmma_fence();
      S.pin();
      this->issue_scores(S, shared.k[this->stage_k()], shared.q[stage()]);
      ptx::wgmma_wait<0>();
      S.pin();
      if constexpr (C::kSoftcap) cap_scores(S, slope, p.score_scale);
      if constexpr (kMasked) {
        const VisibleQueries queries(p.window, work().seqlen_q, work().seqlen_k);
        mask_scores(S, queries, work().walk.tile_at(i) * C::kTileM, work().first_key, thread());
      }
      exponentiate(S, P, shared.lse2[stage()], p.to_log2, S.column(thread()));
    }
    if (thread() % 32 == 0) this->notes().tile[steps % C::kDsBuffers] = this->tile_number(i);
    share_P(slope);
    release(shared.q_empty[stage()]);
    ptx::mbarrier_wait(&shared.dout_full[stage()], parity());
    ptx::wgmma_fence();
    dV.pin();
    this->issue_gradient(dV, P, shared.dout[stage()]);
    ptx::wgmma_wait<0>();
    dV.pin();
    release(shared.dout_empty[stage()]);
    ++steps;
  }

  // The other warpgroup needs P for dS alone: with softcap it gets P ∘ (1 - t²). No barrier says that the place is
  // free: this warpgroup has waited for the dS of the step before, which was made from what lay there.
  template <class Slope>
  __device__ __forceinline__ void share_P(const Slope& slope) {
    OperandA<Element, C::kTileM> shared_P = P;
    if constexpr (C::kSoftcap) multiply(shared_P, slope);
#pragma unroll
    for (int i = 0; i < P.kSteps; ++i) {
      const auto& x = shared_P.steps[i];
      shared.probabilities[i][thread()] = make_uint4(x[0], x[1], x[2], x[3]);
    }
    __syncwarp();
    release(shared.p_full);
  }

  // Of the step before.
  __device__ __forceinline__ void finish_dq() {
    const uint32_t of_step = steps - 1;
    const int buffer = of_step % C::kDsBuffers;
    ptx::mbarrier_wait(&shared.ds_full[buffer], of_step / C::kDsBuffers % 2);
    typename Base::HalfOfDq dQ;
    ptx::wgmma_fence();
    dQ.pin();
    this->issue_half(dQ, buffer);
    ptx::wgmma_wait<0>();
    dQ.pin();
    release(shared.ds_empty[buffer]);
    this->add_half(dQ, this->notes().tile[buffer], of_step);
  }
};

// dP = V dOᵀ    dS = P ∘ (dP - delta), for both    dK += dS Q    the other half of dQ
template <class C>
struct GradientConsumer : WideConsumer<C> {
  using Base = WideConsumer<C>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using Base::p, Base::shared, Base::steps, Base::P, Base::work, Base::stage, Base::parity, Base::release, Base::thread;

  Accumulator<C::kHeadDim> dK;
  OperandA<Element, C::kTileM> dS;

  __device__ __forceinline__ void run() {
    this->first_tile();
    while (!work().last) {
      dK.fill(0.f);
      if (work().walk.count > 0) walk_queries();
      this->store(dK, p.scale, p.dk, p.dk_stride, p.head_dim);
      this->next_tile();
    }
  }

  __device__ __forceinline__ void walk_queries() {
    ptx::mbarrier_wait(&shared.v_full, work().loaded % 2);
    this->wait_k();
    for (this->begin_head(0); this->head() < p.group; this->begin_head(this->head() + 1)) {
#pragma unroll 1
      for (int i = 0; i < work().walk.count; ++i) step(i);
    }
    release(shared.v_empty);
    release(shared.k_empty[this->stage_k()]);
  }

  __device__ __forceinline__ void step(int i) {
    const int buffer = steps % C::kDsBuffers;
    const uint32_t buffer_parity = steps / C::kDsBuffers % 2;
    {
      Scores dP;
      ptx::mbarrier_wait(&shared.dout_full[stage()], parity());
      ptx::wgmma_fence();
      dP.pin();
      this->issue_scores(dP, shared.v, shared.dout[stage()]);
      take_P();
      ptx::wgmma_wait<0>();
      dP.pin();
      differentiate<C::kPackedProduct>(dP, P, dS, shared.delta[stage()], dP.column(thread()));
    }
    dS.pin();
    __syncwarp();
    release(shared.dout_empty[stage()]);
    ptx::mbarrier_wait(&shared.ds_empty[buffer], buffer_parity ^ 1);
    this->write_dS(dS, buffer);
    ptx::fence_proxy_async();
    __syncwarp();
    release(shared.ds_full[buffer]);
    ptx::mbarrier_wait(&shared.q_full[stage()], parity());
    // All four warps have written.
    ptx::mbarrier_wait(&shared.ds_full[buffer], buffer_parity);
    ptx::wgmma_fence();
    dK.pin();
    this->issue_gradient(dK, dS, shared.q[stage()]);
    typename Base::HalfOfDq dQ;
    dQ.pin();
    this->issue_half(dQ, buffer);
    ptx::wgmma_wait<0>();
    dK.pin();
    dQ.pin();
    release(shared.q_empty[stage()]);
    release(shared.ds_empty[buffer]);
    this->add_half(dQ, this->tile_number(i), steps);
    ++steps;
  }

  __device__ __forceinline__ void take_P() {
    ptx::mbarrier_wait(&shared.p_full, steps % 2);
#pragma unroll
    for (int i = 0; i < P.kSteps; ++i) {
      const uint4 x = shared.probabilities[i][thread()];
      P.steps[i][0] = x.x;
      P.steps[i][1] = x.y;
      P.steps[i][2] = x.z;
      P.steps[i][3] = x.w;
    }
  }
};

}  // namespace tilewright::backward
