// The loops of a step in plain C++ that compilers vectorize; each instruction set includes them once.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "exponential.h"
#include "pool.h"
#include "step.h"
#include "step_operations.h"

namespace isomorph {
namespace {

constexpr int kChunk = 256;    // values held as floats at a time
constexpr int kThreadChunks = 128;  // for fewer of them a second thread does not pay
constexpr int kLanes = 16;     // partial sums, so that a sum vectorizes
constexpr int kSlots = 4;     // of a cache at a time: sums of values are loaded and stored once for them
constexpr int kAttentionSlot = 11;

void load(Type type, const char* from, int64_t stride, float* to, int count) {
  if (stride == 0) {
    std::fill(to, to + count, load_float(type, from, 0));
  } else if (stride != 1 || type == Type::float16) {
    for (int i = 0; i < count; ++i) to[i] = load_float(type, from, i * stride);
  } else if (type == Type::float32) {
    std::memcpy(to, from, size_t(count) * 4);
  } else {
    for (int i = 0; i < count; ++i) to[i] = load_float(Type::bfloat16, from, i);
  }
}

void store(Type type, char* to, int64_t stride, const float* from, int count) {
  if (stride == 1) return store_floats(type, to, 0, from, count);
  for (int i = 0; i < count; ++i) store_float(type, to, i * stride, from[i]);
}

inline float hyperbolic_tangent(float x) {
  const float square = x * x;
  // Around zero 1 - 2 / (exp(2x) + 1) cancels.
  const float near = x * (1.f + square * (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315 + square * (62.f / 2835)))));
  const float far = 1.f - 2.f / (exponential(2.f * x) + 1.f);
  return square < 0.09f ? near : far;
}

inline float logistic(float x) { return 1.f / (1.f + exponential(-x)); }

inline float gelu_tanh(float x) {
  return 0.5f * x * (1.f + hyperbolic_tangent(0.7978845608f * (x + 0.044715f * x * x * x)));
}

#define EACH(expression)                      \
  for (int i = 0; i < count; ++i) {           \
    const float x = a[i];                     \
    a[i] = expression;                        \
  }                                           \
  break
#define PAIR(expression)                      \
  for (int i = 0; i < count; ++i) {           \
    const float x = a[i], y = b[i];           \
    a[i] = expression;                        \
  }                                           \
  break

void apply(int operation, float* a, const float* b, int count, float p, float q) {
  switch (operation) {
    case kCopy: break;
    case kNegate: EACH(-x);
    case kReciprocalRoot: EACH(1.f / std::sqrt(x));
    case kRoot: EACH(std::sqrt(x));
    case kReciprocal: EACH(1.f / x);
    case kExp: EACH(exponential(x));
    case kTanh: EACH(hyperbolic_tangent(x));
    case kSigmoid: EACH(logistic(x));
    case kSilu: EACH(x * logistic(x));
    case kGelu: EACH(0.5f * x * (1.f + std::erf(x * 0.70710678f)));
    case kGeluTanh: EACH(gelu_tanh(x));
    case kRelu: EACH(x < 0.f ? 0.f : x);  // NaN stays
    case kCos: EACH(std::cos(x));
    case kSin: EACH(std::sin(x));
    case kPower:
      if (p == 2.f) {
        EACH(x * x);
      }
      if (p == 3.f) {
        EACH(x * x * x);
      }
      EACH(std::pow(x, p));
    case kClamp: EACH(x < p ? p : x > q ? q : x);
    case kAdd: PAIR(x + p * y);
    case kSubtract: PAIR(x - p * y);
    case kMultiply: PAIR(x * y);
    case kDivide: PAIR(x / y);
    case kMaximum: PAIR(x > y || x != x ? x : y);
    case kMinimum: PAIR(x < y || x != x ? x : y);
  }
}
#undef EACH
#undef PAIR

// Calls body(offsets of each view) for every place of the dimensions before the last.
template <int N, class Body>
void each_row(const View* const (&views)[N], Body body) {
  const auto& sizes = views[0]->sizes;
  const int outer = int(sizes.size()) - 1;
  int64_t place[kMaxRank] = {}, offsets[N] = {};
  for (int d = 0; d < outer; ++d)
    if (sizes[d] == 0) return;
  for (;;) {
    body(offsets);
    int d = outer - 1;
    for (; d >= 0; --d) {
      for (int i = 0; i < N; ++i) offsets[i] += views[i]->strides[d];
      if (++place[d] < sizes[d]) break;
      for (int i = 0; i < N; ++i) offsets[i] -= place[d] * views[i]->strides[d];
      place[d] = 0;
    }
    if (d < 0) return;
  }
}

void elementwise(const Elementwise& e) {
  const View& second = e.b.data ? e.b : e.a;
  const View* views[3] = {&e.out, &e.a, &second};
  const int64_t length = e.out.sizes.back(), in_out = e.out.strides.back(), in_a = e.a.strides.back(), in_b = second.strides.back();
  each_row(views, [&](const int64_t* offsets) {
    parallel((length + kChunk - 1) / kChunk, kThreadChunks, [&, to = offsets[0], from = offsets[1], other = offsets[2]](int64_t begin, int64_t end) {
      float a[kChunk], b[kChunk];
      for (int64_t start = begin * kChunk; start < std::min(length, end * kChunk); start += kChunk) {
        const int count = int(std::min<int64_t>(kChunk, length - start));
        load(e.a.type, e.a.at(from + start * in_a), in_a, a, count);
        if (e.b.data) load(e.b.type, e.b.at(other + start * in_b), in_b, b, count);
        apply(e.operation, a, b, count, e.p, e.q);
        store(e.out.type, e.out.at(to + start * in_out), in_out, a, count);
      }
    });
  });
}

// Vectors of the compiler, which makes the widest of them that the instruction set has. It would add up the lanes of an
// array one after the other, which takes longer than a dot product of 128.
using Lanes = float __attribute__((vector_size(4 * kLanes)));

inline void read_lanes(const float* from, Lanes& to) { std::memcpy(&to, from, sizeof to); }

inline float total_of(const Lanes& lanes) {
  using Half = float __attribute__((vector_size(2 * kLanes)));
  using Quarter = float __attribute__((vector_size(kLanes)));
  Half half[2];
  std::memcpy(half, &lanes, sizeof half);
  half[0] += half[1];
  Quarter quarter[2];
  std::memcpy(quarter, half, sizeof quarter);
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

float sum(const float* x, int64_t count) {
  Lanes lanes{}, of_x;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) read_lanes(x + i, of_x), lanes += of_x;
  float total = 0;
  for (; i < count; ++i) total += x[i];
  return total + total_of(lanes);
}

float dot(const float* x, const float* y, int64_t count) {
  Lanes lanes{}, of_x, of_y;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) read_lanes(x + i, of_x), read_lanes(y + i, of_y), lanes += of_x * of_y;
  float total = 0;
  for (; i < count; ++i) total += x[i] * y[i];
  return total + total_of(lanes);
}

float sum_of_squares(const float* x, int64_t count, float mean) {
  Lanes lanes{}, of_x;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) read_lanes(x + i, of_x), of_x -= mean, lanes += of_x * of_x;
  float total = 0;
  for (; i < count; ++i) total += (x[i] - mean) * (x[i] - mean);
  return total + total_of(lanes);
}

// NaN when there is one.
float largest(const float* x, int64_t count) {
  const float none = -std::numeric_limits<float>::infinity();
  Lanes lanes = none - Lanes{}, of_x;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) read_lanes(x + i, of_x), lanes = ((of_x > lanes) | (of_x != of_x)) ? of_x : lanes;
  float value = none;
  for (; i < count; ++i) value = x[i] > value || x[i] != x[i] ? x[i] : value;
  for (int j = 0; j < kLanes; ++j) value = lanes[j] > value || lanes[j] != lanes[j] ? lanes[j] : value;
  return value;
}

// One row of the last dimension as floats, in this thread's scratch memory.
float* row_of(const View& view, int64_t offset, int64_t length) {
  auto* row = static_cast<float*>(scratch(kAttentionSlot, size_t(length) * 4));
  for (int64_t start = 0; start < length; start += 1 << 20)
    load(view.type, view.at(offset + start * view.strides.back()), view.strides.back(), row + start,
         int(std::min<int64_t>(1 << 20, length - start)));
  return row;
}

void reduce(const Reduction& r) {
  const View* views[2] = {&r.a, &r.out};
  const int64_t length = r.a.sizes.back();
  each_row(views, [&](const int64_t* offsets) {
    const float* row = row_of(r.a, offsets[0], length);
    float value = r.operation == kLargest ? largest(row, length) : sum(row, length);
    if (r.operation == kMean) value /= float(length);
    store_float(r.out.type, r.out.at(offsets[1]), 0, value);
  });
}

void layer_norm(const LayerNorm& n) {
  const View* views[2] = {&n.x, &n.out};
  const int64_t length = n.x.sizes.back();
  each_row(views, [&](const int64_t* offsets) {
    float* row = row_of(n.x, offsets[0], length);
    const float mean = sum(row, length) / float(length);
    const float inverse = 1.f / std::sqrt(sum_of_squares(row, length, mean) / float(length) + n.eps);
    for (int64_t i = 0; i < length; ++i) {
      float value = (row[i] - mean) * inverse;
      if (n.weight) value *= load_float(n.weight_type, n.weight, i);
      if (n.bias) value += load_float(n.weight_type, n.bias, i);
      store_float(n.out.type, n.out.at(offsets[1]), i * n.out.strides.back(), value);
    }
  });
}

void normalise(float* row, int64_t length, float extra) {
  const float top = std::max(largest(row, length), extra);
  for (int64_t i = 0; i < length; ++i) row[i] = exponential(row[i] - top);
  const float factor = 1.f / (sum(row, length) + exponential(extra - top));
  for (int64_t i = 0; i < length; ++i) row[i] *= factor;
}

void softmax(const Softmax& s) {
  const View* views[2] = {&s.x, &s.out};
  const int64_t length = s.x.sizes.back();
  each_row(views, [&](const int64_t* offsets) {
    float* row = row_of(s.x, offsets[0], length);
    normalise(row, length, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < length; ++i) store_float(s.out.type, s.out.at(offsets[1]), i * s.out.strides.back(), row[i]);
  });
}

// Copies the new key or value [B, KV, 1, K] behind the filled slots.
void keep(const View& fresh, uint64_t cache, int64_t room, int64_t place) {
  const int64_t batch = fresh.sizes[0], heads = fresh.sizes[1], width = fresh.sizes[3], size = size_of(fresh.type);
  auto* base = reinterpret_cast<char*>(cache);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      const char* from = fresh.at(b * fresh.strides[0] + h * fresh.strides[1]);
      char* to = base + ((b * heads + h) * room + place) * width * size;
      for (int64_t i = 0; i < width; ++i) std::memcpy(to + i * size, from + i * fresh.strides[3] * size, size_t(size));
    }
}

// sums += the rows of `lines`, each times its weight.
void weigh(const float* weights, const float* __restrict lines, float* __restrict sums, int64_t width) {
  const float a = weights[0], b = weights[1], c = weights[2], d = weights[3];
  static_assert(kSlots == 4);
  for (int64_t i = 0; i < width; ++i)
    sums[i] += a * lines[i] + b * lines[width + i] + (c * lines[2 * width + i] + d * lines[3 * width + i]);
}

void attend(const Attention& a, const Slots& slots) {
  const int64_t batch = a.q.sizes[0], heads = a.q.sizes[1], width = a.q.sizes[3];
  const int64_t kv_heads = a.k.sizes[1], value_width = a.v.sizes[3], share = heads / kv_heads;
  const Type type = a.k.type;
  const int64_t room = slots.rooms[a.layer], dropped = slots.dropped[a.layer];
  keep(a.k, slots.keys[a.layer], room, slots.filled - dropped);
  keep(a.v, slots.values[a.layer], room, slots.filled - dropped);
  // Query heads of one key head go together, as many as leave every thread something to do.
  int64_t together = share;
  while (together > 1 && (together % 2 == 0) && batch * heads / together < 2 * thread_count()) together /= 2;
  const int64_t parts = share / together, last = slots.filled + 1;
  parallel(batch * kv_heads * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / (kv_heads * parts), kv = item / parts % kv_heads, head = kv * share + item % parts * together;
      const int64_t first = std::max(slots.starts[b], a.window ? last - a.window : int64_t(0)), count = last - first;
      const int64_t padded = (count + kSlots - 1) / kSlots * kSlots;
      const int64_t floats = together * (width + value_width + padded) + kSlots * std::max(width, value_width);
      auto* q = static_cast<float*>(scratch(kAttentionSlot, size_t(floats) * 4));
      float* out = q + together * width;
      float* scores = out + together * value_width;
      float* line = scores + together * padded;
      for (int64_t g = 0; g < together; ++g) {
        load(a.q.type, a.q.at(b * a.q.strides[0] + (head + g) * a.q.strides[1]), a.q.strides[3], q + g * width, int(width));
        for (int64_t i = 0; i < width; ++i) q[g * width + i] *= a.scale;
      }
      const int64_t place = (b * kv_heads + kv) * room + first - dropped;
      const char* keys = reinterpret_cast<const char*>(slots.keys[a.layer]) + place * width * size_of(type);
      for (int64_t s = 0; s < count; s += kSlots) {
        const int64_t held = std::min<int64_t>(kSlots, count - s);  // slots behind one another
        load(type, keys + s * width * size_of(type), 1, line, int(held * width));
        for (int64_t g = 0; g < together; ++g)
          for (int64_t i = 0; i < held; ++i) scores[g * padded + s + i] = dot(q + g * width, line + i * width, width);
      }
      for (int64_t g = 0; g < together; ++g) {
        float* row = scores + g * padded;
        if (a.cap != 0.f)
          for (int64_t s = 0; s < count; ++s) row[s] = a.cap * hyperbolic_tangent(row[s] / a.cap);
        normalise(row, count, a.sinks ? a.sinks[head + g] : -std::numeric_limits<float>::infinity());
        std::fill(row + count, row + padded, 0.f);
      }
      std::fill(out, out + together * value_width, 0.f);
      const char* values = reinterpret_cast<const char*>(slots.values[a.layer]) +
                           place * value_width * size_of(type);
      for (int64_t s = 0; s < count; s += kSlots) {
        std::fill(line, line + kSlots * value_width, 0.f);
        const int64_t held = std::min<int64_t>(kSlots, count - s);
        load(type, values + s * value_width * size_of(type), 1, line, int(held * value_width));
        for (int64_t g = 0; g < together; ++g) weigh(scores + g * padded + s, line, out + g * value_width, value_width);
      }
      for (int64_t g = 0; g < together; ++g)
        store(a.out.type, a.out.at(b * a.out.strides[0] + (head + g) * a.out.strides[2]), a.out.strides[3],
              out + g * value_width, int(value_width));
    }
  });
}

constexpr StepLoops kLoops{elementwise, reduce, layer_norm, softmax, attend};

}  // namespace
}  // namespace isomorph
