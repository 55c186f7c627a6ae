// Codes as bytes and activations as int8, which vpdpbusd multiplies four by four.
#pragma once

#include "activations.h"
#include "avx512_decode.h"

namespace isomorph {
namespace {

// sum += codes . x in each 32-bit lane. GCC 12 copies and spills the sums of the intrinsic.
inline void add_dot(__m512i& sum, __m512i codes, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x)); }

// 64 codes -> 64 bytes in order. fp4 elements are doubled and raised to 0..24.
template <int bits, bool fp4 = false>
struct CodeBytes {
  static constexpr int bytes = 8 * bits;
  struct Tables {
    alignas(64) uint8_t gather[64];
    alignas(64) uint8_t shifts[64];
    alignas(64) uint8_t elements[64];
    constexpr Tables() : gather(), shifts(), elements() {
      constexpr int twice[8] = {0, 1, 2, 3, 4, 6, 8, 12};
      for (int i = 0; i < 64; ++i) {
        gather[i] = uint8_t(i / 8 * bits + (i % 8 < bits ? i % 8 : bits - 1));
        shifts[i] = uint8_t(i % 8 * bits);
        elements[i] = uint8_t(12 + (i & 8 ? -twice[i & 7] : twice[i & 7]));
      }
    }
  };
  static constexpr Tables tables{};

  // `left` codes remain in the row: 32 of them at the end of a row of odd groups of 32.
  static __m512i load(const uint8_t* p, int64_t left) {
    const int64_t there = left >= 64 ? bytes : bytes / 2;
    if constexpr (bits == 8) return load_bytes(p, there);
    const __m512i mask = _mm512_set1_epi8(char((1 << bits) - 1));
    if constexpr (bits == 4) {
      const __m256i data = left >= 64 ? load_32(p) : _mm256_castsi128_si256(load_16(p));
      const __m512i words = _mm512_cvtepu8_epi16(data);
      // (words | words << 4) & mask
      const __m512i codes = _mm512_ternarylogic_epi32(words, _mm512_slli_epi16(words, 4), mask, 0xa8);
      return fp4 ? _mm512_shuffle_epi8(_mm512_load_si512(tables.elements), codes) : codes;
    }
    const __m512i data = _mm512_permutexvar_epi8(_mm512_load_si512(tables.gather), load_bytes(p, there));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_load_si512(tables.shifts), data), mask);
  }
};

// What multiplies the sums of codes: an fp4 weight is scale * (code - 12) / 2.
inline void fast_terms(const Weights& w, int64_t index, __mmask16 mask, __m512& scale, __m512& bias) {
  scale = _mm512_maskz_mov_ps(mask, load_scales(w, index, mask)), bias = load_biases(w, index, mask);
  if (w.mode == Mode::affine) return;
  bias = _mm512_mul_ps(scale, _mm512_set1_ps(-6.f));
  scale = _mm512_mul_ps(scale, _mm512_set1_ps(0.5f));
}

// code_rows of activations.h, sixteen values at a time.
inline CodedRows code_rows_512(const Rows& rows, int64_t k, int group) {
  const int64_t groups = k / group;
  const CodedRows out = coded_memory(rows.count, k, groups);
  parallel(rows.count, std::max<int64_t>(1, 32768 / (k + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t g = 0; g < groups; ++g) {
        __m512 value[8], largest = _mm512_setzero_ps(), check = _mm512_setzero_ps();
        const int parts = group / 16;
        for (int i = 0; i < parts; ++i) {
          value[i] = load_floats(rows.x_type, rows.x[m], g * group + 16 * i, 0xffff);
          largest = _mm512_max_ps(largest, _mm512_abs_ps(value[i]));
          check = _mm512_add_ps(check, _mm512_sub_ps(value[i], value[i]));  // 0, or NaN from NaN and infinities
        }
        const float top = _mm512_reduce_max_ps(largest);
        const bool finite = _mm512_cmp_ps_mask(check, check, _CMP_UNORD_Q) == 0;
        const __m512 inverse = _mm512_set1_ps(finite && top > 1e-36f ? 127.f / top : 0.f);
        __m512i total = _mm512_setzero_si512();
        for (int i = 0; i < parts; ++i) {
          const __m512i code = finite ? _mm512_cvtps_epi32(_mm512_mul_ps(value[i], inverse)) : _mm512_setzero_si512();
          total = _mm512_add_epi32(total, code);
          int8_t* to = out.codes + m * out.stride + g * group + 16 * i;
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(code));
        }
        const float scale = finite ? top / 127.f : std::numeric_limits<float>::quiet_NaN();  // so that it shows
        out.scales[m * groups + g] = scale;
        out.sums[m * groups + g] = scale * float(_mm512_reduce_add_epi32(total));
      }
  });
  return out;
}

// Of each eight codes first those at even places, then those at odd ones, as masks take them out of transposed nibbles.
inline void part_nibbles(const CodedRows& x, int64_t count) {
  for (int64_t i = 0; i < count * x.stride; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, x.codes + i, 8);
    eight = _pext_u64(eight, 0x00ff00ff00ff00ffu) | _pext_u64(eight, 0xff00ff00ff00ff00u) << 32;
    std::memcpy(x.codes + i, &eight, 8);
  }
}

// Calls f(codes) with what reads w.
template <class F>
void with_codes(const Weights& w, const F& f) {
  if (w.mode != Mode::affine) return f(CodeBytes<4, true>());
  with_bits(w.bits, [&](auto bits) { f(CodeBytes<bits>()); });
}

// Calls f(codes, group), group being a compile-time constant.
template <class F>
void with_grouped_codes(const Weights& w, const F& f) {
  using std::integral_constant;
  if (w.mode != Mode::affine) return f(CodeBytes<4, true>(), integral_constant<int, 32>());
  with_codes(w, [&](auto codes) {
    switch (w.group) {
      case 32: return f(codes, integral_constant<int, 32>());
      case 64: return f(codes, integral_constant<int, 64>());
      default: return f(codes, integral_constant<int, 128>());
    }
  });
}

}  // namespace
}  // namespace isomorph
