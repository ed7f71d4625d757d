#pragma once

#include "attention/host_device.h"

namespace tilewright {

// Who sees whom. Query i of a sequence stands at position i + seqlen_k - seqlen_q (bottom-right alignment) and sees
//
//     key j  <=>  j < end(i)  and  (j >= begin(i)  or  j < sink_tokens)
//
// begin(i) and end(i) never decrease with i: a tile of queries [m0, m1) is described by the ranges of its first and
// last row. The right edge holds for the sink tokens as well, so a causal query never sees a later key.
struct Window {
  // Longer than any sequence can reach (2^30 keys), and small enough that position + right + 1 does not overflow.
  static constexpr int kUnbounded = (1 << 30) - 1;

  int left = kUnbounded;   // keys visible before the query's position
  int right = kUnbounded;  // keys visible after it; 0 is causal
  int sink_tokens = 0;     // the first keys of a sequence, which stay visible on the left of the window

  // Only the right edge cuts keys off: the later a query, the more it sees.
  TILEWRIGHT_HOST_DEVICE constexpr bool causal(int seqlen_k) const { return right < seqlen_k && left >= seqlen_k; }
};

// A window laid over one sequence.
struct VisibleKeys {
  Window window;
  int seqlen_k;
  int offset;  // seqlen_k - seqlen_q: the position of query 0

  TILEWRIGHT_HOST_DEVICE VisibleKeys(const Window& window, int seqlen_q, int seqlen_k)
      : window(window), seqlen_k(seqlen_k), offset(seqlen_k - seqlen_q) {}

  TILEWRIGHT_HOST_DEVICE int begin(int query) const { return clamp(query + offset - window.left, 0, seqlen_k); }
  TILEWRIGHT_HOST_DEVICE int end(int query) const { return clamp(query + offset + window.right + 1, 0, seqlen_k); }
  TILEWRIGHT_HOST_DEVICE bool sees(int query, int key) const {
    return key < end(query) && (key >= begin(query) || key < window.sink_tokens);
  }
};

}  // namespace tilewright
