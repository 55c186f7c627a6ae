// Many rows: tiles of 64 weight rows are decoded once into L1 and multiplied with all activations.
//
// A chunk of kDepth columns of 64 weight rows is decoded and transposed to [depth step][64]; strips of 6 activation rows
// run over it with 6 x 4 vectors of group sums in registers, which are scaled into an fp32 tile once per group. The
// depth step is 2 columns for bfloat16 (exact) and 4 for int8 (fast): 32 bits either way, so both share the layout.
#pragma once

#include "activations.h"
#include "avx512_decode.h"
#include "avx512_skinny.h"

namespace isomorph {
namespace {

constexpr int kStrip = 6, kPanel = 64, kDepth = 128;
constexpr int64_t kTileRows = 85 * kStrip;  // 510: an fp32 tile of 510 x 64 stays in L2
constexpr int kPackSlot = 9, kTileSlot = 10, kPanelSlot = 11;

inline void transpose16(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      t[8 * half + i] = _mm512_shuffle_i32x4(v[8 * half + i], v[8 * half + i + 4], 0x88);
      t[8 * half + i + 4] = _mm512_shuffle_i32x4(v[8 * half + i], v[8 * half + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Activations as the tiles read them: [chunk][strip][step][6] of 32 bits, and per group [strip][G][6] fp32 terms.
struct PackedRows {
  const uint32_t* steps;
  const float* sums;    // sum of x over the group
  const float* scales;  // fast only
  int64_t strips, groups;

  const uint32_t* strip(int64_t chunk_step, int64_t chunk_steps, int64_t s) const {
    return steps + (chunk_step * strips + s * chunk_steps) * kStrip;
  }
  int64_t term(int64_t s, int64_t g) const { return (s * groups + g) * kStrip; }
};

// `row(m)` points at K columns of 16-bit (step 2) or 8-bit (step 4) activations.
template <class RowOf, class TermOf>
PackedRows pack_rows(int64_t count, int64_t k, int step, int64_t groups, int terms, const RowOf& row, const TermOf& term) {
  const int64_t strips = (count + kStrip - 1) / kStrip, depth = k / step, chunk = kDepth / step;
  const size_t codes = size_t(strips * kStrip * depth) * 4, per_term = size_t(strips * kStrip * groups);
  auto* out = static_cast<uint32_t*>(scratch(kPackSlot, codes + per_term * 4 * size_t(terms)));
  auto* floats = reinterpret_cast<float*>(out + strips * kStrip * depth);
  parallel(strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      for (int i = 0; i < kStrip; ++i) {
        const int64_t m = s * kStrip + i;
        const auto* from = m < count ? static_cast<const uint8_t*>(row(m)) : nullptr;
        for (int64_t start = 0; start < depth; start += chunk) {
          const int64_t length = std::min(chunk, depth - start);
          uint32_t* to = out + (start * strips + s * length) * kStrip + i;
          for (int64_t j = 0; j < length; ++j) {
            uint32_t word = 0;
            if (from) std::memcpy(&word, from + 4 * (start + j), 4);
            to[j * kStrip] = word;
          }
        }
        for (int t = 0; t < terms; ++t)
          for (int64_t g = 0; g < groups; ++g)
            floats[size_t(t) * per_term + size_t((s * groups + g) * kStrip + i)] = m < count ? term(t, m, g) : 0.f;
      }
  });
  return {out, floats, floats + per_term, strips, groups};
}

struct Panel {
  uint32_t* steps;  // [kDepth / step][64]
  float* scales;    // [G][64]
  float* biases;    // [G][64]: what multiplies the sum of x
  uint8_t* zeros;   // [64][G]
};

inline Panel panel_memory(int64_t groups) {
  auto* memory = static_cast<char*>(scratch(kPanelSlot, size_t(kDepth / 2 * kPanel * 4 + groups * kPanel * 9)));
  auto* scales = reinterpret_cast<float*>(memory + kDepth / 2 * kPanel * 4);
  float* biases = scales + groups * kPanel;
  return {reinterpret_cast<uint32_t*>(memory), scales, biases, reinterpret_cast<uint8_t*>(biases + groups * kPanel)};
}

template <bool fast>
void panel_terms(const Weights& w, int64_t n0, const Panel& panel) {
  const int64_t groups = w.groups();
  const __m512i lanes = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(kPanel));
  for (int j = 0; j < kPanel; ++j)
    for (int64_t g = 0; g < groups; g += 16) {
      const __mmask16 mask = __mmask16(groups - g >= 16 ? 0xffff : (1 << (groups - g)) - 1);
      __m512 scale = _mm512_setzero_ps(), bias = _mm512_setzero_ps(), zero = _mm512_setzero_ps();
      if (n0 + j < w.rows) {
        if constexpr (fast) {
          fast_terms(w, (n0 + j) * groups + g, mask, scale, bias);
        } else {
          GroupTerms terms = group_terms(w, (n0 + j) * groups + g, mask);
          scale = terms.scale, bias = terms.rest, zero = terms.zero;
        }
      }
      _mm512_mask_i32scatter_ps(panel.scales + g * kPanel + j, mask, lanes, scale, 4);
      _mm512_mask_i32scatter_ps(panel.biases + g * kPanel + j, mask, lanes, bias, 4);
      _mm_mask_storeu_epi8(panel.zeros + j * groups + g, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(zero)));
    }
}

template <int bits>
void panel_exact(const Weights& w, int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
  const Decode32<bits> decode;
  const auto& tables = centred_tables<bits>();
  const int64_t groups = w.groups();
  for (int block = 0; block < kPanel; block += 16)
    for (int64_t k = 0; k < length; k += 32) {
      __m512i v[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t n = n0 + block + i;
        v[i] = _mm512_setzero_si512();
        if (n >= w.rows) continue;
        const uint8_t* p = w.row(n) + (k0 + k) / 8 * bits;
        const int zero = panel.zeros[(block + i) * groups + (k0 + k) / w.group];
        if constexpr (bits == 8) v[i] = (__m512i)decode(p, float(zero));
        else v[i] = (__m512i)decode(p, w.mode == Mode::affine ? tables.entries[zero] : tables.elements);
      }
      transpose16(v);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(panel.steps + (k / 2 + i) * kPanel + block, v[i]);
    }
}

template <int bits, bool fp4>
void panel_fast(const Weights& w, int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
  const Decode64<bits> decode;
  for (int block = 0; block < kPanel; block += 16)
    for (int64_t k = 0; k < length; k += 64) {
      __m512i v[16];
      const int64_t codes = std::min<int64_t>(64, length - k);
      for (int i = 0; i < 16; ++i) {
        const int64_t n = n0 + block + i;
        const uint8_t* p = w.row(n) + (k0 + k) / 8 * bits;
        v[i] = n >= w.rows ? _mm512_setzero_si512()
               : codes == 64 ? decode.template take<fp4>(p)
                             : decode.template take_half<fp4>(p);
      }
      transpose16(v);
      for (int i = 0; i < codes / 4; ++i) _mm512_store_si512(panel.steps + (k / 4 + i) * kPanel + block, v[i]);
    }
}

// tile[6][64] += the chunk's groups.
__attribute__((noinline)) inline void tile_exact(const uint32_t* a, const uint32_t* b, const float* scales,
                                                 const float* biases, const float* sums, int groups, int steps, float* tile) {
  for (int g = 0; g < groups; ++g) {
    __m512 part[kStrip][4];
#pragma GCC unroll 6
    for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) part[i][j] = _mm512_setzero_ps();
    for (int s = 0; s < steps; ++s, a += kStrip, b += kPanel) {
      __m512bh weight[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) weight[j] = (__m512bh)_mm512_load_si512(b + 16 * j);
#pragma GCC unroll 6
      for (int i = 0; i < kStrip; ++i) {
        const __m512bh value = (__m512bh)_mm512_set1_epi32(int(a[i]));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) part[i][j] = _mm512_dpbf16_ps(part[i][j], weight[j], value);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 scale = _mm512_load_ps(scales + g * kPanel + 16 * j), bias = _mm512_load_ps(biases + g * kPanel + 16 * j);
#pragma GCC unroll 6
      for (int i = 0; i < kStrip; ++i) {
        __m512 total = _mm512_load_ps(tile + i * kPanel + 16 * j);
        total = _mm512_fmadd_ps(bias, _mm512_set1_ps(sums[g * kStrip + i]), total);
        _mm512_store_ps(tile + i * kPanel + 16 * j, _mm512_fmadd_ps(scale, part[i][j], total));
      }
    }
  }
}

__attribute__((noinline)) inline void tile_fast(const uint32_t* a, const uint32_t* b, const float* scales,
                                                const float* biases, const float* sums, const float* row_scales,
                                                int groups, int steps, float* tile) {
  for (int g = 0; g < groups; ++g) {
    __m512i part[kStrip][4];
#pragma GCC unroll 6
    for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) part[i][j] = _mm512_setzero_si512();
    for (int s = 0; s < steps; ++s, a += kStrip, b += kPanel) {
      __m512i weight[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) weight[j] = _mm512_load_si512(b + 16 * j);
#pragma GCC unroll 6
      for (int i = 0; i < kStrip; ++i) {
        const __m512i value = _mm512_set1_epi32(int(a[i]));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) part[i][j] = _mm512_dpbusd_epi32(part[i][j], weight[j], value);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 scale = _mm512_load_ps(scales + g * kPanel + 16 * j), bias = _mm512_load_ps(biases + g * kPanel + 16 * j);
#pragma GCC unroll 6
      for (int i = 0; i < kStrip; ++i) {
        const int at = g * kStrip + i;
        __m512 total = _mm512_load_ps(tile + i * kPanel + 16 * j);
        total = _mm512_fmadd_ps(bias, _mm512_set1_ps(sums[at]), total);
        const __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(part[i][j]), _mm512_set1_ps(row_scales[at]));
        _mm512_store_ps(tile + i * kPanel + 16 * j, _mm512_fmadd_ps(scale, dot, total));
      }
    }
  }
}

template <bool fast, class Decode>
void wide(const Weights& w, const Rows& rows, const PackedRows& x, const Decode& decode) {
  const int step = fast ? 4 : 2;
  const int64_t panels = (w.rows + kPanel - 1) / kPanel, blocks = (rows.count + kTileRows - 1) / kTileRows;
  parallel(panels * blocks, 1, [&](int64_t begin, int64_t end) {
    const Panel panel = panel_memory(x.groups);
    auto* tile = static_cast<float*>(scratch(kTileSlot, size_t(kTileRows * kPanel) * 4));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n0 = task / blocks * kPanel, m0 = task % blocks * kTileRows;
      const int64_t m1 = std::min(rows.count, m0 + kTileRows), first = m0 / kStrip, last = (m1 + kStrip - 1) / kStrip;
      panel_terms<fast>(w, n0, panel);
      std::memset(tile, 0, size_t((last - first) * kStrip * kPanel) * 4);
      for (int64_t k0 = 0; k0 < w.columns; k0 += kDepth) {
        const int64_t length = std::min<int64_t>(kDepth, w.columns - k0), g0 = k0 / w.group;
        const int groups = int(length / w.group), steps = w.group / step;
        decode(n0, k0, length, panel);
        const float *scales = panel.scales + g0 * kPanel, *biases = panel.biases + g0 * kPanel;
        for (int64_t s = first; s < last; ++s) {
          const uint32_t* a = x.strip(k0 / step, length / step, s);
          float* out = tile + (s - first) * kStrip * kPanel;
          const int64_t term = x.term(s, g0);
          if constexpr (fast)
            tile_fast(a, panel.steps, scales, biases, x.sums + term, x.scales + term, groups, steps, out);
          else
            tile_exact(a, panel.steps, scales, biases, x.sums + term, groups, steps, out);
        }
      }
      const int64_t width = std::min<int64_t>(kPanel, w.rows - n0);
      for (int64_t m = m0; m < m1; ++m)
        for (int64_t j = 0; j < width; ++j) store_float(rows.y_type, rows.y[m], n0 + j, tile[(m - m0) * kPanel + j]);
    }
  });
}

void wide_exact(const Weights& w, const Rows& rows) {
  const int64_t groups = w.groups();
  auto* sums = static_cast<float*>(scratch(kSkinnySumSlot, size_t(rows.count * groups) * 4));
  for (int64_t m = 0; m < rows.count; ++m) group_sums(rows.x[m], rows.x_type, groups, w.group, sums + m * groups);
  const PackedRows x = pack_rows(
      rows.count, w.columns, 2, groups, 1, [&](int64_t m) { return rows.x[m]; },
      [&](int, int64_t m, int64_t g) { return sums[m * groups + g]; });
  wide<false>(w, rows, x, [&](int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
    switch (w.bits) {
      case 2: return panel_exact<2>(w, n0, k0, length, panel);
      case 3: return panel_exact<3>(w, n0, k0, length, panel);
      case 4: return panel_exact<4>(w, n0, k0, length, panel);
      case 5: return panel_exact<5>(w, n0, k0, length, panel);
      case 6: return panel_exact<6>(w, n0, k0, length, panel);
      default: return panel_exact<8>(w, n0, k0, length, panel);
    }
  });
}

void wide_fast(const Weights& w, const Rows& rows) {
  const int64_t groups = w.groups();
  const CodedRows coded = code_rows_512(rows, w.columns, w.group);
  const float* terms[2] = {coded.sums, coded.scales};
  const PackedRows x = pack_rows(
      rows.count, w.columns, 4, groups, 2, [&](int64_t m) -> const void* { return coded.codes + m * coded.stride; },
      [&](int t, int64_t m, int64_t g) { return terms[t][m * groups + g]; });
  wide<true>(w, rows, x, [&](int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
    if (w.mode != Mode::affine) return panel_fast<4, true>(w, n0, k0, length, panel);
    switch (w.bits) {
      case 2: return panel_fast<2, false>(w, n0, k0, length, panel);
      case 3: return panel_fast<3, false>(w, n0, k0, length, panel);
      case 4: return panel_fast<4, false>(w, n0, k0, length, panel);
      case 5: return panel_fast<5, false>(w, n0, k0, length, panel);
      case 6: return panel_fast<6, false>(w, n0, k0, length, panel);
      default: return panel_fast<8, false>(w, n0, k0, length, panel);
    }
  });
}

}  // namespace
}  // namespace isomorph
