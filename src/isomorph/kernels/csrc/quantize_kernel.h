// The codec in the compiler's own vectors, as wide as the including file's instruction set.
//
// Each step is one rounded float32 operation, so this must be compiled with -ffp-contract=off and without -ffast-math.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "quantize.h"

namespace isomorph {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

constexpr int kTile = 16;  // groups whose codes, one a byte, wait in the cache to be packed
constexpr int kMaxGroup = 128;
constexpr int kAhead = 4096;  // bytes from what is read to what is fetched: the processor's own guesses end with a page

template <class V>
V load_vector(const void* from) {
  V out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

template <class V>
void store_vector(void* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

template <class To, class From>
To as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

// NaN in `a` gives `b`, as in the vector instructions.
template <class V>
V least(V a, V b) {
  return a < b ? a : b;
}
template <class V>
V most(V a, V b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)  // GCC 12 compares and blends
inline Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats most(Floats a, Floats b) { return _mm512_max_ps(a, b); }
#endif
// Compilers split these conversions where the instruction set has one instruction (GCC 12).
#if defined(__AVX512F__)
inline Ints widened(Shorts value) { return Ints(_mm512_cvtepu16_epi32(__m256i(value))); }
inline Ints widened(Bytes value) { return Ints(_mm512_cvtepu8_epi32(__m128i(value))); }
inline Bytes narrowed(Ints value) { return Bytes(_mm512_cvtepi32_epi8(__m512i(value))); }
#elif defined(__AVX2__)
inline Ints widened(Shorts value) { return Ints(_mm256_cvtepu16_epi32(__m128i(value))); }
inline Ints widened(Bytes value) { return Ints(_mm256_cvtepu8_epi32(_mm_set_epi64x(0, as<long long>(value)))); }
#else
inline Ints widened(Shorts value) { return __builtin_convertvector(value, Ints); }
inline Ints widened(Bytes value) { return widened(__builtin_convertvector(value, Shorts)); }
#endif
#if !defined(__AVX512F__)
inline Bytes narrowed(Ints value) { return __builtin_convertvector(__builtin_convertvector(value, Shorts), Bytes); }
#endif
inline Floats all(float value) { return value - Floats{}; }
inline Ints all_bits(int32_t value) { return value - Ints{}; }
inline Ints magnitude_bits(Floats value) { return as<Ints>(value) & 0x7fffffff; }
inline Ints sign_bits(Floats value) { return as<Ints>(value) & all_bits(int32_t(0x80000000u)); }

// Infinity and NaN of float16 come as 65536 and more, which no float16 is.
template <Type type>
Floats load_weights(const void* from, int64_t index) {
  const char* at = static_cast<const char*>(from) + index * size_of(type);
  if constexpr (type == Type::float32) {
    return load_vector<Floats>(at);
  } else {
    const Ints wide = widened(load_vector<Shorts>(at));
    if constexpr (type == Type::bfloat16) {
      return as<Floats>(wide << 16);
    } else {
      const Ints magnitude = wide & 0x7fff;
      const Ints subnormal = as<Ints>(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
      const Ints value = magnitude < 0x400 ? subnormal : (magnitude << 13) + (112 << 23);
      return as<Floats>(value | (wide & 0x8000) << 16);
    }
  }
}

// Nearest even, NaN kept; the result's bits in the low or (bfloat16) high half.
inline Ints rounded_bfloat16(Floats value) {
  const Ints bits = as<Ints>(value), nearest = bits + 0x7fff + ((bits >> 16) & 1);
  return (magnitude_bits(value) > 0x7f800000 ? bits | 0x400000 : nearest) & all_bits(int32_t(0xffff0000u));
}

inline Ints float16_bits(Floats value) {
  const Ints magnitude = magnitude_bits(value);
  const Ints normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Ints subnormal = as<Ints>(as<Floats>(magnitude) + 0.5f) - 0x3f000000;  // steps of 2^-24, those of the sum
  Ints bits = magnitude < 0x38800000 ? subnormal : normal;
  bits = magnitude >= 0x477ff000 ? all_bits(0x7c00) : bits;  // rounds past 65504
  bits = magnitude > 0x7f800000 ? all_bits(0x7e00) : bits;
  return bits | ((as<Ints>(value) >> 16) & 0x8000);
}

inline Floats from_float16_bits(Ints bits) {
  const Ints magnitude = bits & 0x7fff;
  const Ints subnormal = as<Ints>(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
  Ints value = magnitude < 0x400 ? subnormal : (magnitude << 13) + (112 << 23);
  value = magnitude >= 0x7c00 ? (magnitude << 13) + (224 << 23) : value;
  return as<Floats>(value | (bits & 0x8000) << 16);
}

template <Type type>
Floats rounded(Floats value) {
  if constexpr (type == Type::bfloat16) return as<Floats>(rounded_bfloat16(value));
  if constexpr (type == Type::float16) return from_float16_bits(float16_bits(value));
  return value;
}

inline float rounded(Type type, float value) {
  if (type == Type::bfloat16) return from_bfloat16(to_bfloat16(value));
  return type == Type::float16 ? from_float16(to_float16(value)) : value;
}

// `value` is already rounded to `type`.
template <Type type>
void store_weights(void* to, int64_t index, Floats value) {
  char* at = static_cast<char*>(to) + index * size_of(type);
  if constexpr (type == Type::float32) store_vector(at, value);
  if constexpr (type == Type::bfloat16) store_vector(at, __builtin_convertvector((as<Ints>(value) >> 16) & 0xffff, Shorts));
  if constexpr (type == Type::float16) store_vector(at, __builtin_convertvector(float16_bits(value), Shorts));
}

// ---- packing: eight codes of a byte each become `bits` bytes in three steps of pairs, inside one 64-bit integer ----

template <int bits, int lane>
constexpr uint64_t low_fields() {
  uint64_t ones = 0;
  for (int start = 0; start < 64; start += 2 * lane) ones |= ((uint64_t(1) << bits * lane / 8) - 1) << start;
  return ones;
}

// Joins the fields of two lanes of `lane` bits.
template <int bits, int lane>
uint64_t joined(uint64_t eight) {
  constexpr uint64_t low = low_fields<bits, lane>();
  constexpr int width = bits * lane / 8;
  return (eight & low) | ((eight >> (lane - width)) & (low << width));
}

template <int bits, int lane>
uint64_t parted(uint64_t eight) {
  constexpr uint64_t low = low_fields<bits, lane>();
  constexpr int width = bits * lane / 8;
  return (eight & low) | ((eight << (lane - width)) & (low << lane));
}

// Codes of a tile, one a byte; packing them destroys them.
typedef uint64_t Eights[kTile * kMaxGroup / 8];

template <int bits>
void pack(Eights& eights, int count, uint8_t* out) {
  for (int i = 0; i < count / 8; ++i) eights[i] = joined<bits, 32>(joined<bits, 16>(joined<bits, 8>(eights[i])));
  for (int i = 0; i < count / 8; ++i) std::memcpy(out + bits * i, &eights[i], bits);
}

template <int bits>
void unpack(const uint8_t* packed, int count, Eights& eights) {
  for (int i = 0; i < count / 8; ++i) eights[i] = 0, std::memcpy(&eights[i], packed + bits * i, bits);
  for (int i = 0; i < count / 8; ++i) eights[i] = parted<bits, 8>(parted<bits, 16>(parted<bits, 32>(eights[i])));
}

// ---- elements of the microscaling formats ----

inline Floats from_e2m1(Ints code) {
  const Ints magnitude = code & 7;
  const Floats small = __builtin_convertvector(magnitude, Floats) * 0.5f;
  const Ints value = magnitude < 2 ? as<Ints>(small) : (magnitude << 22) + (126 << 23);
  return as<Floats>(value | (code & 8) << 28);
}

inline Floats from_e4m3(Ints code) {
  const Ints magnitude = code & 0x7f;
  const Floats small = __builtin_convertvector(magnitude, Floats) * 0x1p-9f;
  Ints value = magnitude < 8 ? as<Ints>(small) : (magnitude << 20) + (120 << 23);
  value = magnitude == 0x7f ? all_bits(0x7fc00000) : value;
  return as<Floats>(value | (code & 0x80) << 24);
}

// Ties go towards zero, and there is no negative zero.
inline Ints to_e2m1(Floats value) {
  const Floats magnitude = as<Floats>(magnitude_bits(value));
  Ints code{};
  for (float border : {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.f}) code -= magnitude > border;  // true is -1
  return code | ((value < 0) & (code > 0) & 8);
}

// Where an nvfp4 scale saturates, MLX takes the first element at the least distance, and float32 rounds distances.
inline uint8_t nearest_e2m1(float value) {
  uint8_t best = 0;
  for (uint8_t code = 1; code < 16; ++code)
    if (std::fabs(value - isomorph::from_e2m1(code)) < std::fabs(value - isomorph::from_e2m1(best))) best = code;
  return best;
}

// Ties to even, saturating.
inline Ints to_e4m3(Floats value) {
  const Ints magnitude = least(magnitude_bits(value), all_bits(0x43e00000));  // 448
  const Ints normal = (magnitude - (120 << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  const Ints subnormal = as<Ints>(as<Floats>(magnitude) + 0x1p14f) - 0x46800000;  // steps of 2^-9, those of the sum
  return (magnitude < 0x3c800000 ? subnormal : normal) | ((sign_bits(value) >> 24) & 0x80);
}

inline uint8_t to_e4m3(float value) { return uint8_t(to_e4m3(all(value))[0]); }

// The exponent of the smallest power of two that is not below; a group of zeros has 0.
inline int ceil_log2(float value) {
  const int bits = int(to_bits(value));
  if (bits == 0) return 0;
  return std::max((bits >> 23) - 127 + ((bits & 0x7fffff) > (bits < 0x800000 ? 0x400000 : 0)), -127);
}

// ---- one tile of groups ----

struct Terms {  // a weight is scale * element + bias
  float scale[kTile], bias[kTile];
};

// The two halves of a vector.
template <class Half, class V>
std::pair<Half, Half> halves(V value) {
  static_assert(2 * sizeof(Half) == sizeof(V));
  Half half[2];
  std::memcpy(half, &value, sizeof half);
  return {half[0], half[1]};
}

template <int lanes = kLanes, class V, class Reduce>
float over_lanes(V value, Reduce reduce) {
  if constexpr (lanes == 1) {
    return value[0];
  } else {
    typedef float Half __attribute__((vector_size(2 * lanes)));
    const auto [first, second] = halves<Half>(value);
    return over_lanes<lanes / 2>(reduce(first, second), reduce);
  }
}

// [low, high] of each group into `range`; returns the bits of the largest magnitudes seen, NaN and infinity included.
template <Type type>
Ints ranges(const void* weights, int count, int group, Terms& range, Ints worst) {
  for (int g = 0; g < count; ++g) {
    Floats low = load_weights<type>(weights, g * group), high = low;
    for (int i = g * group; i < (g + 1) * group; i += kLanes) {
      __builtin_prefetch(static_cast<const char*>(weights) + i * size_of(type) + kAhead);
      const Floats value = load_weights<type>(weights, i);
      low = least(value, low), high = most(value, high), worst = most(magnitude_bits(value), worst);
    }
    range.scale[g] = over_lanes(low, [](auto a, auto b) { return least(a, b); });
    range.bias[g] = over_lanes(high, [](auto a, auto b) { return most(a, b); });
  }
  return worst;
}

// Scale and bias from [low, high]: see affine.py.
template <int bits>
void affine_terms(Terms& terms) {
  constexpr float levels = (1 << bits) - 1;
  for (int g = 0; g < kTile; ++g) {
    const float low = terms.scale[g], high = terms.bias[g];
    const bool from_low = std::fabs(low) > std::fabs(high);
    const float size = most((high - low) / levels, 1e-7f), scale = from_low ? size : -size;
    const float edge = from_low ? low : high, steps = std::nearbyint(edge / scale);
    terms.scale[g] = steps == 0 ? scale : edge / steps;
    terms.bias[g] = steps == 0 ? 0 : edge;
  }
}

// a * b + c, rounded once.
#if defined(__AVX512F__)
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#endif

// value / divisor, correctly rounded from the divisor's reciprocal (Markstein 1990), at a fraction of a division's cost.
// No step may overflow, and only what is far below 1 may underflow.
inline Floats quotient(Floats value, Floats divisor, [[maybe_unused]] Floats reciprocal) {
#if defined(__AVX2__)
  Floats found = value * reciprocal;
  for (int step = 0; step < 2; ++step) found = fused(fused(-found, divisor, value), reciprocal, found);
  return found;
#else
  return value / divisor;
#endif
}

// Rounds a tile's scales or biases to `type` and stores them.
template <Type type>
void store_terms(float* terms, int count, void* to, int64_t index) {
  char stored[kTile * sizeof(float)];
  for (int g = 0; g < kTile; g += kLanes) {
    const Floats value = rounded<type>(load_vector<Floats>(terms + g));
    store_vector(terms + g, value);
    store_weights<type>(stored, g, value);
  }
  std::memcpy(static_cast<char*>(to) + index * size_of(type), stored, count * size_of(type));
}

template <Type type, int bits>
void affine_codes(const void* weights, int count, int group, const Terms& terms, uint8_t* codes) {
  const Floats levels = all((1 << bits) - 1);
  for (int g = 0; g < count; ++g) {
    const Floats scale = all(terms.scale[g]), bias = all(terms.bias[g]), reciprocal = 1 / scale;
    const bool huge = std::fabs(terms.scale[g]) > 0x1p100f;
    for (int i = g * group; i < (g + 1) * group; i += kLanes) {
      const Floats offset = load_weights<type>(weights, i) - bias;
      Floats position = huge ? offset / scale : quotient(offset, scale, reciprocal);
      position = least(most(position, Floats{}), levels);  // the 0 / 0 of a huge constant group is code 0
      const Ints code = as<Ints>(position + 0x1.8p23f);    // its last bits are the nearest even integer
      store_vector(codes + i, narrowed(code));
    }
  }
}

// Steps from [low, high], and the scales as they are stored: see microscaling.py.
template <Mode mode, Type type>
void microscaled_terms(Terms& terms, int count, uint8_t* scales) {
  for (int g = 0; g < count; ++g) {
    const float largest = most(std::fabs(terms.scale[g]), std::fabs(terms.bias[g]));
    const float wanted = rounded(type, largest / (mode == Mode::mxfp8 ? 448.f : 6.f));
    scales[g] = mode == Mode::nvfp4 ? to_e4m3(wanted) : uint8_t(ceil_log2(wanted) + 127);
    terms.scale[g] = mode == Mode::nvfp4 ? isomorph::from_e4m3(scales[g]) : from_e8m0(scales[g]);
    terms.bias[g] = 0;
  }
}

template <Mode mode, Type type>
void microscaled_codes(const void* weights, int count, int group, const Terms& terms, uint8_t* codes) {
  for (int g = 0; g < count; ++g) {
    const float step = terms.scale[g];
    for (int i = g * group; i < (g + 1) * group; i += kLanes) {
      const Floats weight = load_weights<type>(weights, i);
      if constexpr (mode != Mode::nvfp4) {
        // Exact, as the step is a power of two; what leaves the range of `type` is far below the smallest element.
        const Floats scaled = weight * (1 / step);
        store_vector(codes + i, narrowed(mode == Mode::mxfp8 ? to_e4m3(scaled) : to_e2m1(scaled)));
      } else {
        const Floats scaled = step == 0 ? Floats{} : rounded<type>(weight / step);
        store_vector(codes + i, narrowed(to_e2m1(scaled)));
        for (int lane = 0; step == 448 && lane < kLanes; ++lane)
          if (std::fabs(scaled[lane]) > 12) codes[i + lane] = nearest_e2m1(scaled[lane]);
      }
    }
  }
}

// Weights in `type`, as mx.dequantize computes them: the product is rounded, then the sum.
template <Mode mode, Type type>
Floats decoded(const uint8_t* codes, Floats scale, Floats bias) {
  const Ints code = widened(load_vector<Bytes>(codes));
  if constexpr (mode == Mode::affine)
    return rounded<type>(rounded<type>(__builtin_convertvector(code, Floats) * scale) + bias);
  else
    return rounded<type>((mode == Mode::mxfp8 ? from_e4m3(code) : from_e2m1(code)) * scale);
}

typedef double Doubles __attribute__((vector_size(4 * kLanes)));

// The squares of two halves, added.
inline Doubles squared(Floats value) {
  typedef float Half __attribute__((vector_size(2 * kLanes)));
  const auto [first, second] = halves<Half>(value);
  const Doubles a = __builtin_convertvector(first, Doubles), b = __builtin_convertvector(second, Doubles);
  return a * a + b * b;
}

template <Mode mode, Type type>
void add_squares(const void* weights, int count, int group, const Terms& terms, const uint8_t* codes, Squares& squares) {
  Doubles error{}, signal{};
  for (int g = 0; g < count; ++g) {
    const Floats scale = all(terms.scale[g]), bias = all(terms.bias[g]);
    for (int i = g * group; i < (g + 1) * group; i += kLanes) {
      const Floats weight = load_weights<type>(weights, i);
      error += squared(decoded<mode, Type::float32>(codes + i, scale, bias) - weight);
      signal += squared(weight);
    }
  }
  for (int lane = 0; lane < kLanes / 2; ++lane) squares.error += error[lane], squares.signal += signal[lane];
}

// ---- runs of groups ----

template <Mode mode, int bits, Type type>
bool encode_groups(int group, const void* weights, int64_t groups, const PackedGroups& out, Squares* squares) {
  alignas(64) Eights eights;
  auto* codes = reinterpret_cast<uint8_t*>(eights);
  Ints worst{};
  for (int64_t start = 0; start < groups; start += kTile) {
    const int count = int(std::min<int64_t>(kTile, groups - start));
    const void* from = static_cast<const char*>(weights) + start * group * size_of(type);
    Terms terms{};
    worst = ranges<type>(from, count, group, terms, worst);
    if constexpr (mode == Mode::affine) {
      affine_terms<bits>(terms);
      affine_codes<type, bits>(from, count, group, terms, codes);
      store_terms<type>(terms.scale, count, out.scales, start);
      store_terms<type>(terms.bias, count, out.biases, start);
    } else {
      microscaled_terms<mode, type>(terms, count, static_cast<uint8_t*>(out.scales) + start);
      microscaled_codes<mode, type>(from, count, group, terms, codes);
    }
    if (squares) add_squares<mode, type>(from, count, group, terms, codes, *squares);
    pack<bits>(eights, count * group, out.codes + start * group / 8 * bits);
  }
  const int limit = type == Type::float16 ? 0x47800000 : 0x7f800000;
  for (int lane = 0; lane < kLanes; ++lane)
    if (worst[lane] >= limit) return false;
  return true;
}

template <Mode mode, int bits, Type type>
void decode_groups(int group, Type scale_type, const PackedGroups& from, int64_t groups, void* weights) {
  alignas(64) Eights eights;
  auto* codes = reinterpret_cast<uint8_t*>(eights);
  for (int64_t start = 0; start < groups; start += kTile) {
    const int count = int(std::min<int64_t>(kTile, groups - start));
    unpack<bits>(from.codes + start * group / 8 * bits, count * group, eights);
    for (int g = 0; g < count; ++g) {
      float scale, bias = 0;
      if (mode == Mode::affine) {
        scale = load_float(scale_type, from.scales, start + g), bias = load_float(scale_type, from.biases, start + g);
      } else {
        const uint8_t stored = static_cast<const uint8_t*>(from.scales)[start + g];
        // MLX's exponent 255 is a power of two like the others, beyond float32.
        scale = mode == Mode::nvfp4 ? isomorph::from_e4m3(stored) : stored == 255 ? INFINITY : from_e8m0(stored);
      }
      const Floats scales = all(rounded(type, scale)), biases = all(rounded(type, bias));
      for (int i = g * group; i < (g + 1) * group; i += kLanes)
        store_weights<type>(weights, start * group + i, decoded<mode, type>(codes + i, scales, biases));
    }
  }
}

// ---- settings at run time to settings at compile time ----

template <auto value>
using Constant = std::integral_constant<decltype(value), value>;

template <class Call>
auto with_bits(Mode mode, int bits, Call call) {
  if (mode == Mode::mxfp4) return call(Constant<Mode::mxfp4>{}, Constant<4>{});
  if (mode == Mode::mxfp8) return call(Constant<Mode::mxfp8>{}, Constant<8>{});
  if (mode == Mode::nvfp4) return call(Constant<Mode::nvfp4>{}, Constant<4>{});
  constexpr Constant<Mode::affine> affine;
  switch (bits) {
    case 2: return call(affine, Constant<2>{});
    case 3: return call(affine, Constant<3>{});
    case 4: return call(affine, Constant<4>{});
    case 5: return call(affine, Constant<5>{});
    case 6: return call(affine, Constant<6>{});
    default: return call(affine, Constant<8>{});
  }
}

template <class Call>
auto with_constants(Mode mode, int bits, Type type, Call call) {
  return with_bits(mode, bits, [&](auto fixed_mode, auto fixed_bits) {
    switch (type) {
      case Type::float32: return call(fixed_mode, fixed_bits, Constant<Type::float32>{});
      case Type::bfloat16: return call(fixed_mode, fixed_bits, Constant<Type::bfloat16>{});
      default: return call(fixed_mode, fixed_bits, Constant<Type::float16>{});
    }
  });
}

bool encode_here(const Packing& as, const void* weights, int64_t groups, const PackedGroups& out, Squares* squares) {
  return with_constants(as.mode, as.bits, as.type, [&](auto mode, auto bits, auto type) {
    return encode_groups<mode, bits, type>(as.group, weights, groups, out, squares);
  });
}

void decode_here(const Packing& as, const PackedGroups& from, int64_t groups, void* weights, Type wanted) {
  with_constants(as.mode, as.bits, wanted, [&](auto mode, auto bits, auto type) {
    decode_groups<mode, bits, type>(as.group, as.type, from, groups, weights);
  });
}

constexpr Codec kCodec{encode_here, decode_here};

}  // namespace
}  // namespace isomorph
