// The dense product in the compiler's own vectors, as wide as the including file's instruction set.
//
// The result is cut into blocks. For kDepth columns of a and rows of b at a time, those of a block are copied: of b in
// panels of kPanel columns that stay in L2, of a one strip of kStrip rows after the other, which stays in L1. A tile of
// the result, a strip times a panel, stays in registers. Each element is a sum in the order of k, in parts of kDepth.
#pragma once

#include <algorithm>
#include <cstring>

#include "dense.h"
#include "pool.h"

namespace isomorph {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kStrip = 14;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kStrip = 6;
#else
constexpr int kLanes = 4, kStrip = 6;
#endif
constexpr int kVectors = 2, kPanel = kVectors * kLanes;
constexpr int64_t kDepth = 256, kBlockRows = 256, kBlockColumns = 512, kBlocksEach = 4;  // blocks for each thread, or more
constexpr int kStripSlot = 9, kPanelSlot = 10;

// A strip is [kStrip][kRow] where a's rows are contiguous, otherwise [k][kStrip]: either way it is copied in runs. Rows
// one line longer than their contents do not all fall on the same sets of L1.
constexpr int64_t kRow = kDepth + 16;

typedef float Floats __attribute__((vector_size(4 * kLanes)));

// to[k][width] = from[i * across + k * along] for i < count, and zeros after them.
template <int width>
void pack(const float* from, int64_t across, int64_t along, int64_t count, int64_t depth, float* to) {
  if (across == 1 && count == width) {
    for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * width, from + k * along, width * 4);
    return;
  }
  if (count < width) std::memset(to, 0, size_t(width * depth) * 4);
  for (int64_t start = 0; start < depth; start += 8)  // few lines of `to` at a time, which stay in L1
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = start; k < std::min(depth, start + 8); ++k) to[k * width + i] = from[i * across + k * along];
}

// c[kStrip][stride] = strip @ panel, or added to it.
template <bool in_rows>
__attribute__((noinline)) void multiply_tile(const float* strip, const float* panel, int64_t depth, float* c, int64_t stride,
                                             bool add) {
  constexpr int64_t across = in_rows ? kRow : 1, along = in_rows ? 1 : kStrip;
  Floats sum[kStrip][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = Floats{};
      __builtin_prefetch(c + i * stride + j * kLanes, 1);
    }
  for (int64_t k = 0; k < depth; ++k, strip += along, panel += kPanel) {
    Floats b[kVectors];
    std::memcpy(b, panel, sizeof b);
#pragma GCC unroll 16
    for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] += b[j] * strip[i * across];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* out = c + i * stride + j * kLanes;
      Floats before{};
      if (add) std::memcpy(&before, out, sizeof before);
      before += sum[i][j];
      std::memcpy(out, &before, sizeof before);
    }
}

struct Range {
  int64_t begin, end;
};

// The block of these rows and columns; a, b and c are one product's.
void multiply_block(const DenseProduct& of, const float* a, const float* b, float* c, Range rows, Range columns) {
  const int64_t panels = (columns.end - columns.begin + kPanel - 1) / kPanel;
  auto* strip = static_cast<float*>(scratch(kStripSlot, size_t(kStrip * kRow) * 4));
  auto* packed = static_cast<float*>(scratch(kPanelSlot, size_t(panels * kPanel * kDepth) * 4));
  const bool in_rows = of.a.column == 1;
  const auto tile = in_rows ? multiply_tile<true> : multiply_tile<false>;
  for (int64_t k = 0; k < of.k; k += kDepth) {
    const int64_t depth = std::min(kDepth, of.k - k);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = columns.begin + p * kPanel;
      pack<kPanel>(b + column * of.b.column + k * of.b.row, of.b.column, of.b.row,
                   std::min<int64_t>(kPanel, columns.end - column), depth, packed + p * kPanel * kDepth);
    }
    for (int64_t row = rows.begin; row < rows.end; row += kStrip) {
      const int64_t height = std::min<int64_t>(kStrip, rows.end - row);
      const float* from = a + row * of.a.row + k * of.a.column;
      if (!in_rows) pack<kStrip>(from, of.a.row, of.a.column, height, depth, strip);
      for (int64_t i = 0; in_rows && i < kStrip; ++i)  // past the last row it again: what comes of it is dropped
        std::memcpy(strip + i * kRow, from + std::min(i, height - 1) * of.a.row, size_t(depth) * 4);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t column = columns.begin + p * kPanel, width = std::min<int64_t>(kPanel, columns.end - column);
        const float* panel = packed + p * kPanel * kDepth;
        float* out = c + row * of.n + column;
        if (height == kStrip && width == kPanel) {
          tile(strip, panel, depth, out, of.n, k > 0);
          continue;
        }
        float edge[kStrip * kPanel];
        tile(strip, panel, depth, edge, kPanel, false);
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j) out[i * of.n + j] = edge[i * kPanel + j] + (k > 0 ? out[i * of.n + j] : 0.f);
      }
    }
  }
}

void multiply_dense(const DenseProduct& of, const Threads& threads) {
  if (of.k == 0) std::memset(of.c, 0, size_t(of.products * of.m * of.n) * 4);
  if (of.products * of.m * of.n * of.k == 0) return;
  const int64_t strips = (of.m + kStrip - 1) / kStrip, panels = (of.n + kPanel - 1) / kPanel;
  // Blocks that fit the caches, and more of them where threads would have too few.
  int64_t down = (of.m + kBlockRows - 1) / kBlockRows, across = (of.n + kBlockColumns - 1) / kBlockColumns;
  while (of.products * down * across < kBlocksEach * threads.count && (down < strips || across < panels)) {
    const bool higher = of.m * across >= of.n * down;
    (across == panels || (higher && down < strips) ? down : across) += 1;
  }
  threads.run(of.products * down * across, [&](int64_t task) {
    const int64_t product = task / (down * across), i = task / across % down, j = task % across;
    const Range rows{strips * i / down * kStrip, std::min(of.m, strips * (i + 1) / down * kStrip)};
    const Range columns{panels * j / across * kPanel, std::min(of.n, panels * (j + 1) / across * kPanel)};
    multiply_block(of, of.a.data + product * of.a.product, of.b.data + product * of.b.product,
                   of.c + product * of.m * of.n, rows, columns);
  });
}

}  // namespace
}  // namespace isomorph
