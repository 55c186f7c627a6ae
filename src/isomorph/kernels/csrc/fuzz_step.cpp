// The recorded step: every instruction set against plain C++, over random shapes, strides and types.
#include <cmath>
#include <cstdio>
#include <vector>

#include "dispatch.h"
#include "fuzz.h"
#include "step.h"

using namespace isomorph;

namespace {

// Memory of views: filled alike for every instruction set.
struct Arena {
  std::mt19937 random;
  std::vector<Buffer> buffers;

  uint8_t* floats(Type type, int64_t count, float low = -2, float high = 2) {
    buffers.emplace_back(size_t(count) * size_of(type), random() % 4 * size_of(type));
    std::uniform_real_distribution<float> value(low, high);
    for (int64_t i = 0; i < count; ++i) store_float(type, buffers.back().data, i, value(random));
    return buffers.back().data;
  }

  // Strides with gaps; dimensions of stride 0 where `repeats`.
  View view(Type type, const std::vector<int64_t>& sizes, bool repeats = false, float low = -2) {
    View out{nullptr, type, sizes, std::vector<int64_t>(sizes.size())};
    int64_t next = 1, last = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      out.strides[d] = repeats && random() % 4 == 0 ? 0 : next;
      last += out.strides[d] * (sizes[d] - 1);
      next = std::max<int64_t>(next, out.strides[d] * sizes[d] + int64_t(random() % 3));
    }
    out.data = floats(type, last + 1, low);
    return out;
  }
};

std::vector<float> values_of(const View& view) {
  std::vector<float> out;
  std::vector<int64_t> place(view.sizes.size());
  for (;;) {
    int64_t at = 0;
    for (size_t d = 0; d < place.size(); ++d) at += place[d] * view.strides[d];
    out.push_back(load_float(view.type, view.data, at));
    size_t d = place.size();
    while (d > 0 && ++place[d - 1] == view.sizes[d - 1]) place[--d] = 0;
    if (d == 0) return out;
  }
}

// One random instruction, run; its result.
std::vector<float> run_instruction(uint32_t seed, bool overrun) {
  Arena arena{std::mt19937(seed), {}};
  auto& random = arena.random;
  const Type type = pick(random, {Type::float32, Type::bfloat16, Type::float16});
  std::vector<int64_t> sizes;
  for (int d = 1 + int(random() % 4); d > 0; --d) sizes.push_back(1 + random() % (d == 1 ? 600 : 4));
  std::vector<int64_t> reduced = sizes;
  reduced.back() = 1;
  Step step;
  Slots slots{};
  View out;
  std::vector<uint64_t> keys, values;
  std::vector<int64_t> rooms, dropped, starts;
  switch (overrun ? 0 : random() % 5) {
    case 0: {
      const auto* name = pick(random, {"copy", "neg", "exp", "tanh", "silu", "gelu", "gelu_tanh", "cos", "add", "mul", "div", "maximum"});
      out = arena.view(type, sizes);
      View a = arena.view(type, sizes, true, 0.5f), b = arena.view(type, sizes, true, 0.5f);
      if (overrun) a = {arena.floats(type, 1), type, sizes, std::vector<int64_t>(sizes.size(), 1)};
      step.add(Elementwise{elementwise_operation(name), out, a, b, 1.5f, 0.f});
      break;
    }
    case 1: {
      out = arena.view(type, reduced);
      step.add(Reduction{reduction_operation(pick(random, {"sum", "mean", "amax"})), out, arena.view(type, sizes)});
      break;
    }
    case 2: {
      out = arena.view(type, sizes);
      const auto *weight = arena.floats(type, sizes.back()), *bias = arena.floats(type, sizes.back());
      step.add(LayerNorm{out, arena.view(type, sizes), weight, random() % 2 ? bias : nullptr, type, 1e-2f});
      break;
    }
    case 3: {
      out = arena.view(type, sizes);
      step.add(Softmax{out, arena.view(type, sizes)});
      break;
    }
    default: {
      const int64_t batch = 1 + random() % 3, kv = 1 + random() % 3, heads = kv * pick(random, {1, 2, 4}), k = 1 + random() % 70;
      const int64_t v = 1 + random() % 70, capacity = 1 + random() % 40;
      out = arena.view(type, {batch, 1, heads, v});
      keys.push_back(reinterpret_cast<uint64_t>(arena.floats(type, batch * kv * capacity * k)));
      values.push_back(reinterpret_cast<uint64_t>(arena.floats(type, batch * kv * capacity * v)));
      rooms.push_back(capacity);
      dropped.push_back(random() % 3);
      const int64_t filled = dropped[0] + random() % capacity;
      for (int64_t b = 0; b < batch; ++b) starts.push_back(dropped[0] + random() % (filled - dropped[0] + 1));
      slots = {keys.data(), values.data(), rooms.data(), dropped.data(), filled, starts.data()};
      auto* sinks = reinterpret_cast<float*>(arena.floats(Type::float32, heads));
      step.add(Attention{arena.view(type, {batch, heads, 1, k}), arena.view(type, {batch, kv, 1, k}),
                         arena.view(type, {batch, kv, 1, v}), out, 0, 0.3f, int64_t(random() % 3) * 5, random() % 2 ? 5.f : 0.f,
                         random() % 2 ? sinks : nullptr});
    }
  }
  step.run(slots);
  return values_of(out);
}

}  // namespace

bool step_is_right(std::mt19937& random, const std::string& fault) {
  const uint32_t seed = random();
  std::vector<float> expected;
  for (const std::string& name : plain_first()) {
    choose_backend(name);
    std::vector<float> got = run_instruction(seed, fault == "overrun");
    if (fault == "wrong" && !expected.empty()) got[0] += 0.1f + std::fabs(got[0]);
    if (expected.empty()) expected = got;
    for (size_t i = 0; i < got.size(); ++i)  // one rounding to bfloat16 either way, or sums in another order
      if (!(std::fabs(got[i] - expected[i]) <= 0.01f * (1.f + std::fabs(expected[i])))) {
        std::printf("%s: a step gives %g, expected %g\n", name.c_str(), got[i], expected[i]);
        return false;
      }
  }
  return true;
}
