#pragma once

#include <cstdint>

#include "ptx/math.h"

namespace tilewright {

// How many of a thread's columns of an accumulator lie before `end` >= 0, which counts from column().
__device__ __forceinline__ int columns_before(int end) { return end / 8 * 2 + min(end % 8, 2); }

// The float32 accumulator of one warpgroup: 64 rows × kColumns. A thread holds two rows, `row()` and `row() + 8`, and
// of each the columns 8 j + column() and + 1: values[4 j + 2 (row half) + (column parity)].
template <int kCols>
struct Accumulator {
  static constexpr int kColumns = kCols;
  static constexpr int kValues = kCols / 2;
  float values[kValues];

  __device__ __forceinline__ static int row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
  __device__ __forceinline__ static int column(int thread) { return thread % 4 * 2; }
  __device__ __forceinline__ static constexpr int row_half(int i) { return i / 2 % 2; }
  // Which of the thread's columns values[i] lies in.
  __device__ __forceinline__ static constexpr int nth_column(int i) { return i / 4 * 2 + i % 2; }

  // The asynchronous products write these registers behind the compiler's back: an access must not move across.
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int i = 0; i < kValues; ++i) asm volatile("" : "+f"(values[i])::"memory");
  }
  __device__ __forceinline__ void fill(float x) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = x;
  }
  // Row r of the thread's two is multiplied by factor[r].
  __device__ __forceinline__ void scale_rows(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] *= factor[row_half(i)];
  }
};

// The A operand of a product, 64 rows × kColumns in 16 bits: registers of one thread, four a step of 16 columns.
template <class Element, int kCols>
struct OperandA {
  static constexpr int kSteps = kCols / 16;
  uint32_t steps[kSteps][4];

  // In 16 bits an accumulator's layout is that of the A operand: no data changes its thread.
  __device__ __forceinline__ void pack_step(const Accumulator<kCols>& from, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      steps[step][i] = ptx::pack<Element>(from.values[8 * step + 2 * i], from.values[8 * step + 2 * i + 1]);
    }
  }
  __device__ __forceinline__ void fill_step(int step, uint32_t x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) steps[step][i] = x;
  }
  // Packs now what would otherwise be packed just before the product: the accumulator would stay in its registers.
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int x = 0; x < 4; ++x) asm volatile("" : "+r"(steps[i][x])::"memory");
    }
  }
  __device__ __forceinline__ void pack(const Accumulator<kCols>& from) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) pack_step(from, step);
  }
};

}  // namespace tilewright
