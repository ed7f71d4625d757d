#pragma once

#include <cstdint>

#include "kernels/cpu/element.h"
#include "kernels/cpu/tile_ops.h"

// bfloat16 products on Intel's tile registers (AMX), several times faster than converting to float. PyTorch's attention
// uses them too. An instruction multiplies A (16 rows, 32 numbers) by B (32 lines, 16 columns) and adds to 16 x 16
// floats; of B it wants lines in pairs, B[2k] and B[2k + 1] side by side in 32 bits. Everything is padded to kAmxPad
// with zeros.
namespace tilewright::cpu {

constexpr int kAmxPad = 32;

constexpr int amx_padded(int count) { return ceil_div(count, kAmxPad) * kAmxPad; }

// Two bfloat16, the first in the low half.
using BFloat16Pair = uint32_t;

struct AmxProduct {
  const BFloat16* a;      // (amx_padded(rows), amx_padded(depth))
  const BFloat16Pair* b;  // (amx_padded(depth) / 2, kTile)
  float* c;               // (amx_padded(rows), kTile): c = a b, or c += a b
  bool accumulate;
  const float* c_scale;  // (kTile,) or null: scales each column of c before the sum
  int rows;
  int depth;
  int columns;
};

struct AmxOps {
  // Every other call stands between these two, on the same thread.
  void (*begin)();
  void (*end)();
  void (*multiply)(const AmxProduct&);
  // a = source, padded to (kTile, amx_padded(columns))
  void (*pack_a)(const TileSource& source, BFloat16* a);
  // a = sourceᵀ, padded to (amx_padded(columns), kTile); scratch like it
  void (*pack_a_transposed)(const TileSource& source, BFloat16* scratch, BFloat16* a);
  // b = sourceᵀ, padded to (amx_padded(columns) / 2, kTile); scratch: (kTile, amx_padded(columns))
  void (*pack_b_transposed)(const TileSource& source, BFloat16* scratch, BFloat16Pair* b);
  // b = tile (rows, kTile) rounded to bfloat16, padded to (kTile / 2, kTile)
  void (*pack_b)(const float* tile, int rows, BFloat16Pair* b);
};

// Null where the processor or the operating system has no tile registers for us; the same for the whole life of the
// process.
const AmxOps* amx_ops();

}  // namespace tilewright::cpu
