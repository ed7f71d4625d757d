#pragma once

#include <cstdint>

#include "attention/host_device.h"

namespace tilewright {

// The rows [begin, begin + length) of a packed tensor that belong to one sequence.
struct SequenceBounds {
  int begin;
  int length;

  // cu_seqlens comes from the user's device memory: whatever it holds, the rows stay inside the tensor.
  TILEWRIGHT_HOST_DEVICE static SequenceBounds packed(const int32_t* cu_seqlens, int sequence, int total) {
    const int begin = clamp(cu_seqlens[sequence], 0, total);
    return {begin, clamp(cu_seqlens[sequence + 1], begin, total) - begin};
  }
};

}  // namespace tilewright
