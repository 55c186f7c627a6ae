// Many rows in fp32, or in bfloat16 where that is faster: panels of 64 weight rows, see avx512_panels.h.
#include "avx512.h"

#ifdef ISOMORPH_AVX512

#include "avx512_panels.h"

namespace isomorph {
namespace {

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
      if constexpr (!pairs) load_terms<Decoder>(w, n * w.groups(), w.groups(), unit0, scale[i], bias[i]);
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

}  // namespace

namespace avx512 {

void wide_float32(const Weights& w, const Rows& rows) {
  const int64_t k = w.columns;
  const float* floats = float_rows_512(rows, k);
  const PackedRows x = pack_rows(
      rows.count, k, kDepth, 0, 0, [&](int64_t m) { return floats + m * k; },
      [](int, int64_t, int64_t) { return 0.f; });
  with_decoder(w, [&](const auto& decoder) {
    multiply_panels<Float32>(w, rows, x, [&](int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
      panel_exact<Float32>(w, decoder, n0, k0, length, panel);
    });
  });
}

// Where vdpbf16ps is no slower than an fp32 multiply-add (AMD), it does twice the work. x is bfloat16.
void wide_bfloat16(const Weights& w, const Rows& rows) {
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
      rows.count, w.columns / 2, kDepth / 2, groups, 1, [&](int64_t m) { return static_cast<const uint8_t*>(rows.x[m]); },
      [&](int, int64_t m, int64_t g) { return sums[m * groups + g]; });
  with_decoder(w, [&](const auto& decoder) {
    using Decoder = std::decay_t<decltype(decoder)>;
    if constexpr (Decoder::groups == 1 && Decoder::column(1, 0) == 1)
      multiply_panels<Bfloat16>(w, rows, x, [&](int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
        panel_exact<Bfloat16>(w, decoder, n0, k0, length, panel);
      });
  });
}


}  // namespace avx512
}  // namespace isomorph

#endif
