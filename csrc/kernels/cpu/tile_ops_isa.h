// No #pragma once: tile_ops.cpp includes this once for each instruction set, inside a namespace of its own, with
//
//     TILEWRIGHT_TARGET    the function attribute that turns the instruction set on
//     kVectorBytes         bytes of a vector register
//     kPanelRows, kPanelVectors    the accumulators of the product's inner loop, rows x vectors
//
// Everything below bears TILEWRIGHT_TARGET or is always inlined, so that no function compiled for a newer processor can
// be picked by the linker for an older one.

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(kVectorBytes), may_alias));
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
};

// kRows x kVectors accumulators stay in registers over the whole depth.
template <class T, int kRows, int kVectors>
TILEWRIGHT_TARGET void multiply_panel(const Product<T>& p, int row0, int column0) {
  using Vector = typename VectorOf<T>::type;
  constexpr int kLanes = VectorOf<T>::kLanes;
  const T* a = p.a + static_cast<int64_t>(row0) * p.a_row;
  const T* b = p.b + column0;
  T* c = p.c + row0 * kTile + column0;
  Vector sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector{};
  }
  for (int k = 0; k < p.depth; ++k) {
    Vector line[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) line[v] = *reinterpret_cast<const Vector*>(b + k * kTile + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T factor = a[r * p.a_row + k * p.a_depth];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * line[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Vector& target = *reinterpret_cast<Vector*>(c + r * kTile + v * kLanes);
      if (p.c_scale) {
        target = target * *reinterpret_cast<const Vector*>(p.c_scale + column0 + v * kLanes) + sum[r][v];
      } else {
        target = p.accumulate ? target + sum[r][v] : sum[r][v];
      }
    }
  }
}

template <class T, int kVectors>
TILEWRIGHT_TARGET void multiply_columns(const Product<T>& p, int column0) {
  int row = 0;
  for (; row + kPanelRows <= p.rows; row += kPanelRows) multiply_panel<T, kPanelRows, kVectors>(p, row, column0);
  for (; row + 4 <= p.rows; row += 4) multiply_panel<T, 4, kVectors>(p, row, column0);
  for (; row + 2 <= p.rows; row += 2) multiply_panel<T, 2, kVectors>(p, row, column0);
  if (row < p.rows) multiply_panel<T, 1, kVectors>(p, row, column0);
}

template <class T>
TILEWRIGHT_TARGET void multiply_block(const Product<T>& p) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  constexpr int kPanel = kPanelVectors * kLanes;
  int column = 0;
  for (; column + kPanel <= p.columns; column += kPanel) multiply_columns<T, kPanelVectors>(p, column);
  for (; column < p.columns; column += kLanes) multiply_columns<T, 1>(p, column);
}

template <class T>
TILEWRIGHT_TARGET void multiply(const Product<T>& p) {
  for (int k = 0; k < p.depth; k += kDepthBlock) {
    Product<T> block = p;
    block.a += k * p.a_depth;
    block.b += k * kTile;
    block.depth = min_of(kDepthBlock, p.depth - k);
    if (k > 0) {
      block.accumulate = true;
      block.c_scale = nullptr;
    }
    multiply_block<T>(block);
  }
}

// The softmax's steps are loops over columns inside a loop over keys: each column is a row of the attention matrix.
template <class T, bool kSoftcap, bool kMask>
TILEWRIGHT_TARGET void softmax_steps(const SoftmaxBlock<T>& block) {
  const TileMask mask = kMask ? *block.mask : TileMask{};
  const int columns = block.columns;
  const T inverse_softcap = kSoftcap ? T(1) / block.softcap : T(0);
  alignas(64) T block_max[kTile];
  alignas(64) T shift[kTile];
  alignas(64) T block_sum[kTile];
  for (int i = 0; i < columns; ++i) block_max[i] = OnlineSoftmax<T>::kMinusInfinity;
  for (int j = 0; j < block.keys; ++j) {
    T* scores = block.scores + j * kTile;
    const int key = mask.first_key + j;
    const bool is_sink = key < mask.sink_tokens;
    for (int i = 0; i < columns; ++i) {
      T s = block.scale * scores[i];
      if (kSoftcap) s = block.softcap * tanh(s * inverse_softcap);
      if (kMask) {
        const bool visible = (key < mask.end[i]) & (is_sink | (key >= mask.begin[i]));
        s = visible ? s : OnlineSoftmax<T>::kMinusInfinity;
      }
      scores[i] = s;
      block_max[i] = s > block_max[i] ? s : block_max[i];
    }
  }
  for (int i = 0; i < columns; ++i) {
    OnlineSoftmax<T> row{block.max[i], block.sum[i]};
    block.correction[i] = row.advance(block_max[i], Exp{});
    block.max[i] = row.max;
    block.sum[i] = row.sum;
    shift[i] = row.shift();
    block_sum[i] = 0;
  }
  for (int j = 0; j < block.keys; ++j) {
    T* scores = block.scores + j * kTile;
    for (int i = 0; i < columns; ++i) {
      const T p = exp(scores[i] - shift[i]);
      scores[i] = p;
      block_sum[i] += p;
    }
  }
  for (int i = 0; i < columns; ++i) block.sum[i] += block_sum[i];
}

template <class T>
TILEWRIGHT_TARGET void softmax(const SoftmaxBlock<T>& block) {
  if (block.softcap > T(0)) {
    block.mask ? softmax_steps<T, true, true>(block) : softmax_steps<T, true, false>(block);
  } else {
    block.mask ? softmax_steps<T, false, true>(block) : softmax_steps<T, false, false>(block);
  }
}

template <class T, bool kSoftcap, bool kKeysInColumns>
TILEWRIGHT_TARGET void gradient_steps(const GradientBlock<T>& block) {
  const int columns = block.columns;
  const T inverse_softcap = kSoftcap ? T(1) / block.softcap : T(0);
  for (int r = 0; r < block.rows; ++r) {
    T* scores = block.scores + r * kTile;
    T* dp = block.dp + r * kTile;
    for (int i = 0; i < columns; ++i) {
      const int query = kKeysInColumns ? r : i;
      const T unit = kSoftcap ? tanh(scores[i] * inverse_softcap) : T(0);
      const T s = kSoftcap ? block.softcap * unit : scores[i];
      const T p = exp(s - block.lse[query]);
      const T ds = p * (dp[i] - block.delta[query]);
      scores[i] = p;
      dp[i] = kSoftcap ? ds * (T(1) - unit * unit) : ds;
    }
  }
}

// A select, not a product: what stands at a masked place may be Inf or NaN.
template <class T, bool kKeysInColumns>
TILEWRIGHT_TARGET void gradient_mask(const GradientBlock<T>& block) {
  const TileMask mask = *block.mask;
  for (int r = 0; r < block.rows; ++r) {
    T* scores = block.scores + r * kTile;
    T* dp = block.dp + r * kTile;
    for (int i = 0; i < block.columns; ++i) {
      const int query = kKeysInColumns ? r : i;
      const int key = mask.first_key + (kKeysInColumns ? i : r);
      const bool visible = (key < mask.end[query]) & ((key < mask.sink_tokens) | (key >= mask.begin[query]));
      scores[i] = visible ? scores[i] : T(0);
      dp[i] = visible ? dp[i] : T(0);
    }
  }
}

template <class T>
TILEWRIGHT_TARGET void gradient(const GradientBlock<T>& block) {
  if (block.keys_in_columns) {
    block.softcap > T(0) ? gradient_steps<T, true, true>(block) : gradient_steps<T, false, true>(block);
    if (block.mask) gradient_mask<T, true>(block);
  } else {
    block.softcap > T(0) ? gradient_steps<T, true, false>(block) : gradient_steps<T, false, false>(block);
    if (block.mask) gradient_mask<T, false>(block);
  }
}

template <class T>
TILEWRIGHT_TARGET void column_dot(const T* a, const T* b, int depth, T* result) {
  alignas(64) T total[kTile] = {};
  for (int block = 0; block < depth; block += kDepthBlock) {
    alignas(64) T sum[kTile] = {};
    for (int k = block; k < min_of(block + kDepthBlock, depth); ++k) {
      for (int i = 0; i < kTile; ++i) sum[i] += a[k * kTile + i] * b[k * kTile + i];
    }
    for (int i = 0; i < kTile; ++i) total[i] += sum[i];
  }
  for (int i = 0; i < kTile; ++i) result[i] = total[i];
}

template <class T, class E>
TILEWRIGHT_TARGET void load_as(const TileSource& source, T scale, T* __restrict__ tile) {
  for (int r = 0; r < source.rows; ++r) {
    const E* from = static_cast<const E*>(source.data) + r * source.row_stride;
    T* to = tile + r * source.columns;
    for (int i = 0; i < source.columns; ++i) to[i] = scale * to_compute(from[i]);
  }
}

TILEWRIGHT_TARGET void load(const TileSource& source, float scale, float* tile) {
  if (source.element == Element::kFloat32) return load_as<float, float>(source, scale, tile);
  if (source.element == Element::kBFloat16) return load_as<float, BFloat16>(source, scale, tile);
  load_as<float, Float16>(source, scale, tile);
}

TILEWRIGHT_TARGET void load(const TileSource& source, double scale, double* tile) {
  load_as<double, double>(source, scale, tile);
}

template <class T, class E>
TILEWRIGHT_TARGET void store_as(const T* __restrict__ tile, const T* row_scale, const TileTarget& target) {
  for (int r = 0; r < target.rows; ++r) {
    const T* from = tile + r * target.columns;
    E* to = static_cast<E*>(target.data) + r * target.row_stride;
    const T scale = row_scale ? row_scale[r] : T(1);
    for (int i = 0; i < target.columns; ++i) to[i] = FromCompute<E>::convert(scale * from[i]);
  }
}

TILEWRIGHT_TARGET void store(const float* tile, const float* row_scale, const TileTarget& target) {
  if (target.element == Element::kFloat32) return store_as<float, float>(tile, row_scale, target);
  if (target.element == Element::kBFloat16) return store_as<float, BFloat16>(tile, row_scale, target);
  store_as<float, Float16>(tile, row_scale, target);
}

TILEWRIGHT_TARGET void store(const double* tile, const double* row_scale, const TileTarget& target) {
  store_as<double, double>(tile, row_scale, target);
}

template <class T>
constexpr TileOps<T> kOps = {kName, multiply<T>, softmax<T>, gradient<T>, column_dot<T>, load, store};
