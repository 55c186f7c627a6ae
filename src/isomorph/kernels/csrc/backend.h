// What each instruction set offers. All pointers may be unaligned; rows of x and y are given one pointer each, so that
// strided activations and the scattered rows of an expert need no copy.
#pragma once

#include <algorithm>
#include <vector>

#include "format.h"

namespace isomorph {

struct Rows {
  int64_t count;
  const void* const* x;  // [count] rows of K activations
  Type x_type;
  void* const* y;  // [count] rows of N results
  Type y_type;
};

// Whether `count` products multiply the very same activations.
inline bool share_x(const Rows* rows, int count) {
  return std::all_of(rows, rows + count, [&](const Rows& each) { return std::equal(rows->x, rows->x + rows->count, each.x); });
}

struct Backend {
  const char* name;
  // y = x @ dequantized(w)^T for each of `count` weights of one format and width, whose rows are equally many and of the
  // same types; activations that they share are prepared once.
  // exact: activations as given, fp32 accumulation; fast: int8 activations per group.
  void (*multiply)(const Weights* w, const Rows* rows, int count, bool fast);
  // y = x @ w^T for bfloat16 w [n, k], contiguous.
  void (*multiply_bfloat16)(const void* w, int64_t n, int64_t k, const Rows& rows);
  // out[i] = dequantized row indices[i] of w (rows 0..count-1 when indices is null), contiguous; one rounding to `type`.
  void (*dequantize)(const Weights& w, const int64_t* indices, int64_t count, void* out, Type type);
  // Reads `bytes` at p once, as fast as memory gives them; returns something of them.
  uint64_t (*read)(const uint8_t* p, int64_t bytes);
  // True when products of many rows have a tiled path of their own; otherwise callers dequantize and use a GEMM.
  bool wide;
};

// Each returns null when it was not compiled or this CPU lacks the instructions.
const Backend* portable_backend();
const Backend* avx2_backend();
const Backend* neon_backend();
// AVX-512 with tiles of fp32 and of bfloat16, the faster one on this CPU first; none where the others return null.
std::vector<const Backend*> avx512_backends();

}  // namespace isomorph
