#pragma once

#include <math_constants.h>

#include "attention/block_range.h"
#include "kernels/backward/sm90_params.h"
#include "ptx/elect.h"
#include "ptx/grid_dependency.h"
#include "ptx/ldmatrix.h"
#include "ptx/math.h"
#include "ptx/mbarrier.h"
#include "ptx/registers.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
#include "tile/fragment.h"
#include "tile/shared_tile.h"
#include "tile/store_rows.h"
#include "tile/unhoisted.h"

// The second pass: dQ alone. S and dP are computed again, and dQ stays in registers. At head_dim 256 that takes less
// time than float32 additions from every tile of keys in the level 2 cache, and in short sequences of head_dim 128 less
// than zeros before and a conversion after. The sums have one order.
//
// A persistent block a multiprocessor takes tiles of 128 queries of one head. A consumer warpgroup owns 64 of them,
// with their Q and dO in shared memory, and walks the keys in blocks of 64, from right to left:
//
//     producer (one thread)   K_0 Q dO V_0 K_1 V_1 …   of one tile after the other, as buffers become free
//     consumer, step n        dQ += dS_{n-1} K_{n-1} | S = Q K_nᵀ, dP = dO V_nᵀ | P = exp(S - lse) | dS_n
//
// dQ comes first: K_{n-1} is free early in step n, and two buffers of K are enough. V has one at head_dim 256: so the
// second warpgroup takes dP before S, and the next V has half a step more to come. That also keeps the warpgroups half
// a step apart: one has products under way while the other computes dS.
//
// It starts where the first pass leaves multiprocessors idle: it reads nothing of that pass, which itself has waited
// for what both read. Only the end of each block waits for the end of the first pass.
namespace tilewright::backward {

template <class Element_, int kHeadDim_, bool kSoftcap_>
struct SecondPassConfig {
  using Element = Element_;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr int kHeadDim = kHeadDim_;  // and head_dim_v
  static constexpr int kRows = 64;            // of a warpgroup: tile_m, in which lse2 and delta lie
  static constexpr int kTileM = kSecondTileM;
  static constexpr int kTileN = kSecondTileN;
  static constexpr int kStagesK = kHeadDim > 128 ? 2 : 4;
  static constexpr int kStagesV = kHeadDim > 128 ? 1 : 4;
  static constexpr int kTileSlots = 2;
  static constexpr bool kRowsInRegisters = kHeadDim <= 128;
  static constexpr int kWarpgroups = kTileM / kRows;
  static constexpr int kWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kProducerRegisters = 24;
};

// A tile of work, as the producer announces it to the consumers.
struct QueryTileWork : Sequences {
  int first_query;
  int head;
  int first_tile;   // of lse2 and delta: the number of the first of its two
  uint32_t number;  // tiles announced before
  uint32_t loaded;  // those of them with keys
  int next;         // the producer's: the index of the tile after this one
  bool last;        // no work: the end
  BlockRange range;
};

template <class C>
struct SecondPassStorage {
  using Element = typename C::Element;
  SharedTile<Element, C::kRows, C::kHeadDim> q[C::kWarpgroups];
  SharedTile<Element, C::kRows, C::kHeadDim> dout[C::kWarpgroups];
  SharedTile<Element, C::kTileN, C::kHeadDim> k[C::kStagesK];
  SharedTile<Element, C::kTileN, C::kHeadDim> v[C::kStagesV];
  uint64_t q_full[C::kWarpgroups], q_empty[C::kWarpgroups];
  uint64_t dout_full[C::kWarpgroups], dout_empty[C::kWarpgroups];
  uint64_t k_full[C::kStagesK], k_empty[C::kStagesK];
  uint64_t v_full[C::kStagesV], v_empty[C::kStagesV];
  uint64_t tile_full[C::kTileSlots], tile_empty[C::kTileSlots];
  QueryTileWork tile[C::kTileSlots];

  __device__ __forceinline__ void init_barriers() {
    for (int i = 0; i < C::kWarpgroups; ++i) {
      init(q_full[i], q_empty[i], 4);
      init(dout_full[i], dout_empty[i], 4);
    }
    for (int i = 0; i < C::kStagesK; ++i) init(k_full[i], k_empty[i], C::kWarps);
    for (int i = 0; i < C::kStagesV; ++i) init(v_full[i], v_empty[i], C::kWarps);
    for (int i = 0; i < C::kTileSlots; ++i) init(tile_full[i], tile_empty[i], C::kWarps);
    ptx::fence_mbarrier_init();
  }

 private:
  __device__ __forceinline__ static void init(uint64_t& full, uint64_t& empty, int readers) {
    ptx::mbarrier_init(&full, 1);
    ptx::mbarrier_init(&empty, readers);
  }
};

// The one thread that schedules the tiles and loads everything.
template <class C>
struct SecondPassProducer {
  const SecondPassParams& p;
  SecondPassStorage<C>& shared;
  // Registers are scarce: everything but this stays in shared memory.
  uint32_t steps = 0;  // blocks of K and V loaded

  __device__ __forceinline__ void run() {
    int index = blockIdx.x;
    uint32_t number = 0, loaded = 0;
    while (index < tiles_of_head() * p.order.heads) {
      QueryTileWork& work = next_slot(number);
      work.loaded = loaded;
      unsigned blocks;  // not from gridDim: the compiler would keep it all the time
      asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
      work.next = atomicAdd(p.next_tile, 1) + static_cast<int>(blocks);
      work.last = false;
      describe(work, index);
      publish(work.number);
      if (work.range.count() > 0) load_tile(work);
      index = work.next;
      number = work.number + 1;
      loaded = work.loaded + (work.range.count() > 0);
    }
    next_slot(number).last = true;
    publish(number);
  }

  __device__ __forceinline__ QueryTileWork& next_slot(uint32_t number) {
    ptx::mbarrier_wait(&shared.tile_empty[number % C::kTileSlots], (number / C::kTileSlots + 1) % 2);
    shared.tile[number % C::kTileSlots].number = number;
    return shared.tile[number % C::kTileSlots];
  }
  __device__ __forceinline__ void publish(uint32_t number) {
    ptx::mbarrier_arrive(&shared.tile_full[number % C::kTileSlots]);
  }

  __device__ __forceinline__ int tiles_of_head() const { return p.packed ? *p.num_packed : p.tiles; }

  __device__ __forceinline__ void describe(QueryTileWork& work, int index) const {
    const TileOrder::Tile at = p.order.at(index, tiles_of_head());
    if (p.packed) {
      const PackedPairTile& tile = p.packed[at.tile];
      work.first_query = tile.first_row;
      work.head = at.head;
      work.first_tile = at.head * p.first.head_tiles + tile.first_tile + tile.first_row / C::kRows;
      work.batch = 0;
      forget_values();
      work.q_begin = tile.q_begin;
      work.seqlen_q = tile.seqlen_q;
      work.k_begin = tile.k_begin;
      work.seqlen_k = tile.seqlen_k;
    } else {
      const int first_query = (p.tiles - 1 - at.tile) * C::kTileM;
      const int batch = p.heads_q.divide(at.head);
      work.first_query = first_query;
      work.head = at.head - batch * static_cast<int>(p.heads_q.divisor);
      work.first_tile = at.head * p.first.head_tiles + first_query / C::kRows;
      work.batch = batch;
      work.q_begin = 0;
      work.seqlen_q = p.first.seqlen_q;
      work.k_begin = 0;
      work.seqlen_k = p.first.seqlen_k;
    }
    forget_values();
    const VisibleKeys keys(p.first.window, work.seqlen_q, work.seqlen_k);
    const int last_query = min_of(work.first_query + C::kTileM, work.seqlen_q) - 1;
    work.range = BlockRange::of(keys, work.first_query, last_query, C::kTileN);
  }

  // What has been written so far is read again where it is used.
  __device__ __forceinline__ static void forget_values() { asm volatile("" ::: "memory"); }

  // K_0 Q dO V_0 K_1 V_1 …: in the order in which buffers become free, also across tiles.
  __device__ __forceinline__ void load_tile(const QueryTileWork& work) {
    const int head_kv = p.heads_per_kv.divide(work.head);
#pragma unroll 1
    for (int step = 0; step < work.range.count(); ++step, ++steps) {
      const int key = work.range.block_at(step) * C::kTileN;
      const int k = steps % C::kStagesK, v = steps % C::kStagesV;
      ptx::mbarrier_wait(&shared.k_empty[k], (steps / C::kStagesK + 1) % 2);
      load(shared.k[k], &p.k, &shared.k_full[k], head_kv, work.key(p.packed, key));
      if (step == 0) load_rows(work);
      ptx::mbarrier_wait(&shared.v_empty[v], (steps / C::kStagesV + 1) % 2);
      load(shared.v[v], &p.v, &shared.v_full[v], head_kv, work.key(p.packed, key));
    }
  }
  __device__ __forceinline__ void load_rows(const QueryTileWork& work) {
#pragma unroll 1
    for (int i = 0; i < C::kWarpgroups; ++i) {
      const RowCoordinates rows = work.query(p.packed, work.first_query + C::kRows * i);
      ptx::mbarrier_wait(&shared.q_empty[i], (work.loaded + 1) % 2);
      load(shared.q[i], &p.first.q, &shared.q_full[i], work.head, rows);
      ptx::mbarrier_wait(&shared.dout_empty[i], (work.loaded + 1) % 2);
      load(shared.dout[i], &p.first.dout, &shared.dout_full[i], work.head, rows);
    }
  }
  template <class Tile>
  __device__ __forceinline__ void load(Tile& tile, const CUtensorMap* map, uint64_t* full, int head,
                                       const RowCoordinates& rows) {
    ptx::mbarrier_arrive_expect(full, Tile::kBytes);
    for (int i = 0; i < Tile::kChunks; ++i) {
      ptx::tma_load_5d(tile.chunk(i), map, full, i * 64, head, rows.row, rows.outer, rows.wrap);
    }
  }
};

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

  // Read anew for each use: what is computed from it would otherwise take registers all the time.
  __device__ __forceinline__ static int thread() {
    unsigned x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return static_cast<int>(x % 128);
  }
  __device__ __forceinline__ void release(uint64_t& empty) {
    if (ptx::elect_one()) ptx::mbarrier_arrive(&empty);
  }

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
    constexpr float kTwoLog2e = 2.88539008177793f;
#pragma unroll
    for (int i = 0; i < S.kValues; ++i) {
      float& x = S.values[i];
      if constexpr (C::kSoftcap) {
        const float t = fmaf(-2.f, ptx::reciprocal(1.f + ptx::exp2(x * (p.first.score_scale * kTwoLog2e))), 1.f);
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
    const int sinks_end = p.first.window.sink_tokens - first_column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = work.first_query + warpgroup * C::kRows + P.row(t) + 8 * r;
      const int begin = keys.begin(query) - first_column;
      const int end = keys.end(query) - first_column;
#pragma unroll
      for (int i = 0; i < P.kValues; ++i) {
        const int column = P.column_of(i);
        const bool hidden = column >= end || (column < begin && column >= sinks_end);
        if (P.row_half(i) == r && hidden) P.values[i] = 0.f;
      }
    }
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

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) second_pass_sm90(const __grid_constant__ SecondPassParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<SecondPassStorage<C>*>(memory);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch_map(&p.k);
    ptx::tma_prefetch_map(&p.first.q);
    ptx::tma_prefetch_map(&p.first.dout);
    ptx::tma_prefetch_map(&p.v);
    shared.init_barriers();
  }
  ptx::launch_dependent_grids();
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128) - 1, 0);
  if (warpgroup < 0) {
    ptx::registers_decrease<C::kProducerRegisters>();
    if (threadIdx.x == 0) {
      SecondPassProducer<C>{p, shared}.run();
      ptx::wait_for_prerequisite_grids();
    }
  } else {
    ptx::registers_increase<C::kConsumerRegisters>();
    if (warpgroup == 0) {
      SecondPassConsumer<C, true>{p, shared, 0}.run();
    } else {
      SecondPassConsumer<C, false>{p, shared, 1}.run();
    }
  }
}

}  // namespace tilewright::backward
