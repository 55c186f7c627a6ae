// What training spends its time on, over dense float32: products, any factor of which may be transposed, and attention.
#pragma once

#include <cstdint>
#include <functional>

namespace isomorph {

// Who computes: run(n, f) calls f(0), ..., f(n - 1), at most `count` of them at the same time. No result depends on it.
struct Threads {
  int64_t count;
  std::function<void(int64_t, const std::function<void(int64_t)>&)> run;
};

struct DenseMatrix {
  const float* data;
  int64_t product, row, column;  // steps to the next product's matrix, to the next row and column: one of these is 1
};

// c [products, m, n] = a [products, m, k] @ b [products, k, n], c contiguous.
struct DenseProduct {
  int64_t products, m, n, k;
  DenseMatrix a, b;
  float* c;
};

// Causal attention over the keys at most `window` before each query, all contiguous: q, out, d_out and d_q [batch, tokens,
// heads, size], k, v, d_k and d_v [batch, tokens, kv_heads, size], inverse_totals [batch, heads, tokens] one over the sum
// of exp(score). No maximum is subtracted: scores must stay below 88.
struct DenseAttention {
  int64_t batch, tokens, heads, kv_heads, size, window;
  float scale;
  const float *q, *k, *v;
  float *out, *inverse_totals;  // results of attend
  const float* d_out;
  float *d_q, *d_k, *d_v;  // results of attend_backward
};

struct DenseLoops {
  void (*multiply)(const DenseProduct&, const Threads&);
  void (*attend)(const DenseAttention&, const Threads&);
  void (*attend_backward)(const DenseAttention&, const Threads&);
};

const DenseLoops& dense_loops();  // of the backend in use
const DenseLoops* portable_dense_loops();
const DenseLoops* avx2_dense_loops();    // null where it was not compiled
const DenseLoops* avx512_dense_loops();  // likewise

}  // namespace isomorph
