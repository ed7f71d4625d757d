#pragma once

#include <cstdint>
#include <functional>

namespace tilewright {

// Runs body(begin, end) over pieces of [0, count) on the host's threads. The operators pass PyTorch's own pool, so that
// torch.set_num_threads holds here too and the kernels need no torch.
using ParallelFor = void (*)(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace tilewright
