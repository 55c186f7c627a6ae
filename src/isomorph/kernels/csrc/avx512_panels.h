// Many rows: panels of 64 weight rows are decoded into L1 once and multiplied with all activations.
//
// A chunk of kDepth columns of a panel is decoded and transposed to [step][64], a step being 32 bits of columns: one
// fp32, two bfloat16 or four int8. Strips of 6 activation rows run over it with 6 x 64 sums in registers, which are
// added to an fp32 tile once per chunk (fp32: weights are dequantized) or, scaled, once per group.
#pragma once

#include <functional>

#include "avx512_codes.h"
#include "avx512_transpose.h"

namespace isomorph {
namespace {

constexpr int kPanel = 64, kWidth = kPanel / 16, kStrip = 6, kDepth = 128;
constexpr int64_t kTileRows = 516;  // a multiple of kStrip
constexpr int64_t kPanels = 4;      // side by side: their tiles and the activations of a chunk stay in L2
constexpr int kPackSlot = 9, kTileSlot = 10, kPanelSlot = 11, kSumsSlot = 8;

// The arithmetics of a tile: columns in a step, what a sum is, and whether sums are scaled per group.
struct Float32 {
  static constexpr int columns = 1;
  static constexpr bool scaled = false, coded = false;
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static void add(Sum& sum, __m512i weight, __m512i x) { sum = _mm512_fmadd_ps((__m512)weight, (__m512)x, sum); }
  static __m512 value(Sum sum) { return sum; }
};

struct Bfloat16 {
  static constexpr int columns = 2;
  static constexpr bool scaled = true, coded = false;
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static void add(Sum& sum, __m512i weight, __m512i x) { sum = _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x); }
  static __m512 value(Sum sum) { return sum; }
};

struct Int8 {
  static constexpr int columns = 4;
  static constexpr bool scaled = true, coded = true;
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static void add(Sum& sum, __m512i weight, __m512i x) { add_dot(sum, weight, x); }
  static __m512 value(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// Activations as the tiles read them: [chunk][strip][step][kStrip] of 32 bits, and fp32 terms [strip][G][kStrip].
struct PackedRows {
  int64_t strips, groups;
  uint32_t* steps;
  float* sums;    // of x over the group
  float* scales;  // of its int8 codes

  int64_t term(int64_t s, int64_t g) const { return (s * groups + g) * kStrip; }
};

// `row(m)` points at the words of row m, `depth` of them; `term(t, m, g)` is its t-th term.
template <class RowOf, class TermOf>
PackedRows pack_rows(int64_t count, int64_t depth, int64_t chunk, int64_t groups, int terms, const RowOf& row,
                     const TermOf& term) {
  const int64_t strips = (count + kStrip - 1) / kStrip, padded = strips * kStrip;
  auto* steps = static_cast<uint32_t*>(scratch(kPackSlot, size_t(padded * (depth + terms * groups)) * 4));
  auto* sums = reinterpret_cast<float*>(steps + padded * depth);
  const PackedRows out{strips, groups, steps, sums, sums + padded * groups};
  parallel(strips, 2, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      for (int i = 0; i < kStrip; ++i) {
        const int64_t m = s * kStrip + i;
        const uint8_t* from = m < count ? reinterpret_cast<const uint8_t*>(row(m)) : nullptr;
        for (int64_t start = 0; start < depth; start += chunk) {
          const int64_t length = std::min(chunk, depth - start);
          uint32_t* to = steps + (start * strips + s * length) * kStrip + i;
          for (int64_t j = 0; j < length; ++j) {
            uint32_t word = 0;
            if (from) std::memcpy(&word, from + 4 * (start + j), 4);
            to[j * kStrip] = word;
          }
        }
        for (int t = 0; t < terms; ++t)
          for (int64_t g = 0; g < groups; ++g)
            (t ? out.scales : out.sums)[out.term(s, g) + i] = m < count ? term(t, m, g) : 0.f;
      }
  });
  return out;
}

// One panel: [kDepth / columns][64] words of weights, and [G][64] scales and biases, where sums are scaled.
struct Panel {
  uint32_t* steps;
  float* scales;
  float* biases;
  float* zeros;
};

// Panel p of several, one of which is decoded at a time.
inline Panel panel_memory(int64_t groups, int64_t p) {
  const int64_t size = kPanel * (groups + 16);
  auto* memory = static_cast<uint32_t*>(scratch(kPanelSlot, size_t(kPanel * kDepth + 3 * size * kPanels) * 4));
  auto* floats = reinterpret_cast<float*>(memory + kPanel * kDepth) + 3 * size * p;
  return {memory, floats, floats + size, floats + 2 * size};
}

// exact: w = scale * (code - zero) + bias, with the zero point nearest to w = 0, so that nothing large cancels.
inline void centre(__m512 scale, __m512& bias, __m512& zero, int bits) {
  const __m512 ratio = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), bias), _mm512_rcp14_ps(scale));
  zero = _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // A NaN becomes the largest code; any code would do, that near w = 0 is best.
  zero = _mm512_max_ps(_mm512_min_ps(zero, _mm512_set1_ps(float((1 << bits) - 1))), _mm512_setzero_ps());
  bias = _mm512_fmadd_ps(scale, zero, bias);
}

template <class Arithmetic>
void panel_terms(const Weights& w, int64_t n0, const Panel& panel) {
  const int64_t groups = w.groups();
  for (int block = 0; block < kPanel; block += 16)
    for (int64_t g = 0; g < groups; g += 16) {
      __m512i scale[16], bias[16], zero[16];
      const __mmask16 mask = first_lanes(groups - g);
      for (int i = 0; i < 16; ++i) {
        __m512 s = _mm512_setzero_ps(), b = s, z = s;
        const int64_t n = n0 + block + i;
        if (n < w.rows) {
          if (Arithmetic::coded) fast_terms(w, n * groups + g, mask, s, b);
          else s = load_scales(w, n * groups + g, mask), b = load_biases(w, n * groups + g, mask);
          if (!Arithmetic::coded && w.mode == Mode::affine) centre(s, b, z, w.bits);
        }
        scale[i] = (__m512i)s, bias[i] = (__m512i)b, zero[i] = (__m512i)z;
      }
      auto store = [&](__m512i (&v)[16], float* out) {
        transpose16(v);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(out + (g + i) * kPanel + block, v[i]);
      };
      store(scale, panel.scales);
      store(bias, panel.biases);
      if (!Arithmetic::coded) store(zero, panel.zeros);
    }
}

// A chunk's lines come from 64 rows, too many for the sets of L1: fetch a later chunk's into L2.
inline void prefetch_chunk(const uint8_t* p, int bits) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + 3 * kDepth / 8 * bits, _MM_HINT_T1);
}

// tile[kStrip][64] += the product of `groups` groups of `steps` steps, or of one chunk where sums are not scaled.
template <class Arithmetic>
__attribute__((noinline)) void multiply_tile(const uint32_t* a, const uint32_t* b, const float* scales, const float* biases,
                                             const float* sums, const float* row_scales, int groups, int steps, float* tile) {
  for (int g = 0; g < groups; ++g) {
    typename Arithmetic::Sum part[kStrip][kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) part[i][j] = Arithmetic::zero();
    for (int s = 0; s < steps; ++s, a += kStrip, b += kPanel) {
      __m512i weight[kWidth];
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) weight[j] = _mm512_load_si512(b + 16 * j);
#pragma GCC unroll 8
      for (int i = 0; i < kStrip; ++i) {
        const __m512i value = _mm512_set1_epi32(int(a[i]));
#pragma GCC unroll 4
        for (int j = 0; j < kWidth; ++j) Arithmetic::add(part[i][j], weight[j], value);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) {
      __m512 scale{}, bias{};
      if constexpr (Arithmetic::scaled)
        scale = _mm512_load_ps(scales + g * kPanel + 16 * j), bias = _mm512_load_ps(biases + g * kPanel + 16 * j);
#pragma GCC unroll 8
      for (int i = 0; i < kStrip; ++i) {
        float* out = tile + i * kPanel + 16 * j;
        __m512 value = Arithmetic::value(part[i][j]), total = _mm512_load_ps(out);
        if constexpr (Arithmetic::coded) value = _mm512_mul_ps(value, _mm512_set1_ps(row_scales[g * kStrip + i]));
        if constexpr (Arithmetic::scaled) {
          total = _mm512_fmadd_ps(bias, _mm512_set1_ps(sums[g * kStrip + i]), total);
          total = _mm512_fmadd_ps(scale, value, total);
        } else {
          total = _mm512_add_ps(total, value);
        }
        _mm512_store_ps(out, total);
      }
    }
    asm volatile("" ::: "memory");  // the tile stays in memory: GCC would keep it in registers, which are the sums'
  }
}

// Fills the panel's steps with columns k0..k0+length-1 of weight rows n0..n0+63.
using DecodePanel = std::function<void(int64_t n0, int64_t k0, int64_t length, const Panel& panel)>;

template <class Arithmetic>
void multiply_panels(const Weights& w, const Rows& rows, const PackedRows& x, const DecodePanel& decode) {
  const int64_t panels = (w.rows + kPanel - 1) / kPanel, blocks = (rows.count + kTileRows - 1) / kTileRows;
  const int64_t strips = (x.strips + blocks - 1) / blocks;  // of a block
  const int64_t wide = std::max<int64_t>(1, std::min(kPanels, panels * blocks / (2 * thread_count())));
  parallel((panels + wide - 1) / wide * blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t size = strips * kStrip * kPanel;
    auto* tiles = static_cast<float*>(scratch(kTileSlot, size_t(wide * size) * 4));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p0 = task / blocks * wide, p1 = std::min(panels, p0 + wide);
      const int64_t first = task % blocks * strips, last = std::min(x.strips, first + strips);
      std::memset(tiles, 0, size_t(wide * size) * 4);
      for (int64_t p = p0; Arithmetic::scaled && p < p1; ++p)
        panel_terms<Arithmetic>(w, p * kPanel, panel_memory(x.groups, p - p0));
      for (int64_t k0 = 0; k0 < w.columns; k0 += kDepth) {
        const int64_t length = std::min<int64_t>(kDepth, w.columns - k0), g0 = k0 / w.group;
        const int groups = Arithmetic::scaled ? int(length / w.group) : 1;
        const int steps = int(length / groups / Arithmetic::columns);
        for (int64_t p = p0; p < p1; ++p) {
          const Panel panel = panel_memory(x.groups, p - p0);
          float* tile = tiles + (p - p0) * size;
          decode(p * kPanel, k0, length, panel);
          for (int64_t s = first; s < last; ++s, tile += kStrip * kPanel) {
            const uint32_t* a = x.steps + (k0 * x.strips + s * length) / Arithmetic::columns * kStrip;
            const int64_t term = x.term(s, g0);
            multiply_tile<Arithmetic>(a, panel.steps, panel.scales + g0 * kPanel, panel.biases + g0 * kPanel, x.sums + term,
                                      x.scales + term, groups, steps, tile);
          }
        }
      }
      for (int64_t m = first * kStrip; m < std::min(rows.count, last * kStrip); ++m)
        for (int64_t p = p0; p < p1; ++p)
          store_floats(rows.y_type, rows.y[m], p * kPanel, tiles + (p - p0) * size + (m - first * kStrip) * kPanel,
                       std::min<int64_t>(kPanel, w.rows - p * kPanel));
    }
  });
}

}  // namespace
}  // namespace isomorph
