#pragma once

#include "attention/host_device.h"

namespace tilewright {

// The softmax of a row whose scores arrive block by block (Milakov & Gimelshein 2018, arXiv:1805.02867):
//
//     m' = max(m, max_j s_j)     l' = l exp(m - m') + sum_j exp(s_j - m')     O' = O exp(m - m') + sum_j exp(s_j - m')
//     V_j
//
// A masked score is -inf. A row that has seen no key keeps m = -inf; its exponentials are then taken against 0, because
// -inf - (-inf) would be NaN.
template <class T>
struct OnlineSoftmax {
  static constexpr T kMinusInfinity = -static_cast<T>(__builtin_inf());

  T max = kMinusInfinity;  // m
  T sum = 0;               // l

  // What a row becomes at its end: out = out_scale O.
  struct Result {
    T out_scale;
    T lse;
  };

  // What is subtracted from a score before exp.
  TILEWRIGHT_HOST_DEVICE T shift() const { return max == kMinusInfinity ? T(0) : max; }

  // Takes in a block's largest score; returns exp(m - m'), the factor of the row's output so far.
  template <class Exp>
  TILEWRIGHT_HOST_DEVICE T advance(T block_max, Exp exp) {
    const T old_max = max;
    max = block_max > max ? block_max : max;
    const T correction = exp(old_max - shift());
    sum *= correction;
    return correction;
  }

  // A sink is one more score, without a value; -inf is no sink. The sum is rescaled as in `advance`, since a sink far
  // above every score would overflow it.
  template <class Exp, class Log>
  TILEWRIGHT_HOST_DEVICE Result finish(T sink, Exp exp, Log log) {
    const T correction = advance(sink, exp);
    sum += exp(sink - shift());
    if (sum == T(0)) return {T(0), kMinusInfinity};
    return {correction / sum, max + log(sum)};
  }
};

}  // namespace tilewright
