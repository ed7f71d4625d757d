#pragma once

#include <cstdint>

namespace tilewright {

// Where a role stands in a ring of stages. A consumer waits for `full` with `parity`, a producer for `empty` with
// `parity ^ 1`, which passes at once on the first lap.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace tilewright
