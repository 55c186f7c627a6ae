// A few rows with int8 activations. One or two: four weight rows are read side by side. Three to sixteen: sixteen weight rows
// are transposed, so that a lane is one of them and no sum has to be scaled or added up lane by lane.
#include "avx512.h"

#ifdef ISOMORPH_AVX512

#include "avx512_codes.h"
#include "avx512_stream.h"
#include "avx512_transpose.h"

namespace isomorph {
namespace {

constexpr int kLanes = 16, kWordSlot = 5;

// sums [R][M] += R weight rows n times activation rows m0..m0+M-1 over the columns of `span`. A vector of 64 codes is two
// groups of 32, one of 64 or half of 128.
template <class Codes, int group, int R, int M>
__attribute__((noinline)) void fast_block(const Weights& w, RowSet n, Span span, const CodedRows& x, int64_t m0, float* sums) {
  constexpr bool halves = group == 32;
  const int64_t groups = w.groups(), last = (span.end + group - 1) / group;
  __m512 total[R][M];
  const uint8_t* code[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    code[r] = w.row(n[r]) + span.begin / 8 * w.bits;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  }
  alignas(64) float scale[R][M][16];
  const int8_t* from = x.codes + m0 * x.stride + span.begin;
  int64_t left = w.columns - span.begin;
  for (int64_t first = span.begin / group; first < last; first += 16) {
    const int count = int(std::min<int64_t>(16, last - first));
    const __mmask16 mask = first_lanes(count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512 s, b;
      fast_terms(w, n[r] * groups + first, mask, s, b);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const int64_t at = (m0 + m) * groups + first;
        _mm512_store_ps(scale[r][m], _mm512_mul_ps(s, _mm512_maskz_loadu_ps(mask, x.scales + at)));
        total[r][m] = _mm512_fmadd_ps(b, _mm512_maskz_loadu_ps(mask, x.sums + at), total[r][m]);
      }
    }
    for (int g = 0; g < count; g += halves ? 2 : 1) {
      __m512i dot[R][M];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) dot[r][m] = _mm512_setzero_si512();
      for (int v = 0; v < std::max(1, group / 64); ++v, left -= 64, from += 64) {
        __m512i codes[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          prefetch(code[r], span.ahead);
          codes[r] = Codes::load(code[r], halves ? left : 64);
          code[r] += Codes::bytes;
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const __m512i value = _mm512_loadu_si512(from + m * x.stride);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) add_dot(dot[r][m], codes[r], value);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          __m512 factor = _mm512_set1_ps(scale[r][m][g]);
          if constexpr (halves) factor = spread_pair(&scale[r][m][g]);
          total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][m]), factor, total[r][m]);
        }
    }
  }
  add_sums<R, M>(total, sums);
}

// Activations as lanes_block reads them: strips of `height` rows, [strip][K / 4][height] words of four codes and, for each
// group, `height` scales and `height` sums.
struct WordRows {
  int64_t height, strips, words, groups;
  uint32_t* codes;
  float* terms;

  uint32_t* word(int64_t s, int64_t i) const { return codes + (s * words + i) * height; }
  float* term(int64_t s, int64_t g) const { return terms + (s * groups + g) * 2 * height; }
};

WordRows word_rows(const CodedRows& x, int64_t count, int64_t height, int64_t groups) {
  const int64_t words = x.stride / 4, padded = (count + height - 1) / height * height;
  auto* memory = static_cast<uint32_t*>(scratch(kWordSlot, size_t(padded * (words + 2 * groups)) * 4));
  const WordRows out{height, padded / height, words, groups, memory, reinterpret_cast<float*>(memory + padded * words)};
  for (int64_t m = 0; m < padded; ++m) {
    uint32_t* to = out.word(m / height, 0) + m % height;
    float* terms = out.term(m / height, 0) + m % height;
    for (int64_t i = 0; i < words; ++i) {
      uint32_t word = 0;
      if (m < count) std::memcpy(&word, x.codes + m * x.stride + 4 * i, 4);
      to[i * height] = word;
    }
    for (int64_t g = 0; g < groups; ++g) {
      terms[2 * g * height] = m < count ? x.scales[m * groups + g] : 0.f;
      terms[(2 * g + 1) * height] = m < count ? x.sums[m * groups + g] : 0.f;
    }
  }
  return out;
}

// Scales and biases of 16 groups of 16 weight rows, a lane each: [group][16].
struct LaneTerms {
  alignas(64) float scale[kLanes][kLanes], bias[kLanes][kLanes];

  void load(const Weights& w, RowSet n, int64_t group) {
    __m512i s[kLanes], b[kLanes];
    const __mmask16 mask = first_lanes(w.groups() - group);
    const int bytes = w.mode == Mode::affine ? size_of(w.scale_type) : 1;
    for (int i = 0; i < kLanes; ++i) {
      __m512 one, other;
      const int64_t index = n[i] * w.groups() + group;
      fast_terms(w, index, mask, one, other);
      prefetch(w.scales, (index + w.groups()) * bytes);  // of the next block
      if (w.biases) prefetch(w.biases, (index + w.groups()) * bytes);
      s[i] = (__m512i)one, b[i] = (__m512i)other;
    }
    transpose16(s);
    transpose16(b);
    for (int i = 0; i < kLanes; ++i) _mm512_store_si512(scale[i], s[i]), _mm512_store_si512(bias[i], b[i]);
  }
};

constexpr int kColumns = 128;  // of 16 weight rows that are transposed together: whole groups

// Columns from k on of 16 weight rows, transposed: a word is eight codes of four bits as they lie, else four codes as bytes.
template <int bits, bool fp4>
inline void load_words(const uint8_t* const (&from)[kLanes], CodeBytes<bits, fp4> codes, int64_t k, int64_t left, __m512i* out) {
  for (int part = 0; part < (bits == 4 ? 1 : 2) && 64 * part < left; ++part) {
    __m512i v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const uint8_t* p = from[i] + (k + 64 * part) / 8 * bits;
      prefetch(p, kLaneAhead);
      v[i] = bits == 4 ? load_bytes(p, left / 2) : codes.load(p, left - 64 * part);
    }
    transpose16(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) _mm512_store_si512(out + kLanes * part + i, v[i]);
  }
}

// Two vectors of codes in order: those of eight columns.
template <int bits, bool fp4>
inline void eight_columns(const __m512i* words, CodeBytes<bits, fp4> codes, __m512i (&out)[2]) {
  if constexpr (bits == 4) {
    const __m512i word = *words, mask = _mm512_set1_epi8(15);
    out[0] = _mm512_and_si512(word, mask), out[1] = _mm512_and_si512(_mm512_srli_epi16(word, 4), mask);
    if constexpr (fp4) {
      const __m512i elements = _mm512_load_si512(codes.tables.elements);
      out[0] = _mm512_shuffle_epi8(elements, out[0]), out[1] = _mm512_shuffle_epi8(elements, out[1]);
    }
  } else {
    out[0] = words[0], out[1] = words[1];
  }
}

// sum += codes in each lane times four codes of an activation row.
inline void add_dot(__m512i& sum, __m512i codes, const uint32_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*x));
}

// sums [H][16] = strip s of H activation rows times weight rows n.
template <int H, int bits, bool fp4>
__attribute__((noinline)) void lanes_block(const Weights& w, CodeBytes<bits, fp4> codes, RowSet n, const WordRows& x, int64_t s,
                                           float* sums) {
  const uint8_t* from[kLanes];
  for (int i = 0; i < kLanes; ++i) from[i] = w.row(n[i]);
  const uint32_t* of = x.word(s, 0);
  const float* term = x.term(s, 0);
  __m512 total[H];
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i) total[i] = _mm512_setzero_ps();
  LaneTerms terms;
  __m512i words[bits == 4 ? kLanes : 2 * kLanes];
  int64_t g = 0;
  for (int64_t k = 0; k < w.columns; k += kColumns) {
    load_words(from, codes, k, w.columns - k, words);
    const __m512i* word = words;
    for (int64_t groups = std::min<int64_t>(kColumns, w.columns - k) / w.group; groups > 0; --groups, ++g, term += 2 * H) {
      if (g % 16 == 0) terms.load(w, n, g);
      __m512i dot[2][H];  // two sums each, as an addition waits for the one before
#pragma GCC unroll 8
      for (int i = 0; i < H; ++i) dot[0][i] = dot[1][i] = _mm512_setzero_si512();
      for (int j = 0; j < w.group; j += 8, word += bits == 4 ? 1 : 2, of += 2 * H) {
        __m512i eight[2];
        eight_columns(word, codes, eight);
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i) add_dot(dot[0][i], eight[0], of + i);
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i) add_dot(dot[1][i], eight[1], of + H + i);
      }
      const __m512 scale = _mm512_load_ps(terms.scale[g % 16]), bias = _mm512_load_ps(terms.bias[g % 16]);
#pragma GCC unroll 8
      for (int i = 0; i < H; ++i) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(dot[0][i], dot[1][i]));
        total[i] = _mm512_fmadd_ps(bias, _mm512_set1_ps(term[H + i]), total[i]);
        total[i] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(term[i])), total[i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i) _mm512_store_ps(sums + i * kLanes, total[i]);
}

template <int H>
void multiply_lanes(const Weights* w, const CodedRows& coded, const Rows* rows, int count) {
  if (w->bits == 4) part_nibbles(coded, rows->count);
  const WordRows x = word_rows(coded, rows->count, H, w->groups());
  std::vector<Blocks> matrices;
  std::vector<int64_t> counts;
  for (int i = 0; i < count; ++i) matrices.emplace_back(w[i].rows, kLanes), counts.push_back(matrices.back().apart);
  with_codes(*w, [&](auto codes) {
    parallel_blocks(counts, 2, [&](size_t matrix, int64_t begin, int64_t end) {
      const Blocks& blocks = matrices[matrix];
      end += end == blocks.apart && blocks.rest();
      const int64_t height = x.strips * H;
      auto* sums = static_cast<float*>(scratch(kPartSlot, size_t((end - begin) * height * kLanes) * 4));
      for (int64_t i = begin; i < end; ++i)
        for (int64_t s = 0; s < x.strips; ++s)
          lanes_block<H>(w[matrix], codes, blocks[i], x, s, sums + ((i - begin) * height + s * H) * kLanes);
      for (int64_t m = 0; m < rows->count; ++m)
        blocks.store(rows[matrix], m, begin, end, sums + m * kLanes, height * kLanes, 1);
    });
  });
}

}  // namespace

namespace avx512 {

void few_fast(const Weights* w, const Rows* rows, int count) {
  const CodedRows x = code_rows_512(*rows, w->columns, w->group);
  if (rows->count > 4) return multiply_lanes<8>(w, x, rows, count);
  if (rows->count > 2) return multiply_lanes<4>(w, x, rows, count);
  with_grouped_codes(*w, [&](auto codes, auto group) {
    for_blocks(row_counts(w, count), w->row_bytes(), w->columns, 16 * group, rows,
               [&](size_t i, RowSet n, Span span, int64_t m, auto R, auto M, float* sums) {
                 if constexpr (M <= 2) fast_block<decltype(codes), group, R, M>(w[i], n, span, x, m, sums);
               });
  });
}

}  // namespace avx512
}  // namespace isomorph

#endif
