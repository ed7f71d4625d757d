#pragma once

#include <cstdint>

#include "attention/host_device.h"

namespace tilewright {

// The work list of a packed batch, made on the device from cu_seqlens: which tile of which sequence, longest first.
// Rows that belong to no sequence (before the first, behind the last) form sequences of their own, without keys.
struct PackedTile {
  int first_query;  // within the sequence
  int q_begin;      // of the sequence in the packed tensor
  int seqlen_q;
  int k_begin;  // -1: rows of no sequence
  int seqlen_k;
};

// The list has at most this many tiles, whatever cu_seqlens holds: each sequence ends with one tile that is not full,
// and so do the rows before the first and behind the last sequence.
TILEWRIGHT_HOST_DEVICE constexpr int64_t max_packed_tiles(int total_q, int sequences, int tile) {
  return total_q / tile + sequences + 2;
}

}  // namespace tilewright
