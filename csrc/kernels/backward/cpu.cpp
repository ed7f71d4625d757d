#include "kernels/backward/cpu.h"

#include <cmath>
#include <vector>

#include "attention/block_range.h"
#include "attention/online_softmax.h"
#include "kernels/cpu/batch.h"
#include "kernels/cpu/tile_ops.h"

// Two passes, each with one owner for every row it writes: no sum crosses threads, so the bits are the same for any
// number of them, and no dQ of all key blocks has to be kept. The price is S and dP twice, 7 products instead of 5.
//
//     query pass: a tile of queries of one head.  Sᵀ = K (scale Q)ᵀ   dPᵀ = V dOᵀ   dQᵀ += Kᵀ dSᵀ       also delta
//     key pass:   a tile of keys of one kv head.  S = (scale Q) Kᵀ    dP = dO Vᵀ    dVᵀ += dOᵀ P   dKᵀ += (scale Q)ᵀ dS
//     sink pass:  dsinks = -sum exp(sink - lse) delta, a head at a time
namespace tilewright {
namespace {

using namespace cpu;

// What both passes need of a tile of queries.
template <class T>
struct QueryTile {
  explicit QueryTile(const BackwardParams& p) : query(kTile * p.head_dim), dout(kTile * p.head_dim_v) {}

  void load(const TileOps<T>& ops, const BackwardParams& p, const Sequence& sequence, const RowTile& tile, int head) {
    const int64_t row = int64_t{sequence.q.begin} + tile.row;
    ops.load(tile_source(p.element, p.q, p.q_stride, tile.index, row, head, tile.rows, p.head_dim),
             static_cast<T>(p.scale), query);
    ops.load(tile_source(p.element, p.dout, p.dout_stride, tile.index, row, head, tile.rows, p.head_dim_v), T(1), dout);
    const T* source = static_cast<const T*>(p.lse) + lse_index(p, sequence, head, tile.row);
    for (int i = 0; i < kTile; ++i) {
      lse[i] = i < tile.rows ? source[i] : OnlineSoftmax<T>::kMinusInfinity;
      if (lse[i] != OnlineSoftmax<T>::kMinusInfinity) continue;
      // The row has seen nothing: exp(s - lse) is to be 0, whatever s is, and so is its part of dV, whatever dO is.
      lse[i] = -lse[i];
      if (i < tile.rows) {
        for (int column = 0; column < p.head_dim_v; ++column) dout[i * p.head_dim_v + column] = 0;
      }
    }
  }

  TileBuffer<T> query;  // (kTile, head_dim): scale Q
  TileBuffer<T> dout;   // (kTile, head_dim_v)
  alignas(64) T lse[kTile];
};

template <class T>
class QueryPass {
 public:
  QueryPass(const BackwardParams& p, T* delta)
      : p_(p),
        delta_(delta),
        tile_(p),
        rows_(kTile * max_of(p.head_dim, p.head_dim_v)),
        query_t_(p.head_dim * kTile),
        dout_t_(p.head_dim_v * kTile),
        out_t_(p.head_dim_v * kTile),
        scores_t_(kTile * kTile),
        dp_t_(kTile * kTile),
        dq_t_(p.head_dim * kTile) {}

  void run(const RowTile& tile, int head) {
    const Sequence sequence = sequence_at(p_, tile.index);
    const VisibleRows visible(sequence.keys, tile);
    const BlockRange range = BlockRange::of(sequence.keys, tile.row, tile.row + tile.rows - 1, kTile);
    tile_.load(ops_, p_, sequence, tile, head);
    transpose_padded<T>(tile_.query, tile.rows, p_.head_dim, query_t_);
    transpose_padded<T>(tile_.dout, tile.rows, p_.head_dim_v, dout_t_);
    compute_delta(sequence, tile, head);
    for (int step = 0; step < range.count(); ++step) {
      const TileMask mask = visible.mask(sequence.keys, range.block_at(step) * kTile);
      const bool masked = step < range.right_edge_steps() || step >= range.full_steps_end();
      differentiate(sequence, head, tile.rows, mask.first_key, masked ? &mask : nullptr, step > 0);
    }
    if (range.count() == 0) {
      for (int i = 0; i < p_.head_dim * kTile; ++i) dq_t_[i] = 0;
    }
    for (T& scale : row_scale_) scale = static_cast<T>(p_.scale);
    transpose<T>(dq_t_, kTile, p_.head_dim, tile.rows, rows_, p_.head_dim);
    ops_.store(rows_, row_scale_,
               tile_target(p_.element, p_.dq, p_.dq_stride, tile.index, int64_t{sequence.q.begin} + tile.row, head,
                           tile.rows, p_.head_dim));
  }

 private:
  // delta = rowsum(dO ∘ O) - dlse. The sum runs in the order of dP's, so that the two cancel exactly in a row with one
  // key.
  void compute_delta(const Sequence& sequence, const RowTile& tile, int head) {
    ops_.load(tile_source(p_.element, p_.out, p_.out_stride, tile.index, int64_t{sequence.q.begin} + tile.row, head,
                          tile.rows, p_.head_dim_v),
              T(1), rows_);
    transpose_padded<T>(rows_, tile.rows, p_.head_dim_v, out_t_);
    ops_.column_dot(out_t_, dout_t_, p_.head_dim_v, tile_delta_);
    const int64_t index = lse_index(p_, sequence, head, tile.row);
    for (int i = 0; i < tile.rows; ++i) {
      if (p_.dlse) tile_delta_[i] -= static_cast<const T*>(p_.dlse)[index + i];
      delta_[index + i] = tile_delta_[i];
    }
  }

  void differentiate(const Sequence& sequence, int head, int queries, int first_key, const TileMask* mask,
                     bool accumulate) {
    const int head_kv = head / (p_.heads_q / p_.heads_kv);
    const int keys = min_of(kTile, sequence.k.length - first_key);
    const int columns = padded_columns(queries);
    const int64_t row = int64_t{sequence.k.begin} + first_key;
    const auto rows = [&](const void* data, const Strides& stride, int head_dim) {
      ops_.load(tile_source(p_.element, data, stride, sequence.index, row, head_kv, keys, head_dim), T(1), rows_);
    };
    rows(p_.v, p_.v_stride, p_.head_dim_v);
    ops_.multiply({rows_, p_.head_dim_v, 1, dout_t_, dp_t_, false, nullptr, keys, p_.head_dim_v, columns});
    rows(p_.k, p_.k_stride, p_.head_dim);
    ops_.multiply({rows_, p_.head_dim, 1, query_t_, scores_t_, false, nullptr, keys, p_.head_dim, columns});
    ops_.gradient({scores_t_, dp_t_, tile_.lse, tile_delta_, false, keys, columns, static_cast<T>(p_.softcap), mask});
    ops_.multiply({rows_, 1, p_.head_dim, dp_t_, dq_t_, accumulate, nullptr, p_.head_dim, keys, columns});
  }

  const BackwardParams& p_;
  const TileOps<T>& ops_ = tile_ops<T>();
  T* delta_;  // like lse
  QueryTile<T> tile_;
  TileBuffer<T> rows_;      // (kTile, head_dim or head_dim_v): O, K, V, then dQ
  TileBuffer<T> query_t_;   // (head_dim, kTile)
  TileBuffer<T> dout_t_;    // (head_dim_v, kTile)
  TileBuffer<T> out_t_;     // (head_dim_v, kTile)
  TileBuffer<T> scores_t_;  // (kTile, kTile), a line a key
  TileBuffer<T> dp_t_;
  TileBuffer<T> dq_t_;  // (head_dim, kTile)
  alignas(64) T tile_delta_[kTile];
  T row_scale_[kTile];
};

template <class T>
class KeyPass {
 public:
  KeyPass(const BackwardParams& p, const T* delta)
      : p_(p),
        delta_(delta),
        tile_(p),
        rows_(kTile * max_of(p.head_dim, p.head_dim_v)),
        key_t_(p.head_dim * kTile),
        value_t_(p.head_dim_v * kTile),
        scores_(kTile * kTile),
        dp_(kTile * kTile),
        dk_t_(p.head_dim * kTile),
        dv_t_(p.head_dim_v * kTile) {}

  void run(const RowTile& tile, int head_kv) {
    const Sequence sequence = sequence_at(p_, tile.index);
    const int64_t row = int64_t{sequence.k.begin} + tile.row;
    ops_.load(tile_source(p_.element, p_.k, p_.k_stride, tile.index, row, head_kv, tile.rows, p_.head_dim), T(1),
              rows_);
    transpose_padded<T>(rows_, tile.rows, p_.head_dim, key_t_);
    ops_.load(tile_source(p_.element, p_.v, p_.v_stride, tile.index, row, head_kv, tile.rows, p_.head_dim_v), T(1),
              rows_);
    transpose_padded<T>(rows_, tile.rows, p_.head_dim_v, value_t_);
    for (int i = 0; i < p_.head_dim * kTile; ++i) dk_t_[i] = 0;
    for (int i = 0; i < p_.head_dim_v * kTile; ++i) dv_t_[i] = 0;

    const int group = p_.heads_q / p_.heads_kv;
    for (int head = head_kv * group; head < (head_kv + 1) * group; ++head) {
      for (int first = 0; first < sequence.q.length; first += kTile) {
        differentiate(sequence, head, {tile.index, first, min_of(kTile, sequence.q.length - first)}, tile);
      }
    }
    transpose<T>(dk_t_, kTile, p_.head_dim, tile.rows, rows_, p_.head_dim);
    ops_.store(rows_, nullptr,
               tile_target(p_.element, p_.dk, p_.dk_stride, tile.index, row, head_kv, tile.rows, p_.head_dim));
    transpose<T>(dv_t_, kTile, p_.head_dim_v, tile.rows, rows_, p_.head_dim_v);
    ops_.store(rows_, nullptr,
               tile_target(p_.element, p_.dv, p_.dv_stride, tile.index, row, head_kv, tile.rows, p_.head_dim_v));
  }

 private:
  void differentiate(const Sequence& sequence, int head, const RowTile& queries, const RowTile& keys) {
    const BlockRange range = BlockRange::of(sequence.keys, queries.row, queries.row + queries.rows - 1, kTile);
    const int block = keys.row / kTile;
    if (block >= range.sink_end && (block < range.begin || block >= range.end)) return;
    const bool full = block >= range.full_begin && block < range.full_end;
    const VisibleRows visible(sequence.keys, queries);
    const TileMask mask = visible.mask(sequence.keys, keys.row);
    const int columns = padded_columns(keys.rows);
    tile_.load(ops_, p_, sequence, queries, head);
    ops_.multiply({tile_.query, p_.head_dim, 1, key_t_, scores_, false, nullptr, queries.rows, p_.head_dim, columns});
    ops_.multiply({tile_.dout, p_.head_dim_v, 1, value_t_, dp_, false, nullptr, queries.rows, p_.head_dim_v, columns});
    ops_.gradient({scores_, dp_, tile_.lse, delta_ + lse_index(p_, sequence, head, queries.row), true, queries.rows,
                   columns, static_cast<T>(p_.softcap), full ? nullptr : &mask});
    ops_.multiply({tile_.dout, 1, p_.head_dim_v, scores_, dv_t_, true, nullptr, p_.head_dim_v, queries.rows, columns});
    ops_.multiply({tile_.query, 1, p_.head_dim, dp_, dk_t_, true, nullptr, p_.head_dim, queries.rows, columns});
  }

  const BackwardParams& p_;
  const TileOps<T>& ops_ = tile_ops<T>();
  const T* delta_;  // like lse
  QueryTile<T> tile_;
  TileBuffer<T> rows_;     // (kTile, head_dim or head_dim_v): K, V, then dK, dV
  TileBuffer<T> key_t_;    // (head_dim, kTile)
  TileBuffer<T> value_t_;  // (head_dim_v, kTile)
  TileBuffer<T> scores_;   // (kTile, kTile), a line a query
  TileBuffer<T> dp_;
  TileBuffer<T> dk_t_;  // (head_dim, kTile)
  TileBuffer<T> dv_t_;  // (head_dim_v, kTile)
};

template <class T>
void sink_pass(const BackwardParams& p, const T* delta, int head) {
  const T sink = static_cast<const T*>(p.sinks)[head];
  double sum = 0;
  for (int index = 0; index < p.batch; ++index) {
    const Sequence sequence = sequence_at(p, index);
    const int64_t line = lse_index(p, sequence, head, 0);
    const T* lse = static_cast<const T*>(p.lse) + line;
    for (int row = 0; row < sequence.q.length; ++row) {
      if (lse[row] == OnlineSoftmax<T>::kMinusInfinity) continue;
      sum += static_cast<double>(std::exp(sink - lse[row])) * static_cast<double>(delta[line + row]);
    }
  }
  static_cast<T*>(p.dsinks)[head] = static_cast<T>(-sum);
}

template <class T>
void zero_unowned_rows(const BackwardParams& p) {
  for_unowned_rows(p.cu_seqlens_q, p.batch, p.seqlen_q, [&](int first, int last) {
    zero_rows(p.element, p.dq, p.dq_stride, first, last, p.heads_q, p.head_dim);
  });
  for_unowned_rows(p.cu_seqlens_k, p.batch, p.seqlen_k, [&](int first, int last) {
    zero_rows(p.element, p.dk, p.dk_stride, first, last, p.heads_kv, p.head_dim);
    zero_rows(p.element, p.dv, p.dv_stride, first, last, p.heads_kv, p.head_dim_v);
  });
}

// Runs pass.run(tile, head) for every tile and head.
template <class Pass, class T>
void run_pass(const BackwardParams& p, const std::vector<RowTile>& tiles, int heads, T* delta,
              ParallelFor parallel_for) {
  const int64_t count = static_cast<int64_t>(tiles.size());
  if (count == 0 || heads == 0) return;
  parallel_for(count * heads, [&](int64_t begin, int64_t end) {
    Pass pass(p, delta);
    for (int64_t i = begin; i < end; ++i) pass.run(tiles[i % count], static_cast<int>(i / count));
  });
}

template <class T>
void backward(const BackwardParams& p, ParallelFor parallel_for) {
  zero_unowned_rows<T>(p);
  const int64_t lines = p.cu_seqlens_q ? p.heads_q : int64_t{p.batch} * p.heads_q;
  TileBuffer<T> delta(lines * p.seqlen_q);
  run_pass<QueryPass<T>, T>(p, row_tiles(p, &Sequence::q), p.heads_q, delta, parallel_for);
  run_pass<KeyPass<T>, T>(p, row_tiles(p, &Sequence::k), p.heads_kv, delta, parallel_for);
  if (!p.dsinks || p.heads_q == 0) return;
  parallel_for(p.heads_q, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) sink_pass<T>(p, delta, static_cast<int>(head));
  });
}

}  // namespace

void backward_cpu(const BackwardParams& params, ParallelFor parallel_for) {
  if (params.element == Element::kFloat64) return backward<double>(params, parallel_for);
  backward<float>(params, parallel_for);
}

}  // namespace tilewright
