#pragma once

#include <cstdint>
#include <vector>

#include "attention/sequence.h"
#include "attention/window.h"
#include "kernels/cpu/element.h"
#include "kernels/cpu/tile_ops.h"
#include "kernels/forward/params.h"
#include "kernels/parallel.h"

// A batch as the CPU kernels walk through it: sequences, and tiles of their rows. Params is ForwardParams or
// BackwardParams.
namespace tilewright::cpu {

// The rows of q and k that attend to each other.
struct Sequence {
  int index;
  SequenceBounds q;
  SequenceBounds k;
  VisibleKeys keys;
};

template <class Params>
Sequence sequence_at(const Params& p, int index) {
  SequenceBounds q{0, p.seqlen_q};
  SequenceBounds k{0, p.seqlen_k};
  if (p.cu_seqlens_q) q = SequenceBounds::packed(p.cu_seqlens_q, index, p.seqlen_q);
  if (p.cu_seqlens_k) k = SequenceBounds::packed(p.cu_seqlens_k, index, p.seqlen_k);
  return {index, q, k, VisibleKeys(p.window, q.length, k.length)};
}

// Row `row` of a sequence that begins at row `begin`, in the layout of lse.
template <class Params>
int64_t lse_index(const Params& p, const Sequence& sequence, int head, int row) {
  const int64_t line = p.cu_seqlens_q ? head : int64_t{sequence.index} * p.heads_q + head;
  return line * p.seqlen_q + sequence.q.begin + row;
}

// Rows [row, row + rows) of one head of one sequence, as a tile of the tensor at `data`.
inline TileSource tile_source(Element element, const void* data, const Strides& stride, int sequence, int64_t row,
                              int head, int rows, int columns) {
  const int64_t offset = sequence * stride.batch + row * stride.row + head * stride.head;
  return {element, static_cast<const char*>(data) + offset * element_size(element), stride.row, rows, columns};
}

inline TileTarget tile_target(Element element, void* data, const Strides& stride, int sequence, int64_t row, int head,
                              int rows, int columns) {
  const TileSource source = tile_source(element, data, stride, sequence, row, head, rows, columns);
  return {element, const_cast<void*>(source.data), source.row_stride, rows, columns};
}

// Rows [row, row + rows) of the sequence `index`; `row` counts from the sequence's first.
struct RowTile {
  int index;
  int row;
  int rows;
};

// The tiles of every sequence, `bounds` picking its queries or its keys. A causal tile costs more the further right it
// stands (for keys: left), so first and last alternate: the even shares a ParallelFor hands out are then even in time.
template <class Params>
std::vector<RowTile> row_tiles(const Params& p, SequenceBounds Sequence::* bounds) {
  std::vector<RowTile> tiles;
  for (int index = 0; index < p.batch; ++index) {
    const int length = (sequence_at(p, index).*bounds).length;
    const int count = ceil_div(length, kTile);
    for (int i = 0; i < count; ++i) {
      const int row = (i % 2 == 0 ? i / 2 : count - 1 - i / 2) * kTile;
      tiles.push_back({index, row, min_of(kTile, length - row)});
    }
  }
  return tiles;
}

// Calls body(first, last) for the rows of a packed tensor that no sequence owns: before the first and after the last
// one.
template <class Body>
void for_unowned_rows(const int32_t* cu_seqlens, int batch, int total, Body body) {
  if (!cu_seqlens) return;
  const int first = clamp(cu_seqlens[0], 0, total);
  body(0, first);
  body(clamp(cu_seqlens[batch], first, total), total);
}

// Zeros `rows` rows of every head.
inline void zero_rows(Element element, void* data, const Strides& stride, int64_t first, int64_t last, int heads,
                      int columns) {
  const int64_t bytes = columns * element_size(element);
  for (int64_t row = first; row < last; ++row) {
    for (int head = 0; head < heads; ++head) {
      __builtin_memset(tile_target(element, data, stride, 0, row, head, 1, columns).data, 0,
                       static_cast<size_t>(bytes));
    }
  }
}

// The keys that each query of a tile sees, for TileMask. Columns past the tile's rows see none.
struct VisibleRows {
  int begin[kTile];
  int end[kTile];

  VisibleRows(const VisibleKeys& keys, const RowTile& tile) {
    for (int i = 0; i < kTile; ++i) {
      begin[i] = i < tile.rows ? keys.begin(tile.row + i) : 0;
      end[i] = i < tile.rows ? keys.end(tile.row + i) : 0;
    }
  }
  TileMask mask(const VisibleKeys& keys, int first_key) const {
    return {begin, end, keys.window.sink_tokens, first_key};
  }
};

// The columns of a score tile that holds `count` rows of a tensor.
inline int padded_columns(int count) { return ceil_div(count, kColumnStep) * kColumnStep; }

// transposed (columns, kTile) = tileᵀ, with zeros in the padding.
template <class T>
void transpose_padded(const T* tile, int rows, int columns, T* transposed) {
  transpose(tile, columns, rows, columns, transposed, kTile);
  for (int column = 0; column < columns; ++column) {
    for (int row = rows; row < padded_columns(rows); ++row) transposed[column * kTile + row] = T(0);
  }
}

}  // namespace tilewright::cpu
