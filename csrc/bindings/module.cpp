// The part of tilewright that is no tensor operator. It knows nothing of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "attention/query_range.h"
#include "attention/window.h"
#include "kernels/backward/select.h"
#include "kernels/forward/select.h"

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

pybind11::dict build_info() {
  using namespace pybind11::literals;
  const std::string cuda_version = TILEWRIGHT_CUDA_VERSION;
  return pybind11::dict("version"_a = TILEWRIGHT_VERSION, "kernel_id"_a = TILEWRIGHT_KERNEL_ID,
                        "cuda"_a = !cuda_version.empty(), "cuda_version"_a = cuda_version,
                        "archs"_a = split(TILEWRIGHT_ARCHS), "kernels"_a = split(TILEWRIGHT_KERNELS),
                        "compiler"_a = "gcc " __VERSION__);
}

// What kernels/forward/select.h picks for a problem.
pybind11::dict forward_tile(int head_dim, int head_dim_v, bool softcap, int64_t heads, int seqlen_q, int seqlen_k,
                            std::optional<int> window_left, std::optional<int> window_right, int multiprocessors) {
  using namespace pybind11::literals;
  if (multiprocessors < 1) throw pybind11::value_error("multiprocessors must be at least 1");
  const tilewright::Window unbounded;
  const int index = tilewright::select_forward_tile({head_dim, head_dim_v, softcap, heads, seqlen_q, seqlen_k,
                                                     window_left.value_or(unbounded.left),
                                                     window_right.value_or(unbounded.right), multiprocessors});
  if (index < 0) throw pybind11::value_error("head_dim and head_dim_v must be at most 256");
  const tilewright::ForwardTile& tile = tilewright::kForwardTiles[index];
  return pybind11::dict("head_dim"_a = tile.head_dim, "head_dim_v"_a = tile.head_dim_v, "tile_m"_a = tile.tile_m,
                        "tile_n"_a = tile.tile_n, "stages_k"_a = tile.stages_k, "stages_v"_a = tile.stages_v);
}

// What kernels/backward/select.h picks for a problem.
pybind11::dict backward_tile(int head_dim, int head_dim_v, bool softcap, int seqlen_q, int seqlen_k,
                             std::optional<int> window_left, std::optional<int> window_right, int sink_tokens,
                             bool packed, bool deterministic, int64_t heads_kv, int group, int multiprocessors) {
  using namespace pybind11::literals;
  if (multiprocessors < 1) throw pybind11::value_error("multiprocessors must be at least 1");
  const tilewright::Window unbounded;
  const tilewright::BackwardProblem problem{head_dim,
                                            head_dim_v,
                                            softcap,
                                            seqlen_q,
                                            seqlen_k,
                                            window_left.value_or(unbounded.left),
                                            window_right.value_or(unbounded.right),
                                            sink_tokens,
                                            deterministic,
                                            heads_kv * group,
                                            heads_kv,
                                            packed,
                                            multiprocessors};
  const int index = tilewright::select_backward_tile(problem);
  if (index < 0) throw pybind11::value_error("head_dim and head_dim_v must be at most 256");
  const tilewright::BackwardTile& tile = tilewright::kBackwardTiles[index];
  const tilewright::BackwardHeads heads{
      packed, deterministic && !problem.full(), heads_kv, group, seqlen_q, seqlen_k, problem.span(), multiprocessors};
  const bool whole_heads = tilewright::takes_whole_heads(tile, heads);
  const int64_t tiles = heads_kv * tilewright::ceil_div(seqlen_k, tile.tile_n);
  const bool uneven = packed || !problem.full();
  return pybind11::dict("head_dim"_a = tile.head_dim, "head_dim_v"_a = tile.head_dim_v, "tile_m"_a = tile.tile_m,
                        "tile_n"_a = tile.tile_n, "stages"_a = tile.stages, "stages_k"_a = tile.stages_k,
                        "bulk"_a = tile.add_dq == tilewright::AddDq::kBulk,
                        "second_pass"_a = tile.add_dq == tilewright::AddDq::kSecondPass, "whole_heads"_a = whole_heads,
                        "splits"_a = whole_heads ? 1 : tilewright::select_splits(tile, heads, tiles, uneven));
}

// How the backward walks one sequence, tile of keys after tile of keys: the tiles of queries [begin, end) that it
// visits, and the first of them that none before has visited.
std::vector<std::tuple<int, int, int>> backward_walk(int seqlen_q, int seqlen_k, int tile_m, int tile_n,
                                                     std::optional<int> window_left, std::optional<int> window_right,
                                                     int sink_tokens) {
  const tilewright::Window unbounded;
  const tilewright::Window window{window_left.value_or(unbounded.left), window_right.value_or(unbounded.right),
                                  sink_tokens};
  std::vector<std::tuple<int, int, int>> walk;
  for (int key = 0; key < seqlen_k; key += tile_n) {
    const auto range = tilewright::QueryRange::of(window, seqlen_q, seqlen_k, key, tile_n, tile_m);
    walk.emplace_back(range.begin, range.end, range.first_fresh(window, seqlen_q, seqlen_k, key, tile_m));
  }
  return walk;
}

}  // namespace

PYBIND11_MODULE(_tilewright, module) {
  module.def("build_info", &build_info, "What this binary was built from and what it holds.");
  module.def("forward_tile", &forward_tile, pybind11::arg("head_dim"), pybind11::arg("head_dim_v"),
             pybind11::arg("softcap") = false, pybind11::arg("heads") = 1024, pybind11::arg("seqlen_q") = 4096,
             pybind11::arg("seqlen_k") = 4096, pybind11::arg("window_left") = pybind11::none(),
             pybind11::arg("window_right") = pybind11::none(), pybind11::arg("multiprocessors") = 132,
             "The tile that the Hopper forward uses for a problem; heads are counted over the batch.");
  module.def(
      "backward_tile", &backward_tile, pybind11::arg("head_dim"), pybind11::arg("head_dim_v"),
      pybind11::arg("softcap") = false, pybind11::arg("seqlen_q") = 4096, pybind11::arg("seqlen_k") = 4096,
      pybind11::arg("window_left") = pybind11::none(), pybind11::arg("window_right") = pybind11::none(),
      pybind11::arg("sink_tokens") = 0, pybind11::arg("packed") = false, pybind11::arg("deterministic") = false,
      pybind11::arg("heads_kv") = 64, pybind11::arg("group") = 1, pybind11::arg("multiprocessors") = 132,
      "The tile that the Hopper backward uses for a problem, whether dQ has a second pass, whether a block takes whole "
      "heads, and into how many splits the query heads of a key head are cut; heads_kv are counted over the batch.");
  module.def("backward_walk", &backward_walk, pybind11::arg("seqlen_q"), pybind11::arg("seqlen_k"),
             pybind11::arg("tile_m"), pybind11::arg("tile_n"), pybind11::arg("window_left") = pybind11::none(),
             pybind11::arg("window_right") = pybind11::none(), pybind11::arg("sink_tokens") = 0,
             "For each tile of keys the tiles of queries it visits, [begin, end), and the first that is new.");
}
