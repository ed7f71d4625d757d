#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// mma.sync: D += A B by one warp, D 16×8 in float32, A 16×16 and B 16×8 in 16 bits, all in registers.
namespace tilewright::ptx {

template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define TILEWRIGHT_MMA(ELEMENT, TYPE)                                                                                 \
  template <>                                                                                                         \
  __device__ __forceinline__ void mma_m16n8k16<ELEMENT>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                               \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                     \
  }
TILEWRIGHT_MMA(__nv_bfloat16, "bf16")
TILEWRIGHT_MMA(__half, "f16")
#undef TILEWRIGHT_MMA

}  // namespace tilewright::ptx
