#include "kernels/cpu/tile_ops.h"

#include "attention/online_softmax.h"
#include "kernels/cpu/element.h"
#include "kernels/cpu/vector_math.h"

namespace tilewright::cpu {
namespace {

struct Exp {
  template <class T>
  TILEWRIGHT_INLINE T operator()(T x) const {
    return cpu::exp(x);
  }
};

#if defined(__x86_64__)
#define TILEWRIGHT_X86 1
#else
#define TILEWRIGHT_X86 0
#endif

// What every processor of the architecture has: SSE2 with 16 registers on x86-64, NEON with 32 on aarch64.
namespace baseline {
#define TILEWRIGHT_TARGET
constexpr char kName[] = "baseline";
constexpr int kVectorBytes = 16;
constexpr int kPanelRows = TILEWRIGHT_X86 ? 4 : 6;
constexpr int kPanelVectors = TILEWRIGHT_X86 ? 2 : 4;
#include "kernels/cpu/tile_ops_isa.h"
#undef TILEWRIGHT_TARGET
}  // namespace baseline

#if TILEWRIGHT_X86
namespace avx2 {
#define TILEWRIGHT_TARGET __attribute__((target("avx2,fma")))
constexpr char kName[] = "avx2";
constexpr int kVectorBytes = 32;
constexpr int kPanelRows = 6;
constexpr int kPanelVectors = 2;
#include "kernels/cpu/tile_ops_isa.h"
#undef TILEWRIGHT_TARGET
}  // namespace avx2

namespace avx512 {
#define TILEWRIGHT_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
constexpr char kName[] = "avx512";
constexpr int kVectorBytes = 64;
constexpr int kPanelRows = 6;
constexpr int kPanelVectors = 4;
#include "kernels/cpu/tile_ops_isa.h"
#undef TILEWRIGHT_TARGET
}  // namespace avx512

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

}  // namespace

template <class T>
const TileOps<T>& tile_ops() {
#if TILEWRIGHT_X86
  static const TileOps<T>& chosen = has_avx512() ? avx512::kOps<T> : has_avx2() ? avx2::kOps<T> : baseline::kOps<T>;
  return chosen;
#else
  return baseline::kOps<T>;
#endif
}

template const TileOps<float>& tile_ops<float>();
template const TileOps<double>& tile_ops<double>();

}  // namespace tilewright::cpu
