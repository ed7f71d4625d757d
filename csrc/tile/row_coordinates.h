#pragma once

namespace tilewright {

// Rows are addressed by three coordinates. In a plain tensor these are (row, batch, 0). In a packed one the tensor map
// has the row dimension three times, as (x, y, z) with strides (s, s, 2^34 - s) bytes and x < 2^30: at z = 2^30 the
// address is base + (x + y - 2^30) s, modulo 2^64, and with y the end of a sequence and x = 2^30 - length + row the
// bound on x is the end of the sequence. So the copy engine itself keeps to the sequence: rows behind its end are read
// as zero and never written, and what the next sequence holds can't reach this one.
struct RowCoordinates {
  static constexpr int kRagged = 1 << 30;
  int row;
  int outer;
  int wrap;

  __device__ __forceinline__ static RowCoordinates plain(int row, int batch) { return {row, batch, 0}; }
  __device__ __forceinline__ static RowCoordinates packed(int begin, int length, int row) {
    return {kRagged - length + row, begin + length, kRagged};
  }
};

}  // namespace tilewright
