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

// What the two warpgroups of the wide kernel have in common.
template <class C>
struct WideConsumer : ConsumerRole<C> {
  using Base = ConsumerRole<C>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using Base::p, Base::shared, Base::warpgroup, Base::steps, Base::release, Base::thread;

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

  // This warpgroup's half of dQ. Its first half is added under dV or dK, the second under S or dP of the step after: so
  // the products of scores take the registers of the first half, and both always have a product to cover their
  // additions.
  typename Base::DqUnit dQ;
  static constexpr int kMiddle = Base::DqUnit::kColumns / 16, kEnd = 2 * kMiddle;

  __device__ __forceinline__ float* part_of_step(uint32_t of_step) const {
    return this->part_of_sum(shared.step[of_step % C::kStepSlots].sums, warpgroup);
  }
  __device__ __forceinline__ void add_first(uint32_t of_step) {
    this->wait_turn(of_step);
    this->template add_from_registers<0, kMiddle>(dQ, part_of_step(of_step), false);
  }
  __device__ __forceinline__ void add_second(uint32_t of_step) {
    this->template add_from_registers<kMiddle, kEnd>(dQ, part_of_step(of_step), false);
    this->end_turn(of_step);
  }

  // All steps of a tile of keys. The compiler must see that the whole warp has one number.
  __device__ __forceinline__ int count() const { return __shfl_sync(~0u, p.group * this->work().walk.count, 0); }
  __device__ __forceinline__ void wait_dS(uint32_t of_step) {
    ptx::mbarrier_wait(&shared.ds_full[of_step % C::kDsBuffers], of_step / C::kDsBuffers % 2);
  }
  // dQ of the step before. In the first step of a tile there is none: it is then of what lies there, and nobody takes
  // it.
  __device__ __forceinline__ void issue_dQ_before() {
    ptx::wgmma_fence();
    dQ.pin();
    this->issue_dQ(dQ, warpgroup, 0, (steps - 1) % C::kDsBuffers);
  }

  // Of the last step of a tile.
  __device__ __forceinline__ void finish_dq(int all) {
    const uint32_t last = steps - 1;
    if (all > 1) add_second(last - 1);
    wait_dS(last);
    issue_dQ_before();
    ptx::wgmma_wait<0>();
    dQ.pin();
    release(shared.ds_empty[last % C::kDsBuffers]);
    release(shared.k_empty[this->stage_k()]);
    add_first(last);
    add_second(last);
  }
};

// S = K Qᵀ    P = exp(S - lse), for this warpgroup and the other    dV += P dO    a half of dQ, one step late
template <class C>
struct ProbabilityConsumer : WideConsumer<C> {
  using Base = WideConsumer<C>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using Base::dQ;
  using Base::p, Base::shared, Base::steps, Base::P, Base::work, Base::stage, Base::parity, Base::release, Base::thread;

  Accumulator<C::kHeadDimV> dV;

  __device__ __forceinline__ void run() {
    this->first_tile();
    while (!work().last) {
      dV.fill(0.f);
      if (work().walk.count > 0) walk_queries();
      this->store(dV, 1.f, p.dv_rows, p.dv_stride, p.head_dim_v);
      this->next_tile();
    }
  }

  __device__ __forceinline__ void walk_queries() {
    this->wait_k();
    const int all = this->count();
#pragma unroll 1
    for (int done = 0; done < all; ++done) step(done);
    this->finish_dq(all);
  }

  __device__ __forceinline__ void step(int done) {
    OperandA<Element, C::kSoftcap ? C::kTileM : 16> slope;
    {
      Scores S;
      ptx::mbarrier_wait(&shared.q_full[stage()], parity());
      const int masked = shared.step[steps % C::kStepSlots].masked;
      ptx::wgmma_fence();
      S.pin();
      this->issue_scores(S, shared.k[this->stage_k()], shared.q[stage()]);
      if (done > 1) this->add_second(steps - 2);
      ptx::wgmma_wait<0>();
      S.pin();
      if constexpr (C::kSoftcap) cap_scores(S, slope, p.score_scale);
      if (masked >= 0) {
        const VisibleQueries queries(p.window, work().seqlen_q, work().seqlen_k);
        mask_scores(S, queries, masked, work().first_key, thread());
      }
      exponentiate(S, P, shared.lse2[stage()], p.to_log2, S.column(thread()));
    }
    P.pin();
    if (done > 0) this->wait_dS(steps - 1);
    share_P(slope);
    release(shared.q_empty[stage()]);
    ptx::mbarrier_wait(&shared.dout_full[stage()], parity());
    this->issue_dQ_before();
    dV.pin();
    this->issue_gradient(dV, P, shared.dout[stage()]);
    ptx::wgmma_wait<1>();
    dQ.pin();
    if (done > 0) this->add_first(steps - 1);
    ptx::wgmma_wait<0>();
    dV.pin();
    if (done > 0) release(shared.ds_empty[(steps - 1) % C::kDsBuffers]);
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
      shared.on_its_way.steps[i][thread()] = make_uint4(x[0], x[1], x[2], x[3]);
    }
    __syncwarp();
    release(shared.p_full);
  }
};

// dP = V dOᵀ    dS = P ∘ (dP - delta), for both    dK += dS Q    the other half of dQ, one step late
template <class C>
struct GradientConsumer : WideConsumer<C> {
  using Base = WideConsumer<C>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using Base::dQ;
  using Base::p, Base::shared, Base::steps, Base::P, Base::work, Base::stage, Base::parity, Base::release, Base::thread;

  Accumulator<C::kHeadDim> dK;

  __device__ __forceinline__ void run() {
    this->first_tile();
    while (!work().last) {
      dK.fill(0.f);
      if (work().walk.count > 0) walk_queries();
      this->store(dK, p.scale, p.dk_rows, p.dk_stride, p.head_dim);
      this->next_tile();
    }
  }

  __device__ __forceinline__ void walk_queries() {
    ptx::mbarrier_wait(&shared.v_full, work().loaded % 2);
    this->wait_k();
    const int all = this->count();
#pragma unroll 1
    for (int done = 0; done < all; ++done) step(done);
    release(shared.v_empty);
    this->finish_dq(all);
  }

  __device__ __forceinline__ void step(int done) {
    const int buffer = steps % C::kDsBuffers;
    OperandA<Element, C::kTileM> dS;
    // There is nothing to wait for. Without this ptxas waits for dP in the middle of the second half's additions.
    ptx::wgmma_wait<0>();
    {
      Scores dP;
      ptx::mbarrier_wait(&shared.dout_full[stage()], parity());
      ptx::wgmma_fence();
      dP.pin();
      this->issue_scores(dP, shared.v, shared.dout[stage()]);
      if (done > 1) this->add_second(steps - 2);
      take_P();
      ptx::wgmma_wait<0>();
      dP.pin();
      differentiate<C::kPackedProduct>(dP, P, dS, shared.delta[stage()], dP.column(thread()));
    }
    dS.pin();
    __syncwarp();
    release(shared.dout_empty[stage()]);
    ptx::mbarrier_wait(&shared.ds_empty[buffer], (steps / C::kDsBuffers + 1) % 2);
    this->write_dS(dS, buffer);
    ptx::mbarrier_wait(&shared.q_full[stage()], parity());
    if (done > 0) this->wait_dS(steps - 1);  // of all four warps
    this->issue_dQ_before();
    dK.pin();
    this->issue_gradient(dK, dS, shared.q[stage()]);
    // The fence waits for the writes, under the products.
    ptx::fence_proxy_async();
    __syncwarp();
    release(shared.ds_full[buffer]);
    ptx::wgmma_wait<1>();
    dQ.pin();
    if (done > 0) this->add_first(steps - 1);
    ptx::wgmma_wait<0>();
    dK.pin();
    if (done > 0) release(shared.ds_empty[(steps - 1) % C::kDsBuffers]);
    release(shared.q_empty[stage()]);
    ++steps;
  }

  __device__ __forceinline__ void take_P() {
    ptx::mbarrier_wait(&shared.p_full, steps % 2);
#pragma unroll
    for (int i = 0; i < P.kSteps; ++i) {
      const uint4 x = shared.on_its_way.steps[i][thread()];
      P.steps[i][0] = x.x;
      P.steps[i][1] = x.y;
      P.steps[i][2] = x.z;
      P.steps[i][3] = x.w;
    }
  }
};

}  // namespace tilewright::backward
