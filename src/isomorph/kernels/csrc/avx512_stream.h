// Weights streamed past a few activation rows: which rows and columns a block takes, and what its lanes add up to.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "backend.h"
#include "pool.h"

namespace isomorph {
namespace {

constexpr int kPartSlot = 4;
constexpr int kStreams = 4;       // weight rows read side by side
constexpr int64_t kAhead = 2048;  // bytes; what memory delivers while it answers
constexpr int64_t kLaneAhead = 512;  // the same with sixteen rows side by side
constexpr int64_t kNearBytes = 1 << 15;  // of activations, which stay in L1 while weights pass by

// Activation rows that a block multiplies at once.
inline int strip_rows(int64_t count) { return count <= 2 ? int(count) : count <= 4 ? 4 : 8; }

// The weight rows of a block, `apart` from one another: streams far apart, which the hardware prefetches each as one,
// where rows behind one another would be short streams that it loses at every end. The last row stands in for missing ones.
struct RowSet {
  int64_t first, apart, last;
  int64_t operator[](int r) const { return std::min(first + r * apart, last); }
  RowSet from(int r) const { return {first + r * apart, apart, last}; }
};

// Columns of one pass, and how far ahead in the stream of a weight row its bytes are fetched.
struct Span {
  int64_t begin, end, ahead;
};

// The sums over the lanes of four vectors.
inline __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// sums[r][m] += over lanes.
template <int R, int M>
inline void add_sums(const __m512 (&total)[R][M], float* sums) {
  static_assert(R * M % 4 == 0);
  const __m512* all = &total[0][0];
#pragma GCC unroll 8
  for (int i = 0; i < R * M; i += 4) {
    const __m128 four = sums_of_four(all[i], all[i + 1], all[i + 2], all[i + 3]);
    _mm_storeu_ps(sums + i, _mm_add_ps(_mm_loadu_ps(sums + i), four));
  }
}

inline void prefetch(const void* p, int64_t ahead) {
  _mm_prefetch(static_cast<const char*>(p) + ahead, _MM_HINT_T0);
}

// Matrices that share their activations are worked on as if they lay behind one another: work(i, begin, end) is called in
// parallel for blocks of matrix i, of which there are blocks[i].
template <class Work>
void parallel_blocks(const std::vector<int64_t>& blocks, int64_t grain, const Work& work) {
  parallel(std::accumulate(blocks.begin(), blocks.end(), int64_t(0)), grain, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < blocks.size(); begin -= blocks[i], end -= blocks[i], ++i) {
      const int64_t from = std::max<int64_t>(0, begin), to = std::min(end, blocks[i]);
      if (from < to) work(i, from, to);
    }
  });
}

// Blocks of `size` weight rows, see RowSet, and the rows at the end that do not make one.
struct Blocks {
  int64_t apart, last;
  int size;

  Blocks(int64_t rows, int size) : apart(std::max<int64_t>(1, rows / size)), last(rows - 1), size(size) {}
  bool rest() const { return last >= apart * size; }
  RowSet operator[](int64_t i) const { return i < apart ? RowSet{i, apart, last} : RowSet{apart * size, 1, last}; }

  // Results of activation row m: sums[(i - begin) * stride + lane * step] of block i. Neighbouring chunks share cache lines,
  // so that a chunk's results are written together.
  void store(const Rows& rows, int64_t m, int64_t begin, int64_t end, const float* sums, int64_t stride, int64_t step) const {
    for (int lane = 0; lane < size && begin + lane * apart <= last; ++lane) {
      const int64_t first = begin + lane * apart, count = std::min(end, apart) - begin;
      const float* from = sums + lane * step;
      if (rows.y_type == Type::bfloat16) {
        char* to = static_cast<char*>(rows.y[m]) + 2 * first;
        for (int64_t i = 0; i < count; ++i) {
          const uint16_t bits = to_bfloat16(from[i * stride]);
          std::memcpy(to + 2 * i, &bits, 2);
        }
      } else {
        for (int64_t i = 0; i < count; ++i) store_float(rows.y_type, rows.y[m], first + i, from[i * stride]);
      }
    }
    for (int lane = 0; end > apart && apart * size + lane <= last; ++lane)
      store_float(rows.y_type, rows.y[m], apart * size + lane, sums[(apart - begin) * stride + lane * step]);
  }
};

// Calls block(i, n, span, m0, R, M, sums [R][M]) until the x of `rows` is multiplied with all rows of the matrices, of
// weight_rows[i] rows each; R and M are compile-time constants. `batch` columns cannot be divided between passes.
template <class Block>
void for_blocks(const std::vector<int64_t>& weight_rows, int64_t row_bytes, int64_t columns, int64_t batch, const Rows* rows,
                const Block& block) {
  std::vector<Blocks> matrices;
  std::vector<int64_t> counts;
  for (int64_t size : weight_rows) matrices.emplace_back(size, kStreams), counts.push_back(matrices.back().apart);
  auto strips = [&](auto R, auto M) {
    const int64_t near = std::max<int64_t>(1, kNearBytes / (4 * M * batch)) * batch;
    const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 13) / std::max<int64_t>(1, row_bytes));
    parallel_blocks(counts, grain, [&](size_t matrix, int64_t begin, int64_t end) {
      const Blocks& blocks = matrices[matrix];
      const Rows& results = rows[matrix];
      end += end == blocks.apart && blocks.rest();
      auto* sums = static_cast<float*>(scratch(kPartSlot, size_t((end - begin) * kStreams * M) * 4));
      for (int64_t m0 = 0; m0 < results.count; m0 += M) {
        std::memset(sums, 0, size_t((end - begin) * kStreams * M) * 4);
        for (int64_t k = 0; k < columns; k += near) {
          // The stream of a pass over some of the columns goes on in the next row.
          const int64_t part = std::min(near, columns - k) * row_bytes / columns;
          const Span span{k, std::min(columns, k + near), part == row_bytes ? kAhead : (kAhead + part - 1) / part * row_bytes};
          for (int64_t i = begin; i < end; ++i)
            for (int r = 0; r < kStreams; r += R)
              block(matrix, blocks[i].from(r), span, m0, R, M, sums + ((i - begin) * kStreams + r) * M);
        }
        for (int m = 0; m < M && m0 + m < results.count; ++m)
          blocks.store(results, m0 + m, begin, end, sums + m, kStreams * M, M);
      }
    });
  };
  using std::integral_constant;
  switch (strip_rows(rows->count)) {
    case 1: return strips(integral_constant<int, 4>(), integral_constant<int, 1>());
    case 2: return strips(integral_constant<int, 4>(), integral_constant<int, 2>());
    case 4: return strips(integral_constant<int, 4>(), integral_constant<int, 4>());
    default: return strips(integral_constant<int, 2>(), integral_constant<int, 8>());
  }
}

inline std::vector<int64_t> row_counts(const Weights* w, int count) {
  std::vector<int64_t> out;
  for (int i = 0; i < count; ++i) out.push_back(w[i].rows);
  return out;
}

}  // namespace
}  // namespace isomorph
