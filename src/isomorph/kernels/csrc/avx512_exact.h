// One to a dozen rows, exactly: every weight is read once, decoded in registers to fp32 and used for all rows.
//
// fp32 rather than vdpbf16ps: Intel issues two fp32 multiply-adds a cycle and a vdpbf16ps every other one, and fp32 needs
// no splitting of fp32 activations and no scaling of sums.
#pragma once

#include "avx512_decode.h"
#include "pool.h"

namespace isomorph {
namespace {

constexpr int kOrderedSlot = 0, kNaturalSlot = 1;
constexpr int kStreams = 4;  // weight rows at a time: they share the loads of activations
constexpr int64_t kAhead = 2048;  // bytes; what memory delivers while it answers

struct FloatRows {
  const float* x;  // [count, stride], columns in the decoder's order, zero rows up to a multiple of 4
  int64_t stride;  // a multiple of the decoder's unit; zero beyond K
  const float* row(int64_t m) const { return x + m * stride; }
};

template <class Decoder>
FloatRows ordered_rows(const Rows& rows, int64_t k) {
  constexpr int unit = Decoder::unit;
  const int64_t stride = (k + unit - 1) / unit * unit, padded = rows.count > 2 ? (rows.count + 3) / 4 * 4 : rows.count;
  auto* out = static_cast<float*>(scratch(kOrderedSlot, size_t(padded * stride) * 4));
  std::memset(out + rows.count * stride, 0, size_t((padded - rows.count) * stride) * 4);
  alignas(64) int32_t column[unit];
  for (int j = 0; j < Decoder::vectors; ++j)
    for (int lane = 0; lane < 16; ++lane) column[16 * j + lane] = Decoder::column(j, lane);
  parallel(rows.count, std::max<int64_t>(1, 32768 / (k + 1)), [&](int64_t begin, int64_t end) {
    auto* natural = static_cast<float*>(scratch(kNaturalSlot, size_t(stride) * 4));
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t i = 0; i < stride; i += 16)
        _mm512_store_ps(natural + i, load_floats(rows.x_type, rows.x[m], i, first_lanes(std::max<int64_t>(0, k - i))));
      for (int64_t i = 0; i < stride; i += unit)
        for (int j = 0; j < unit; j += 16)
          _mm512_store_ps(out + m * stride + i + j, _mm512_i32gather_ps(_mm512_load_si512(column + j), natural + i, 4));
    }
  });
  return {out, stride};
}

// One vector of each weight row times M activation rows.
template <int M>
inline void accumulate(const __m512 (&weight)[kStreams], const float* x, int64_t stride, __m512 (&total)[kStreams][M]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const __m512 value = _mm512_loadu_ps(x + m * stride);
#pragma GCC unroll 4
    for (int r = 0; r < kStreams; ++r) total[r][m] = _mm512_fmadd_ps(weight[r], value, total[r][m]);
  }
}

// The weight rows of a block, `apart` from one another: streams far apart, which the hardware prefetches each as one,
// where rows behind one another would be short streams that it loses at every end. The last row stands in for missing ones.
struct RowSet {
  int64_t first, apart, last;
  int64_t operator[](int r) const { return std::min(first + r * apart, last); }
};

template <int M>
inline void store_sums(const __m512 (&total)[kStreams][M], const Rows& rows, RowSet n, int64_t m0) {
  for (int m = 0; m < M && m0 + m < rows.count; ++m)
    for (int r = 0; r < kStreams; ++r) store_float(rows.y_type, rows.y[m0 + m], n[r], _mm512_reduce_add_ps(total[r][m]));
}

inline void prefetch(const void* p, int64_t ahead) {
  _mm_prefetch(static_cast<const char*>(p) + ahead, _MM_HINT_T0);
}

// Scales and biases of the next 16 groups of units, those of a row beginning at `base`; halves of 128 share theirs.
template <class Decoder>
inline void load_terms(const Weights& w, int64_t base, int64_t unit, float* scale, float* bias) {
  const bool halves = w.group > Decoder::unit;
  const int64_t g = halves ? unit / 2 : unit * Decoder::groups;
  const __mmask16 mask = first_lanes(std::min<int64_t>(halves ? 8 : 16, w.groups() - g));
  __m512 s = load_scales(w, base + g, mask), b = load_biases(w, base + g, mask);
  if (halves) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    s = _mm512_permutexvar_ps(twice, s), b = _mm512_permutexvar_ps(twice, b);
  }
  _mm512_store_ps(scale, s);
  _mm512_store_ps(bias, b);
}

// Weight rows n times activation rows m0..m0+M-1.
template <class Decoder, int M>
__attribute__((noinline)) void exact_block(const Weights& w, const Decoder& decoder, RowSet n, const FloatRows& x, int64_t m0,
                                           const Rows& rows) {
  const Decoder decode = decoder;
  const int64_t groups = w.groups(), units = (w.columns + Decoder::unit - 1) / Decoder::unit;
  const float* from = x.row(m0);
  const uint8_t* code[kStreams];
  __m512 total[kStreams][M];
  for (int r = 0; r < kStreams; ++r) {
    code[r] = w.row(n[r]);
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  }
  alignas(64) float scale[kStreams][16], bias[kStreams][16];
  const int batch = 16 / Decoder::groups;  // units whose scales are loaded at once
  for (int64_t first = 0; first < units; first += batch) {
    const int count = int(std::min<int64_t>(batch, units - first));
    for (int r = 0; r < kStreams; ++r) load_terms<Decoder>(w, n[r] * groups, first, scale[r], bias[r]);
    for (int u = 0; u < count; ++u) {
      typename Decoder::Codes codes[kStreams];
      typename Decoder::Terms terms[kStreams];
#pragma GCC unroll 4
      for (int r = 0; r < kStreams; ++r) {
        const uint8_t* p = code[r] + (first + u) * Decoder::bytes;
        prefetch(p, kAhead);
        codes[r] = decode.load(p, w.columns - (first + u) * Decoder::unit);
        terms[r] = decode.terms(&scale[r][u * Decoder::groups], &bias[r][u * Decoder::groups]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < Decoder::vectors; ++j) {
        __m512 weight[kStreams];
#pragma GCC unroll 4
        for (int r = 0; r < kStreams; ++r) weight[r] = decode.weight(codes[r], j, terms[r]);
        accumulate<M>(weight, from + (first + u) * Decoder::unit + 16 * j, x.stride, total);
      }
    }
  }
  store_sums<M>(total, rows, n, m0);
}

// Calls block(n, m0, M) for all weight rows times `count` activation rows, M being a compile-time constant.
template <class Block>
void for_blocks(int64_t weight_rows, int64_t row_bytes, int64_t count, const Block& block) {
  const int64_t apart = std::max<int64_t>(1, weight_rows / kStreams), last = weight_rows - 1;
  // A chunk of work is long enough to stream and short enough to share evenly.
  const int64_t fair = apart / (8 * thread_count()), most = (int64_t(1) << 16) / std::max<int64_t>(1, row_bytes);
  auto activations = [&](RowSet n) {
    if (count == 1) return block(n, int64_t(0), std::integral_constant<int, 1>());
    if (count == 2) return block(n, int64_t(0), std::integral_constant<int, 2>());
    for (int64_t m = 0; m < count; m += 4) block(n, m, std::integral_constant<int, 4>());
  };
  parallel(apart, std::max<int64_t>(1, std::min(fair, most)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) activations({i, apart, last});
    if (end == apart && weight_rows > apart * kStreams) activations({apart * kStreams, 1, last});
  });
}

void few_exact(const Weights& w, const Rows& rows) {
  with_decoder(w, [&](const auto& decoder) {
    using Decoder = std::decay_t<decltype(decoder)>;
    const FloatRows x = ordered_rows<Decoder>(rows, w.columns);
    for_blocks(w.rows, w.row_bytes(), rows.count, [&](RowSet n, int64_t m, auto M) {
      exact_block<Decoder, M>(w, decoder, n, x, m, rows);
    });
  });
}

// bfloat16 weights [N, K] as they lie: a 32-bit lane is two of them.
struct Bfloat16Pairs {
  static constexpr int vectors = 2, unit = 32;
  static constexpr int column(int j, int lane) { return 2 * lane + j; }
};

template <int M>
__attribute__((noinline)) void bfloat16_block(const uint8_t* w, RowSet n, int64_t k, const FloatRows& x, int64_t m0,
                                              const Rows& rows) {
  __m512 total[kStreams][M];
  for (int r = 0; r < kStreams; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  auto step = [&](int64_t j, auto load) {
    __m512i pairs[kStreams];
    __m512 weight[kStreams];
    for (int r = 0; r < kStreams; ++r) pairs[r] = load(w + 2 * (n[r] * k + j));
    for (int r = 0; r < kStreams; ++r) weight[r] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[r], 16));
    accumulate<M>(weight, x.row(m0) + j, x.stride, total);
    const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
    for (int r = 0; r < kStreams; ++r) weight[r] = _mm512_castsi512_ps(_mm512_and_si512(pairs[r], high));
    accumulate<M>(weight, x.row(m0) + j + 16, x.stride, total);
  };
  int64_t j = 0;
  for (; j + 32 <= k; j += 32)
    step(j, [](const uint8_t* p) {
      prefetch(p, kAhead);
      return _mm512_loadu_si512(p);
    });
  if (j < k) step(j, [&](const uint8_t* p) { return load_bytes(p, 2 * (k - j)); });
  store_sums<M>(total, rows, n, m0);
}

void multiply_bfloat16(const void* w, int64_t n, int64_t k, const Rows& rows) {
  const FloatRows x = ordered_rows<Bfloat16Pairs>(rows, k);
  const auto* weights = static_cast<const uint8_t*>(w);
  for_blocks(n, 2 * k, rows.count, [&](RowSet set, int64_t m, auto M) {
    bfloat16_block<M>(weights, set, k, x, m, rows);
  });
}

}  // namespace
}  // namespace isomorph
