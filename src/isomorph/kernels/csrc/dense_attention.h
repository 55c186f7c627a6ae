// Attention in the compiler's own vectors: the scores of kQueries queries by kKeys keys are made, used and forgotten in L1,
// and made again for the gradients.
#pragma once

#include <vector>

#include "dense_product.h"
#include "exponential.h"

namespace isomorph {
namespace {

#if defined(__AVX512F__)
constexpr int kHeadVectors = 4;
#else
constexpr int kHeadVectors = 2;
#endif
constexpr int kTileRows = 6, kTileColumns = kHeadVectors * kLanes;
constexpr int64_t kQueries = 8 * kTileRows, kKeys = 64;  // keys: in whole tiles
constexpr int kAttentionSlot = 11;

// c[rows][stride] = a @ b, or added to it: element (i, k) of a is a[i * row + k * column], b is [depth][stride].
template <int rows>
void add_tile(const float* a, int64_t row, int64_t column, const float* b, int64_t depth, float* c, int64_t stride, bool add) {
  Floats sum[rows][kHeadVectors];
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kHeadVectors; ++j) {
      sum[i][j] = Floats{};
      if (add) std::memcpy(&sum[i][j], c + i * stride + j * kLanes, sizeof(Floats));
    }
  for (int64_t k = 0; k < depth; ++k, a += column, b += stride) {
    Floats other[kHeadVectors];
    std::memcpy(other, b, sizeof other);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kHeadVectors; ++j) sum[i][j] += other[j] * a[i * row];
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kHeadVectors; ++j) std::memcpy(c + i * stride + j * kLanes, &sum[i][j], sizeof(Floats));
}

// c [rows, columns] = a [rows, depth] @ b [depth, columns], or added to it; b and c are contiguous, columns whole tiles.
void add_product(const float* a, int64_t row, int64_t column, int64_t rows, const float* b, int64_t columns, int64_t depth,
                 float* c, bool add) {
  constexpr void (*tiles[])(const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool) = {
      add_tile<1>, add_tile<2>, add_tile<3>, add_tile<4>, add_tile<5>, add_tile<6>};
  for (int64_t j = 0; j < columns; j += kTileColumns)
    for (int64_t i = 0; i < rows; i += kTileRows)
      tiles[std::min<int64_t>(kTileRows, rows - i) - 1](a + i * row, row, column, b + j, depth, c + i * columns + j, columns, add);
}

float dot(const float* a, const float* b, int64_t size) {  // size: whole vectors
  Floats sum{};
  for (int64_t i = 0; i < size; i += kLanes) {
    Floats x, y;
    std::memcpy(&x, a + i, sizeof x);
    std::memcpy(&y, b + i, sizeof y);
    sum += x * y;
  }
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

// One head's rows of an array [tokens, heads, size], and copies of them that are `width` wide, a whole number of tiles.
struct Head {
  int64_t offset, stride, size, width;

  void copy(const float* from, int64_t first, int64_t count, int64_t padded, float factor, float* to) const {
    std::fill(to, to + padded * width, 0.f);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < size; ++j) to[i * width + j] = factor * from[offset + (first + i) * stride + j];
  }

  void put(const float* from, int64_t first, int64_t count, const float* factors, float* to) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < size; ++j) to[offset + (first + i) * stride + j] = factors[i] * from[i * width + j];
  }
};

// Panels [width][kKeys] of rows [count][width], count a multiple of kKeys.
void transpose_keys(const float* rows, int64_t count, int64_t width, float* to) {
  for (int64_t key = 0; key < count; key += kKeys)
    pack<kKeys>(rows + key * width, width, 1, kKeys, width, to + key * width);
}

// exp of scores [count][kKeys], of queries from `first` and keys from `key`; 0 where the key is not seen.
void open_scores(float* scores, int64_t first, int64_t count, int64_t key, int64_t window) {
  for (int64_t i = 0; i < count; ++i, scores += kKeys) {
    for (int64_t j = 0; j < kKeys; ++j) scores[j] = exponential(scores[j]);
    std::fill(scores, scores + std::clamp<int64_t>(first + i - window - key, 0, kKeys), 0.f);
    std::fill(scores + std::clamp<int64_t>(first + i + 1 - key, 0, kKeys), scores + kKeys, 0.f);
  }
}

// What both directions have in common: sizes, and the heads of a task.
struct AttentionTask {
  const DenseAttention& of;
  int64_t width = (of.size + kTileColumns - 1) / kTileColumns * kTileColumns;
  int64_t padded = (of.tokens + kKeys - 1) / kKeys * kKeys;

  Head head(int64_t row, int64_t index, int64_t heads) const {
    return {(row * of.tokens * heads + index) * of.size, heads * of.size, of.size, width};
  }
  int64_t first_key(int64_t query) const { return std::max<int64_t>(0, query - of.window) / kKeys * kKeys; }
};

void attend(const DenseAttention& of, const Threads& threads) {
  const AttentionTask task{of};
  const int64_t width = task.width, padded = task.padded;
  threads.run(of.batch * of.heads, [&](int64_t index) {
    const int64_t row = index / of.heads, number = index % of.heads;
    const Head head = task.head(row, number, of.heads);
    const Head kv_head = task.head(row, number * of.kv_heads / of.heads, of.kv_heads);
    auto* keys = static_cast<float*>(scratch(kAttentionSlot, size_t(2 * padded * width + kQueries * (2 * width + kKeys)) * 4));
    float *values = keys + padded * width, *queries = values + padded * width, *sums = queries + kQueries * width;
    float* odds = sums + kQueries * width;
    kv_head.copy(of.k, 0, of.tokens, padded, 1.f, values);
    transpose_keys(values, padded, width, keys);
    kv_head.copy(of.v, 0, of.tokens, padded, 1.f, values);
    const std::vector<float> ones(kKeys, 1.f);
    for (int64_t first = 0; first < of.tokens; first += kQueries) {
      const int64_t count = std::min(kQueries, of.tokens - first), from = task.first_key(first);
      head.copy(of.q, first, count, count, of.scale, queries);
      float totals[kQueries] = {};
      for (int64_t key = from; key < first + count; key += kKeys) {
        add_product(queries, width, 1, count, keys + key * width, kKeys, width, odds, false);
        open_scores(odds, first, count, key, of.window);
        for (int64_t i = 0; i < count; ++i) totals[i] += dot(odds + i * kKeys, ones.data(), kKeys);
        add_product(odds, kKeys, 1, count, values + key * width, width, kKeys, sums, key > from);
      }
      float* inverse = of.inverse_totals + index * of.tokens + first;
      for (int64_t i = 0; i < count; ++i) inverse[i] = 1.f / totals[i];
      head.put(sums, first, count, inverse, of.out);
    }
  });
}

// With p the odds over their total, and e the gradient by p: the one by a score is p * (e - sum over keys of p * e), and
// that sum is the product of out and d_out.
void attend_backward(const DenseAttention& of, const Threads& threads) {
  const AttentionTask task{of};
  const int64_t width = task.width, padded = task.padded, group = of.heads / of.kv_heads;
  threads.run(of.batch * of.kv_heads, [&](int64_t index) {
    const int64_t row = index / of.kv_heads, kv_number = index % of.kv_heads;
    const Head kv_head = task.head(row, kv_number, of.kv_heads);
    const size_t floats = size_t(5 * padded * width + kQueries * (4 * width + 2 * kKeys));
    auto* keys = static_cast<float*>(scratch(kAttentionSlot, floats * 4));
    float *keys_across = keys + padded * width, *values_across = keys_across + padded * width;
    float *d_keys = values_across + padded * width, *d_values = d_keys + padded * width;
    float *queries = d_values + padded * width, *d_queries = queries + kQueries * width;
    float *d_out = d_queries + kQueries * width, *out = d_out + kQueries * width;
    float *odds = out + kQueries * width, *d_odds = odds + kQueries * kKeys;
    kv_head.copy(of.v, 0, of.tokens, padded, 1.f, keys);
    transpose_keys(keys, padded, width, values_across);
    kv_head.copy(of.k, 0, of.tokens, padded, 1.f, keys);
    transpose_keys(keys, padded, width, keys_across);
    std::fill(d_keys, d_keys + 2 * padded * width, 0.f);
    for (int64_t number = kv_number * group; number < (kv_number + 1) * group; ++number) {
      const Head head = task.head(row, number, of.heads);
      for (int64_t first = 0; first < of.tokens; first += kQueries) {
        const int64_t count = std::min(kQueries, of.tokens - first), from = task.first_key(first);
        const float* inverse = of.inverse_totals + (row * of.heads + number) * of.tokens + first;
        head.copy(of.q, first, count, count, of.scale, queries);
        head.copy(of.d_out, first, count, count, 1.f, d_out);
        head.copy(of.out, first, count, count, 1.f, out);
        float means[kQueries];
        for (int64_t i = 0; i < count; ++i) means[i] = dot(out + i * width, d_out + i * width, width);
        for (int64_t key = from; key < first + count; key += kKeys) {
          add_product(queries, width, 1, count, keys_across + key * width, kKeys, width, odds, false);
          open_scores(odds, first, count, key, of.window);
          add_product(d_out, width, 1, count, values_across + key * width, kKeys, width, d_odds, false);
          for (int64_t i = 0; i < count; ++i)
            for (int64_t j = i * kKeys; j < (i + 1) * kKeys; ++j) {
              odds[j] *= inverse[i];
              d_odds[j] = odds[j] * (d_odds[j] - means[i]);
            }
          add_product(odds, 1, kKeys, kKeys, d_out, width, count, d_values + key * width, true);
          add_product(d_odds, 1, kKeys, kKeys, queries, width, count, d_keys + key * width, true);
          add_product(d_odds, kKeys, 1, count, keys + key * width, width, kKeys, d_queries, key > from);
        }
        const std::vector<float> scales(size_t(count), of.scale);
        head.put(d_queries, first, count, scales.data(), of.d_q);
      }
    }
    const std::vector<float> ones(size_t(of.tokens), 1.f);
    kv_head.put(d_keys, 0, of.tokens, ones.data(), of.d_k);
    kv_head.put(d_values, 0, of.tokens, ones.data(), of.d_v);
  });
}

}  // namespace
}  // namespace isomorph
