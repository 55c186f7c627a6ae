// Weights to MLX's packed layout and back, bit for bit as mx.quantize and mx.dequantize do it on a CPU.
//
// The numpy of isomorph/quantize/{affine,microscaling,packing}.py says the same and is what the tests compare with.
#pragma once

#include "format.h"

namespace isomorph {

// Consecutive groups: a matrix's rows follow one another, as a group never spans two of them.
struct Packing {
  Mode mode;
  int bits;
  int group;
  Type type;  // of the weights; of the scales and biases too in affine mode
};

struct PackedGroups {
  uint8_t* codes;  // [groups * group * bits / 8]
  void* scales;    // [groups] of `type`, or bytes
  void* biases;    // [groups] of `type`; null but in affine mode
};

// Squared error, and squared weight, of the groups it was measured on.
struct Squares {
  double error = 0, signal = 0;
};

// Weights are worked on in blocks of this many groups; the error of every `stride`-th block goes to its own Squares.
struct Sample {
  int64_t block_groups, stride;
  Squares* squares;  // [blocks / stride, rounded up], or null
};

// On all threads of the pool. False when a weight is not finite.
bool encode(const Packing& as, const void* weights, int64_t groups, const PackedGroups& out, const Sample& sample);

// On all threads, in `type`, to which scales and biases, products and sums are each rounded.
void decode(const Packing& as, const PackedGroups& from, int64_t groups, void* weights, Type type);

// The same for one instruction set on one thread.
struct Codec {
  bool (*encode)(const Packing& as, const void* weights, int64_t groups, const PackedGroups& out, Squares* squares);
  void (*decode)(const Packing& as, const PackedGroups& from, int64_t groups, void* weights, Type type);
};

// Null where it was not compiled; whether this CPU has the instructions is dispatch.h's to say.
const Codec* portable_codec();
const Codec* avx2_codec();
const Codec* avx512_codec();

}  // namespace isomorph
