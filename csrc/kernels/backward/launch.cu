#include "kernels/backward/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention/score_scale.h"
#include "kernels/backward/launch_sm90.h"
#include "kernels/backward/prepare_packed.cuh"
#include "kernels/backward/select.h"
#include "kernels/backward/sinks.cuh"
#include "kernels/device.h"
#include "kernels/tensor_map.h"

namespace tilewright {
namespace {

using backward::kConsumerWarps;
using backward::KernelParams;
using backward::kSecondTileN;
using backward::Launch;
using backward::PackedPairTile;
using backward::RowParams;
using backward::SecondPassParams;

// Heads worked on at the same time should leave Q, dO and the sums of dQ in the L2 cache (50 MB).
constexpr int64_t kGroupBytes = 32 << 20;

// How a problem is cut up.
struct Shape {
  BackwardTile tile;
  int index;  // in kBackwardTiles
  bool packed;
  int64_t head_tiles;   // of queries, of one head; packed: of all parts
  int64_t row_tiles;    // of all heads
  int64_t key_tiles;    // of one head; packed: at most, of all parts
  int64_t heads_kv;     // times batch, and splits; packed: times splits
  bool edges;           // not every query of a sequence sees every key
  bool uneven;          // tiles of keys differ in length
  BackwardHeads heads;  // with splits the group is the longest of them
  int splits;           // of the query heads of a key head
  bool second_pass;     // for dQ
  bool turns;           // blocks add to its sums in
  bool overlapping;     // groups of heads
  int64_t steps;        // of a tile of keys, about, where not all queries see all keys
  bool whole_heads;     // a block takes
  int64_t head_group;   // heads at work at the same time
  int64_t head_groups;
  int64_t ahead;  // see Zeros
  bool waiting;   // a block may wait for another: for its turn, for zeros, or for another split's sum
};

// Whole heads come in their order: all are as long. Else: key tiles of one length run best one head after the other:
// the blocks at work then read the same queries at the same time. Others fill each other's gaps, with as many heads as
// all blocks need and the cache holds. Those that add in turns wait for the other blocks of their head, each a step
// behind the one before: the more heads at a time, the fewer, but too many leave nothing in the cache. Short tiles come
// faster than that, so groups of heads overlap, if there are enough of them.
void choose_order(const BackwardParams& p, Shape& shape) {
  const int64_t blocks = shape.heads.multiprocessors;
  const int64_t bytes_a_head =
      int64_t{std::max(p.seqlen_q, 1)} * shape.heads.group * (6 * p.head_dim + 2 * p.head_dim_v);
  const int64_t fitting = std::max<int64_t>(1, kGroupBytes / bytes_a_head);
  const auto over = [](int64_t a, int64_t b) { return (a + b - 1) / std::max<int64_t>(b, 1); };
  const int64_t few = blocks * 8 / p.head_dim;  // a step takes longer with more columns
  const int64_t needed = 1 + blocks * 3 / 2 / std::max<int64_t>(shape.key_tiles, 1);
  // Of a packed batch all sequences come with a head: fewer heads are enough. Where every query sees every key, only
  // the last tiles leave gaps.
  const int64_t sequences = shape.packed ? std::max(p.batch, 1) : 1;
  const int64_t least = !shape.packed ? 2 * few
                        : shape.edges ? over(2 * few, sequences)
                                      : std::min(2 * few, over(4 * blocks, shape.key_tiles));
  int64_t heads = shape.uneven ? std::max(std::min(fitting, needed), least) : 1;
  if (shape.turns) {
    const int64_t even = std::clamp(fitting * 3 / 2, blocks / 8, blocks / 4);
    const int64_t at_once = std::max(blocks * 7 / (4 * (shape.steps + 2)), blocks / 22);
    const int64_t overlapping = shape.edges ? over(at_once, sequences) : at_once;
    shape.overlapping = shape.uneven && shape.heads_kv >= 6 * overlapping;
    const int64_t most = std::max<int64_t>(!shape.uneven ? even : shape.overlapping ? overlapping : shape.heads_kv, 1);
    // Groups of one size, nearly: few heads left over would wait longest.
    const int64_t groups = std::max<int64_t>(over(shape.heads_kv, most), 1);
    heads = over(shape.heads_kv, groups);
  }
  // Tiles of one split keep in step, those of several do not: as few splits at a time as will do, as many every time,
  // if there is room for one. In turns few heads wait.
  const int64_t heads_of_split = std::max<int64_t>(shape.heads_kv / shape.splits, 1);
  if (shape.splits > 1 && shape.uneven && !shape.overlapping && heads_of_split <= heads) {
    const int64_t at_work = shape.packed ? heads : shape.turns ? std::max(needed, blocks / 16) : needed;
    int64_t at_once = std::min<int64_t>(over(at_work, heads_of_split), shape.splits);
    while (shape.splits % at_once != 0) ++at_once;
    heads = at_once * heads_of_split;
  }
  shape.head_group = shape.whole_heads ? 1 : std::max<int64_t>(std::min(heads, shape.heads_kv), 1);
  shape.head_groups = over(shape.heads_kv, shape.head_group);
  // Zeros come so early that nobody waits for them. Where the additions set the pace anyway, they cost less before the
  // main kernel; and there they are for a packed batch and with splits. With turns there are none.
  const bool before =
      shape.turns || shape.packed || shape.splits > 1 || (shape.uneven && shape.tile.add_dq == AddDq::kRegisters);
  const int64_t tiles = std::max<int64_t>(shape.head_group * shape.key_tiles, 1);
  shape.ahead = before ? shape.head_groups : 1 + over(blocks * 3 / 2, tiles);
  const bool zeros_meanwhile = !shape.second_pass && !shape.whole_heads && shape.ahead < shape.head_groups;
  shape.waiting = shape.turns || shape.splits > 1 || zeros_meanwhile;
}

// Of a packed batch the host knows the mean length.
cudaError_t choose_shape(const BackwardParams& p, Shape& shape) {
  shape.packed = p.cu_seqlens_q != nullptr;
  const int sequences = shape.packed ? std::max(p.batch, 1) : 1;
  const int64_t times = shape.packed ? sequences : p.batch;
  int blocks = 0;
  const cudaError_t status = multiprocessors(blocks);
  if (status != cudaSuccess) return status;
  const BackwardProblem problem{p.head_dim,
                                p.head_dim_v,
                                p.softcap > 0,
                                ceil_div(p.seqlen_q, sequences),
                                ceil_div(p.seqlen_k, sequences),
                                p.window.left,
                                p.window.right,
                                p.window.sink_tokens,
                                p.deterministic,
                                times * p.heads_q,
                                times * p.heads_kv,
                                shape.packed,
                                blocks};
  shape.index = select_backward_tile(problem);
  if (shape.index < 0) return cudaErrorInvalidValue;
  shape.tile = kBackwardTiles[shape.index];
  const int batch = shape.packed ? 1 : p.batch;
  shape.head_tiles =
      shape.packed ? max_packed_tiles(p.seqlen_q, p.batch, shape.tile.tile_m) : ceil_div(p.seqlen_q, shape.tile.tile_m);
  shape.key_tiles =
      shape.packed ? max_packed_tiles(p.seqlen_k, p.batch, shape.tile.tile_n) : ceil_div(p.seqlen_k, shape.tile.tile_n);
  shape.row_tiles = shape.head_tiles * p.heads_q * batch;
  shape.heads_kv = int64_t{p.heads_kv} * batch;
  shape.edges = !problem.full();
  shape.uneven = shape.packed || shape.edges;
  shape.heads = {shape.packed,   p.deterministic && shape.uneven,
                 shape.heads_kv, p.heads_q / p.heads_kv,
                 p.seqlen_q,     p.seqlen_k,
                 problem.span(), blocks};
  shape.whole_heads = takes_whole_heads(shape.tile, shape.heads);
  shape.second_pass = shape.tile.add_dq == AddDq::kSecondPass;
  shape.turns = p.deterministic && !shape.whole_heads && !shape.second_pass;
  shape.splits = 1;
  if (!shape.whole_heads) {
    shape.splits = select_splits(shape.tile, shape.heads, shape.key_tiles * shape.heads_kv, shape.uneven);
    shape.heads.group = ceil_div(shape.heads.group, shape.splits);
    shape.heads_kv *= shape.splits;
  }
  if (shape.row_tiles > kMostTiles || shape.key_tiles * shape.heads_kv > kMostTiles) return cudaErrorInvalidValue;
  const int64_t window =
      std::min<int64_t>(int64_t{p.window.left} + p.window.right + shape.tile.tile_n, problem.seqlen_q);
  const bool one_edge = p.window.left >= problem.seqlen_k || p.window.right >= problem.seqlen_k;
  shape.steps =
      shape.heads.group * ceil_div(static_cast<int>(one_edge ? problem.seqlen_q / 2 : window), shape.tile.tile_m);
  choose_order(p, shape);
  return cudaSuccess;
}

bool has_queries(const BackwardParams& p) { return p.seqlen_q > 0 && (p.cu_seqlens_q || p.batch > 0); }
bool has_keys(const BackwardParams& p) { return p.seqlen_k > 0; }

// Of queries; packed: at most, of all parts.
int64_t second_tiles_of_head(const BackwardParams& p, const Shape& shape) {
  return shape.packed ? max_packed_tiles(p.seqlen_q, p.batch, kSecondTileM) : ceil_div(p.seqlen_q, kSecondTileM);
}

// Tiles of keys of all key heads, which all splits of one share.
int64_t split_tiles(const Shape& shape) { return shape.key_tiles * shape.heads_kv / shape.splits; }
int64_t split_counters(const Shape& shape) { return shape.splits > 1 ? kConsumerWarps * split_tiles(shape) : 0; }

struct Workspace {
  float* dq_sum;
  float* lse2;
  float* delta;
  int2* turns;
  int* zero_shares;
  int* next_tile;
  float* split_sum;
  int* splits_done;
  int* num_packed;
  int* first_row_q;
  int* first_row_k;
  int* first_tile;
  PackedPairTile* tiles;
  PackedPairTile* second_tiles;
  size_t bytes;
};

Workspace workspace_at(void* memory, const BackwardParams& p, const Shape& shape) {
  Workspace w{};
  const auto take = [&](auto*& to, int64_t count) {
    constexpr size_t kAlignment = 256;
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(static_cast<char*>(memory) + w.bytes);
    w.bytes += (count * sizeof(*to) + kAlignment - 1) / kAlignment * kAlignment;
  };
  const int64_t rows = shape.row_tiles * shape.tile.tile_m;
  if (!shape.second_pass) {
    take(w.dq_sum, shape.whole_heads ? sums_of_whole_heads(shape.tile, shape.heads) : rows * shape.tile.head_dim);
    if (!shape.turns) take(w.zero_shares, shape.head_groups);
  }
  if (shape.turns) take(w.turns, shape.row_tiles);
  take(w.lse2, rows);
  take(w.delta, rows);
  take(w.next_tile, 2);
  if (shape.splits > 1) {
    take(w.split_sum, split_tiles(shape) * shape.tile.tile_n * (shape.tile.head_dim + shape.tile.head_dim_v));
    take(w.splits_done, split_counters(shape));
  }
  if (shape.packed) {
    take(w.num_packed, 2);
    take(w.first_row_q, int64_t{p.batch} + 1);
    take(w.first_row_k, int64_t{p.batch} + 1);
    take(w.first_tile, int64_t{p.batch} + 3);
    take(w.tiles, shape.key_tiles);
    if (shape.second_pass) take(w.second_tiles, second_tiles_of_head(p, shape));
  }
  return w;
}

KernelParams kernel_params(const BackwardParams& p, const Shape& shape, const Workspace& w) {
  KernelParams kernel{};
  kernel.lse2 = w.lse2;
  kernel.delta = w.delta;
  kernel.dq_sum = w.dq_sum;
  kernel.turns = w.turns;
  kernel.zeros = {w.zero_shares, static_cast<int>(shape.ahead)};
  kernel.order = {static_cast<int>(shape.heads_kv), Divisor::of(static_cast<int>(shape.head_group))};
  kernel.overlapping = shape.overlapping;
  kernel.next_tile = w.next_tile;
  kernel.waiting = shape.waiting;
  kernel.dq = shape.whole_heads ? p.dq : nullptr;
  kernel.dk_rows = p.dk;
  kernel.dv_rows = p.dv;
  kernel.dq_stride = p.dq_stride;
  kernel.dk_stride = p.dk_stride;
  kernel.dv_stride = p.dv_stride;
  kernel.window = p.window;
  kernel.tiles = static_cast<int>(shape.key_tiles);
  kernel.head_tiles = static_cast<int>(shape.head_tiles);
  kernel.packed = w.tiles;
  kernel.num_packed = w.num_packed;
  kernel.heads_kv = Divisor::of(p.heads_kv);
  kernel.all_kv = static_cast<int>(shape.heads_kv / shape.splits);
  kernel.group = p.heads_q / p.heads_kv;
  kernel.splits = shape.splits;
  kernel.split_heads = shape.heads.group;
  kernel.split_sum = w.split_sum;
  kernel.splits_done = w.splits_done;
  kernel.seqlen_q = p.seqlen_q;
  kernel.seqlen_k = p.seqlen_k;
  kernel.head_dim = p.head_dim;
  kernel.head_dim_v = p.head_dim_v;
  const double scale = std::abs(p.scale);  // its sign is in q
  const ScoreScale of_scores = ScoreScale::of(scale, p.softcap);
  kernel.scale = static_cast<float>(scale);
  kernel.dq_scale = static_cast<float>(p.scale);
  kernel.score_scale = of_scores.before_tanh;
  kernel.to_log2 = of_scores.to_log2;
  return kernel;
}

void set_second_pass(SecondPassParams& second, const BackwardParams& p, const Shape& shape, const KernelParams& first,
                     const Workspace& w) {
  second.first = first;
  second.dq = p.dq;
  second.dq_stride = p.dq_stride;
  second.order = TileOrder::of_queries(p.heads_q * (shape.packed ? 1 : p.batch), first.group,
                                       p.window.causal(p.seqlen_k), shape.packed ? std::max(p.batch, 1) : 1,
                                       int64_t{p.seqlen_k} * (p.head_dim + p.head_dim_v) * 2);
  second.tiles = static_cast<int>(second_tiles_of_head(p, shape));
  second.next_tile = w.next_tile + 1;
  second.packed = w.second_tiles;
  second.num_packed = shape.packed ? w.num_packed + 1 : nullptr;
  second.heads_q = Divisor::of(p.heads_q);
  second.heads_per_kv = Divisor::of(first.group);
}

cudaError_t make_tensor_maps(Launch& launch, const BackwardParams& p, const Shape& shape) {
  KernelParams& kernel = launch.main;
  const bool half = p.element == Element::kFloat16;
  const auto map = [&](CUtensorMap& to, const void* data, int dim, int heads, int rows, const Strides& strides,
                       int box) {
    return encode_tensor_map(to, {data, half, dim, heads, rows, p.batch, strides, shape.packed, box});
  };
  const int tile_m = shape.tile.tile_m, tile_n = shape.tile.tile_n;
  cudaError_t status = map(kernel.q, p.q, p.head_dim, p.heads_q, p.seqlen_q, p.q_stride, tile_m);
  if (status == cudaSuccess) {
    status = map(kernel.dout, p.dout, p.head_dim_v, p.heads_q, p.seqlen_q, p.dout_stride, tile_m);
  }
  if (status == cudaSuccess) status = map(kernel.k, p.k, p.head_dim, p.heads_kv, p.seqlen_k, p.k_stride, tile_n);
  if (status == cudaSuccess) status = map(kernel.v, p.v, p.head_dim_v, p.heads_kv, p.seqlen_k, p.v_stride, tile_n);
  if (shape.tile.stores_by_copy()) {
    if (status == cudaSuccess) status = map(kernel.dk, p.dk, p.head_dim, p.heads_kv, p.seqlen_k, p.dk_stride, 16);
    if (status == cudaSuccess) status = map(kernel.dv, p.dv, p.head_dim_v, p.heads_kv, p.seqlen_k, p.dv_stride, 16);
  }
  if (shape.second_pass) {
    SecondPassParams& second = launch.second;
    if (status == cudaSuccess)
      status = map(second.k, p.k, p.head_dim, p.heads_kv, p.seqlen_k, p.k_stride, kSecondTileN);
    if (status == cudaSuccess)
      status = map(second.v, p.v, p.head_dim_v, p.heads_kv, p.seqlen_k, p.v_stride, kSecondTileN);
  }
  return status;
}

RowParams row_params(const BackwardParams& p, const Shape& shape, const KernelParams& kernel, const Workspace& w) {
  RowParams rows{};
  rows.out = p.out;
  rows.dout = p.dout;
  rows.dq = kernel.dq || shape.second_pass || !has_keys(p) ? nullptr : p.dq;
  rows.out_stride = p.out_stride;
  rows.dout_stride = p.dout_stride;
  rows.dq_stride = p.dq_stride;
  rows.lse = static_cast<const float*>(p.lse);
  rows.dlse = static_cast<const float*>(p.dlse);
  rows.sinks = static_cast<const float*>(p.sinks);
  rows.dsinks = static_cast<float*>(p.dsinks);
  rows.lse2 = w.lse2;
  rows.delta = w.delta;
  rows.dq_sum = w.dq_sum;
  if (!shape.whole_heads && !shape.second_pass && !shape.turns) {
    const int64_t heads = std::min(shape.ahead * shape.head_group, shape.heads_kv);
    rows.zero_tiles = static_cast<int>(std::min(heads * shape.heads.group * shape.head_tiles, shape.row_tiles));
  }
  rows.zero_shares = w.zero_shares;
  rows.head_groups = static_cast<int>(shape.head_groups);
  rows.turns = kernel.turns;
  rows.splits_done = kernel.splits_done;
  rows.split_counters = split_counters(shape);
  if (p.cu_seqlens_q) rows.parts = {w.first_row_q, p.batch, p.seqlen_q};
  rows.next_tile = kernel.next_tile;
  rows.batch = p.cu_seqlens_q ? 1 : p.batch;
  rows.seqlen_q = p.seqlen_q;
  rows.heads_q = p.heads_q;
  rows.head_tiles = kernel.head_tiles;
  rows.head_dim = p.head_dim;
  rows.head_dim_v = p.head_dim_v;
  rows.scale = static_cast<float>(p.scale);
  return rows;
}

template <class Element, int kIndex = 0>
cudaError_t launch_tile(const Launch& launch, int index, cudaStream_t stream) {
  if (index == kIndex) return backward::launch_instance<Element, kIndex>(launch, stream);
  if constexpr (kIndex + 1 < kNumBackwardTiles) return launch_tile<Element, kIndex + 1>(launch, index, stream);
  return cudaErrorInvalidValue;
}

// Without queries no kernel has anything to add up.
cudaError_t clear_gradients(const BackwardParams& p, cudaStream_t stream) {
  const int64_t keys = (p.cu_seqlens_k ? 1 : int64_t{p.batch}) * p.seqlen_k * p.heads_kv;
  cudaError_t status = cudaSuccess;
  const auto clear = [&](void* data, int64_t bytes) {
    if (status == cudaSuccess && data && bytes > 0) status = cudaMemsetAsync(data, 0, bytes, stream);
  };
  clear(p.dk, keys * p.head_dim * 2);
  clear(p.dv, keys * p.head_dim_v * 2);
  clear(p.dsinks, p.heads_q * static_cast<int64_t>(sizeof(float)));
  return status;
}

}  // namespace

size_t backward_workspace_bytes(const BackwardParams& params) {
  Shape shape{};
  if (!has_queries(params) || choose_shape(params, shape) != cudaSuccess) return 0;
  return workspace_at(nullptr, params, shape).bytes;
}

cudaError_t backward_sm90(const BackwardParams& params, void* workspace, cudaStream_t stream) {
  if (!has_queries(params)) return clear_gradients(params, stream);
  Shape shape{};
  cudaError_t status = choose_shape(params, shape);
  if (status != cudaSuccess) return status;
  const Workspace w = workspace_at(workspace, params, shape);
  Launch launch{};
  launch.main = kernel_params(params, shape, w);
  const int blocks = shape.heads.multiprocessors;
  launch.rows = row_params(params, shape, launch.main, w);
  launch.row_tiles = shape.row_tiles;
  const int64_t portions = shape.whole_heads ? shape.heads_kv : shape.key_tiles * shape.heads_kv;
  launch.blocks = has_keys(params) ? std::min<int64_t>(blocks, portions) : 0;
  if (has_keys(params)) status = make_tensor_maps(launch, params, shape);
  if (has_keys(params) && shape.second_pass) {
    set_second_pass(launch.second, params, shape, launch.main, w);
    launch.second_blocks = std::min<int64_t>(blocks, int64_t{launch.second.tiles} * launch.second.order.heads);
  }
  if (status == cudaSuccess && shape.packed) {
    status = start(
        backward::prepare_packed, {1, kPrepareThreads, 0}, stream,
        backward::PrepareParams{params.cu_seqlens_q, params.cu_seqlens_k, params.batch, params.seqlen_q,
                                params.seqlen_k, shape.tile.tile_m, shape.tile.tile_n, params.window, w.first_row_q,
                                w.first_row_k, w.first_tile, w.num_packed, w.tiles, w.second_tiles});
  }
  if (status != cudaSuccess) return status;
  status = params.element == Element::kFloat16 ? launch_tile<__half>(launch, shape.index, stream)
                                               : launch_tile<__nv_bfloat16>(launch, shape.index, stream);
  if (status == cudaSuccess && !has_keys(params)) {
    const int64_t rows = (shape.packed ? 1 : int64_t{params.batch}) * params.seqlen_q;
    status = cudaMemsetAsync(params.dq, 0, rows * params.heads_q * params.head_dim * 2, stream);
  }
  if (status == cudaSuccess && params.dsinks) {
    status = start_overlapping(backward::sum_dsinks, {params.heads_q, backward::kSinkThreads, 0}, stream,
                               backward::SinkParams{launch.rows, shape.tile.tile_m});
  }
  return status;
}

}  // namespace tilewright
