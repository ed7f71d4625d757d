#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// wgmma: D (+)= A B by one warpgroup, D 64×N in float32 registers, A 64×16 from registers or shared memory, B 16×N from
// shared memory. The operands from shared memory are named by matrix descriptors (tile/shared_tile.h).
namespace tilewright::ptx {

// Orders earlier register accesses before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Which dimension of an operand lies contiguous in shared memory: its 16 (kK) or its N, for A its M (kMN).
enum class Major { kK = 0, kMN = 1 };

// m64nNk16. `accumulate` false overwrites D.
template <class Element, int kN>
struct Wgmma;

// An instruction's text names each register, so there is one definition a width. REGISTERS is N / 2; the operands
// behind the accumulator are numbered from there.
#define TILEWRIGHT_D8(i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define TILEWRIGHT_D12 TILEWRIGHT_D8(0), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define TILEWRIGHT_D16 TILEWRIGHT_D8(0), TILEWRIGHT_D8(8)
#define TILEWRIGHT_D24 TILEWRIGHT_D8(0), TILEWRIGHT_D8(8), TILEWRIGHT_D8(16)
#define TILEWRIGHT_D32 TILEWRIGHT_D8(0), TILEWRIGHT_D8(8), TILEWRIGHT_D8(16), TILEWRIGHT_D8(24)
#define TILEWRIGHT_D40 TILEWRIGHT_D8(0), TILEWRIGHT_D8(8), TILEWRIGHT_D8(16), TILEWRIGHT_D8(24), TILEWRIGHT_D8(32)
#define TILEWRIGHT_D48 \
  TILEWRIGHT_D8(0), TILEWRIGHT_D8(8), TILEWRIGHT_D8(16), TILEWRIGHT_D8(24), TILEWRIGHT_D8(32), TILEWRIGHT_D8(40)
#define TILEWRIGHT_D64                                                                                            \
  TILEWRIGHT_D8(0), TILEWRIGHT_D8(8), TILEWRIGHT_D8(16), TILEWRIGHT_D8(24), TILEWRIGHT_D8(32), TILEWRIGHT_D8(40), \
      TILEWRIGHT_D8(48), TILEWRIGHT_D8(56)
#define TILEWRIGHT_D96                                                                                            \
  TILEWRIGHT_D8(0), TILEWRIGHT_D8(8), TILEWRIGHT_D8(16), TILEWRIGHT_D8(24), TILEWRIGHT_D8(32), TILEWRIGHT_D8(40), \
      TILEWRIGHT_D8(48), TILEWRIGHT_D8(56), TILEWRIGHT_D8(64), TILEWRIGHT_D8(72), TILEWRIGHT_D8(80), TILEWRIGHT_D8(88)
#define TILEWRIGHT_D128                                                                                           \
  TILEWRIGHT_D8(0), TILEWRIGHT_D8(8), TILEWRIGHT_D8(16), TILEWRIGHT_D8(24), TILEWRIGHT_D8(32), TILEWRIGHT_D8(40), \
      TILEWRIGHT_D8(48), TILEWRIGHT_D8(56), TILEWRIGHT_D8(64), TILEWRIGHT_D8(72), TILEWRIGHT_D8(80),              \
      TILEWRIGHT_D8(88), TILEWRIGHT_D8(96), TILEWRIGHT_D8(104), TILEWRIGHT_D8(112), TILEWRIGHT_D8(120)
#define TILEWRIGHT_NAMES12 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11"
#define TILEWRIGHT_NAMES24 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define TILEWRIGHT_NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TILEWRIGHT_NAMES32                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TILEWRIGHT_NAMES40                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define TILEWRIGHT_NAMES48                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TILEWRIGHT_NAMES64                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TILEWRIGHT_NAMES96                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TILEWRIGHT_NAMES128                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define TILEWRIGHT_WGMMA(ELEMENT, TYPE, N, REGISTERS, A0, A1, A2, A3, RS_B, RS_ADD, RS_MAJOR, SS_A, SS_B, SS_ADD,   \
                         SS_MAJOR_A, SS_MAJOR)                                                                      \
  template <>                                                                                                       \
  struct Wgmma<ELEMENT, N> {                                                                                        \
    template <Major kMajor>                                                                                         \
    __device__ __forceinline__ static void rs(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b,            \
                                              bool accumulate) {                                                    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " RS_ADD                                                       \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TILEWRIGHT_NAMES##REGISTERS \
                   "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " RS_B ", p, 1, 1, " RS_MAJOR ";\n}"                       \
                   : TILEWRIGHT_D##REGISTERS                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),         \
                     "n"(static_cast<int>(kMajor)));                                                                \
    }                                                                                                               \
    template <Major kMajor, Major kMajorA = Major::kK>                                                              \
    __device__ __forceinline__ static void ss(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulate) {     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " SS_ADD                                                       \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TILEWRIGHT_NAMES##REGISTERS \
                   "}, " SS_A ", " SS_B ", p, 1, 1, " SS_MAJOR_A ", " SS_MAJOR ";\n}"                               \
                   : TILEWRIGHT_D##REGISTERS                                                                        \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorA)),             \
                     "n"(static_cast<int>(kMajor)));                                                                \
    }                                                                                                               \
  };
TILEWRIGHT_WGMMA(__nv_bfloat16, "bf16", 24, 12, "%12", "%13", "%14", "%15", "%16", "%17", "%18", "%12", "%13", "%14",
                 "%15", "%16")
TILEWRIGHT_WGMMA(__half, "f16", 24, 12, "%12", "%13", "%14", "%15", "%16", "%17", "%18", "%12", "%13", "%14", "%15",
                 "%16")
TILEWRIGHT_WGMMA(__nv_bfloat16, "bf16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%16", "%17", "%18",
                 "%19", "%20")
TILEWRIGHT_WGMMA(__half, "f16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%16", "%17", "%18", "%19",
                 "%20")
TILEWRIGHT_WGMMA(__nv_bfloat16, "bf16", 48, 24, "%24", "%25", "%26", "%27", "%28", "%29", "%30", "%24", "%25", "%26",
                 "%27", "%28")
TILEWRIGHT_WGMMA(__half, "f16", 48, 24, "%24", "%25", "%26", "%27", "%28", "%29", "%30", "%24", "%25", "%26", "%27",
                 "%28")
TILEWRIGHT_WGMMA(__nv_bfloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%32", "%33", "%34",
                 "%35", "%36")
TILEWRIGHT_WGMMA(__half, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%32", "%33", "%34", "%35",
                 "%36")
TILEWRIGHT_WGMMA(__nv_bfloat16, "bf16", 80, 40, "%40", "%41", "%42", "%43", "%44", "%45", "%46", "%40", "%41", "%42",
                 "%43", "%44")
TILEWRIGHT_WGMMA(__half, "f16", 80, 40, "%40", "%41", "%42", "%43", "%44", "%45", "%46", "%40", "%41", "%42", "%43",
                 "%44")
TILEWRIGHT_WGMMA(__nv_bfloat16, "bf16", 96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54", "%48", "%49", "%50",
                 "%51", "%52")
TILEWRIGHT_WGMMA(__half, "f16", 96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54", "%48", "%49", "%50", "%51",
                 "%52")
TILEWRIGHT_WGMMA(__nv_bfloat16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%64", "%65", "%66",
                 "%67", "%68")
TILEWRIGHT_WGMMA(__half, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%64", "%65", "%66", "%67",
                 "%68")
TILEWRIGHT_WGMMA(__nv_bfloat16, "bf16", 192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102", "%96", "%97",
                 "%98", "%99", "%100")
TILEWRIGHT_WGMMA(__half, "f16", 192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102", "%96", "%97", "%98", "%99",
                 "%100")
TILEWRIGHT_WGMMA(__nv_bfloat16, "bf16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134", "%128",
                 "%129", "%130", "%131", "%132")
TILEWRIGHT_WGMMA(__half, "f16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134", "%128", "%129",
                 "%130", "%131", "%132")

#undef TILEWRIGHT_WGMMA
#undef TILEWRIGHT_NAMES12
#undef TILEWRIGHT_NAMES16
#undef TILEWRIGHT_NAMES24
#undef TILEWRIGHT_D12
#undef TILEWRIGHT_D16
#undef TILEWRIGHT_D24
#undef TILEWRIGHT_NAMES32
#undef TILEWRIGHT_D32
#undef TILEWRIGHT_NAMES40
#undef TILEWRIGHT_D40
#undef TILEWRIGHT_NAMES48
#undef TILEWRIGHT_D48
#undef TILEWRIGHT_NAMES64
#undef TILEWRIGHT_D64
#undef TILEWRIGHT_NAMES96
#undef TILEWRIGHT_D96
#undef TILEWRIGHT_NAMES128
#undef TILEWRIGHT_D128
#undef TILEWRIGHT_D8

}  // namespace tilewright::ptx
