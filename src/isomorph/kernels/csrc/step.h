// One decode step as a list of instructions over fixed memory, recorded once from a model and run again for every token.
//
// What a model does besides its products is hundreds of operations over a few thousand numbers: dispatching each costs
// more than computing it. Values are rounded to the dtype of every result, as the framework rounds them.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "backend.h"

namespace isomorph {

constexpr int kMaxRank = 6;

// A strided array of at most kMaxRank dimensions; strides count elements.
struct View {
  void* data;
  Type type;
  std::vector<int64_t> sizes, strides;

  char* at(int64_t offset) const { return static_cast<char*>(data) + offset * size_of(type); }
};

// out = operation(a, b): operands have out's shape (stride 0 where they are broadcast). p and q are its parameters.
struct Elementwise {
  int operation;
  View out, a, b;  // b.data is null for operations of one operand
  float p, q;
};

// out[..., 0] = operation over the last dimension of a.
struct Reduction {
  int operation;
  View out, a;
};

// Rows of the last dimension: (x - mean) / sqrt(variance + eps) * weight + bias; weight and bias may be null.
struct LayerNorm {
  View out, x;
  const void* weight;
  const void* bias;
  Type weight_type;
  float eps;
};

struct Softmax {
  View out, x;
};

// What changes from step to step: caches [B, KV, room, K] of every layer and how far they are filled.
struct Slots {
  const uint64_t* keys;
  const uint64_t* values;
  const int64_t* rooms;
  const int64_t* dropped;  // slots that no longer stand in the layer's cache
  int64_t filled;          // slots before this step
  const int64_t* starts;   // [B] first slot that holds a token
};

// One query per row: stores k and v in the layer's cache, then out = softmax(cap(q @ keys * scale)) @ values.
struct Attention {
  View q, k, v, out;  // [B, H, 1, K], [B, KV, 1, K], [B, KV, 1, V], [B, 1, H, V]
  int layer;
  float scale;
  int64_t window;      // 0: all
  float cap;           // 0: none
  const float* sinks;  // [H] logits that take probability and give nothing, or null
};

// The loops, compiled for each instruction set.
struct StepLoops {
  void (*elementwise)(const Elementwise&);
  void (*reduce)(const Reduction&);
  void (*layer_norm)(const LayerNorm&);
  void (*softmax)(const Softmax&);
  void (*attend)(const Attention&, const Slots&);
};
const StepLoops* portable_step_loops();
const StepLoops* avx2_step_loops();    // null when not compiled; the caller has checked that this CPU has them
const StepLoops* avx512_step_loops();
const StepLoops& step_loops();  // those of the backend in use

int elementwise_operation(const std::string& name);  // throws std::invalid_argument
int reduction_operation(const std::string& name);

class Step {
 public:
  void add(Elementwise instruction);
  void add(Reduction instruction);
  void add(LayerNorm instruction);
  void add(Softmax instruction);
  void add(Attention instruction);
  void add(std::function<void(const Slots&)> instruction) { instructions_.push_back(std::move(instruction)); }

  void run(const Slots& slots) const {
    for (const auto& instruction : instructions_) instruction(slots);
  }
  size_t size() const { return instructions_.size(); }

 private:
  std::vector<std::function<void(const Slots&)>> instructions_;
};

}  // namespace isomorph
