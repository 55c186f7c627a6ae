// One row of 16-bit activations times weights of four bits, exactly, in integers.
//
// Within a group of weights an activation is x = unit * X, X an integer of three signed bytes: six vpdpbusd multiply 128
// codes where fp32 needs eight multiply-adds and as many table look-ups. y = scale * unit * sum((code - zero) * X) +
// (bias + scale * zero) * sum(x), where zero is the code nearest to a weight of 0: sums of integers are exact, so that
// nothing large cancels after rounding. What X leaves of an activation that is tiny beside its group's largest is multiplied
// apart.
#include "avx512.h"

#ifdef ISOMORPH_AVX512

#include "avx512_codes.h"
#include "avx512_stream.h"

namespace isomorph {
namespace {

constexpr int kColumns = 128;  // of a vector of codes; a lane holds eight
constexpr int kIntegerSlot = 0;
constexpr int kLeftovers = 64;

// What is taken from a code before its group's zero is known. The elements of CodeBytes have theirs there.
template <bool fp4>
constexpr int centre = fp4 ? 12 : 8;

// 128 integers by lane.
struct alignas(64) Columns {
  int8_t bytes[3][2][64];     // the highest byte first; of even columns, of odd ones
  int32_t high[16], low[16];  // high * 2^16 + low = -centre * sum
};

struct IntegerRow {
  Columns* columns;
  float* units;   // of each group
  int32_t* sums;  // of its integers
  int leftovers;
  int32_t places[kLeftovers];
  float values[kLeftovers];
};

// A group's activations as integers; false when they are infinite, NaN or too small, or leave too much over.
bool round_group(const Rows& rows, int64_t column, int group, int32_t* integers, float& unit, IntegerRow& out) {
  __m512 value[8];
  __m512i largest = _mm512_setzero_si512();
  const int parts = group / 16;
  for (int i = 0; i < parts; ++i) {
    value[i] = load_floats(rows.x_type, rows.x[0], column + 16 * i, 0xffff);
    largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(value[i])));
  }
  const uint32_t top = uint32_t(_mm512_reduce_max_epi32(largest));
  const int exponent = int(top >> 23);
  if (top && (exponent < 32 || exponent == 255)) return false;
  // The largest is below 2^27 / group: 15 times a group of it is a 32-bit integer.
  const int shift = 153 - __builtin_ctz(unsigned(group)) - exponent;
  const float inverse = top ? from_bits(uint32_t(127 + shift) << 23) : 0.f;
  unit = top ? from_bits(uint32_t(127 - shift) << 23) : 0.f;
  for (int i = 0; i < parts; ++i) {
    const __m512 scaled = _mm512_mul_ps(value[i], _mm512_set1_ps(inverse));
    const __m512i integer = _mm512_cvtps_epi32(scaled);
    _mm512_store_si512(integers + 16 * i, integer);
    const __m512 rest = _mm512_sub_ps(scaled, _mm512_cvtepi32_ps(integer));
    const __mmask16 left = _mm512_cmpneq_ps_mask(rest, _mm512_setzero_ps());
    if (!left) continue;
    const int count = __builtin_popcount(left);
    if (out.leftovers + count > kLeftovers) return false;
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(column + 16 * i)));
    _mm512_mask_compressstoreu_epi32(out.places + out.leftovers, left, places);
    _mm512_mask_compressstoreu_ps(out.values + out.leftovers, left, _mm512_mul_ps(rest, _mm512_set1_ps(unit)));
    out.leftovers += count;
  }
  return true;
}

// Splits 128 integers into bytes; returns the sum of each lane's eight.
__m512i split(const int32_t* integers, int centre, Columns& out) {
  alignas(64) int8_t bytes[3][kColumns];
  for (int i = 0; i < kColumns; i += 16) {
    __m512i left = _mm512_load_si512(integers + i);
    for (int byte = 2; byte >= 0; --byte) {
      const __m128i low = _mm512_cvtepi32_epi8(left);
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes[byte] + i), low);
      left = _mm512_srai_epi32(_mm512_sub_epi32(left, _mm512_cvtepi8_epi32(low)), 8);
    }
  }
  __m512i sums = _mm512_setzero_si512();
  for (int byte = 0; byte < 3; ++byte) {
    sums = _mm512_slli_epi32(sums, 8);
    const __m512i first = _mm512_load_si512(bytes[byte]), second = _mm512_load_si512(bytes[byte] + 64);
    for (int odd = 0; odd < 2; ++odd) {
      const __m256i halves[2] = {_mm512_cvtepi16_epi8(_mm512_srli_epi16(first, unsigned(8 * odd))),
                                 _mm512_cvtepi16_epi8(_mm512_srli_epi16(second, unsigned(8 * odd)))};
      const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
      _mm512_store_si512(out.bytes[byte][odd], all);
      add_dot(sums, _mm512_set1_epi8(1), all);
    }
  }
  const __m512i less = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-centre)), high = _mm512_srai_epi32(less, 16);
  _mm512_store_si512(out.high, high);
  _mm512_store_si512(out.low, _mm512_sub_epi32(less, _mm512_slli_epi32(high, 16)));
  return sums;
}

// The row as integers; false where it has to be multiplied in fp32.
bool to_integers(const Rows& rows, int64_t k, int group, int centre, IntegerRow& out) {
  out.leftovers = 0;
  const int lanes = group / 8;
  for (int64_t start = 0; start < k; start += kColumns) {
    alignas(64) int32_t integers[kColumns] = {};
    const int count = int(std::min<int64_t>(kColumns, k - start));
    for (int i = 0; i < count; i += group)
      if (!round_group(rows, start + i, group, integers + i, out.units[(start + i) / group], out)) return false;
    const __m512i sums = split(integers, centre, out.columns[start / kColumns]);
    for (int i = 0; i < count; i += group) {
      const __mmask16 own = __mmask16(((1 << lanes) - 1) << i / 8);
      out.sums[(start + i) / group] = _mm512_mask_reduce_add_epi32(own, sums);
    }
  }
  return true;
}

// The sums of each four lanes of four vectors: lane 4 i + j is that of lanes 4 i to 4 i + 3 of vector j.
inline __m512i sums_of_four(const __m512i* v) {
  const auto pair = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i first = pair(v[0], v[1]), second = pair(v[2], v[3]);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
}

// The sums of each eight lanes, where the vectors hold those of four.
inline __m512i sums_of_two(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// The sums of 16 groups, of group / 8 neighbouring lanes each, in order.
template <int group>
inline __m512i group_sums(const __m512i* v) {
  if constexpr (group == 32) {  // group 4 u + k of vector u is lane 4 k + u
    const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_epi32(lanes, sums_of_four(v));
  } else if constexpr (group == 64) {  // group 2 u + k is lane 8 (u / 4) + 4 k + u % 4
    const __m512i lanes = _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    return _mm512_permutexvar_epi32(lanes, sums_of_two(sums_of_four(v), sums_of_four(v + 4)));
  } else {
    const __m512i first = sums_of_two(sums_of_four(v), sums_of_four(v + 4));
    return sums_of_two(first, sums_of_two(sums_of_four(v + 8), sums_of_four(v + 12)));
  }
}

// sums [R] += R weight rows n times x, over the columns of `span`, which begin a batch of 16 groups.
template <bool fp4, int group, int R>
__attribute__((noinline)) void integer_block(const Weights& w, RowSet n, Span span, const IntegerRow& x, float* sums) {
  constexpr int batch = 16 * group / kColumns;
  const int64_t groups = w.groups(), end = (span.end + kColumns - 1) / kColumns;
  const __m512i nibble = _mm512_set1_epi8(15), elements = _mm512_load_si512(CodeBytes<4, true>::tables.elements);
  const uint8_t* code[R];
  __m512 total[R][1];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) code[r] = w.row(n[r]), total[r][0] = _mm512_setzero_ps();
  __m512i dots[R][batch];
  for (auto& row : dots)
    for (__m512i& dot : row) dot = _mm512_setzero_si512();
  for (int64_t first = span.begin / kColumns; first < end; first += batch) {
    const int count = int(std::min<int64_t>(batch, end - first));
    for (int i = 0; i < count; ++i) {
      const Columns& of_x = x.columns[first + i];
      const int64_t left = w.columns - (first + i) * kColumns;
      __m512i even[R], odd[R], high[R], low[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = code[r] + (first + i) * (kColumns / 2);
        prefetch(p, span.ahead);
        const __m512i codes = left >= kColumns ? _mm512_loadu_si512(p) : load_bytes(p, left / 2);
        even[r] = _mm512_and_si512(codes, nibble), odd[r] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
        if constexpr (fp4) even[r] = _mm512_shuffle_epi8(elements, even[r]), odd[r] = _mm512_shuffle_epi8(elements, odd[r]);
        high[r] = _mm512_load_si512(of_x.high), low[r] = _mm512_load_si512(of_x.low);
      }
#pragma GCC unroll 3
      for (int byte = 0; byte < 3; ++byte) {
        const __m512i of_even = _mm512_load_si512(of_x.bytes[byte][0]), of_odd = _mm512_load_si512(of_x.bytes[byte][1]);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          __m512i& dot = byte == 2 ? low[r] : high[r];  // two chains of additions
          if (byte == 1) dot = _mm512_slli_epi32(dot, 8);
          add_dot(dot, even[r], of_even);
          add_dot(dot, odd[r], of_odd);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dots[r][i] = _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]);
    }
    const int64_t g = first * kColumns / group;
    const __mmask16 there = first_lanes(groups - g);
    const __m512 units = _mm512_maskz_loadu_ps(there, x.units + g);
    const __m512i integers = _mm512_maskz_loadu_epi32(there, x.sums + g);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512 s, b;
      fast_terms(w, n[r] * groups + g, there, s, b);
      __m512i sum = group_sums<group>(dots[r]);
      if constexpr (!fp4) {
        __m512i minus = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_rcp14_ps(s), b));  // -zero; NaN gives the least integer
        minus = _mm512_max_epi32(_mm512_min_epi32(minus, _mm512_setzero_si512()), _mm512_set1_epi32(-15));
        sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(_mm512_add_epi32(minus, _mm512_set1_epi32(centre<fp4>)), integers));
        const __m512 of_x = _mm512_mul_ps(_mm512_cvtepi32_ps(integers), units);
        total[r][0] = _mm512_fmadd_ps(_mm512_fnmadd_ps(s, _mm512_cvtepi32_ps(minus), b), of_x, total[r][0]);
      }
      total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(s, units), total[r][0]);
    }
  }
  add_sums<R, 1>(total, sums);
  for (int i = 0; i < x.leftovers; ++i) {
    const int64_t column = x.places[i];
    if (column < span.begin || column >= span.end) continue;
    for (int r = 0; r < R; ++r) {
      const uint8_t own = code[r][column / 2] >> column % 2 * 4 & 15;
      const int64_t index = n[r] * groups + column / group;
      sums[r] += (load_scale(w, index) * (fp4 ? from_e2m1(own) : float(own)) + load_bias(w, index)) * x.values[i];
    }
  }
}

}  // namespace

namespace avx512 {

bool one_exact(const Weights* w, const Rows* rows, int count) {
  const int64_t groups = w->groups(), parts = (w->columns + kColumns - 1) / kColumns;
  const int distinct = share_x(rows, count) ? 1 : count;
  const int64_t floats = (2 * groups + 15) / 16 * 16;
  const size_t bytes = size_t(parts) * sizeof(Columns) + size_t(floats) * 4;
  auto* memory = static_cast<char*>(scratch(kIntegerSlot, size_t(distinct) * bytes));
  std::vector<IntegerRow> x(static_cast<size_t>(distinct));
  const bool affine = w->mode == Mode::affine;
  for (int i = 0; i < distinct; ++i, memory += bytes) {
    IntegerRow& own = x[size_t(i)];
    own.columns = reinterpret_cast<Columns*>(memory);
    own.units = reinterpret_cast<float*>(own.columns + parts);
    own.sums = reinterpret_cast<int32_t*>(own.units + groups);
    if (!to_integers(rows[i], w->columns, w->group, affine ? centre<false> : centre<true>, own)) return false;
  }
  const auto multiply = [&](auto fp4, auto group) {
    for_blocks(row_counts(w, count), w->row_bytes(), w->columns, 16 * group, rows,
               [&](size_t i, RowSet n, Span span, int64_t, auto R, auto M, float* sums) {
                 if constexpr (M == 1) integer_block<fp4, group, R>(w[i], n, span, x[distinct == 1 ? 0 : i], sums);
               });
  };
  using std::integral_constant;
  if (!affine) multiply(std::true_type(), integral_constant<int, 32>());
  else if (w->group == 32) multiply(std::false_type(), integral_constant<int, 32>());
  else if (w->group == 64) multiply(std::false_type(), integral_constant<int, 64>());
  else multiply(std::false_type(), integral_constant<int, 128>());
  return true;
}

}  // namespace avx512
}  // namespace isomorph

#endif
