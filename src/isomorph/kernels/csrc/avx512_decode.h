// Codes from MLX's bit stream to vectors: 32 bfloat16 (exact) or 64 bytes (fast); scales of 16 groups at a time.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "backend.h"

namespace isomorph {
namespace {

inline __m512i load_bytes(const uint8_t* p, int count) {  // never reads past count: the stream may end a mapping
  return _mm512_maskz_loadu_epi8(count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1, p);
}

// bfloat16 of (code - zero) for every zero point; entry 0 of the e2m1 set holds the fp4 elements.
template <int bits>
struct CentredTables {
  static constexpr int width = bits == 6 ? 64 : 32;  // vpermw reads five index bits and ignores what lies above
  alignas(64) uint16_t entries[1 << bits][width];
  alignas(64) uint16_t elements[width];
  CentredTables() {
    constexpr int mask = (1 << bits) - 1;
    for (int zero = 0; zero <= mask; ++zero)
      for (int i = 0; i < width; ++i) entries[zero][i] = to_bfloat16(float((i & mask) - zero));
    for (int i = 0; i < width; ++i) elements[i] = to_bfloat16(from_e2m1(uint8_t(i & 15)));
  }
};

template <>
struct CentredTables<8> {  // 8-bit codes are converted by arithmetic
  static constexpr int width = 1;
  uint16_t entries[1][1] = {};
  uint16_t elements[1] = {};
};

template <int bits>
const CentredTables<bits>& centred_tables() {
  static const CentredTables<bits> tables{};
  return tables;
}

// 32 codes -> 32 bfloat16. The two bytes that hold a code go to its 16-bit lane, a shift brings the code to bit 0, and a
// table looks up the low bits.
template <int bits>
struct Decode32 {
  struct Lanes {
    alignas(64) uint8_t gather[64];
    alignas(64) uint16_t shift[32];
    constexpr Lanes() : gather(), shift() {
      for (int i = 0; i < 32; ++i) {
        gather[2 * i] = uint8_t(i * bits / 8);
        gather[2 * i + 1] = uint8_t(i * bits / 8 + 1);  // past the last byte only where its bits are not used
        shift[i] = uint16_t(i * bits % 8);
      }
    }
  };
  static constexpr Lanes lanes{};
  __m512i gather = _mm512_load_si512(lanes.gather), shift = _mm512_load_si512(lanes.shift);

  static __m512i load(const uint8_t* p) {
    if constexpr (bits == 4) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    if constexpr (bits == 2) return _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return load_bytes(p, 4 * bits);
  }
  __m512bh operator()(const uint8_t* p, const uint16_t* table) const {
    __m512i codes = _mm512_srlv_epi16(_mm512_permutexvar_epi8(gather, load(p)), shift);
    __m512i out;
    if constexpr (bits == 6) out = _mm512_permutex2var_epi16(_mm512_load_si512(table), codes, _mm512_load_si512(table + 32));
    else out = _mm512_permutexvar_epi16(codes, _mm512_load_si512(table));
    return (__m512bh)out;
  }
};

template <>
struct Decode32<8> {
  __m512bh operator()(const uint8_t* p, float zero) const {
    __m512 centre = _mm512_set1_ps(zero);
    __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    __m512i high = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)));
    return _mm512_cvtne2ps_pbh(_mm512_sub_ps(_mm512_cvtepi32_ps(high), centre),
                               _mm512_sub_ps(_mm512_cvtepi32_ps(low), centre));
  }
};

// 64 codes -> 64 bytes in order: vpmultishiftqb takes eight codes out of each 64-bit lane.
template <int bits>
struct Decode64 {
  struct Lanes {
    alignas(64) uint8_t gather[64];
    alignas(64) uint8_t shifts[64];
    alignas(64) uint8_t elements[64];
    constexpr Lanes() : gather(), shifts(), elements() {
      constexpr int twice[8] = {0, 1, 2, 3, 4, 6, 8, 12};
      for (int i = 0; i < 64; ++i) {
        gather[i] = uint8_t(i / 8 * bits + (i % 8 < bits ? i % 8 : bits - 1));
        shifts[i] = uint8_t(i % 8 * bits);
        elements[i] = uint8_t(12 + (i & 8 ? -twice[i & 7] : twice[i & 7]));
      }
    }
  };
  static constexpr Lanes lanes{};
  __m512i gather = _mm512_load_si512(lanes.gather), shifts = _mm512_load_si512(lanes.shifts);
  __m512i elements = _mm512_load_si512(lanes.elements), mask = _mm512_set1_epi8(char((1 << bits) - 1));

  static __m512i load(const uint8_t* p) {
    if constexpr (bits == 4) return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if constexpr (bits == 2) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return load_bytes(p, 8 * bits);
  }
  template <bool fp4>
  __m512i decode(__m512i data) const {
    if constexpr (bits == 8) return data;
    data = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(gather, data)), mask);
    if constexpr (fp4) data = _mm512_permutexvar_epi8(data, elements);  // 2 * element + 12: 0..24
    return data;
  }
  template <bool fp4>
  __m512i take(const uint8_t* p) const {
    return decode<fp4>(load(p));
  }
  template <bool fp4>
  __m512i take_half(const uint8_t* p) const {  // the last 32 codes of a row
    return decode<fp4>(load_bytes(p, 4 * bits));
  }
};

inline __m512 load_floats(Type type, const void* data, int64_t index, __mmask16 mask) {
  if (type == Type::float32) return _mm512_maskz_loadu_ps(mask, static_cast<const char*>(data) + 4 * index);
  __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const char*>(data) + 2 * index);
  if (type == Type::float16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512 load_e8m0(const void* data, int64_t index, __mmask16 mask) {
  __m512i e = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(data) + index));
  __m512i value = _mm512_slli_epi32(e, 23);
  value = _mm512_mask_mov_epi32(value, _mm512_cmpeq_epi32_mask(e, _mm512_setzero_si512()), _mm512_set1_epi32(0x00400000));
  value = _mm512_mask_mov_epi32(value, _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(255)), _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(value);
}

struct GroupTerms {
  __m512 scale, rest;  // w = scale * (code - zero) + rest
  __m512 zero;
};

inline GroupTerms group_terms(const Weights& w, int64_t index, __mmask16 mask) {
  if (w.mode != Mode::affine) return {load_e8m0(w.scales, index, mask), _mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512 scale = load_floats(w.scale_type, w.scales, index, mask);
  __m512 bias = load_floats(w.scale_type, w.biases, index, mask);
  __m512 largest = _mm512_set1_ps(float((1 << w.bits) - 1));
  // The reciprocal's 14 bits are enough: any code near w = 0 serves as zero point.
  __m512 ratio = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), bias), _mm512_rcp14_ps(scale));
  __m512 zero = _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  zero = _mm512_max_ps(_mm512_min_ps(zero, largest), _mm512_setzero_ps());  // a NaN becomes `largest`
  return {scale, _mm512_fmadd_ps(scale, zero, bias), zero};
}

}  // namespace
}  // namespace isomorph
