#pragma once

#include "kernels/backward/fragment_gradient.h"
#include "kernels/backward/sm90_config.cuh"
#include "kernels/backward/sm90_first_pass_consumer.cuh"
#include "ptx/ldmatrix.h"
#include "ptx/mbarrier.h"
#include "ptx/wgmma.h"
#include "tile/fragment.h"
#include "tile/unhoisted.h"

namespace tilewright::backward {

// What the two warpgroups of the wide kernel have in common.
//
// Each waits for Q and dO of a step both before it releases one of them: the next step's Q may then arrive where dO
// was, and a barrier must not be two phases ahead of who waits for it.
template <class C>
struct WideConsumer : FirstPassRole<C> {
  using Base = FirstPassRole<C>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using Base::p, Base::shared, Base::steps, Base::thread;

  static constexpr int kHeld = C::kHeldColumns / 16;
  OperandA<Element, C::kHeldColumns> held;  // the first columns of the tile's K or V

  template <class Keys>
  __device__ __forceinline__ void hold(const Keys& keys) {
    const int t = thread();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      ptx::ldmatrix_x4(held.steps[i], keys.address() + keys.piece_offset(t / 32 * 16 + t % 16, 2 * i + t % 32 / 16));
    }
  }

  // X = rows Yᵀ: the 64 keys of a tile × the tile's queries
  template <class Keys, class Queries>
  __device__ __forceinline__ void issue_scores(Scores& X, const Keys& keys, const Queries& queries) {
    using Product = ptx::Wgmma<Element, C::kTileM>;
    X.pin();
    const uint32_t a = unhoisted(keys.address());
    const uint32_t b = queries.address();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      Product::template rs<ptx::Major::kK>(X.values, held.steps[i], queries.k_major(b, i), i > 0);
    }
#pragma unroll
    for (int i = kHeld; i < Keys::kChunks * 4; ++i) {
      Product::template ss<ptx::Major::kK>(X.values, keys.k_major(a, i), queries.k_major(b, i), true);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ int slot() const { return steps % C::kSharedP; }
  __device__ __forceinline__ uint32_t lap() const { return steps / C::kSharedP % 2; }
};

// dV += P dO, of the step before    S = K Qᵀ    P = exp(S - lse), for this warpgroup and the other
template <class C>
struct ProbabilityConsumer : WideConsumer<C> {
  using Base = WideConsumer<C>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using Base::p, Base::shared, Base::steps, Base::work, Base::stage, Base::parity, Base::thread;

  Accumulator<C::kHeadDimV> dV;
  typename Base::Operand P;

  __device__ __forceinline__ void run() {
    this->first_tile();
    while (!work().last) {
      dV.fill(0.f);
      if (work().walk.count > 0) walk_queries();
      this->store_dV(dV);
      this->next_tile();
    }
    // The turn given away last comes back: a barrier must not be left with arrivals.
    this->my_turn();
  }

  __device__ __forceinline__ void walk_queries() {
    this->wait_k();
    this->hold(shared.k[this->stage_k()]);
    step<false, true>();
#pragma unroll 1
    for (int left = this->count() - 1; left > 0; --left) step<true, true>();
    release(shared.k_empty[this->stage_k()]);
    step<true, false>();
  }

  template <bool kGradient, bool kScores>
  __device__ __forceinline__ void step() {
    [[maybe_unused]] Scores S;
    [[maybe_unused]] int masked = -1;
    this->my_turn();
    ptx::wgmma_fence();
    if constexpr (kGradient) this->issue_gradient(dV, P, shared.dout_of(steps - 1));
    if constexpr (kScores) {
      ptx::mbarrier_wait(&shared.q_full[stage()], parity());
      masked = shared.step[steps % C::kStepSlots].masked;
      this->issue_scores(S, shared.k[this->stage_k()], shared.q_of(steps));
    }
    this->your_turn();
    if constexpr (kGradient) {
      ptx::wgmma_wait<kScores ? 1 : 0>();
      dV.pin();
      release(shared.dout_empty[(steps - 1) % C::kStages]);
    }
    if constexpr (kScores) {
      ptx::wgmma_wait<0>();
      S.pin();
      make_P(S, masked);
      ++steps;
    }
  }

  // The other warpgroup needs P for dS alone: with softcap it gets P ∘ (1 - t²).
  __device__ __forceinline__ void make_P(Scores& S, int masked) {
    OperandA<Element, C::kSoftcap ? C::kTileM : 16> slope;
    if constexpr (C::kSoftcap) cap_scores(S, slope, p.score_scale);
    if (masked >= 0) {
      const VisibleQueries queries(p.window, work().seqlen_q, work().seqlen_k);
      mask_scores(S, queries, masked, work().first_key, thread());
    }
    exponentiate(S, P, shared.lse2[stage()], p.to_log2, S.column(thread()));
    P.pin();
    ptx::mbarrier_wait(&shared.dout_full[stage()], parity());
    __syncwarp();
    release(shared.q_empty[stage()]);
    typename Base::Operand shared_P = P;
    if constexpr (C::kSoftcap) multiply(shared_P, slope);
    const int slot = this->slot();
    ptx::mbarrier_wait(&shared.p_empty[slot], this->lap() ^ 1);
#pragma unroll
    for (int i = 0; i < P.kSteps; ++i) {
      const auto& x = shared_P.steps[i];
      shared.on_its_way.steps[slot][i][thread()] = make_uint4(x[0], x[1], x[2], x[3]);
    }
    __syncwarp();
    release(shared.p_full[slot]);
  }
};

// dK += dS Q, of the step before    dP = V dOᵀ    dS = P ∘ (dP - delta)
template <class C>
struct GradientConsumer : WideConsumer<C> {
  using Base = WideConsumer<C>;
  using Element = typename C::Element;
  using Scores = typename Base::Scores;
  using Base::p, Base::shared, Base::steps, Base::work, Base::stage, Base::parity, Base::thread;

  Accumulator<C::kHeadDim> dK;
  typename Base::Operand dS;

  __device__ __forceinline__ void run() {
    this->your_turn();
    this->first_tile();
    while (!work().last) {
      dK.fill(0.f);
      if (work().walk.count > 0) walk_queries();
      this->store_dK(dK);
      this->next_tile();
    }
  }

  __device__ __forceinline__ void walk_queries() {
    ptx::mbarrier_wait(&shared.v_full, work().loaded % 2);
    this->hold(shared.v);
    step<false, true>();
#pragma unroll 1
    for (int left = this->count() - 1; left > 0; --left) step<true, true>();
    release(shared.v_empty);
    step<true, false>();
  }

  template <bool kGradient, bool kScores>
  __device__ __forceinline__ void step() {
    [[maybe_unused]] Scores dP;
    this->my_turn();
    ptx::wgmma_fence();
    if constexpr (kGradient) this->issue_gradient(dK, dS, shared.q_of(steps - 1));
    if constexpr (kScores) {
      ptx::mbarrier_wait(&shared.dout_full[stage()], parity());
      this->issue_scores(dP, shared.v, shared.dout_of(steps));
    }
    this->your_turn();
    if constexpr (kGradient) {
      ptx::wgmma_wait<kScores ? 1 : 0>();
      dK.pin();
      release(shared.q_empty[(steps - 1) % C::kStages]);
    }
    if constexpr (kScores) {
      typename Base::Operand P;
      take_P(P);
      ptx::wgmma_wait<0>();
      dP.pin();
      differentiate<C::kPackedProduct>(dP, P, dS, shared.delta[stage()], dP.column(thread()));
      dS.pin();
      ptx::mbarrier_wait(&shared.q_full[stage()], parity());
      __syncwarp();
      release(shared.dout_empty[stage()]);
      ++steps;
    }
  }

  __device__ __forceinline__ void take_P(typename Base::Operand& P) {
    const int slot = this->slot();
    ptx::mbarrier_wait(&shared.p_full[slot], this->lap());
#pragma unroll
    for (int i = 0; i < P.kSteps; ++i) {
      const uint4 x = shared.on_its_way.steps[slot][i][thread()];
      P.steps[i][0] = x.x;
      P.steps[i][1] = x.y;
      P.steps[i][2] = x.z;
      P.steps[i][3] = x.w;
    }
    __syncwarp();
    release(shared.p_empty[slot]);
  }
};

}  // namespace tilewright::backward
