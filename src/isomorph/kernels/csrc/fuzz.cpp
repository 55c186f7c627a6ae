// Random products against double precision, packings and steps, for sanitizers and for machines without Python:
// fuzz [seconds] [seed] [wrong | overrun] [products | step | dense | codec].
//
// Every operand lies at a random alignment and ends where its allocation ends, so that AddressSanitizer sees a read of one
// byte too many. Exits with 1 at the first product that is off by more than 1e-6 * sum|x * w| (exact). The last argument
// puts a fault in, to show that it is found: a result that is a little off, or a matrix of one row less than is claimed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <chrono>
#include <vector>

#include "dispatch.h"
#include "fuzz.h"
#include "pool.h"

using namespace isomorph;

namespace {

bool one(std::mt19937& random, const Backend& backend, const std::string& fault) {
  const Mode mode = pick(random, {Mode::affine, Mode::affine, Mode::affine, Mode::mxfp4, Mode::mxfp8, Mode::nvfp4});
  Weights w{};
  w.mode = mode;
  w.bits = mode == Mode::affine ? pick(random, kWidths) : mode == Mode::mxfp8 ? 8 : 4;
  w.group = mode == Mode::affine ? pick(random, {32, 64, 128}) : mode == Mode::nvfp4 ? 16 : 32;
  w.scale_type = pick(random, {Type::float32, Type::bfloat16, Type::float16});
  w.rows = 1 + random() % 70;
  // Whole 32-bit words, as MLX stores them.
  w.columns = int64_t(w.group) * (1 + random() % 12);
  if (w.columns * w.bits % 32) w.columns *= 2;
  const int64_t count = pick(random, {1, 1, 2, 3, 4, 5, 8, 11, 12, 13, 31, 77}), groups = w.groups();
  const Type x_type = pick(random, {Type::float32, Type::bfloat16, Type::float16});
  const Type y_type = pick(random, {Type::float32, Type::bfloat16});
  const bool fast = random() % 3 == 0;
  std::normal_distribution<float> normal;

  const int scale_bytes = mode == Mode::affine ? size_of(w.scale_type) : 1;
  const int64_t stored = w.rows - (fault == "overrun");
  Buffer codes(size_t(stored * w.row_bytes()), random() % 4), scales(size_t(w.rows * groups * scale_bytes), random() % 4);
  Buffer biases(size_t(w.rows * groups * scale_bytes), random() % 4);
  for (int64_t i = 0; i < stored * w.row_bytes(); ++i) {
    codes.data[i] = uint8_t(random());
    if (mode == Mode::mxfp8 && (codes.data[i] & 0x7f) == 0x7f) codes.data[i] = 0;  // NaN
  }
  for (int64_t i = 0; i < w.rows * groups; ++i) {
    if (mode == Mode::affine) {
      const float scale = normal(random) * 0.1f;
      store_float(w.scale_type, scales.data, i, scale);
      store_float(w.scale_type, biases.data, i, random() % 2 ? -scale * float(random() % 16) : normal(random));
    } else {
      scales.data[i] = uint8_t(mode == Mode::nvfp4 ? 32 + random() % 40 : 118 + random() % 12);
    }
  }
  w.codes = codes.data, w.scales = scales.data, w.biases = biases.data;

  const int64_t stride = w.columns + int64_t(random() % 5);
  Buffer x(size_t(((count - 1) * stride + w.columns) * size_of(x_type)), random() % 4);
  Buffer y(size_t(count * w.rows * size_of(y_type)), random() % 4);
  std::vector<const void*> x_rows;
  std::vector<void*> y_rows;
  for (int64_t m = 0; m < count; ++m) {
    x_rows.push_back(x.data + m * stride * size_of(x_type));
    y_rows.push_back(y.data + m * w.rows * size_of(y_type));
    for (int64_t k = 0; k < w.columns; ++k) store_float(x_type, const_cast<void*>(x_rows.back()), k, normal(random));
  }
  set_thread_count(1 + int(random() % 3));
  const Rows rows{count, x_rows.data(), x_type, y_rows.data(), y_type};
  if (random() % 2) {
    backend.multiply(&w, &rows, 1, fast);
  } else {  // as two matrices that share their activations
    Weights parts[2] = {w, w};
    parts[0].rows = int64_t(random()) % w.rows, parts[1].rows = w.rows - parts[0].rows;
    const int64_t cut = parts[0].rows;
    parts[1].codes += cut * w.row_bytes();
    parts[1].scales = scales.data + cut * groups * scale_bytes, parts[1].biases = biases.data + cut * groups * scale_bytes;
    std::vector<void*> later;
    for (void* y_row : y_rows) later.push_back(static_cast<char*>(y_row) + cut * size_of(y_type));
    const Rows results[2] = {rows, {count, x_rows.data(), x_type, later.data(), y_type}};
    backend.multiply(parts + (cut == 0), results + (cut == 0), cut == 0 ? 1 : 2, fast);
  }
  if (fault == "wrong") store_float(y_type, y_rows[0], 0, load_float(y_type, y_rows[0], 0) * 1.02f + 1e-3f);

  std::vector<float> row(static_cast<size_t>(w.columns));
  for (int64_t n = 0; n < w.rows; ++n) {
    backend.dequantize(w, &n, 1, row.data(), Type::float32);
    for (int64_t k = 0; k < w.columns; ++k) {  // the format by definition, bit by bit
      int code = 0;
      for (int b = 0; b < w.bits; ++b) code |= (w.row(n)[(k * w.bits + b) / 8] >> ((k * w.bits + b) % 8) & 1) << b;
      const double scale = load_scale(w, n * groups + k / w.group), bias = load_bias(w, n * groups + k / w.group);
      const double element = mode == Mode::affine ? code : mode == Mode::mxfp8 ? from_e4m3(uint8_t(code)) : from_e2m1(uint8_t(code));
      const double value = scale * element + bias;
      if (row[size_t(k)] != float(value)) {
        std::printf("%s: dequantized %g, expected %g\n", backend.name, row[size_t(k)], value);
        return false;
      }
    }
    for (int64_t m = 0; m < count; ++m) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < w.columns; ++k) {
        const double term = double(load_float(x_type, x_rows[size_t(m)], k)) * row[size_t(k)];
        sum += term, size += std::fabs(term);
      }
      const double got = load_float(y_type, y_rows[size_t(m)], n), error = std::fabs(got - sum);
      double allowed = 1e-6 * size + (y_type == Type::bfloat16 ? 0.004 * std::fabs(sum) : 0.);
      if (fast) {  // one int8 rounding a value: half a step of the largest in the group
        double rounding = 0;
        for (int64_t g = 0; g < groups; ++g) {
          double largest = 0, weight = 0;
          for (int64_t k = g * w.group; k < (g + 1) * w.group; ++k) {
            largest = std::max(largest, double(std::fabs(load_float(x_type, x_rows[size_t(m)], k))));
            weight += std::fabs(row[size_t(k)]);
          }
          rounding += largest / 253 * weight;
        }
        // scale * code and bias may cancel in float32: the sums are those of codes.
        allowed += rounding + 1e-3 * std::fabs(size) + 1e-3;
      }
      if (!(error <= allowed)) {
        std::printf("%s: mode %d bits %d group %d rows %ld columns %ld count %ld x %d fast %d: %g, expected %g (allowed %g)\n",
                    backend.name, int(mode), w.bits, w.group, long(w.rows), long(w.columns), long(count), int(x_type),
                    int(fast), got, sum, allowed);
        return false;
      }
    }
  }

  const int64_t k = 1 + int64_t(random()) % w.columns;
  Buffer dense(size_t(w.rows * k * 2), random() % 4);
  for (int64_t i = 0; i < w.rows * k; ++i) store_float(Type::bfloat16, dense.data, i, normal(random));
  backend.multiply_bfloat16(dense.data, w.rows, k, {count, x_rows.data(), x_type, y_rows.data(), y_type});
  for (int64_t n = 0; n < w.rows; ++n)
    for (int64_t m = 0; m < count; ++m) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double term = double(load_float(x_type, x_rows[size_t(m)], i)) * load_float(Type::bfloat16, dense.data, n * k + i);
        sum += term, size += std::fabs(term);
      }
      const double got = load_float(y_type, y_rows[size_t(m)], n);
      if (!(std::fabs(got - sum) <= 1e-6 * size + (y_type == Type::bfloat16 ? 0.004 * std::fabs(sum) : 0.))) {
        std::printf("%s: bfloat16 rows %ld columns %ld: %g, expected %g\n", backend.name, long(w.rows), long(k), got, sum);
        return false;
      }
    }
  return true;
}

constexpr std::pair<const char*, bool (*)(std::mt19937&, const std::string&)> kOthers[] = {
    {"step", step_is_right},
    {"dense", dense_is_right},
#ifndef ISOMORPH_SAMPLE
    {"codec", codec_is_right},
#endif
};

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  std::mt19937 random(argc > 2 ? unsigned(std::atoi(argv[2])) : 1u);
  const std::string fault = argc > 3 ? argv[3] : "", part = argc > 4 ? argv[4] : "";
  const auto start = std::chrono::steady_clock::now();
  long products = 0, others = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    for (const Backend* backend : available_backends()) {
      if (!part.empty() && part != "products") break;
      if (!one(random, *backend, fault)) return 1;
      ++products;
    }
    for (const auto& [name, is_right] : kOthers) {
      if (!part.empty() && part != name) continue;
      if (!is_right(random, fault)) return 1;
      ++others;
    }
  }
  std::printf("%ld products right, %ld steps and packings:", products, others);
  for (const Backend* backend : available_backends()) std::printf(" %s", backend->name);
  std::printf("\n");
}
