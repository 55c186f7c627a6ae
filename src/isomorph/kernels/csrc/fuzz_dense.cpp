// Dense products and attention: every instruction set against double precision, and one thread against several.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "dense.h"
#include "dispatch.h"
#include "fuzz.h"
#include "pool.h"

using namespace isomorph;

namespace {

struct Floats : Buffer {
  int64_t count;

  Floats(std::mt19937& random, int64_t count, float spread = 0)
      : Buffer(size_t(count) * 4, random() % 4 * 4), count(count) {
    std::normal_distribution<float> normal(0, spread + 1e-30f);
    for (int64_t i = 0; i < count; ++i) values()[i] = spread > 0 ? normal(random) : 0;
  }
  float* values() const { return reinterpret_cast<float*>(data); }
};

Threads of_pool(int threads) {
  set_thread_count(threads);
  return {threads, [](int64_t n, const std::function<void(int64_t)>& body) {
            parallel(n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(i);
            });
          }};
}

// Whether got[i] are the expected up to allowed[i].
bool near(const char* what, const Floats& got, const std::vector<double>& expected, const std::vector<double>& allowed) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(std::fabs(got.values()[i] - expected[i]) <= allowed[i])) {
      std::printf("%s: %s of %zu: %g, expected %g (allowed %g)\n", backend().name, what, i, got.values()[i], expected[i], allowed[i]);
      return false;
    }
  return true;
}

bool product_is_right(std::mt19937& random, const std::string& fault) {
  const auto size = [&] { return int64_t(pick(random, {1, 2, 13, 14, 15, 31, 32, 33, 64, 97, 150})); };
  const int64_t products = 1 + random() % 3, m = size(), n = size(), k = pick(random, {0, 1, 5, 64, 255, 256, 257, 600});
  const bool transpose_a = random() % 2, transpose_b = random() % 2;
  const Floats a(random, products * m * k - (fault == "overrun" && k > 0), 1), b(random, products * k * n, 1);
  const DenseMatrix left{a.values(), m * k, transpose_a ? 1 : k, transpose_a ? m : 1};
  const DenseMatrix right{b.values(), k * n, transpose_b ? 1 : n, transpose_b ? k : 1};
  const Floats c(random, products * m * n), again(random, products * m * n);
  dense_loops().multiply({products, m, n, k, left, right, c.values()}, of_pool(1));
  dense_loops().multiply({products, m, n, k, left, right, again.values()}, of_pool(2 + int(random() % 3)));
  if (std::memcmp(c.data, again.data, size_t(c.count) * 4)) {
    std::printf("%s: a product, expected the same from any number of threads\n", backend().name);
    return false;
  }
  if (fault == "wrong") c.values()[c.count - 1] += 1e-3f;
  std::vector<double> sums, allowed;
  for (int64_t p = 0; p < products; ++p)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0, size = 0;
        for (int64_t l = 0; l < k; ++l) {
          const double term = double(left.data[p * m * k + i * left.row + l * left.column]) *
                              right.data[p * k * n + l * right.row + j * right.column];
          sum += term, size += std::fabs(term);
        }
        sums.push_back(sum), allowed.push_back(double(k + 2) * 0x1p-24 * size);  // one rounding a term, of partial sums
      }
  return near("product", c, sums, allowed);
}

// Gradients are checked as what they say of the loss: sum(out * d_out) moved along one random direction of q, k and v.
bool attention_is_right(std::mt19937& random, const std::string& fault) {
  DenseAttention of{};
  of.batch = 1 + random() % 2, of.kv_heads = 1 + random() % 2, of.heads = of.kv_heads * int64_t(1 + random() % 3);
  of.tokens = pick(random, {1, 7, 48, 49, 64, 65, 130}), of.size = pick(random, {8, 24, 64, 72});
  of.window = pick(random, {0, 1, 30, 63, 64, 200}), of.scale = 1 / std::sqrt(float(of.size));
  const int64_t queries = of.batch * of.tokens * of.heads * of.size, keys = of.batch * of.tokens * of.kv_heads * of.size;
  const Floats q(random, queries, 1), k(random, keys, 1), v(random, keys - (fault == "overrun"), 1), d_out(random, queries, 1);
  const Floats out(random, queries), totals(random, of.batch * of.heads * of.tokens);
  const Floats d_q(random, queries), d_k(random, keys), d_v(random, keys);
  of.q = q.values(), of.k = k.values(), of.v = v.values(), of.out = out.values(), of.inverse_totals = totals.values();
  of.d_out = d_out.values(), of.d_q = d_q.values(), of.d_k = d_k.values(), of.d_v = d_v.values();
  dense_loops().attend(of, of_pool(1 + int(random() % 3)));
  dense_loops().attend_backward(of, of_pool(1 + int(random() % 3)));

  const Floats along_q(random, queries, 1), along_k(random, keys, 1), along_v(random, keys, 1);
  const auto attended = [&](double step) {
    std::vector<double> result(static_cast<size_t>(queries));
    const auto moved = [&](const Floats& x, const Floats& along, int64_t i) { return x.values()[i] + step * along.values()[i]; };
    for (int64_t b = 0; b < of.batch; ++b)
      for (int64_t h = 0; h < of.heads; ++h)
        for (int64_t t = 0; t < of.tokens; ++t) {
          const auto key = [&](int64_t s) { return ((b * of.tokens + s) * of.kv_heads + h * of.kv_heads / of.heads) * of.size; };
          const int64_t query = ((b * of.tokens + t) * of.heads + h) * of.size;
          double total = 0;
          for (int64_t s = std::max<int64_t>(0, t - of.window); s <= t; ++s) {
            double score = 0;
            for (int64_t j = 0; j < of.size; ++j) score += moved(q, along_q, query + j) * moved(k, along_k, key(s) + j);
            const double odds = std::exp(score * of.scale);
            total += odds;
            for (int64_t j = 0; j < of.size; ++j) result[size_t(query + j)] += odds * moved(v, along_v, key(s) + j);
          }
          for (int64_t j = 0; j < of.size; ++j) result[size_t(query + j)] /= total;
        }
    return result;
  };
  if (fault == "wrong") out.values()[queries - 1] += 1e-3f;
  // Values are of order 1 and so are sums of odds over their total: some roundings of those.
  if (!near("attention", out, attended(0), std::vector<double>(size_t(queries), 2e-5))) return false;
  const std::vector<double> after = attended(1e-4), before = attended(-1e-4);
  double change = 0, gradient = 0, size = 0;
  for (int64_t i = 0; i < queries; ++i) change += d_out.values()[i] * (after[size_t(i)] - before[size_t(i)]) / 2e-4;
  for (const auto& [d, along] : {std::pair{&d_q, &along_q}, {&d_k, &along_k}, {&d_v, &along_v}})
    for (int64_t i = 0; i < d->count; ++i) {
      const double term = double(d->values()[i]) * along->values()[i];
      gradient += term, size += std::fabs(term);
    }
  if (!(std::fabs(gradient - change) <= 1e-5 * (size + 1))) {
    std::printf("%s: gradient of attention: %g, expected %g (allowed %g)\n", backend().name, gradient, change, 1e-5 * (size + 1));
    return false;
  }
  return true;
}

}  // namespace

bool dense_is_right(std::mt19937& random, const std::string& fault) {
  for (const std::string& name : plain_first()) {
    choose_backend(name);
    if (!product_is_right(random, fault) || !attention_is_right(random, fault)) return false;
  }
  return true;
}
