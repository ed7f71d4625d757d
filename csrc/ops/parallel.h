#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace tilewright::ops {

// Runs body over pieces of [0, count) on PyTorch's threads. The threads take the pieces one after another: a causal
// tile costs what its place costs, and equal shares would leave half the threads waiting.
inline void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  if (count <= 1 || threads <= 1) {
    if (count > 0) body(0, count);
    return;
  }
  constexpr int64_t kPiecesPerThread = 8;
  struct Work {
    const std::function<void(int64_t, int64_t)>& body;
    int64_t count;
    int64_t piece;
    std::atomic<int64_t> next{0};
  } work{body, count, std::max<int64_t>(1, count / (threads * kPiecesPerThread))};
  const auto run = [](int64_t, int64_t, void* context) {
    Work& work = *static_cast<Work*>(context);
    for (;;) {
      const int64_t begin = work.next.fetch_add(work.piece, std::memory_order_relaxed);
      if (begin >= work.count) return;
      work.body(begin, std::min(begin + work.piece, work.count));
    }
  };
  const int64_t workers = std::min<int64_t>(threads, count);
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, workers, 1, run, &work));
}

}  // namespace tilewright::ops
