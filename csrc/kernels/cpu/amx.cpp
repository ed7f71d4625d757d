#include "kernels/cpu/amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tilewright::cpu {

#if defined(__x86_64__) && defined(__linux__)
namespace {

#define TILEWRIGHT_AMX \
  __attribute__((target("amx-tile,amx-bf16,avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;
constexpr int kLanes = 16;  // 32-bit lanes of a vector register

TILEWRIGHT_AMX void begin() {
  struct alignas(64) {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = kTileBytes;
    config.rows[tile] = kTileRows;
  }
  __asm__ volatile("" ::: "memory");  // GCC's intrinsic does not say that it reads the structure
  _tile_loadconfig(&config);
}

TILEWRIGHT_AMX void end() { _tile_release(); }

// 2 x 2 tiles of c stay in registers over the depth; tile registers have names, not indices.
TILEWRIGHT_AMX void multiply(const AmxProduct& p) {
  const int depth = amx_padded(p.depth);
  const int64_t a_bytes = depth * static_cast<int64_t>(sizeof(BFloat16));
  constexpr int64_t kLineBytes = kTile * 4;  // of b and of c
  if (p.c_scale) {
    for (int row = 0; row < p.rows; ++row) {
      for (int i = 0; i < kTile; ++i) p.c[row * kTile + i] *= p.c_scale[i];
    }
  }
  __asm__ volatile("" ::: "memory");  // _tile_loadd does not say that it reads a and b
  for (int row = 0; row < p.rows; row += 2 * kTileRows) {
    for (int column = 0; column < p.columns; column += 2 * kLanes) {
      float* c0 = p.c + row * kTile + column;
      float* c1 = c0 + kTileRows * kTile;
      if (p.accumulate) {
        _tile_loadd(0, c0, kLineBytes);
        _tile_loadd(1, c0 + kLanes, kLineBytes);
        _tile_loadd(2, c1, kLineBytes);
        _tile_loadd(3, c1 + kLanes, kLineBytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int k = 0; k < depth; k += kAmxPad) {
        const BFloat16* a = p.a + row * depth + k;
        const BFloat16Pair* b = p.b + k / 2 * kTile + column;
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(5, a + kTileRows * depth, a_bytes);
        _tile_loadd(6, b, kLineBytes);
        _tile_loadd(7, b + kLanes, kLineBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c0, kLineBytes);
      _tile_stored(1, c0 + kLanes, kLineBytes);
      _tile_stored(2, c1, kLineBytes);
      _tile_stored(3, c1 + kLanes, kLineBytes);
    }
  }
}

typedef uint32_t Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// One step of a 16 x 16 transposition: swaps the off-diagonal blocks of every 2 kStep x 2 kStep square.
template <int kStep>
TILEWRIGHT_AMX TILEWRIGHT_INLINE void swap_blocks(Lanes (&line)[kLanes]) {
  typedef int32_t Index __attribute__((vector_size(4 * kLanes)));
  Index upper, lower;
  for (int i = 0; i < kLanes; ++i) {
    upper[i] = i & kStep ? kLanes + i - kStep : i;
    lower[i] = i & kStep ? kLanes + i : i + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const __m512i first = reinterpret_cast<__m512i>(line[i]);
    const __m512i second = reinterpret_cast<__m512i>(line[i + kStep]);
    line[i] = reinterpret_cast<Lanes>(_mm512_permutex2var_epi32(first, reinterpret_cast<__m512i>(upper), second));
    line[i + kStep] =
        reinterpret_cast<Lanes>(_mm512_permutex2var_epi32(first, reinterpret_cast<__m512i>(lower), second));
  }
}

// to (columns, to_stride) = fromᵀ; rows and columns multiples of 16
TILEWRIGHT_AMX void transpose_lanes(const uint32_t* from, int from_stride, int rows, int columns, uint32_t* to,
                                    int to_stride) {
  for (int row = 0; row < rows; row += kLanes) {
    for (int column = 0; column < columns; column += kLanes) {
      Lanes line[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        line[i] = *reinterpret_cast<const Lanes*>(from + (row + i) * from_stride + column);
      }
      swap_blocks<1>(line);
      swap_blocks<2>(line);
      swap_blocks<4>(line);
      swap_blocks<8>(line);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) *reinterpret_cast<Lanes*>(to + (column + i) * to_stride + row) = line[i];
    }
  }
}

TILEWRIGHT_AMX void pack_a(const TileSource& source, BFloat16* a) {
  const int columns = amx_padded(source.columns);
  for (int row = 0; row < source.rows; ++row) {
    const BFloat16* from = static_cast<const BFloat16*>(source.data) + row * source.row_stride;
    BFloat16* to = a + row * columns;
    __builtin_memcpy(to, from, static_cast<size_t>(source.columns) * sizeof(BFloat16));
    __builtin_memset(to + source.columns, 0, static_cast<size_t>(columns - source.columns) * sizeof(BFloat16));
  }
  __builtin_memset(a + source.rows * columns, 0,
                   static_cast<size_t>((kTile - source.rows) * columns) * sizeof(BFloat16));
}

TILEWRIGHT_AMX void pack_b_transposed(const TileSource& source, BFloat16* scratch, BFloat16Pair* b) {
  const int pairs = amx_padded(source.columns) / 2;
  pack_a(source, scratch);
  transpose_lanes(reinterpret_cast<const uint32_t*>(scratch), pairs, kTile, pairs, b, kTile);
}

TILEWRIGHT_AMX void pack_a_transposed(const TileSource& source, BFloat16* scratch, BFloat16* a) {
  // Rows in pairs first: the transposition then moves 32 bits at a time.
  const int columns = amx_padded(source.columns);
  uint32_t* pairs = reinterpret_cast<uint32_t*>(scratch);
  for (int row = 0; row < kTile; row += 2) {
    const BFloat16* first = static_cast<const BFloat16*>(source.data) + row * source.row_stride;
    const BFloat16* second = first + source.row_stride;
    uint32_t* to = pairs + row / 2 * columns;
    const int filled = row < source.rows ? source.columns : 0;
    if (row + 1 < source.rows) {
      for (int i = 0; i < filled; ++i) to[i] = uint32_t{first[i].bits} | uint32_t{second[i].bits} << 16;
    } else {
      for (int i = 0; i < filled; ++i) to[i] = first[i].bits;
    }
    for (int i = filled; i < columns; ++i) to[i] = 0;
  }
  transpose_lanes(pairs, columns, kTile / 2, columns, reinterpret_cast<uint32_t*>(a), kTile / 2);
}

TILEWRIGHT_AMX void pack_b(const float* tile, int rows, BFloat16Pair* b) {
  for (int row = 0; row < kTile; row += 2) {
    const float* first = tile + row * kTile;
    const float* second = first + kTile;
    BFloat16Pair* to = b + row / 2 * kTile;
    const bool has_first = row < rows;
    const bool has_second = row + 1 < rows;
    for (int i = 0; i < kTile; ++i) {
      const uint32_t low = has_first ? FromCompute<BFloat16>::convert(first[i]).bits : 0;
      const uint32_t high = has_second ? FromCompute<BFloat16>::convert(second[i]).bits : 0;
      to[i] = low | high << 16;
    }
  }
}

// The operating system hands out the tile registers only to a process that asks: Linux,
// Documentation/arch/x86/xstate.rst.
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22;
  constexpr unsigned kTileFeature = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kBf16) == 0 || (d & kTileFeature) == 0) return false;
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl")) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

constexpr AmxOps kOps = {begin, end, multiply, pack_a, pack_a_transposed, pack_b_transposed, pack_b};

}  // namespace

const AmxOps* amx_ops() {
  static const bool available = has_amx();
  return available ? &kOps : nullptr;
}
#else
const AmxOps* amx_ops() { return nullptr; }
#endif

}  // namespace tilewright::cpu
