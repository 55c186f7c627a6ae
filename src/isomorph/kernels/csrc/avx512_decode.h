// Weights in fp32 out of MLX's bit stream, 16 at a time.
//
// A unit of 16 * V codes, a group or a part of one, goes to 16 lanes of 32 bits, V consecutive codes in each; vector j of
// the unit holds code j of every lane. The order of columns within a unit is therefore column(j, lane): activations are
// brought into it once per call, so that no shuffle is needed to undo it. What a group's scale and bias make of a code, w = scale * code + bias, is
// rounded once: nothing large cancels in a product, whatever scale and bias are.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "backend.h"

namespace isomorph {
namespace {

inline __mmask16 first_lanes(int64_t count) { return __mmask16(count >= 16 ? 0xffff : (1u << count) - 1); }

// Never reads past count: the stream may end a mapping.
inline __m512i load_bytes(const uint8_t* p, int64_t count) {
  return _mm512_maskz_loadu_epi8(count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1, p);
}

// Lanes 0-7 hold the first of two floats, lanes 8-15 the second.
inline __m512 spread_pair(const float* pair) {
  const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pair));
  return _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(_mm_castsi128_ps(two)));
}

inline __m128i load_16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256i load_32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

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

// e4m3 is float16 with an exponent bit less, so a shift makes it float16 / 256, subnormals included.
inline __m512 from_e4m3_16(__m128i codes) {
  __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), _mm256_set1_epi16(int16_t(0xbf80)));
  __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.f));
  __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128(codes, _mm_set1_epi8(char(0x80))), _mm_set1_epi8(char(0xff)));
  return _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
}

// Scales and biases of up to 16 groups, the first of which is `index`.
inline __m512 load_scales(const Weights& w, int64_t index, __mmask16 mask) {
  if (w.mode == Mode::affine) return load_floats(w.scale_type, w.scales, index, mask);
  if (w.mode != Mode::nvfp4) return load_e8m0(w.scales, index, mask);
  return from_e4m3_16(_mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(w.scales) + index));
}

inline __m512 load_biases(const Weights& w, int64_t index, __mmask16 mask) {
  return w.mode == Mode::affine ? load_floats(w.scale_type, w.biases, index, mask) : _mm512_setzero_ps();
}

// V codes of `bits` bits to each lane of 32 bits; code j is then the low bits of at(lanes, j), with others above it.
template <int bits, int V>
struct Lanes {
  static constexpr int width = bits * V, bytes = 2 * width;
  struct Tables {
    alignas(64) uint8_t gather[64];
    alignas(64) int32_t shift[V][16];
    constexpr Tables() : gather(), shift() {
      for (int lane = 0; lane < 16; ++lane) {
        for (int i = 0; i < 4; ++i) gather[4 * lane + i] = uint8_t((lane * width / 8 + i) % 64);
        for (int j = 0; j < V; ++j) shift[j][lane] = lane * width % 8 + j * bits;
      }
    }
  };
  static constexpr Tables tables{};

  static __m512i load(const uint8_t* p) {
    if constexpr (width == 32) return _mm512_loadu_si512(p);
    if constexpr (width == 16) return _mm512_cvtepu16_epi32(load_32(p));
    if constexpr (width == 8) return _mm512_cvtepu8_epi32(load_16(p));
    return _mm512_permutexvar_epi8(_mm512_load_si512(tables.gather), load_bytes(p, bytes));
  }
  static __m512i at(__m512i lanes, int j) {
    if constexpr (width % 8 == 0) return j ? _mm512_srli_epi32(lanes, unsigned(j * bits)) : lanes;
    return _mm512_srlv_epi32(lanes, _mm512_load_si512(tables.shift[j]));
  }
};

// What decoders of affine and fp4 weights share: a unit is a group of 32 or 64, or half a group of 128.
template <int bits, int group>
struct Unit {
  static constexpr int vectors = group / 16, unit = group, groups = 1;
  using Lanes = isomorph::Lanes<bits, vectors>;
  using Codes = __m512i;
  static constexpr int bytes = Lanes::bytes;
  static constexpr int column(int j, int lane) { return vectors * lane + j; }
  static Codes load(const uint8_t* p, int64_t) { return Lanes::load(p); }
};

// Up to four bits: a group's 16 possible weights are a register, which a code indexes with its low four bits.
template <int bits, int group, bool fp4 = false>
struct TableWeights : Unit<bits, group> {
  using Lanes = typename Unit<bits, group>::Lanes;
  using Terms = __m512;

  __m512 elements;
  TableWeights() {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = fp4 ? from_e2m1(uint8_t(i)) : float(i & ((1 << bits) - 1));
    elements = _mm512_loadu_ps(values);
  }
  Terms terms(const float* scale, const float* bias) const {
    if constexpr (fp4) return _mm512_mul_ps(_mm512_set1_ps(*scale), elements);
    return _mm512_fmadd_ps(_mm512_set1_ps(*scale), elements, _mm512_set1_ps(*bias));
  }
  __m512 weight(__m512i codes, int j, Terms table) const {
    return _mm512_permutexvar_ps(Lanes::at(codes, j), table);
  }
};

// Five bits: a table of two registers.
template <int group>
struct TwoTableWeights : Unit<5, group> {
  using Lanes = typename Unit<5, group>::Lanes;
  struct Terms {
    __m512 low, high;
  };

  __m512 first = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  Terms terms(const float* scale, const float* bias) const {
    const __m512 s = _mm512_set1_ps(*scale), b = _mm512_set1_ps(*bias);
    return {_mm512_fmadd_ps(s, first, b), _mm512_fmadd_ps(s, _mm512_add_ps(first, _mm512_set1_ps(16)), b)};
  }
  __m512 weight(__m512i codes, int j, const Terms& table) const {
    return _mm512_permutex2var_ps(table.low, Lanes::at(codes, j), table.high);
  }
};

// Six and eight bits: by arithmetic.
template <int bits, int group>
struct ComputedWeights : Unit<bits, group> {
  using Lanes = typename Unit<bits, group>::Lanes;
  struct Terms {
    __m512 scale, bias;
  };

  static Terms terms(const float* scale, const float* bias) { return {_mm512_set1_ps(*scale), _mm512_set1_ps(*bias)}; }
  static __m512 code(__m512i codes, int j) {
    const int place = j * bits;
    if (Lanes::width % 8 == 0 && place + bits <= 23) {  // where it lies it is in the mantissa of 2^(23 - place) + code
      const __m512i power = _mm512_set1_epi32((150 - place) << 23), mask = _mm512_set1_epi32(((1 << bits) - 1) << place);
      const __m512i sum = _mm512_ternarylogic_epi32(codes, mask, power, 0xea);  // (codes & mask) | power
      return _mm512_sub_ps(_mm512_castsi512_ps(sum), _mm512_castsi512_ps(power));
    }
    __m512i low = Lanes::at(codes, j);
    if (place + bits != 32) low = _mm512_and_si512(low, _mm512_set1_epi32((1 << bits) - 1));
    return _mm512_cvtepi32_ps(low);
  }
  static __m512 weight(__m512i codes, int j, const Terms& t) {
    return _mm512_fmadd_ps(code(codes, j), t.scale, t.bias);
  }
};

// fp4 elements in groups of 16: a unit is two groups, the second of which may be missing at the end of a row.
struct Nvfp4Weights {
  static constexpr int vectors = 2, unit = 32, bytes = 16, groups = 2;
  using Codes = __m512i;
  using Terms = __m512;
  static constexpr int column(int j, int lane) { return 2 * lane + j; }

  __m512 elements = TableWeights<4, 32, true>().elements;
  static Codes load(const uint8_t* p, int64_t left) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(left / 2), p));
  }
  static Terms terms(const float* scale, const float*) { return spread_pair(scale); }
  __m512 weight(__m512i codes, int j, Terms scale) const {
    return _mm512_mul_ps(_mm512_permutexvar_ps(Lanes<4, 2>::at(codes, j), elements), scale);
  }
};

struct Mxfp8Weights {
  static constexpr int vectors = 2, unit = 32, bytes = 32, groups = 1;
  struct Codes {
    __m128i half[2];
  };
  using Terms = __m512;
  static constexpr int column(int j, int lane) { return 16 * j + lane; }

  static Codes load(const uint8_t* p, int64_t) { return {load_16(p), load_16(p + 16)}; }
  static Terms terms(const float* scale, const float*) { return _mm512_set1_ps(*scale); }
  static __m512 weight(const Codes& codes, int j, Terms scale) { return _mm512_mul_ps(from_e4m3_16(codes.half[j]), scale); }
};

// fp4 for a few rows: 128 codes are 16 lanes of eight, so that a group is some whole lanes. Elements are multiplied as they
// are and the lanes' sums scaled, a unit at a time.
template <int group>
struct Fp4Sums {
  static constexpr int vectors = 8, unit = 128, bytes = 64, groups = unit / group;
  using Codes = __m512i;
  using Terms = __m512;
  static constexpr int column(int j, int lane) { return 8 * lane + j; }

  __m512 elements = TableWeights<4, 32, true>().elements;
  static Codes load(const uint8_t* p, int64_t left) {
    return left >= unit ? _mm512_loadu_si512(p) : load_bytes(p, left / 2);
  }
  static Terms terms(const float* scale, const float*) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, group == 32 ? 2 : 1), _mm512_loadu_ps(scale));
  }
  __m512 element(__m512i codes, int j) const { return _mm512_permutexvar_ps(Lanes<4, 8>::at(codes, j), elements); }
  __m512 weight(__m512i codes, int j, Terms scale) const { return _mm512_mul_ps(element(codes, j), scale); }
};

template <class Decoder>
constexpr bool scales_sums = false;
template <int group>
constexpr bool scales_sums<Fp4Sums<group>> = true;

// Scales and biases of the next 16 groups of units, those of a row beginning at `base`; halves of 128 share theirs.
template <class Decoder>
__attribute__((noinline)) void load_any_terms(const Weights& w, int64_t base, int64_t groups, int64_t unit, float* scale, float* bias) {
  const bool halves = w.group > Decoder::unit;
  const int64_t g = halves ? unit / 2 : unit * Decoder::groups;
  const __mmask16 mask = first_lanes(std::min<int64_t>(halves ? 8 : 16, groups - g));
  __m512 s = load_scales(w, base + g, mask), b = load_biases(w, base + g, mask);
  if (halves) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    s = _mm512_permutexvar_ps(twice, s), b = _mm512_permutexvar_ps(twice, b);
  }
  _mm512_store_ps(scale, s);
  _mm512_store_ps(bias, b);
}

// The usual cases in line: scales of 16 whole groups in bfloat16, or of mxfp4.
template <class Decoder>
inline void load_terms(const Weights& w, int64_t base, int64_t groups, int64_t unit, float* scale, float* bias) {
  const bool affine = w.mode == Mode::affine && w.scale_type == Type::bfloat16;
  const int64_t first = unit * Decoder::groups;
  if (first + 16 > groups || w.group * Decoder::groups != Decoder::unit || !(affine || w.mode == Mode::mxfp4))
    return load_any_terms<Decoder>(w, base, groups, unit, scale, bias);
  if (!affine) return _mm512_store_ps(scale, load_e8m0(w.scales, base + first, 0xffff));
  _mm512_store_ps(scale, load_floats(Type::bfloat16, w.scales, base + first, 0xffff));
  _mm512_store_ps(bias, load_floats(Type::bfloat16, w.biases, base + first, 0xffff));
}

// Calls f(decoder) with what reads w.
template <class F>
void with_decoder(const Weights& w, const F& f) {
  switch (w.mode) {
    case Mode::mxfp4: return f(TableWeights<4, 32, true>());
    case Mode::mxfp8: return f(Mxfp8Weights());
    case Mode::nvfp4: return f(Nvfp4Weights());
    default: break;
  }
  auto of_group = [&](auto bits, auto group) {
    if constexpr (bits <= 4) f(TableWeights<bits, group>());
    else if constexpr (bits == 5) f(TwoTableWeights<group>());
    else f(ComputedWeights<bits, group>());
  };
  with_bits(w.bits, [&](auto bits) {
    if (w.group == 32) of_group(bits, std::integral_constant<int, 32>());
    else of_group(bits, std::integral_constant<int, 64>());
  });
}

}  // namespace
}  // namespace isomorph
