// Many rows: panels of 64 weight rows are decoded into L1 once and multiplied with all activations.
//
// A chunk of kDepth columns of a panel is decoded and transposed to [step][64], a step being 32 bits of columns: one
// fp32, two bfloat16 or four int8. Strips of H activation rows run over it with H x 16 W sums in registers, which are
// added to an fp32 tile once per chunk (fp32: weights are dequantized) or, scaled, once per group.
#pragma once

#include <functional>

#include "avx512_fast.h"

namespace isomorph {
namespace {

constexpr int kPanel = 64, kDepth = 128;
constexpr int64_t kTileRows = 504;  // an fp32 tile of 504 x 64 stays in L2; a multiple of all strip heights
constexpr int kPackSlot = 9, kTileSlot = 10, kPanelSlot = 11, kSumsSlot = 8;

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

// Activations as the tiles read them: [chunk][strip][step][height] of 32 bits, and fp32 terms [strip][G][height].
struct PackedRows {
  int height;
  int64_t strips, groups;
  uint32_t* steps;
  float* sums;    // of x over the group
  float* scales;  // of its int8 codes

  int64_t term(int64_t s, int64_t g) const { return (s * groups + g) * height; }
};

// `row(m)` points at the words of row m, `depth` of them; `term(t, m, g)` is its t-th term.
template <class RowOf, class TermOf>
PackedRows pack_rows(int64_t count, int height, int64_t depth, int64_t chunk, int64_t groups, int terms, const RowOf& row,
                     const TermOf& term) {
  const int64_t strips = (count + height - 1) / height, padded = strips * height;
  auto* steps = static_cast<uint32_t*>(scratch(kPackSlot, size_t(padded * (depth + terms * groups)) * 4));
  auto* sums = reinterpret_cast<float*>(steps + padded * depth);
  const PackedRows out{height, strips, groups, steps, sums, sums + padded * groups};
  parallel(strips, 2, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      for (int i = 0; i < height; ++i) {
        const int64_t m = s * height + i;
        const uint8_t* from = m < count ? reinterpret_cast<const uint8_t*>(row(m)) : nullptr;
        for (int64_t start = 0; start < depth; start += chunk) {
          const int64_t length = std::min(chunk, depth - start);
          uint32_t* to = steps + (start * strips + s * length) * height + i;
          for (int64_t j = 0; j < length; ++j) {
            uint32_t word = 0;
            if (from) std::memcpy(&word, from + 4 * (start + j), 4);
            to[j * height] = word;
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

inline Panel panel_memory(int64_t groups) {
  auto* memory = static_cast<uint32_t*>(scratch(kPanelSlot, size_t(kPanel * (kDepth + 3 * (groups + 16))) * 4));
  auto* floats = reinterpret_cast<float*>(memory + kPanel * kDepth);
  const int64_t size = kPanel * (groups + 16);
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

// Dequantized fp32 weights, or for Bfloat16 centred codes in pairs.
template <class Arithmetic, class Decoder>
void panel_exact(const Weights& w, const Decoder& decode, int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
  constexpr bool pairs = Arithmetic::columns == 2;
  const int64_t unit0 = k0 / Decoder::unit;
  for (int block = 0; block < kPanel; block += 16) {
    alignas(64) float scale[16][16], bias[16][16];
    for (int i = 0; i < 16; ++i) {
      const int64_t n = std::min(n0 + block + i, w.rows - 1);
      prefetch_chunk(w.row(n) + k0 / 8 * w.bits, w.bits);
      if constexpr (!pairs) load_terms<Decoder>(w, n * w.groups(), unit0, scale[i], bias[i]);
      else for (int u = 0; u < kDepth / Decoder::unit; ++u) {
        const int64_t group = std::min((k0 + u * Decoder::unit) / w.group, w.groups() - 1);
        scale[i][u] = 1, bias[i][u] = -panel.zeros[group * kPanel + block + i];
      }
    }
    for (int64_t k = 0; k < length; k += Decoder::unit) {
      typename Decoder::Codes codes[16];
      typename Decoder::Terms terms[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t n = std::min(n0 + block + i, w.rows - 1);
        codes[i] = decode.load(w.row(n) + (k0 + k) / 8 * w.bits, length - k);
        const int64_t term = k / Decoder::unit * Decoder::groups;
        terms[i] = decode.terms(&scale[i][term], &bias[i][term]);
      }
      for (int j = 0; j < Decoder::vectors; j += Arithmetic::columns) {
        __m512i v[16];
        for (int i = 0; i < 16; ++i) {
          v[i] = (__m512i)decode.weight(codes[i], j, terms[i]);
          if constexpr (pairs) {  // bfloat16 holds a centred code exactly
            const __m512i next = (__m512i)decode.weight(codes[i], j + 1, terms[i]);
            v[i] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(v[i], 16), next);
          }
        }
        transpose16(v);
        for (int i = 0; i < 16; ++i) {
          const int64_t column = k + Decoder::column(j, i);
          if (column < length) _mm512_store_si512(panel.steps + column / Arithmetic::columns * kPanel + block, v[i]);
        }
      }
    }
  }
}

// Four-bit codes are transposed before they are taken apart: steps are then codes 0, 2, 4, 6 and 1, 3, 5, 7 of each eight.
template <int bits, bool fp4>
void panel_codes(const Weights& w, CodeBytes<bits, fp4> codes, int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
  for (int block = 0; block < kPanel; block += 16)
    for (int64_t k = 0; k < length; k += bits == 4 ? 128 : 64) {
      __m512i v[16];
      for (int i = 0; i < 16; ++i) {
        const uint8_t* p = w.row(std::min(n0 + block + i, w.rows - 1)) + (k0 + k) / 8 * bits;
        v[i] = bits == 4 ? load_bytes(p, (length - k) / 2) : codes.load(p, length - k);
        if (k == 0) prefetch_chunk(p, bits);
      }
      transpose16(v);
      uint32_t* to = panel.steps + k / 4 * kPanel + block;
      if constexpr (bits == 4) {
        const __m512i mask = _mm512_set1_epi8(15);
        for (int i = 0; i < (length - k) / 8; ++i) {
          __m512i even = _mm512_and_si512(v[i], mask), odd = _mm512_and_si512(_mm512_srli_epi16(v[i], 4), mask);
          if (fp4) {
            const __m512i elements = _mm512_load_si512(codes.tables.elements);
            even = _mm512_shuffle_epi8(elements, even), odd = _mm512_shuffle_epi8(elements, odd);
          }
          _mm512_store_si512(to + 2 * i * kPanel, even);
          _mm512_store_si512(to + (2 * i + 1) * kPanel, odd);
        }
      } else {
        for (int i = 0; i < std::min<int64_t>(16, (length - k) / 4); ++i) _mm512_store_si512(to + i * kPanel, v[i]);
      }
    }
}

// tile[H][64] += the product of `groups` groups of `steps` steps, or of one chunk where sums are not scaled.
template <class Arithmetic, int H, int W>
__attribute__((noinline)) void multiply_tile(const uint32_t* a, const uint32_t* b, const float* scales, const float* biases,
                                             const float* sums, const float* row_scales, int groups, int steps, float* tile) {
  for (int g = 0; g < groups; ++g) {
    typename Arithmetic::Sum part[H][W];
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) part[i][j] = Arithmetic::zero();
    for (int s = 0; s < steps; ++s, a += H, b += kPanel) {
      __m512i weight[W];
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) weight[j] = _mm512_load_si512(b + 16 * j);
#pragma GCC unroll 8
      for (int i = 0; i < H; ++i) {
        const __m512i value = _mm512_set1_epi32(int(a[i]));
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) Arithmetic::add(part[i][j], weight[j], value);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) {
      __m512 scale{}, bias{};
      if constexpr (Arithmetic::scaled)
        scale = _mm512_load_ps(scales + g * kPanel + 16 * j), bias = _mm512_load_ps(biases + g * kPanel + 16 * j);
#pragma GCC unroll 8
      for (int i = 0; i < H; ++i) {
        float* out = tile + i * kPanel + 16 * j;
        __m512 value = Arithmetic::value(part[i][j]), total = _mm512_load_ps(out);
        if constexpr (Arithmetic::coded) value = _mm512_mul_ps(value, _mm512_set1_ps(row_scales[g * H + i]));
        if constexpr (Arithmetic::scaled) {
          total = _mm512_fmadd_ps(bias, _mm512_set1_ps(sums[g * H + i]), total);
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

template <class Arithmetic, int H, int W>
void multiply_panels(const Weights& w, const Rows& rows, const PackedRows& x, const DecodePanel& decode) {
  const int64_t panels = (w.rows + kPanel - 1) / kPanel, blocks = (rows.count + kTileRows - 1) / kTileRows;
  parallel(panels * blocks, 1, [&](int64_t begin, int64_t end) {
    const Panel panel = panel_memory(x.groups);
    auto* tile = static_cast<float*>(scratch(kTileSlot, size_t(std::min((rows.count + H - 1) / H * H, kTileRows) * kPanel) * 4));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n0 = task / blocks * kPanel, m0 = task % blocks * kTileRows;
      const int64_t m1 = std::min(rows.count, m0 + kTileRows), first = m0 / H, last = (m1 + H - 1) / H;
      if (Arithmetic::scaled) panel_terms<Arithmetic>(w, n0, panel);
      std::memset(tile, 0, size_t((last - first) * H * kPanel) * 4);
      for (int64_t k0 = 0; k0 < w.columns; k0 += kDepth) {
        const int64_t length = std::min<int64_t>(kDepth, w.columns - k0), g0 = k0 / w.group;
        const int groups = Arithmetic::scaled ? int(length / w.group) : 1;
        const int steps = int(length / groups / Arithmetic::columns);
        decode(n0, k0, length, panel);
        for (int64_t s = first; s < last; ++s) {
          const uint32_t* a = x.steps + (k0 * x.strips + s * length) / Arithmetic::columns * H;
          float* out = tile + (s - first) * H * kPanel;
          const int64_t term = x.term(s, g0);
          for (int j = 0; j < kPanel; j += 16 * W)
            multiply_tile<Arithmetic, H, W>(a, panel.steps + j, panel.scales + g0 * kPanel + j, panel.biases + g0 * kPanel + j,
                                            x.sums + term, x.scales + term, groups, steps, out + j);
        }
      }
      const int64_t width = std::min<int64_t>(kPanel, w.rows - n0);
      for (int64_t m = m0; m < m1; ++m)
        for (int64_t j = 0; j < width; ++j) store_float(rows.y_type, rows.y[m], n0 + j, tile[(m - m0) * kPanel + j]);
    }
  });
}

// Few rows take strips of their own height.
template <class Arithmetic>
void multiply_strips(const Weights& w, const Rows& rows, const PackedRows& x, const DecodePanel& decode) {
  if (x.height == 4) multiply_panels<Arithmetic, 4, 4>(w, rows, x, decode);
  else if (x.height == 8) multiply_panels<Arithmetic, 8, 2>(w, rows, x, decode);
  else multiply_panels<Arithmetic, 6, 4>(w, rows, x, decode);
}

inline int strip_height(int64_t count) { return count <= 4 ? 4 : count <= 8 ? 8 : 6; }

inline const float* float_rows_512(const Rows& rows, int64_t k) {
  auto* out = static_cast<float*>(scratch(kFloatSlot, size_t(rows.count * k) * 4));
  parallel(rows.count, std::max<int64_t>(1, 65536 / (k + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t i = 0; i < k; i += 16) {
        const __mmask16 mask = first_lanes(k - i);
        _mm512_mask_storeu_ps(out + m * k + i, mask, load_floats(rows.x_type, rows.x[m], i, mask));
      }
  });
  return out;
}

inline void wide_float32(const Weights& w, const Rows& rows) {
  const int64_t k = w.columns;
  const float* floats = float_rows_512(rows, k);
  const PackedRows x = pack_rows(
      rows.count, strip_height(rows.count), k, kDepth, 0, 0, [&](int64_t m) { return floats + m * k; },
      [](int, int64_t, int64_t) { return 0.f; });
  with_decoder(w, [&](const auto& decoder) {
    multiply_strips<Float32>(w, rows, x, [&](int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
      panel_exact<Float32>(w, decoder, n0, k0, length, panel);
    });
  });
}

// Where vdpbf16ps is no slower than an fp32 multiply-add (AMD), it does twice the work. x is bfloat16.
inline void wide_bfloat16(const Weights& w, const Rows& rows) {
  const int64_t groups = w.groups();
  auto* sums = static_cast<float*>(scratch(kSumsSlot, size_t(rows.count * groups) * 4));
  for (int64_t m = 0; m < rows.count; ++m)
    for (int64_t g = 0; g < groups; ++g) {
      __m512 sum = _mm512_setzero_ps();
      for (int j = 0; j < w.group; j += 16)
        sum = _mm512_add_ps(sum, load_floats(rows.x_type, rows.x[m], g * w.group + j, 0xffff));
      sums[m * groups + g] = _mm512_reduce_add_ps(sum);
    }
  const PackedRows x = pack_rows(
      rows.count, strip_height(rows.count), w.columns / 2, kDepth / 2, groups, 1, [&](int64_t m) { return static_cast<const uint8_t*>(rows.x[m]); },
      [&](int, int64_t m, int64_t g) { return sums[m * groups + g]; });
  with_decoder(w, [&](const auto& decoder) {
    using Decoder = std::decay_t<decltype(decoder)>;
    if constexpr (Decoder::groups == 1 && Decoder::column(1, 0) == 1)
      multiply_strips<Bfloat16>(w, rows, x, [&](int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
        panel_exact<Bfloat16>(w, decoder, n0, k0, length, panel);
      });
  });
}

inline void wide_int8(const Weights& w, const Rows& rows) {
  const int64_t groups = w.groups();
  const CodedRows coded = code_rows_512(rows, w.columns, w.group);
  if (w.bits == 4)  // panel_codes's order
    for (int64_t i = 0; i < rows.count * coded.stride; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, coded.codes + i, 8);
      eight = _pext_u64(eight, 0x00ff00ff00ff00ffu) | _pext_u64(eight, 0xff00ff00ff00ff00u) << 32;
      std::memcpy(coded.codes + i, &eight, 8);
    }
  const float* terms[2] = {coded.sums, coded.scales};
  const PackedRows x = pack_rows(
      rows.count, strip_height(rows.count), w.columns / 4, kDepth / 4, groups, 2,
      [&](int64_t m) { return coded.codes + m * coded.stride; },
      [&](int t, int64_t m, int64_t g) { return terms[t][m * groups + g]; });
  auto with_bits = [&](auto codes) {
    multiply_strips<Int8>(w, rows, x, [&](int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
      panel_codes(w, codes, n0, k0, length, panel);
    });
  };
  if (w.mode != Mode::affine) return with_bits(CodeBytes<4, true>());
  switch (w.bits) {
    case 2: return with_bits(CodeBytes<2>());
    case 3: return with_bits(CodeBytes<3>());
    case 4: return with_bits(CodeBytes<4>());
    case 5: return with_bits(CodeBytes<5>());
    case 6: return with_bits(CodeBytes<6>());
    default: return with_bits(CodeBytes<8>());
  }
}

}  // namespace
}  // namespace isomorph
