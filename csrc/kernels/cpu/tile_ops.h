#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "kernels/forward/params.h"

// What the CPU kernels do to a tile. Tiles live in a thread's own memory, in T: double for float64, float for the rest.
//
// A score tile has kTile columns, and the columns are the vector lanes. The forward and dQ put queries there (Sᵀ = K
// Qᵀ), dK and dV put keys there (S = Q Kᵀ). Then the softmax needs no sum across a vector, and of all operands only the
// one tile that stays for the whole loop has to be transposed: the other side of a product is read one number at a
// time.
namespace tilewright::cpu {

constexpr int kTile = 64;

// c = a b, or c += a b, or c = c diag(c_scale) + a b.
template <class T>
struct Product {
  const T* a;  // (rows, depth): a[row * a_row + k * a_depth]
  int a_row;
  int a_depth;
  const T* b;  // (depth, kTile)
  T* c;        // (rows, kTile)
  bool accumulate;
  const T* c_scale;  // (kTile,) or null
  int rows;
  int depth;
  int columns;  // a multiple of kColumnStep
};

constexpr int kColumnStep = 16;

// Sums over the depth run in blocks of this many: a long chain of additions loses more digits.
constexpr int kDepthBlock = 32;

// The rows of a tensor that fill a tile.
struct TileSource {
  Element element;
  const void* data;
  int64_t row_stride;  // elements
  int rows;
  int columns;
};

struct TileTarget {
  Element element;
  void* data;
  int64_t row_stride;
  int rows;
  int columns;
};

// Which keys of a block, first_key and on, the rows of a tile of queries see: attention/window.h, per row.
struct TileMask {
  const int* begin;  // (kTile,)
  const int* end;    // (kTile,)
  int sink_tokens;
  int first_key;
};

// One block of keys enters the softmax: scores (keys, kTile) become exp(scale s - m).
template <class T>
struct SoftmaxBlock {
  T* scores;
  int keys;
  int columns;
  T scale;
  T softcap;
  const TileMask* mask;  // null: every key is visible
  T* max;                // (kTile,)
  T* sum;                // (kTile,)
  T* correction;         // (kTile,) out: the factor of the output so far
};

// Scores become P = exp(s - lse), dp becomes dS = P (dp - delta) times the softcap's derivative.
template <class T>
struct GradientBlock {
  T* scores;
  T* dp;
  const T* lse;  // a query's; +inf where it sees nothing
  const T* delta;
  bool keys_in_columns;
  int rows;
  int columns;
  T softcap;
  const TileMask* mask;
};

template <class T>
struct TileOps {
  const char* isa;
  void (*multiply)(const Product<T>&);
  void (*softmax)(const SoftmaxBlock<T>&);
  void (*gradient)(const GradientBlock<T>&);
  // result[column] = sum_k a[k, column] b[k, column] over tiles (depth, kTile), added in the order of multiply
  void (*column_dot)(const T* a, const T* b, int depth, T* result);
  // tile (rows, columns), dense, = scale * source
  void (*load)(const TileSource&, T scale, T* tile);
  // target = tile (rows, columns), dense, with row r scaled by row_scale[r] (null: 1)
  void (*store)(const T* tile, const T* row_scale, const TileTarget&);
};

// The fastest the processor has; the same for the whole life of the process.
template <class T>
const TileOps<T>& tile_ops();

// to[column * to_stride + row] = from[row * from_stride + column]
template <class T>
void transpose(const T* from, int from_stride, int rows, int columns, T* to, int to_stride) {
  constexpr int kBlock = 8;  // rows and columns that share their cache lines
  for (int row0 = 0; row0 < rows; row0 += kBlock) {
    const int row_end = row0 + kBlock < rows ? row0 + kBlock : rows;
    for (int column = 0; column < columns; ++column) {
      for (int row = row0; row < row_end; ++row) to[column * to_stride + row] = from[row * from_stride + column];
    }
  }
}

// Uninitialised memory on a cache line's edge.
template <class T>
class TileBuffer {
 public:
  explicit TileBuffer(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kAlignment))) {}
  ~TileBuffer() { ::operator delete(data_, kAlignment); }
  TileBuffer(const TileBuffer&) = delete;
  TileBuffer& operator=(const TileBuffer&) = delete;
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace tilewright::cpu
