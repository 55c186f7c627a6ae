// The kernels written once over a small vector type V of 8 floats; AVX2, NEON and plain C++ instantiate them.
//
// V offers: zero(), set(float), load(const float*), add, fma(a, b, c) = a * b + c, sum(v), codes<bits>(uint64_t) = eight
// codes as floats, and dot32(const uint8_t*, const int8_t*) = integer product of 32 codes with 32 int8.
#pragma once

#include <algorithm>

#include "activations.h"

namespace isomorph {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;  // of weights in one chunk of work

inline int64_t grain_rows(int64_t row_bytes) { return std::max<int64_t>(4, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

template <int bits>
uint64_t load_codes(const uint8_t* p) {  // eight codes; reads exactly `bits` bytes, as the stream may end a mapping
  uint64_t word = 0;
  std::memcpy(&word, p, bits);
  return word;
}

struct ElementTable {
  float values[256];
};

inline const ElementTable& elements(Mode mode) {
  static const ElementTable tables[2] = {
      [] {
        ElementTable t{};
        for (int i = 0; i < 256; ++i) t.values[i] = from_e2m1(uint8_t(i & 15));
        return t;
      }(),
      [] {
        ElementTable t{};
        for (int i = 0; i < 256; ++i) t.values[i] = from_e4m3(uint8_t(i));
        return t;
      }(),
  };
  return tables[mode == Mode::mxfp8];
}

// Eight weights before scaling: integer codes, or the elements of a float format looked up.
template <class V, int bits, bool affine>
typename V::vector decode8(const uint8_t* p, const ElementTable& table) {
  uint64_t word = load_codes<bits>(p);
  if constexpr (affine) {
    return V::template codes<bits>(word);
  } else {
    float values[8];
    for (int i = 0; i < 8; ++i) values[i] = table.values[word >> (i * bits) & ((1 << bits) - 1)];
    return V::load(values);
  }
}

// Weights are dequantized in fp32 (one rounding of the fused multiply-add), then multiplied: the error is at most a few
// roundings of sum|x * w| whatever scale and bias are, as nothing large cancels. Partial sums are kept per group.
template <class V, int bits, bool affine, int M>
void exact_row(const Weights& w, int64_t n, const float* x, float* out) {
  using vector = typename V::vector;
  const ElementTable& table = elements(w.mode);
  const uint8_t* p = w.row(n);
  const int64_t k = w.columns, groups = w.groups();
  vector total[M];
  for (int m = 0; m < M; ++m) total[m] = V::zero();
  for (int64_t g = 0; g < groups; ++g) {
    vector scale = V::set(load_scale(w, n * groups + g)), bias = V::set(load_bias(w, n * groups + g));
    vector part[M];
    for (int m = 0; m < M; ++m) part[m] = V::zero();
    for (int j = 0; j < w.group; j += 8, p += bits) {
      vector weight = V::fma(decode8<V, bits, affine>(p, table), scale, bias);
      for (int m = 0; m < M; ++m) part[m] = V::fma(weight, V::load(x + m * k + g * w.group + j), part[m]);
    }
    for (int m = 0; m < M; ++m) total[m] = V::add(total[m], part[m]);
  }
  for (int m = 0; m < M; ++m) out[m] = V::sum(total[m]);
}

template <class V, int bits, bool affine>
void exact_rows(const Weights& w, const Rows& rows, const float* x, int64_t begin, int64_t end) {
  float out[4];
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t m = 0; m < rows.count;) {
      int64_t left = rows.count - m;
      int step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const float* from = x + m * w.columns;
      if (step == 4) exact_row<V, bits, affine, 4>(w, n, from, out);
      else if (step == 2) exact_row<V, bits, affine, 2>(w, n, from, out);
      else exact_row<V, bits, affine, 1>(w, n, from, out);
      for (int i = 0; i < step; ++i) store_float(rows.y_type, rows.y[m + i], n, out[i]);
      m += step;
    }
  }
}

template <int bits>
void spread_codes(const uint8_t* p, int count, uint8_t* out) {
  for (int j = 0; j < count; j += 8, p += bits) {
    uint64_t word = load_codes<bits>(p);
    for (int i = 0; i < 8; ++i) out[j + i] = uint8_t(word >> (i * bits) & ((1u << bits) - 1));
  }
}

template <class V, int bits>
void fast_rows(const Weights& w, const Rows& rows, const CodedRows& x, int64_t begin, int64_t end) {
  const int64_t groups = w.groups();
  uint8_t codes[128];
  float* totals = static_cast<float*>(scratch(5, size_t(rows.count) * 4));
  for (int64_t n = begin; n < end; ++n) {
    std::fill(totals, totals + rows.count, 0.f);
    for (int64_t g = 0; g < groups; ++g) {
      float scale = load_scale(w, n * groups + g), bias = load_bias(w, n * groups + g);
      spread_codes<bits>(w.row(n) + g * w.group / 8 * bits, w.group, codes);
      for (int64_t m = 0; m < rows.count; ++m) {
        int dot = 0;
        for (int j = 0; j < w.group; j += 32) dot += V::dot32(codes + j, x.codes + m * x.stride + g * w.group + j);
        int64_t i = m * groups + g;
        totals[m] += scale * x.scales[i] * float(dot) + bias * x.sums[i];
      }
    }
    for (int64_t m = 0; m < rows.count; ++m) store_float(rows.y_type, rows.y[m], n, totals[m]);
  }
}

template <class V>
void dispatch_exact(const Weights& w, const Rows& rows, const float* x, int64_t begin, int64_t end) {
  if (w.mode == Mode::mxfp8) return exact_rows<V, 8, false>(w, rows, x, begin, end);
  if (w.mode != Mode::affine) return exact_rows<V, 4, false>(w, rows, x, begin, end);
  with_bits(w.bits, [&](auto bits) { exact_rows<V, bits, true>(w, rows, x, begin, end); });
}

template <class V>
void dispatch_fast(const Weights& w, const Rows& rows, const CodedRows& x, int64_t begin, int64_t end) {
  with_bits(w.bits, [&](auto bits) { fast_rows<V, bits>(w, rows, x, begin, end); });
}

template <class V>
void multiply(const Weights* weights, const Rows* results, int count, bool fast) {
  const bool coded = fast && weights[0].mode == Mode::affine;
  const float* x = nullptr;
  CodedRows codes{};
  for (int i = 0; i < count; ++i) {
    const Weights& w = weights[i];
    const Rows& rows = results[i];
    if (i == 0 || !share_x(&results[i - 1], 2)) {
      x = float_rows(rows, w.columns);
      if (coded) codes = code_rows(rows, x, w.columns, w.group);
    }
    parallel(w.rows, grain_rows(w.row_bytes()), [&](int64_t begin, int64_t end) {
      if (coded) dispatch_fast<V>(w, rows, codes, begin, end);
      else dispatch_exact<V>(w, rows, x, begin, end);
    });
  }
}

template <class V>
void multiply_bfloat16(const void* w, int64_t n, int64_t k, const Rows& rows) {
  const float* x = float_rows(rows, k);
  parallel(n, grain_rows(2 * k), [&](int64_t begin, int64_t end) {
    auto* weight = static_cast<float*>(scratch(6, size_t(k) * 4));
    for (int64_t i = begin; i < end; ++i) {
      read_row(static_cast<const char*>(w) + 2 * i * k, Type::bfloat16, k, weight);
      for (int64_t m = 0; m < rows.count; ++m) {
        typename V::vector parts[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        const float* from = x + m * k;
        int64_t j = 0;
        for (; j + 32 <= k; j += 32)
          for (int u = 0; u < 4; ++u) parts[u] = V::fma(V::load(weight + j + 8 * u), V::load(from + j + 8 * u), parts[u]);
        float total = V::sum(V::add(V::add(parts[0], parts[1]), V::add(parts[2], parts[3])));
        for (; j < k; ++j) total += weight[j] * from[j];
        store_float(rows.y_type, rows.y[m], i, total);
      }
    }
  });
}

template <class V, int bits, bool affine>
void dequantize_row(const Weights& w, int64_t n, float* out) {
  const ElementTable& table = elements(w.mode);
  const uint8_t* p = w.row(n);
  const int64_t groups = w.groups();
  for (int64_t g = 0; g < groups; ++g) {
    auto scale = V::set(load_scale(w, n * groups + g)), bias = V::set(load_bias(w, n * groups + g));
    for (int j = 0; j < w.group; j += 8, p += bits, out += 8)
      V::store(out, V::fma(decode8<V, bits, affine>(p, table), scale, bias));
  }
}

template <class V>
void dequantize_row_any(const Weights& w, int64_t n, float* out) {
  if (w.mode == Mode::mxfp8) return dequantize_row<V, 8, false>(w, n, out);
  if (w.mode != Mode::affine) return dequantize_row<V, 4, false>(w, n, out);
  with_bits(w.bits, [&](auto bits) { dequantize_row<V, bits, true>(w, n, out); });
}

template <class V>
void dequantize(const Weights& w, const int64_t* indices, int64_t count, void* out, Type type) {
  const int64_t k = w.columns;
  parallel(count, grain_rows(w.row_bytes()), [&](int64_t begin, int64_t end) {
    auto* row = static_cast<float*>(scratch(6, size_t(k) * 4));
    for (int64_t i = begin; i < end; ++i) {
      dequantize_row_any<V>(w, indices ? indices[i] : i, row);
      store_floats(type, out, i * k, row, k);
    }
  });
}

// Four streams, each fetched ahead: what the products themselves do, with nothing else to do.
inline uint64_t read(const uint8_t* p, int64_t bytes) {
  constexpr int kStreams = 4, kLine = 8;  // 64-bit words
  const int64_t apart = bytes / kStreams / 512 * 64;
  const auto* words = reinterpret_cast<const uint64_t*>(p);
  uint64_t seen[kLine] = {};
  for (int64_t i = 0; i < apart; i += kLine)
    for (int s = 0; s < kStreams; ++s) {
      __builtin_prefetch(words + s * apart + i + 256);
      for (int j = 0; j < kLine; ++j) seen[j] |= words[s * apart + i + j];
    }
  uint64_t all = 0;
  for (uint64_t word : seen) all ^= word;
  return all;
}

}  // namespace
}  // namespace isomorph
