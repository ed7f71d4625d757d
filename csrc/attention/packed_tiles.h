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

// The rows of a packed tensor in parts: those before the first sequence, the sequences, and those behind the last.
//
//     first_row[i] = max over j ≤ i of cu_seqlens[j], within the tensor
//
// The running maximum keeps the parts disjoint whatever cu_seqlens holds.
struct PackedParts {
  const int* first_row;  // (sequences + 1,)
  int sequences;
  int total;

  TILEWRIGHT_HOST_DEVICE int count() const { return sequences + 2; }
  TILEWRIGHT_HOST_DEVICE bool is_sequence(int part) const { return part >= 1 && part <= sequences; }
  TILEWRIGHT_HOST_DEVICE int begin(int part) const { return part == 0 ? 0 : first_row[part - 1]; }
  TILEWRIGHT_HOST_DEVICE int length(int part) const {
    return (part == sequences + 1 ? total : first_row[part]) - begin(part);
  }
};

}  // namespace tilewright
