// MLX's packed layouts as they lie in a file, and the scalar conversions every backend shares.
//
// A row of codes is one little-endian bit stream: code k of width b occupies bits [k*b, (k+1)*b). Scales and biases are
// [rows, columns / group]. affine: w = scale * code + bias. mxfp4, mxfp8, nvfp4: w = scale * element, no bias.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace isomorph {

enum class Mode : int { affine, mxfp4, mxfp8, nvfp4 };
enum class Type : int { float32, bfloat16, float16 };

struct Weights {
  const uint8_t* codes;
  const void* scales;
  const void* biases;  // affine only
  Mode mode;
  Type scale_type;  // affine only: mx modes have byte scales
  int bits;
  int group;
  int64_t rows;
  int64_t columns;

  int64_t row_bytes() const { return columns / 8 * bits; }  // columns is a multiple of 8: the group divides it
  int64_t groups() const { return columns >> __builtin_ctz(unsigned(group)); }  // a power of two; dividing takes 20 cycles
  const uint8_t* row(int64_t n) const { return codes + n * row_bytes(); }
};

static inline int size_of(Type type) { return type == Type::float32 ? 4 : 2; }

static inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float from_bfloat16(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

static inline uint16_t to_bfloat16(float value) {  // round to nearest even, NaN stays NaN; without a branch, for loops
  const uint32_t bits = to_bits(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

static inline float from_float16(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16;
  uint32_t magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  float value = float(magnitude) * 0x1p-24f;  // subnormal
  return sign ? -value : value;
}

static inline uint16_t to_float16(float value) {
  uint32_t bits = to_bits(value);
  uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds past 65504
  if (bits < 0x38800000u) {                       // subnormal: the addition rounds to nearest even
    float shifted = from_bits(bits) + from_bits(0x3f000000u);
    return uint16_t(sign | (to_bits(shifted) - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1);
  return uint16_t(sign | ((bits - (112u << 23)) >> 13));
}

static inline float load_float(Type type, const void* data, int64_t index) {
  if (type == Type::float32) {
    float value;
    std::memcpy(&value, static_cast<const char*>(data) + 4 * index, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(data) + 2 * index, 2);
  return type == Type::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

static inline void store_float(Type type, void* data, int64_t index, float value) {
  if (type == Type::float32) {
    std::memcpy(static_cast<char*>(data) + 4 * index, &value, 4);
    return;
  }
  uint16_t bits = type == Type::bfloat16 ? to_bfloat16(value) : to_float16(value);
  std::memcpy(static_cast<char*>(data) + 2 * index, &bits, 2);
}

static inline void store_floats(Type type, void* data, int64_t index, const float* values, int64_t count) {
  char* to = static_cast<char*>(data) + index * size_of(type);
  if (type == Type::float32) {
    std::memcpy(to, values, size_t(count) * 4);
  } else if (type == Type::bfloat16) {
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t bits = to_bfloat16(values[i]);
      std::memcpy(to + 2 * i, &bits, 2);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) store_float(type, to, i, values[i]);
  }
}

// OCP microscaling: scale 2^(e - 127), 255 is NaN.
static inline float from_e8m0(uint8_t e) {
  if (e == 255) return std::numeric_limits<float>::quiet_NaN();
  return e ? from_bits(uint32_t(e) << 23) : 0x1p-127f;
}

// OCP 8-bit float with 4 exponent bits, no infinities; all ones is NaN.
static inline float from_e4m3(uint8_t e) {
  uint32_t magnitude = e & 0x7f;
  if (magnitude == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  float value = magnitude >= 8 ? from_bits((magnitude << 20) + (120u << 23)) : float(magnitude) * 0x1p-9f;
  return e & 0x80 ? -value : value;
}

// OCP 4-bit float with 2 exponent bits.
static inline float from_e2m1(uint8_t code) {
  constexpr float magnitudes[8] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f};
  return code & 8 ? -magnitudes[code & 7] : magnitudes[code & 7];
}

static inline float load_scale(const Weights& w, int64_t index) {
  switch (w.mode) {
    case Mode::affine: return load_float(w.scale_type, w.scales, index);
    case Mode::nvfp4: return from_e4m3(static_cast<const uint8_t*>(w.scales)[index]);
    default: return from_e8m0(static_cast<const uint8_t*>(w.scales)[index]);
  }
}

static inline float load_bias(const Weights& w, int64_t index) {
  return w.mode == Mode::affine ? load_float(w.scale_type, w.biases, index) : 0.f;
}

// Calls f(bits) for the bits of an affine code as a compile-time constant. The sanitized sample of the quick tests has one
// width only, as it is compiled there.
template <class F>
inline void with_bits(int bits, const F& f) {
  using std::integral_constant;
  switch (bits) {
    case 4: return f(integral_constant<int, 4>());
#ifndef ISOMORPH_SAMPLE
    case 2: return f(integral_constant<int, 2>());
    case 3: return f(integral_constant<int, 3>());
    case 5: return f(integral_constant<int, 5>());
    case 6: return f(integral_constant<int, 6>());
    case 8: return f(integral_constant<int, 8>());
#endif
  }
}

}  // namespace isomorph
