#pragma once

#include <cstdint>

namespace tilewright::ptx {

// elect.sync: true in one thread of a warp, which all 32 execute together. It is the same one every time.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected;
}

}  // namespace tilewright::ptx
