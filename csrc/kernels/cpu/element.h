#pragma once

#include <cstdint>

#include "kernels/cpu/vector_math.h"
#include "kernels/forward/params.h"

// Elements in memory and the type they are computed in: float64 in double, everything else in float. The conversions
// are plain integer arithmetic without a branch, so they become vector code on every instruction set.
namespace tilewright::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

TILEWRIGHT_INLINE double to_compute(double x) { return x; }
TILEWRIGHT_INLINE float to_compute(float x) { return x; }
TILEWRIGHT_INLINE float to_compute(BFloat16 x) { return __builtin_bit_cast(float, uint32_t{x.bits} << 16); }

TILEWRIGHT_INLINE float to_compute(Float16 x) {
  constexpr uint32_t kExponent = 0x7c00u << 13;
  const uint32_t magnitude = (uint32_t{x.bits} & 0x7fffu) << 13;
  const uint32_t rebased = magnitude + ((127u - 15u) << 23);
  // A subnormal: 1.m 2^-14 - 2^-14 = 0.m 2^-14, exact, and without a float that a flush-to-zero mode would lose.
  const float subnormal = __builtin_bit_cast(float, rebased + (1u << 23)) - 0x1p-14f;
  const uint32_t special = rebased + ((128u - 16u) << 23);  // Inf and NaN
  const uint32_t finite = magnitude < (1u << 23) ? __builtin_bit_cast(uint32_t, subnormal) : rebased;
  const uint32_t result = magnitude >= kExponent ? special : finite;
  return __builtin_bit_cast(float, result | ((uint32_t{x.bits} & 0x8000u) << 16));
}

template <class E>
struct FromCompute;

template <>
struct FromCompute<double> {
  static TILEWRIGHT_INLINE double convert(double x) { return x; }
};

template <>
struct FromCompute<float> {
  static TILEWRIGHT_INLINE float convert(float x) { return x; }
};

template <>
struct FromCompute<BFloat16> {
  static TILEWRIGHT_INLINE BFloat16 convert(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const uint32_t nan = (bits >> 16) | 0x40u;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
  }
};

template <>
struct FromCompute<Float16> {
  static TILEWRIGHT_INLINE Float16 convert(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // To nearest, ties to even; what rounds past 65504 carries into the exponent and becomes infinity by itself.
    const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 1/2 leaves the value in units of 2^-24, rounded, in the low bits.
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - __builtin_bit_cast(uint32_t, 0.5f);
    const uint32_t small = magnitude < ((127u - 14u) << 23) ? subnormal : normal;
    const uint32_t finite = magnitude >= ((127u + 16u) << 23) ? 0x7c00u : small;
    const uint32_t result = magnitude > 0x7f800000u ? 0x7e00u : finite;
    return {static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u))};
  }
};

inline int64_t element_size(Element element) {
  return element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2;
}

}  // namespace tilewright::cpu
