#pragma once

#include <cstdint>

#include "ptx/elect.h"
#include "ptx/mbarrier.h"

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

// By a warp: one arrival, which comes when the wait of each of its threads is surely over.
__device__ __forceinline__ void release(uint64_t& empty) {
  if (ptx::elect_one()) ptx::mbarrier_arrive(&empty);
}

}  // namespace tilewright
