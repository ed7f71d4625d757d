#include "kernels/forward/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "attention/score_scale.h"
#include "kernels/device.h"
#include "kernels/forward/launch_sm90.h"
#include "kernels/forward/prepare_packed.cuh"
#include "kernels/forward/select.h"
#include "kernels/tensor_map.h"
#include "ptx/grid_dependency.h"

namespace tilewright {
namespace {

using forward::KernelParams;

struct Workspace {
  int* next_tile;
  int* num_tiles;
  int* first_row;
  int* first_tile;
  PackedTile* tiles;
  size_t bytes;
};

Workspace workspace_at(void* memory, const ForwardParams& p, const ForwardTile& tile) {
  Workspace w{};
  const auto take = [&](int64_t ints) {
    int* at = reinterpret_cast<int*>(static_cast<char*>(memory) + w.bytes);
    w.bytes += ints * sizeof(int);
    return at;
  };
  w.next_tile = take(1);
  w.num_tiles = take(3);
  if (p.cu_seqlens_q) {
    w.first_row = take(p.batch + 1);
    w.first_tile = take(p.batch + 3);
    constexpr int kInts = sizeof(PackedTile) / sizeof(int);
    w.tiles = reinterpret_cast<PackedTile*>(take(max_packed_tiles(p.seqlen_q, p.batch, tile.tile_m) * kInts));
  }
  return w;
}

// With few tiles a block the static order is as good, and saves a kernel. A packed batch's list is only counted on the
// device.
bool needs_counter(const ForwardParams& p, const ForwardTile& tile, int blocks) {
  constexpr int64_t kStaticRounds = 4;
  const int64_t tiles = int64_t{ceil_div(p.seqlen_q, tile.tile_m)} * p.heads_q * p.batch;
  return p.cu_seqlens_q || tiles > blocks * kStaticRounds;
}

struct CounterParams {
  int* counter;
};

// Not a memset: that would wait for the end of the kernel before, and the kernel behind it for its end.
__global__ void zero_counter(const CounterParams p) {
  ptx::launch_dependent_grids();
  ptx::wait_for_prerequisite_grids();
  *p.counter = 0;
}

// The tile for a problem. Of a packed batch the host knows the mean length.
cudaError_t choose_tile(const ForwardParams& p, int& index, int& blocks) {
  const cudaError_t status = multiprocessors(blocks);
  if (status != cudaSuccess) return status;
  const int sequences = p.cu_seqlens_q ? std::max(p.batch, 1) : 1;
  index = select_forward_tile({p.head_dim, p.head_dim_v, p.softcap > 0, int64_t{p.heads_q} * p.batch,
                               ceil_div(p.seqlen_q, sequences), ceil_div(p.seqlen_k, sequences), p.window.left,
                               p.window.right, blocks});
  return index < 0 ? cudaErrorInvalidValue : cudaSuccess;
}

template <class Element, int kIndex = 0>
cudaError_t launch_tile(const KernelParams& params, int index, int blocks, cudaStream_t stream) {
  if (index == kIndex) return forward::launch_instance<Element, kIndex>(params, blocks, stream);
  if constexpr (kIndex + 1 < kNumForwardTiles) {
    return launch_tile<Element, kIndex + 1>(params, index, blocks, stream);
  }
  return cudaErrorInvalidValue;
}

KernelParams kernel_params(const ForwardParams& p, const ForwardTile& tile) {
  KernelParams kernel{};
  kernel.out_rows = p.out;
  kernel.out_stride = p.out_stride;
  kernel.lse = static_cast<float*>(p.lse);
  kernel.sinks = static_cast<const float*>(p.sinks);
  kernel.lse_head_stride = p.seqlen_q;
  kernel.lse_batch_stride = p.cu_seqlens_q ? 0 : int64_t{p.heads_q} * p.seqlen_q;
  kernel.window = p.window;
  kernel.heads_q = Divisor::of(p.heads_q);
  kernel.heads_per_kv = Divisor::of(p.heads_q / p.heads_kv);
  kernel.seqlen_q = p.seqlen_q;
  kernel.seqlen_k = p.seqlen_k;
  kernel.head_dim_v = p.head_dim_v;
  const ScoreScale of_scores = ScoreScale::of(p.scale, p.softcap);
  kernel.score_scale = of_scores.before_tanh;
  kernel.to_log2 = of_scores.to_log2;
  kernel.tiles = ceil_div(p.seqlen_q, tile.tile_m);

  kernel.order = TileOrder::of_queries(p.heads_q * (p.cu_seqlens_q ? 1 : p.batch), p.heads_q / p.heads_kv,
                                       p.window.causal(p.seqlen_k), p.cu_seqlens_q ? std::max(p.batch, 1) : 1,
                                       int64_t{p.seqlen_k} * (p.head_dim + p.head_dim_v) * 2);
  return kernel;
}

cudaError_t make_tensor_maps(KernelParams& kernel, const ForwardParams& p, const ForwardTile& tile) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const bool half = p.element == Element::kFloat16;
  const auto map = [&](CUtensorMap& to, const void* data, int dim, int heads, int rows, const Strides& strides,
                       int box) {
    return encode_tensor_map(to, {data, half, dim, heads, rows, p.batch, strides, packed, box});
  };
  cudaError_t status = map(kernel.q, p.q, p.head_dim, p.heads_q, p.seqlen_q, p.q_stride, 64);
  if (status == cudaSuccess) status = map(kernel.k, p.k, p.head_dim, p.heads_kv, p.seqlen_k, p.k_stride, tile.tile_n);
  if (status == cudaSuccess) status = map(kernel.v, p.v, p.head_dim_v, p.heads_kv, p.seqlen_k, p.v_stride, tile.tile_n);
  if (status == cudaSuccess) status = map(kernel.out, p.out, p.head_dim_v, p.heads_q, p.seqlen_q, p.out_stride, 64);
  return status;
}

}  // namespace

size_t forward_workspace_bytes(const ForwardParams& params) {
  int index = 0, blocks = 0;
  if (choose_tile(params, index, blocks) != cudaSuccess) return 0;  // the launch will say so
  if (!needs_counter(params, kForwardTiles[index], blocks)) return 0;
  return workspace_at(nullptr, params, kForwardTiles[index]).bytes;
}

cudaError_t forward_sm90(const ForwardParams& params, void* workspace, cudaStream_t stream) {
  int index = 0, blocks = 0;
  cudaError_t status = choose_tile(params, index, blocks);
  if (status != cudaSuccess) return status;
  const int64_t heads = int64_t{params.heads_q} * (params.cu_seqlens_q ? 1 : params.batch);
  if (heads > kMostTiles) return cudaErrorInvalidValue;
  const ForwardTile& tile = kForwardTiles[index];
  KernelParams kernel = kernel_params(params, tile);
  status = make_tensor_maps(kernel, params, tile);
  if (status != cudaSuccess) return status;
  const Workspace w = workspace_at(workspace, params, tile);
  if (params.cu_seqlens_q) {
    kernel.next_tile = w.next_tile;
    kernel.packed_tiles = w.tiles;
    kernel.num_packed_tiles = w.num_tiles;
    const int64_t tiles = max_packed_tiles(params.seqlen_q, params.batch, tile.tile_m) * kernel.order.heads;
    if (tiles > kMostTiles) return cudaErrorInvalidValue;
    blocks = static_cast<int>(std::min<int64_t>(blocks, tiles));
    status = start(forward::prepare_packed, {1, kPrepareThreads, 0}, stream,
                   forward::PrepareParams{params.cu_seqlens_q, params.cu_seqlens_k, params.batch, params.seqlen_q,
                                          params.seqlen_k, tile.tile_m, tile.tile_n, params.window, w.next_tile,
                                          w.num_tiles, w.first_row, w.first_tile, w.tiles});
  } else {
    const int64_t tiles = int64_t{kernel.tiles} * kernel.order.heads;
    if (tiles > kMostTiles) return cudaErrorInvalidValue;
    if (needs_counter(params, tile, blocks)) {
      kernel.next_tile = w.next_tile;
      status = start_overlapping(zero_counter, {1, 1, 0}, stream, CounterParams{w.next_tile});
    }
    blocks = static_cast<int>(std::min<int64_t>(blocks, tiles));
  }
  if (status != cudaSuccess) return status;
  return params.element == Element::kFloat16 ? launch_tile<__half>(kernel, index, blocks, stream)
                                             : launch_tile<__nv_bfloat16>(kernel, index, blocks, stream);
}

}  // namespace tilewright
