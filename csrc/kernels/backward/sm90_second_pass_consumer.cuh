#pragma once

#include <math_constants.h>

#include "attention/softcap.h"
#include "attention/visible_columns.h"
#include "kernels/backward/sm90_second_pass_config.cuh"
#include "ptx/ldmatrix.h"
#include "ptx/math.h"
#include "ptx/mbarrier.h"
#include "ptx/wgmma.h"
#include "tile/fragment.h"
#include "tile/pipeline.h"
#include "tile/store_rows.h"
#include "tile/unhoisted.h"

namespace tilewright::backward {

// A warpgroup: 64 queries of each tile.
template <class C, bool kScoresFirst>
struct SecondPassConsumer {
  using Element = typename C::Element;
  using Scores = Accumulator<C::kTileN>;

  const SecondPassParams& p;
  SecondPassStorage<C>& shared;
  const int warpgroup;

  uint32_t steps = 0;  // blocks of keys done
  Accumulator<C::kHeadDim> dQ;
  OperandA<Element, C::kTileN> dS;
  // Q and dO where registers have room: less to read from shared memory, and their buffers are free at once.
  OperandA<Element, C::kRowsInRegisters ? C::kHeadDim : 16> Q, dO;
  float lse2[2];  // of the thread's two rows
  float delta[2];

  __device__ __forceinline__ static int thread() { return static_cast<int>(unhoisted_thread() % 128); }

  __device__ __forceinline__ void run() {
    for (uint32_t number = 0;; ++number) {
      const int slot = number % C::kTileSlots;
      ptx::mbarrier_wait(&shared.tile_full[slot], number / C::kTileSlots % 2);
      const QueryTileWork& work = shared.tile[slot];
      if (work.last) break;
      dQ.fill(0.f);
      if (work.range.count() > 0) walk_keys(work, work.loaded % 2);
      store(work);
      __syncwarp();
      release(shared.tile_empty[slot]);
    }
  }

  __device__ __forceinline__ void walk_keys(const QueryTileWork& work, uint32_t parity) {
    load_rows(work);
    // The shuffles tell the compiler that the numbers are the same in a warp.
    const int count = __shfl_sync(~0u, work.range.count(), 0);
    const int right_edge = __shfl_sync(~0u, work.range.right_edge_steps(), 0);
    const int left_edge = __shfl_sync(~0u, work.range.full_steps_end(), 0);
    int at = 0;
    while (at + 1 < count && !sees_block(work, at)) {
      pass_block();
      ++at;
    }
    ptx::mbarrier_wait(&shared.q_full[warpgroup], parity);
    ptx::mbarrier_wait(&shared.dout_full[warpgroup], parity);
    if constexpr (C::kRowsInRegisters) {
      hold(Q, shared.q[warpgroup]);
      hold(dO, shared.dout[warpgroup]);
      release_rows();
    }
    step<true>(work, at, at < right_edge || at >= left_edge);
#pragma unroll 1
    for (++at; at < count; ++at) step<false>(work, at, at < right_edge || at >= left_edge);
    if constexpr (!C::kRowsInRegisters) release_rows();
    ptx::wgmma_fence();
    issue_dQ();
    ptx::wgmma_wait<0>();
    dQ.pin();
    release_k();
  }

  __device__ __forceinline__ void load_rows(const QueryTileWork& work) {
    const int first = work.first_query + warpgroup * C::kRows;
    const int64_t row = int64_t{work.first_tile + warpgroup} * C::kRows + dQ.row(thread());
    const bool there = first < work.seqlen_q;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      lse2[r] = there ? p.first.lse2[row + 8 * r] : CUDART_INF_F;
      delta[r] = there ? p.first.delta[row + 8 * r] : 0.f;
    }
  }

  // Whether any row of the warpgroup sees a key of the block of step `at`.
  __device__ __forceinline__ bool sees_block(const QueryTileWork& work, int at) const {
    const VisibleKeys keys(p.first.window, work.seqlen_q, work.seqlen_k);
    const int last_query = min_of(work.first_query + (warpgroup + 1) * C::kRows, work.seqlen_q) - 1;
    return keys.end(last_query) > work.range.block_at(at) * C::kTileN;
  }
  // Waits all the same: a warpgroup that is a lap ahead would arrive in the wrong phase.
  __device__ __forceinline__ void pass_block() {
    ptx::mbarrier_wait(&shared.k_full[steps % C::kStagesK], steps / C::kStagesK % 2);
    wait_v();
    release(shared.k_empty[steps % C::kStagesK]);
    release_v();
    ++steps;
  }
  __device__ __forceinline__ void release_rows() {
    __syncwarp();
    release(shared.q_empty[warpgroup]);
    release(shared.dout_empty[warpgroup]);
  }
  template <int kColumns, class Rows>
  __device__ __forceinline__ static void hold(OperandA<Element, kColumns>& held, const Rows& rows) {
    const int t = thread();
#pragma unroll
    for (int i = 0; i < held.kSteps; ++i) {
      ptx::ldmatrix_x4(held.steps[i], rows.address() + rows.piece_offset(t / 32 * 16 + t % 16, 2 * i + t % 32 / 16));
    }
  }
  __device__ __forceinline__ void wait_v() {
    ptx::mbarrier_wait(&shared.v_full[steps % C::kStagesV], steps / C::kStagesV % 2);
  }
  __device__ __forceinline__ void release_v() { release(shared.v_empty[steps % C::kStagesV]); }
  // Of the step before.
  __device__ __forceinline__ void release_k() { release(shared.k_empty[(steps - 1) % C::kStagesK]); }

  template <bool kFirst>
  __device__ __forceinline__ void step(const QueryTileWork& work, int at, bool masked) {
    Scores S, dP;
    ptx::wgmma_fence();
    if constexpr (!kFirst) issue_dQ();
    if constexpr (kScoresFirst) issue_S(S);
    issue_dP(dP);
    if constexpr (!kScoresFirst) issue_S(S);
    if constexpr (!kFirst) {
      ptx::wgmma_wait<2>();
      dQ.pin();
      release_k();
    }
    if constexpr (!kScoresFirst) {
      ptx::wgmma_wait<1>();
      dP.pin();
      release_v();
    }
    ptx::wgmma_wait<kScoresFirst ? 1 : 0>();
    S.pin();
    exponentiate(S);
    if (masked) mask(work, at, S);
    S.pin();
    if constexpr (kScoresFirst) {
      ptx::wgmma_wait<0>();
      dP.pin();
      release_v();
    }
    differentiate(S, dP);
    dS.pin();
    ++steps;
  }

  __device__ __forceinline__ void issue_S(Scores& S) {
    ptx::mbarrier_wait(&shared.k_full[steps % C::kStagesK], steps / C::kStagesK % 2);
    S.pin();
    issue_scores(S, Q, shared.q[warpgroup], shared.k[steps % C::kStagesK]);
  }
  __device__ __forceinline__ void issue_dP(Scores& dP) {
    wait_v();
    dP.pin();
    issue_scores(dP, dO, shared.dout[warpgroup], shared.v[steps % C::kStagesV]);
  }
  // X = rows colsᵀ: 64 queries × the block's keys
  template <class Held, class Rows, class Columns>
  __device__ __forceinline__ void issue_scores(Scores& X, const Held& held, const Rows& rows, const Columns& columns) {
    const uint32_t a = unhoisted(rows.address());
    const uint32_t b = columns.address();
    using Product = ptx::Wgmma<Element, C::kTileN>;
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      if constexpr (C::kRowsInRegisters) {
        Product::template rs<ptx::Major::kK>(X.values, held.steps[i], columns.k_major(b, i), i > 0);
      } else {
        Product::template ss<ptx::Major::kK>(X.values, rows.k_major(a, i), columns.k_major(b, i), i > 0);
      }
    }
    ptx::wgmma_commit();
  }
  // dQ += dS K, of the step before
  __device__ __forceinline__ void issue_dQ() {
    dQ.pin();
    const uint32_t k = shared.k[(steps - 1) % C::kStagesK].address();
#pragma unroll
    for (int i = 0; i < C::kTileN / 16; ++i) {
      ptx::Wgmma<Element, C::kHeadDim>::template rs<ptx::Major::kMN>(dQ.values, dS.steps[i], shared.k[0].mn_major(k, i),
                                                                     true);
    }
    ptx::wgmma_commit();
  }

  // S ← P = 2^(to_log2 S - lse2); with softcap S ← P ∘ (1 - t²), of t = tanh(score_scale S)
  __device__ __forceinline__ void exponentiate(Scores& S) {
    const Softcap softcap = Softcap::of(p.first.score_scale);
#pragma unroll
    for (int i = 0; i < S.kValues; ++i) {
      float& x = S.values[i];
      if constexpr (C::kSoftcap) {
        const float t = softcap(x);
        x = ptx::exp2(fmaf(t, p.first.to_log2, -lse2[S.row_half(i)])) * fmaf(-t, t, 1.f);
      } else {
        x = ptx::exp2(fmaf(x, p.first.to_log2, -lse2[S.row_half(i)]));
      }
    }
  }

  // P ← 0 where the query does not see the key.
  __device__ __forceinline__ void mask(const QueryTileWork& work, int at, Scores& P) const {
    const VisibleKeys keys(p.first.window, work.seqlen_q, work.seqlen_k);
    const int t = thread();
    const int first_column = work.range.block_at(at) * C::kTileN + P.column(t);
    ColumnSet seen[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = work.first_query + warpgroup * C::kRows + P.row(t) + 8 * r;
      seen[r] = visible_columns(keys, query, first_column);
    }
    replace_other_columns(P, seen, 0.f);
  }

  // dS = P ∘ (dP - delta)
  __device__ __forceinline__ void differentiate(const Scores& P, const Scores& dP) {
#pragma unroll
    for (int i = 0; i < P.kValues; i += 2) {
      const float d = delta[P.row_half(i)];
      dS.steps[i / 8][i % 8 / 2] =
          ptx::pack<Element>(P.values[i] * (dP.values[i] - d), P.values[i + 1] * (dP.values[i + 1] - d));
    }
  }

  __device__ __forceinline__ void store(const QueryTileWork& work) {
    const int t = thread();
    const int query = work.first_query + warpgroup * C::kRows + dQ.row(t);
    const int left = work.seqlen_q - query;
    const int rows = left <= 0 ? 0 : left <= 8 ? 1 : 2;
    Element* to = static_cast<Element*>(p.dq) + work.batch * p.dq_stride.batch +
                  int64_t{work.q_begin + query} * p.dq_stride.row + work.head * p.dq_stride.head;
    store_rows(dQ, p.first.dq_scale, to, 8 * p.dq_stride.row, rows, p.first.head_dim, t);
  }
};

}  // namespace tilewright::backward
