#include "kernels/forward/cpu.h"

#include <cmath>
#include <vector>

#include "attention/block_range.h"
#include "attention/online_softmax.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/batch.h"
#include "kernels/cpu/tile_ops.h"

// One piece of work is a tile of up to kTile queries of one head. It goes over its blocks of keys
// (attention/block_range.h) and keeps everything transposed, queries in the vector lanes (kernels/cpu/tile_ops.h):
//
//     Sᵀ = K (scale Q)ᵀ        P, m, l <- online softmax(S)        Oᵀ = Oᵀ diag(correction) + Vᵀ Pᵀ
//
// and at the end out = O / l, lse = m + log l.
namespace tilewright {
namespace {

using namespace cpu;

// The two products, in T.
template <class T>
class TileProducts {
 public:
  using Compute = T;

  explicit TileProducts(const ForwardParams& p)
      : scale_(static_cast<T>(p.scale)),
        query_t_(p.head_dim * kTile),
        rows_(kTile * max_of(p.head_dim, p.head_dim_v)) {}

  // What the scores have yet to be multiplied by.
  T score_scale() const { return 1; }

  void load_query(const TileSource& query) {
    ops_.load(query, scale_, rows_);
    transpose_padded<T>(rows_, query.rows, query.columns, query_t_);
  }

  // Sᵀ = K Qᵀ, up to score_scale
  void score(const TileSource& key, int columns, T* scores_t) {
    ops_.load(key, T(1), rows_);
    ops_.multiply({rows_, key.columns, 1, query_t_, scores_t, false, nullptr, key.rows, key.columns, columns});
  }

  // Oᵀ = Oᵀ diag(correction) + Vᵀ Pᵀ, or Vᵀ Pᵀ if it is the first
  void accumulate(const TileSource& value, int columns, const T* p_t, const T* correction, bool first, T* out_t) {
    ops_.load(value, T(1), rows_);
    ops_.multiply({rows_, 1, value.columns, p_t, out_t, !first, first ? nullptr : correction, value.columns, value.rows,
                   columns});
  }

 private:
  const TileOps<T>& ops_ = tile_ops<T>();
  const T scale_;
  TileBuffer<T> query_t_;  // (head_dim, kTile): scale Q
  TileBuffer<T> rows_;     // (kTile, head_dim or head_dim_v): Q, K or V
};

// The same in bfloat16 on AMX: Q, K, V as they are, P rounded.
class AmxProducts {
 public:
  using Compute = float;

  explicit AmxProducts(const ForwardParams& p)
      : scale_(static_cast<float>(p.scale)),
        query_t_(amx_padded(p.head_dim) / 2 * kTile),
        p_t_(kTile / 2 * kTile),
        rows_(kTile * amx_padded(max_of(p.head_dim, p.head_dim_v))),
        value_t_(kTile * amx_padded(p.head_dim_v)) {
    ops_.begin();
  }
  ~AmxProducts() { ops_.end(); }

  float score_scale() const { return scale_; }

  void load_query(const TileSource& query) { ops_.pack_b_transposed(query, rows_, query_t_); }

  void score(const TileSource& key, int columns, float* scores_t) {
    ops_.pack_a(key, rows_);
    ops_.multiply({rows_, query_t_, scores_t, false, nullptr, key.rows, key.columns, columns});
  }

  void accumulate(const TileSource& value, int columns, const float* p_t, const float* correction, bool first,
                  float* out_t) {
    ops_.pack_a_transposed(value, rows_, value_t_);
    ops_.pack_b(p_t, value.rows, p_t_);
    ops_.multiply({value_t_, p_t_, out_t, !first, first ? nullptr : correction, value.columns, kTile, columns});
  }

 private:
  const AmxOps& ops_ = *amx_ops();
  const float scale_;
  TileBuffer<BFloat16Pair> query_t_;
  TileBuffer<BFloat16Pair> p_t_;
  TileBuffer<BFloat16> rows_;  // Q, K, or V before it is transposed
  TileBuffer<BFloat16> value_t_;
};

template <class Products>
class ForwardWorker {
  using T = typename Products::Compute;

 public:
  explicit ForwardWorker(const ForwardParams& p)
      : p_(p),
        products_(p),
        scores_t_(kTile * kTile),
        out_t_(amx_padded(p.head_dim_v) * kTile),
        out_(kTile * p.head_dim_v) {}

  void run(const RowTile& tile, int head) {
    const Sequence sequence = sequence_at(p_, tile.index);
    const VisibleRows visible(sequence.keys, tile);
    const BlockRange range = BlockRange::of(sequence.keys, tile.row, tile.row + tile.rows - 1, kTile);
    products_.load_query(tile_source(p_.element, p_.q, p_.q_stride, tile.index, int64_t{sequence.q.begin} + tile.row,
                                     head, tile.rows, p_.head_dim));
    for (int i = 0; i < kTile; ++i) {
      max_[i] = OnlineSoftmax<T>::kMinusInfinity;
      sum_[i] = 0;
    }
    for (int step = 0; step < range.count(); ++step) {
      const TileMask mask = visible.mask(sequence.keys, range.block_at(step) * kTile);
      const bool masked = step < range.right_edge_steps() || step >= range.full_steps_end();
      attend(sequence, head, tile.rows, mask.first_key, masked ? &mask : nullptr, step == 0);
    }
    finish(sequence, tile, head, range.count() == 0);
  }

 private:
  void attend(const Sequence& sequence, int head, int queries, int first_key, const TileMask* mask, bool first) {
    const int head_kv = head / (p_.heads_q / p_.heads_kv);
    const int keys = min_of(kTile, sequence.k.length - first_key);
    const int columns = padded_columns(queries);
    const int64_t row = int64_t{sequence.k.begin} + first_key;
    products_.score(tile_source(p_.element, p_.k, p_.k_stride, sequence.index, row, head_kv, keys, p_.head_dim),
                    columns, scores_t_);
    ops_.softmax(
        {scores_t_, keys, columns, products_.score_scale(), static_cast<T>(p_.softcap), mask, max_, sum_, correction_});
    products_.accumulate(tile_source(p_.element, p_.v, p_.v_stride, sequence.index, row, head_kv, keys, p_.head_dim_v),
                         columns, scores_t_, correction_, first, out_t_);
  }

  void finish(const Sequence& sequence, const RowTile& tile, int head, bool empty) {
    const T sink = p_.sinks ? static_cast<const T*>(p_.sinks)[head] : OnlineSoftmax<T>::kMinusInfinity;
    T* lse = static_cast<T*>(p_.lse) + lse_index(p_, sequence, head, tile.row);
    for (int i = 0; i < tile.rows; ++i) {
      OnlineSoftmax<T> state{max_[i], sum_[i]};
      const auto result = state.finish(sink, [](T x) { return std::exp(x); }, [](T x) { return std::log(x); });
      lse[i] = result.lse;
      correction_[i] = result.out_scale;
    }
    if (empty) {
      for (int i = 0; i < p_.head_dim_v * kTile; ++i) out_t_[i] = 0;
    }
    transpose<T>(out_t_, kTile, p_.head_dim_v, tile.rows, out_, p_.head_dim_v);
    ops_.store(out_, correction_,
               tile_target(p_.element, p_.out, p_.out_stride, tile.index, int64_t{sequence.q.begin} + tile.row, head,
                           tile.rows, p_.head_dim_v));
  }

  const ForwardParams& p_;
  const TileOps<T>& ops_ = tile_ops<T>();
  Products products_;
  TileBuffer<T> scores_t_;  // (kTile, kTile): S, then P; a line a key
  TileBuffer<T> out_t_;     // (head_dim_v, kTile)
  TileBuffer<T> out_;       // (kTile, head_dim_v)
  alignas(64) T max_[kTile];
  alignas(64) T sum_[kTile];
  alignas(64) T correction_[kTile];
};

template <class T>
void write_unowned_rows(const ForwardParams& p) {
  for_unowned_rows(p.cu_seqlens_q, p.batch, p.seqlen_q, [&](int first, int last) {
    zero_rows(p.element, p.out, p.out_stride, first, last, p.heads_q, p.head_dim_v);
    for (int64_t head = 0; head < p.heads_q; ++head) {
      T* lse = static_cast<T*>(p.lse) + head * p.seqlen_q;
      for (int row = first; row < last; ++row) lse[row] = OnlineSoftmax<T>::kMinusInfinity;
    }
  });
}

template <class Products>
void forward(const ForwardParams& p, ParallelFor parallel_for) {
  write_unowned_rows<typename Products::Compute>(p);
  const std::vector<RowTile> tiles = row_tiles(p, &Sequence::q);
  const int64_t count = static_cast<int64_t>(tiles.size());
  if (count == 0 || p.heads_q == 0) return;
  parallel_for(count * p.heads_q, [&](int64_t begin, int64_t end) {
    ForwardWorker<Products> worker(p);
    for (int64_t i = begin; i < end; ++i) worker.run(tiles[i % count], static_cast<int>(i / count));
  });
}

}  // namespace

void forward_cpu(const ForwardParams& params, ParallelFor parallel_for) {
  if (params.element == Element::kFloat64) return forward<TileProducts<double>>(params, parallel_for);
  if (params.element == Element::kBFloat16 && amx_ops()) return forward<AmxProducts>(params, parallel_for);
  forward<TileProducts<float>>(params, parallel_for);
}

}  // namespace tilewright
