// A float32 exponential that compilers vectorize in loops.
#pragma once

#include "format.h"

namespace isomorph {
namespace {

// exp by 2^n * polynomial on [-ln2/2, ln2/2], coefficients of Cephes' expf: 2 units in the last place.
inline float exponential(float x) {
  const float bounded = x > -104.f ? (x < 89.f ? x : 89.f) : -104.f;
  const float shifted = bounded * 1.44269504f + 12582912.f;  // the addition rounds to an integer
  const float n = shifted - 12582912.f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // In two factors, so that results below the smallest normal number and above 2^127 come out right.
  const int whole = int(n), half = whole / 2;
  const float value = p * from_bits(uint32_t(half + 127) << 23) * from_bits(uint32_t(whole - half + 127) << 23);
  return x != x ? x : value;
}

}  // namespace
}  // namespace isomorph
