// A few rows, exactly: every weight is read once, decoded in registers to fp32 and used for all rows.
//
// fp32 rather than vdpbf16ps: Intel issues two fp32 multiply-adds a cycle and a vdpbf16ps every other one, and fp32 needs
// no splitting of fp32 activations and no scaling of sums.
#include "avx512.h"

#ifdef ISOMORPH_AVX512

#include "avx512_decode.h"
#include "avx512_stream.h"

namespace isomorph {
namespace {

constexpr int kOrderedSlot = 0, kNaturalSlot = 1;

// fp32 strips of `height` rows, [count / height][stride / 16][height][16], columns in the decoder's order; zero beyond K and
// in rows that only fill the last strip.
struct FloatRows {
  const float* x;
  int64_t stride;  // K up to a multiple of the decoder's unit
  int64_t apart;   // from one matrix's rows to the next one's; 0 when they share theirs
  const float* strip(size_t matrix, int64_t m) const { return x + int64_t(matrix) * apart + m * stride; }
};

template <class Decoder>
FloatRows ordered_rows(const Rows* rows, int count, int64_t k) {
  constexpr int unit = Decoder::unit;
  const int64_t stride = (k + unit - 1) / unit * unit, height = strip_rows(rows->count);
  const int64_t padded = (rows->count + height - 1) / height * height;
  const int64_t matrices = share_x(rows, count) ? 1 : count;
  auto* out = static_cast<float*>(scratch(kOrderedSlot, size_t(matrices * padded * stride) * 4));
  alignas(64) int32_t column[unit];
  for (int j = 0; j < Decoder::vectors; ++j)
    for (int lane = 0; lane < 16; ++lane) column[16 * j + lane] = Decoder::column(j, lane);
  parallel(matrices * padded, std::max<int64_t>(1, 32768 / (k + 1)), [&](int64_t begin, int64_t end) {
    auto* natural = static_cast<float*>(scratch(kNaturalSlot, size_t(stride) * 4));
    for (int64_t each = begin; each < end; ++each) {
      const Rows& own = rows[each / padded];
      const int64_t m = each % padded, there = m < own.count ? k : 0;
      const void* x = own.x[std::min(m, own.count - 1)];
      for (int64_t i = 0; i < stride; i += 16)
        _mm512_store_ps(natural + i, load_floats(own.x_type, x, i, first_lanes(std::max<int64_t>(0, there - i))));
      float* to = out + each / height * height * stride + m % height * 16;
      for (int64_t i = 0; i < stride; i += unit)
        for (int j = 0; j < unit; j += 16)
          _mm512_store_ps(to + (i + j) * height, _mm512_i32gather_ps(_mm512_load_si512(column + j), natural + i, 4));
    }
  });
  return {out, stride, matrices == 1 ? 0 : padded * stride};
}

// One vector of each of R weight rows times M activation rows.
template <int R, int M>
inline void accumulate(const __m512 (&weight)[R], const float* x, __m512 (&total)[R][M]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    __m512 value = _mm512_load_ps(x + 16 * m);
    asm("" : "+v"(value));  // GCC would load it again for each weight row
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[r][m] = _mm512_fmadd_ps(weight[r], value, total[r][m]);
  }
}

// sums [R][M] += R weight rows n times M activation rows at x, over the columns of `span`, which begin a batch of scales.
template <class Decoder, int R, int M>
__attribute__((noinline)) void exact_block(const Weights& w, const Decoder& decoder, RowSet n, Span span, const float* x,
                                           float* sums) {
  const Decoder decode = decoder;
  const int64_t groups = w.groups(), units = (span.end + Decoder::unit - 1) / Decoder::unit;
  const uint8_t* code[R];
  __m512 total[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    code[r] = w.row(n[r]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  }
  alignas(64) float scale[R + 1][16], bias[R][16];  // one more: terms may load 16 floats from any of a row's
  constexpr bool late = scales_sums<Decoder> && M <= 2;  // more sums than that do not fit the registers twice
  const int batch = 16 / Decoder::groups;  // units whose scales are loaded at once
  for (int64_t first = span.begin / Decoder::unit; first < units; first += batch) {
    const int count = int(std::min<int64_t>(batch, units - first));
    for (int r = 0; r < R; ++r) load_terms<Decoder>(w, n[r] * groups, groups, first, scale[r], bias[r]);
    for (int u = 0; u < count; ++u) {
      typename Decoder::Codes codes[R];
      typename Decoder::Terms terms[R];
      __m512 unscaled[R][M];
      if constexpr (late)
        for (auto& row : unscaled)
          for (__m512& sum : row) sum = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = code[r] + (first + u) * Decoder::bytes;
        prefetch(p, span.ahead);
        codes[r] = decode.load(p, w.columns - (first + u) * Decoder::unit);
        terms[r] = decode.terms(&scale[r][u * Decoder::groups], &bias[r][u * Decoder::groups]);
      }
#pragma GCC unroll 8
      for (int j = 0; j < Decoder::vectors; ++j) {
        __m512 weight[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          if constexpr (late) weight[r] = decode.element(codes[r], j);
          else weight[r] = decode.weight(codes[r], j, terms[r]);
        }
        accumulate<R, M>(weight, x + ((first + u) * Decoder::unit + 16 * j) * M, late ? unscaled : total);
      }
      if constexpr (late)
        for (int r = 0; r < R; ++r)
          for (int m = 0; m < M; ++m) total[r][m] = _mm512_fmadd_ps(unscaled[r][m], terms[r], total[r][m]);
    }
  }
  add_sums<R, M>(total, sums);
}

// bfloat16 weights [N, K] as they lie: a 32-bit lane is two of them.
struct Bfloat16Pairs {
  static constexpr int vectors = 2, unit = 32;
  static constexpr int column(int j, int lane) { return 2 * lane + j; }
};

template <int R, int M>
__attribute__((noinline)) void bfloat16_block(const uint8_t* w, int64_t k, RowSet n, Span span, const float* x,
                                              float* sums) {
  const uint8_t* from[R];
  __m512 total[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    from[r] = w + 2 * n[r] * k;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  }
  auto step = [&](int64_t j, auto load) {
    __m512i pairs[R];
    __m512 weight[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) pairs[r] = load(from[r] + 2 * j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) weight[r] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[r], 16));
    accumulate<R, M>(weight, x + j * M, total);
    const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) weight[r] = _mm512_castsi512_ps(_mm512_and_si512(pairs[r], high));
    accumulate<R, M>(weight, x + (j + 16) * M, total);
  };
  int64_t j = span.begin;
  for (; j + 32 <= span.end; j += 32)
    step(j, [&](const uint8_t* p) {
      prefetch(p, span.ahead);
      return _mm512_loadu_si512(p);
    });
  if (j < span.end) step(j, [&](const uint8_t* p) { return load_bytes(p, 2 * (k - j)); });
  add_sums<R, M>(total, sums);
}

}  // namespace

namespace avx512 {

void few_exact(const Weights* w, const Rows* rows, int count) {
  const auto multiply = [&](const auto& decoder) {
    using Decoder = std::decay_t<decltype(decoder)>;
    const FloatRows x = ordered_rows<Decoder>(rows, count, w->columns);
    const int64_t batch = 16 / Decoder::groups * Decoder::unit;
    for_blocks(row_counts(w, count), w->row_bytes(), w->columns, batch, rows,
               [&](size_t i, RowSet n, Span span, int64_t m, auto R, auto M, float* sums) {
                 exact_block<Decoder, R, M>(w[i], decoder, n, span, x.strip(i, m), sums);
               });
  };
  if (w->mode == Mode::nvfp4) return multiply(Fp4Sums<16>());
  if (w->mode == Mode::mxfp4 && rows->count == 1) return multiply(Fp4Sums<32>());  // for more a table a group costs less
  with_decoder(*w, multiply);
}

void multiply_bfloat16(const void* w, int64_t n, int64_t k, const Rows& rows) {
  const FloatRows x = ordered_rows<Bfloat16Pairs>(&rows, 1, k);
  const auto* weights = static_cast<const uint8_t*>(w);
  for_blocks({n}, 2 * k, k, 32, &rows, [&](size_t, RowSet set, Span span, int64_t m, auto R, auto M, float* sums) {
    bfloat16_block<R, M>(weights, k, set, span, x.strip(0, m), sums);
  });
}

}  // namespace avx512
}  // namespace isomorph

#endif
