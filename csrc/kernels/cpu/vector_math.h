#pragma once

#include <cstdint>

// exp and tanh written without a branch or a call, so that the compiler turns a loop over them into vector code. GCC's
// vectoriser only knows libm's through glibc's vector library, which needs -ffast-math and is not everywhere.
namespace tilewright::cpu {

#define TILEWRIGHT_INLINE inline __attribute__((always_inline))

template <class T>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  using Bits = uint32_t;  // of a NaN they wrap around
  static constexpr int kMantissa = 23;
  static constexpr Bits kBias = 127;
  static constexpr float kRound = 0x1.8p23f;               // adding it rounds to an integer, kept in the low bits
  static constexpr float kLn2High = 0x1.62ep-1f;           // 12 bits: n * kLn2High is exact
  static constexpr float kLn2Low = 0x1.0bfbe8e7bcd5ep-15;  // ln 2 - kLn2High
  static constexpr float kExpMin = -87.33654f;             // below: 2^-126 and less, taken as 0
  static constexpr float kExpMax = 88.37626f;
  static constexpr int kTerms = 7;         // of the Taylor series; the next one is 5e-9 at |r| = ln 2 / 2
  static constexpr float kTanhMax = 10.f;  // tanh rounds to 1 from here on
};

template <>
struct FloatFormat<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr Bits kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefp-1;  // 32 bits
  static constexpr double kLn2Low = 0x1.473de6af278edp-34;
  static constexpr double kExpMin = -708.39641853226408;
  static constexpr double kExpMax = 709.08956571282405;
  static constexpr int kTerms = 13;  // the next one is 4e-18
  static constexpr double kTanhMax = 20.;
};

// exp(x) = scale * (1 + tail): scale = 2^n, |r| = |x - n ln 2| <= ln 2 / 2, tail = exp(r) - 1. A NaN stays in the tail.
template <class T>
struct SplitExp {
  T scale;
  T tail;
};

template <class T>
TILEWRIGHT_INLINE SplitExp<T> split_exp(T x) {
  using F = FloatFormat<T>;
  using Bits = typename F::Bits;
  constexpr T kLog2E = static_cast<T>(1.4426950408889634);
  const T rounded = x * kLog2E + F::kRound;
  const T n = rounded - F::kRound;
  const T r = (x - n * F::kLn2High) - n * F::kLn2Low;
  T factorial = 1;
  T inverse_factorials[F::kTerms + 1] = {1};
  for (int k = 1; k <= F::kTerms; ++k) inverse_factorials[k] = T(1) / (factorial *= T(k));
  T series = inverse_factorials[F::kTerms];
#pragma GCC unroll 16
  for (int k = F::kTerms - 1; k >= 1; --k) series = series * r + inverse_factorials[k];
  const Bits exponent = __builtin_bit_cast(Bits, rounded) - __builtin_bit_cast(Bits, F::kRound) + F::kBias;
  return {__builtin_bit_cast(T, exponent << F::kMantissa), series * r};
}

// exp(x) to about 1 ulp; 0 where the result would be subnormal, finite for every finite x, NaN for NaN.
template <class T>
TILEWRIGHT_INLINE T exp(T x) {
  using F = FloatFormat<T>;
  const T above = x < F::kExpMin ? F::kExpMin : x;
  const SplitExp<T> e = split_exp(above > F::kExpMax ? F::kExpMax : above);
  const T result = e.scale * e.tail + e.scale;
  return x < F::kExpMin ? T(0) : result;
}

// tanh |x| = u / (u + 2) with u = exp(2|x|) - 1, which the split gives without cancellation near 0.
template <class T>
TILEWRIGHT_INLINE T tanh(T x) {
  const T magnitude = x < T(0) ? -x : x;
  const SplitExp<T> e = split_exp(T(2) * (magnitude > FloatFormat<T>::kTanhMax ? FloatFormat<T>::kTanhMax : magnitude));
  const T u = e.scale * e.tail + (e.scale - T(1));
  const T result = u / (u + T(2));
  return x < T(0) ? -result : result;
}

}  // namespace tilewright::cpu
