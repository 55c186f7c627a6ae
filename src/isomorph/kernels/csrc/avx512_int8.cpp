// Many rows with int8 activations: panels of 64 weight rows, see avx512_panels.h.
#include "avx512.h"

#ifdef ISOMORPH_AVX512

#include "avx512_panels.h"

namespace isomorph {
namespace {

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


}  // namespace

namespace avx512 {

void wide_int8(const Weights& w, const Rows& rows) {
  const int64_t groups = w.groups();
  const CodedRows coded = code_rows_512(rows, w.columns, w.group);
  if (w.bits == 4) part_nibbles(coded, rows.count);
  const float* terms[2] = {coded.sums, coded.scales};
  const PackedRows x = pack_rows(
      rows.count, w.columns / 4, kDepth / 4, groups, 2,
      [&](int64_t m) { return coded.codes + m * coded.stride; },
      [&](int t, int64_t m, int64_t g) { return terms[t][m * groups + g]; });
  with_codes(w, [&](auto codes) {
    multiply_panels<Int8>(w, rows, x, [&](int64_t n0, int64_t k0, int64_t length, const Panel& panel) {
      panel_codes(w, codes, n0, k0, length, panel);
    });
  });
}

}  // namespace avx512
}  // namespace isomorph

#endif
