// One to a dozen rows: every weight is read once, decoded in registers and used for all rows.
#pragma once

#include "activations.h"
#include "avx512_decode.h"

namespace isomorph {
namespace {

constexpr int kPieceSlot = 7, kSkinnySumSlot = 8;
constexpr int64_t kChunkBytes = 1 << 16, kPrefetchBytes = 1024;

struct PieceRows {
  const uint16_t* pieces;  // bfloat16 [count, P, K], zero rows up to a multiple of 4
  const float* sums;       // [count, G]
  int64_t k, groups;
};

inline int pieces_of(Type type) { return type == Type::bfloat16 ? 1 : 3; }

inline __m512bh as_bfloat16(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline __m512 widen(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// x = p0 + p1 + p2 exactly (24 bits in three times 8). Infinities and NaN stay in p0.
inline void split_row(const void* x, Type type, int64_t k, uint16_t* out) {
  for (int64_t j = 0; j < k; j += 16) {
    __mmask16 mask = __mmask16(k - j >= 16 ? 0xffff : (1 << (k - j)) - 1);
    __m512 value = load_floats(type, x, j, mask);
    for (int piece = 0; piece < 3; ++piece) {
      __m256i rounded = (__m256i)_mm512_cvtneps_pbh(value);
      _mm256_mask_storeu_epi16(out + piece * k + j, mask, rounded);
      value = _mm512_sub_ps(value, widen(rounded));
      __mmask16 bad = _mm512_fpclass_ps_mask(value, 0x99);  // NaN or infinity: keep it in the first piece only
      value = _mm512_mask_mov_ps(value, bad, _mm512_setzero_ps());
    }
  }
}

inline void group_sums(const void* x, Type type, int64_t groups, int group, float* out) {
  for (int64_t g = 0; g < groups; ++g) {
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < group; j += 16) sum = _mm512_add_ps(sum, load_floats(type, x, g * group + j, 0xffff));
    out[g] = _mm512_reduce_add_ps(sum);
  }
}

inline PieceRows split_rows(const Rows& rows, int64_t k, int group) {
  const int pieces = pieces_of(rows.x_type);
  const int64_t padded = (rows.count + 3) / 4 * 4, groups = group ? k / group : 0;
  auto* out = static_cast<uint16_t*>(scratch(kPieceSlot, size_t(padded * pieces * k) * 2));
  auto* sums = static_cast<float*>(scratch(kSkinnySumSlot, size_t(padded * groups) * 4 + 4));
  for (int64_t m = 0; m < padded; ++m) {
    uint16_t* to = out + m * pieces * k;
    if (m >= rows.count) {
      std::memset(to, 0, size_t(pieces * k) * 2);
      std::memset(sums + m * groups, 0, size_t(groups) * 4);
      continue;
    }
    if (pieces == 1) std::memcpy(to, rows.x[m], size_t(k) * 2);
    else split_row(rows.x[m], rows.x_type, k, to);
    if (group) group_sums(rows.x[m], rows.x_type, groups, group, sums + m * groups);
  }
  return {out, sums, k, groups};
}

// out[r * M + m] for weight rows n..n+R-1 and activation rows m0..m0+M-1. `steps` vectors of 32 codes share one scale
// multiplication; a group is one or two such runs.
template <int bits, int steps, int M, int R, int P>
__attribute__((noinline)) void exact_block(const Weights& w, int64_t n, const PieceRows& x, int64_t m0, float* out) {
  const Decode32<bits> decode;
  const auto& tables = centred_tables<bits>();
  const int64_t k = x.k, groups = x.groups;
  const int runs = w.group / (32 * steps);
  // One row is one stream, which the hardware prefetches; several are short ones that it loses at every row's end.
  [[maybe_unused]] const int64_t ahead = std::max<int64_t>(R * w.row_bytes(), kPrefetchBytes);
  const bool fp4 = w.mode != Mode::affine;
  const uint16_t* from = x.pieces + m0 * P * k;
  const uint8_t* code[R];
  __m512 total[R][M];
  for (int r = 0; r < R; ++r) {
    code[r] = w.row(n + r);
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  }
  alignas(64) float scale[R][16], zero[R][16];
  alignas(64) int32_t table[R][16];
  for (int64_t first = 0; first < groups; first += 16) {
    const int count = int(std::min<int64_t>(16, groups - first));
    const __mmask16 mask = __mmask16((1u << count) - 1);
    for (int r = 0; r < R; ++r) {
      GroupTerms terms = group_terms(w, (n + r) * groups + first, mask);
      _mm512_store_ps(scale[r], terms.scale);
      if constexpr (bits == 8) _mm512_store_ps(zero[r], terms.zero);
      else _mm512_store_si512(table[r], _mm512_cvtps_epi32(terms.zero));
      for (int m = 0; m < M; ++m)
        total[r][m] = _mm512_fmadd_ps(_mm512_maskz_mov_ps(mask, terms.rest),
                                      _mm512_maskz_loadu_ps(mask, x.sums + (m0 + m) * groups + first), total[r][m]);
    }
    for (int g = 0; g < count; ++g) {
      for (int run = 0; run < runs; ++run) {
        __m512 part[R][M];
        for (int r = 0; r < R; ++r) {
          if constexpr (R > 1) _mm_prefetch(reinterpret_cast<const char*>(code[r] + ahead), _MM_HINT_T0);
          for (int m = 0; m < M; ++m) part[r][m] = _mm512_setzero_ps();
        }
#pragma GCC unroll 2
        for (int step = 0; step < steps; ++step) {
          __m512bh codes[R];
          for (int r = 0; r < R; ++r) {
            if constexpr (bits == 8) codes[r] = decode(code[r], zero[r][g]);
            else codes[r] = decode(code[r], fp4 ? tables.elements : tables.entries[table[r][g]]);
            code[r] += 4 * bits;
          }
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
            for (int piece = 0; piece < P; ++piece) {
              __m512bh value = as_bfloat16(from + (m * P + piece) * k);
#pragma GCC unroll 4
              for (int r = 0; r < R; ++r) part[r][m] = _mm512_dpbf16_ps(part[r][m], codes[r], value);
            }
          from += 32;
        }
        for (int r = 0; r < R; ++r)
          for (int m = 0; m < M; ++m)
            total[r][m] = _mm512_fmadd_ps(_mm512_set1_ps(scale[r][g]), part[r][m], total[r][m]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * M + m] = _mm512_reduce_add_ps(total[r][m]);
}

template <int M, int R, class Block>
void run_block(const Rows& rows, int64_t n, int64_t m0, const Block& block) {
  float out[R * M];
  block(n, m0, out);
  for (int m = 0; m < M && m0 + m < rows.count; ++m)
    for (int r = 0; r < R; ++r) store_float(rows.y_type, rows.y[m0 + m], n + r, out[r * M + m]);
}

template <int bits, int steps, int P>
void exact_range(const Weights& w, const Rows& rows, const PieceRows& x, int64_t begin, int64_t end) {
  auto block = [&](auto M, auto R) {
    return [&](int64_t n, int64_t m0, float* out) {
      exact_block<bits, steps, decltype(M)::value, decltype(R)::value, P>(w, n, x, m0, out);
    };
  };
  using std::integral_constant;
  integral_constant<int, 1> one;
  integral_constant<int, 2> two;
  integral_constant<int, 4> four;
  int64_t n = begin;
  if (rows.count == 1) {
    for (; n < end; ++n) run_block<1, 1>(rows, n, 0, block(one, one));
  } else if (rows.count == 2) {
    for (; n + 2 <= end; n += 2) run_block<2, 2>(rows, n, 0, block(two, two));
    for (; n < end; ++n) run_block<2, 1>(rows, n, 0, block(two, one));
  } else {
    for (; n + 2 <= end; n += 2)
      for (int64_t m = 0; m < rows.count; m += 4) run_block<4, 2>(rows, n, m, block(four, two));
    for (; n < end; ++n)
      for (int64_t m = 0; m < rows.count; m += 4) run_block<4, 1>(rows, n, m, block(four, one));
  }
}

template <int bits>
void exact_bits(const Weights& w, const Rows& rows, const PieceRows& x, int64_t begin, int64_t end) {
  const bool one_piece = rows.x_type == Type::bfloat16;
  if (w.group == 32) {
    if (one_piece) return exact_range<bits, 1, 1>(w, rows, x, begin, end);
    return exact_range<bits, 1, 3>(w, rows, x, begin, end);
  }
  if (one_piece) return exact_range<bits, 2, 1>(w, rows, x, begin, end);
  return exact_range<bits, 2, 3>(w, rows, x, begin, end);
}

inline int64_t chunk_rows(int64_t row_bytes) {
  return std::max<int64_t>(4, kChunkBytes / std::max<int64_t>(1, row_bytes) / 4 * 4);
}

void skinny_exact(const Weights& w, const Rows& rows) {
  const PieceRows x = split_rows(rows, w.columns, w.group);
  parallel(w.rows, chunk_rows(w.row_bytes()), [&](int64_t begin, int64_t end) {
    switch (w.bits) {
      case 2: return exact_bits<2>(w, rows, x, begin, end);
      case 3: return exact_bits<3>(w, rows, x, begin, end);
      case 4: return exact_bits<4>(w, rows, x, begin, end);
      case 5: return exact_bits<5>(w, rows, x, begin, end);
      case 6: return exact_bits<6>(w, rows, x, begin, end);
      default: return exact_bits<8>(w, rows, x, begin, end);
    }
  });
}

// In fast numerics an fp4 weight is affine: element = (code' - 12) / 2 with code' in 0..24.
inline void fast_terms(const Weights& w, int64_t index, __mmask16 mask, __m512& scale, __m512& bias) {
  if (w.mode == Mode::affine) {
    scale = load_floats(w.scale_type, w.scales, index, mask);
    bias = load_floats(w.scale_type, w.biases, index, mask);
  } else {
    __m512 e8m0 = _mm512_maskz_mov_ps(mask, load_e8m0(w.scales, index, mask));
    scale = _mm512_mul_ps(e8m0, _mm512_set1_ps(0.5f));
    bias = _mm512_mul_ps(e8m0, _mm512_set1_ps(-6.f));
  }
}

// code_rows of activations.h, sixteen values at a time.
inline CodedRows code_rows_512(const Rows& rows, int64_t k, int group) {
  const int64_t groups = k / group, stride = (k + 63) / 64 * 64;
  auto* codes = static_cast<int8_t*>(scratch(kCodeSlot, size_t(rows.count * stride)));
  auto* scales = static_cast<float*>(scratch(kScaleSlot, size_t(rows.count * groups) * 4));
  auto* sums = static_cast<float*>(scratch(kSumSlot, size_t(rows.count * groups) * 4));
  if (stride != k) std::memset(codes, 0, size_t(rows.count * stride));
  parallel(rows.count, std::max<int64_t>(1, 262144 / (k + 1)), [&](int64_t begin, int64_t end) {
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
        const float inverse = finite && top > 1e-36f ? 127.f / top : 0.f;
        __m512i total = _mm512_setzero_si512();
        for (int i = 0; i < parts; ++i) {
          __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(value[i], _mm512_set1_ps(inverse)));
          code = finite ? code : _mm512_setzero_si512();
          total = _mm512_add_epi32(total, code);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + m * stride + g * group + 16 * i), _mm512_cvtepi32_epi8(code));
        }
        const float scale = finite ? top / 127.f : std::numeric_limits<float>::quiet_NaN();  // so that it shows
        scales[m * groups + g] = scale;
        sums[m * groups + g] = scale * float(_mm512_reduce_add_epi32(total));
      }
  });
  return {codes, stride, scales, sums};
}

// `halves`: groups of 32, two in a vector of 64 codes.
template <int bits, bool fp4, bool halves, int M, int R>
__attribute__((noinline)) void fast_block(const Weights& w, int64_t n, const CodedRows& x, int64_t m0, float* out) {
  const Decode64<bits> decode;
  const int64_t groups = w.groups(), k = w.columns;
  const int vectors = halves ? 1 : w.group / 64;  // in a group
  const __m512i spread = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  [[maybe_unused]] const int64_t ahead = std::max<int64_t>(R * w.row_bytes(), kPrefetchBytes);
  __m512 total[R][M];
  const uint8_t* code[R];
  for (int r = 0; r < R; ++r) {
    code[r] = w.row(n + r);
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  }
  alignas(64) float scale[R][M][16];
  const int8_t* from = x.codes + m0 * x.stride;
  int64_t j = 0;
  for (int64_t first = 0; first < groups; first += 16) {
    const int count = int(std::min<int64_t>(16, groups - first));
    const __mmask16 mask = __mmask16((1u << count) - 1);
    for (int r = 0; r < R; ++r) {
      __m512 s, b;
      fast_terms(w, (n + r) * groups + first, mask, s, b);
      for (int m = 0; m < M; ++m) {
        const int64_t at = (m0 + m) * groups + first;
        _mm512_store_ps(scale[r][m], _mm512_mul_ps(s, _mm512_maskz_loadu_ps(mask, x.scales + at)));
        total[r][m] = _mm512_fmadd_ps(b, _mm512_maskz_loadu_ps(mask, x.sums + at), total[r][m]);
      }
    }
    for (int g = 0; g < count; g += halves ? 2 : 1) {
      __m512i dot[R][M];
      for (int r = 0; r < R; ++r) {
        if constexpr (R > 1) _mm_prefetch(reinterpret_cast<const char*>(code[r] + ahead), _MM_HINT_T0);
        for (int m = 0; m < M; ++m) dot[r][m] = _mm512_setzero_si512();
      }
      for (int v = 0; v < vectors; ++v, j += 64) {
        __m512i codes[R];
        for (int r = 0; r < R; ++r) {
          codes[r] = !halves || k - j >= 64 ? decode.template take<fp4>(code[r]) : decode.template take_half<fp4>(code[r]);
          code[r] += 8 * bits;
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          __m512i value = _mm512_loadu_si512(from + m * x.stride + j);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) dot[r][m] = _mm512_dpbusd_epi32(dot[r][m], codes[r], value);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
          __m512 factor;
          if constexpr (halves) {
            double pair;
            std::memcpy(&pair, scale[r][m] + g, 8);
            factor = _mm512_permutexvar_ps(spread, _mm512_castpd_ps(_mm512_set1_pd(pair)));
          } else {
            factor = _mm512_set1_ps(scale[r][m][g]);
          }
          total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][m]), factor, total[r][m]);
        }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * M + m] = _mm512_reduce_add_ps(total[r][m]);
}

template <int bits, bool fp4, bool halves>
void fast_range(const Weights& w, const Rows& rows, const CodedRows& x, int64_t begin, int64_t end) {
  auto block = [&](auto M, auto R) {
    return [&](int64_t n, int64_t m0, float* out) {
      fast_block<bits, fp4, halves, decltype(M)::value, decltype(R)::value>(w, n, x, m0, out);
    };
  };
  using std::integral_constant;
  integral_constant<int, 1> one;
  integral_constant<int, 2> two;
  integral_constant<int, 4> four;
  int64_t n = begin;
  if (rows.count == 1) {
    for (; n < end; ++n) run_block<1, 1>(rows, n, 0, block(one, one));
  }
  for (; n < end;) {
    const bool pair = n + 2 <= end;
    for (int64_t m = 0; m < rows.count;) {
      const int64_t left = rows.count - m;
      if (left >= 4) {
        pair ? run_block<4, 2>(rows, n, m, block(four, two)) : run_block<4, 1>(rows, n, m, block(four, one));
        m += 4;
      } else {
        pair ? run_block<1, 2>(rows, n, m, block(one, two)) : run_block<1, 1>(rows, n, m, block(one, one));
        m += 1;
      }
    }
    n += pair ? 2 : 1;
  }
}

template <int bits, bool fp4>
void fast_group(const Weights& w, const Rows& rows, const CodedRows& x, int64_t begin, int64_t end) {
  if (w.group == 32) fast_range<bits, fp4, true>(w, rows, x, begin, end);
  else fast_range<bits, fp4, false>(w, rows, x, begin, end);
}

void skinny_fast(const Weights& w, const Rows& rows) {
  const CodedRows x = code_rows_512(rows, w.columns, w.group);
  parallel(w.rows, chunk_rows(w.row_bytes()), [&](int64_t begin, int64_t end) {
    if (w.mode != Mode::affine) return fast_range<4, true, true>(w, rows, x, begin, end);
    switch (w.bits) {
      case 2: return fast_group<2, false>(w, rows, x, begin, end);
      case 3: return fast_group<3, false>(w, rows, x, begin, end);
      case 4: return fast_group<4, false>(w, rows, x, begin, end);
      case 5: return fast_group<5, false>(w, rows, x, begin, end);
      case 6: return fast_group<6, false>(w, rows, x, begin, end);
      default: return fast_group<8, false>(w, rows, x, begin, end);
    }
  });
}

// bfloat16 weights [n, k] as they lie.
template <int M, int R, int P>
__attribute__((noinline)) void bfloat16_block(const uint8_t* w, int64_t n, const PieceRows& x, int64_t m0, float* out) {
  const int64_t k = x.k;
  const uint16_t* from = x.pieces + m0 * P * k;
  __m512 total[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  for (int64_t j = 0; j < k; j += 32) {
    const __mmask32 mask = k - j >= 32 ? ~__mmask32(0) : (__mmask32(1) << (k - j)) - 1;
    __m512bh weight[R];
    for (int r = 0; r < R; ++r) weight[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + 2 * ((n + r) * k + j));
    for (int m = 0; m < M; ++m)
      for (int piece = 0; piece < P; ++piece) {
        __m512bh value = (__m512bh)_mm512_maskz_loadu_epi16(mask, from + (m * P + piece) * k + j);
        for (int r = 0; r < R; ++r) total[r][m] = _mm512_dpbf16_ps(total[r][m], weight[r], value);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * M + m] = _mm512_reduce_add_ps(total[r][m]);
}

template <int P>
void bfloat16_range(const uint8_t* w, const Rows& rows, const PieceRows& x, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end;) {
    const bool four = n + 4 <= end;
    for (int64_t m = 0; m < rows.count;) {
      const bool wide = rows.count - m >= 3;
      auto one_four = [&](int64_t i, int64_t at, float* out) { bfloat16_block<1, 4, P>(w, i, x, at, out); };
      auto one_one = [&](int64_t i, int64_t at, float* out) { bfloat16_block<1, 1, P>(w, i, x, at, out); };
      auto four_four = [&](int64_t i, int64_t at, float* out) { bfloat16_block<4, 4, P>(w, i, x, at, out); };
      auto four_one = [&](int64_t i, int64_t at, float* out) { bfloat16_block<4, 1, P>(w, i, x, at, out); };
      if (wide) four ? run_block<4, 4>(rows, n, m, four_four) : run_block<4, 1>(rows, n, m, four_one);
      else four ? run_block<1, 4>(rows, n, m, one_four) : run_block<1, 1>(rows, n, m, one_one);
      m += wide ? 4 : 1;
    }
    n += four ? 4 : 1;
  }
}

void multiply_bfloat16(const void* w, int64_t n, int64_t k, const Rows& rows) {
  const PieceRows x = split_rows(rows, k, 0);
  const auto* weights = static_cast<const uint8_t*>(w);
  parallel(n, chunk_rows(2 * k), [&](int64_t begin, int64_t end) {
    if (rows.x_type == Type::bfloat16) bfloat16_range<1>(weights, rows, x, begin, end);
    else bfloat16_range<3>(weights, rows, x, begin, end);
  });
}

}  // namespace
}  // namespace isomorph
