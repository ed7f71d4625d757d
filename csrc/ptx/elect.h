#pragma once

#include <cstdint>

namespace tilewright::ptx {

// elect.sync: true in one thread of a warp, which all 32 execute together. It is the same one every time. The compiler
// knows that it is alone: around a copy of another `if` for one thread it makes a loop over all that might be there.
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
