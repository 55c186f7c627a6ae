// Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction, Intel 2009.
#include "checksum.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define CARRY_LESS __attribute__((target("pclmul")))

namespace isomorph {
namespace {

// x^n modulo the CRC's polynomial; bits are reflected, so the product of two is one bit short.
constexpr int64_t power(int n) {
  uint32_t value = 0x80000000u;
  for (; n > 0; --n) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
  return int64_t(value) << 1;
}

inline __m128i load(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

// What moves 16 bytes on by so many bits.
template <int bits>
__m128i shift() {
  constexpr int64_t low = power(bits + 32), high = power(bits - 32);
  return _mm_set_epi64x(high, low);
}

CARRY_LESS inline __m128i moved(__m128i value, __m128i shift) {
  return _mm_xor_si128(_mm_clmulepi64_si128(value, shift, 0x00), _mm_clmulepi64_si128(value, shift, 0x11));
}

}  // namespace

CARRY_LESS bool fold_crc32(const uint8_t* data, int64_t bytes, uint32_t state, uint8_t* folded) {
  if (!__builtin_cpu_supports("pclmul")) return false;
  const __m128i next = shift<128>(), fourth = shift<512>();
  __m128i parts[4];
  for (int i = 0; i < 4; ++i) parts[i] = load(data + 16 * i);
  parts[0] = _mm_xor_si128(parts[0], _mm_cvtsi32_si128(int(state)));
  for (int64_t at = 64; at < bytes; at += 64)
    for (int i = 0; i < 4; ++i) parts[i] = _mm_xor_si128(moved(parts[i], fourth), load(data + at + 16 * i));
  for (int i = 1; i < 4; ++i) parts[i] = _mm_xor_si128(moved(parts[i - 1], next), parts[i]);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(folded), parts[3]);
  return true;
}

}  // namespace isomorph

#else

namespace isomorph {
bool fold_crc32(const uint8_t*, int64_t, uint32_t, uint8_t*) { return false; }
}  // namespace isomorph

#endif
