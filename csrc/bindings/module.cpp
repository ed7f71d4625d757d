// The part of tilewright that is no tensor operator. It knows nothing of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

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
                             std::optional<int> window_left, std::optional<int> window_right) {
  using namespace pybind11::literals;
  const tilewright::Window unbounded;
  const int index =
      tilewright::select_backward_tile({head_dim, head_dim_v, softcap, seqlen_q, seqlen_k,
                                        window_left.value_or(unbounded.left), window_right.value_or(unbounded.right)});
  if (index < 0) throw pybind11::value_error("head_dim and head_dim_v must be at most 256");
  const tilewright::BackwardTile& tile = tilewright::kBackwardTiles[index];
  return pybind11::dict("head_dim"_a = tile.head_dim, "head_dim_v"_a = tile.head_dim_v, "tile_m"_a = tile.tile_m,
                        "tile_n"_a = tile.tile_n, "stages"_a = tile.stages, "stages_k"_a = tile.stages_k);
}

}  // namespace

PYBIND11_MODULE(_tilewright, module) {
  module.def("build_info", &build_info, "What this binary was built from and what it holds.");
  module.def("forward_tile", &forward_tile, pybind11::arg("head_dim"), pybind11::arg("head_dim_v"),
             pybind11::arg("softcap") = false, pybind11::arg("heads") = 1024, pybind11::arg("seqlen_q") = 4096,
             pybind11::arg("seqlen_k") = 4096, pybind11::arg("window_left") = pybind11::none(),
             pybind11::arg("window_right") = pybind11::none(), pybind11::arg("multiprocessors") = 132,
             "The tile that the Hopper forward uses for a problem; heads are counted over the batch.");
  module.def("backward_tile", &backward_tile, pybind11::arg("head_dim"), pybind11::arg("head_dim_v"),
             pybind11::arg("softcap") = false, pybind11::arg("seqlen_q") = 4096, pybind11::arg("seqlen_k") = 4096,
             pybind11::arg("window_left") = pybind11::none(), pybind11::arg("window_right") = pybind11::none(),
             "The tile that the Hopper backward uses for a problem.");
}
