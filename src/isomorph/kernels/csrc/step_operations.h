// The operations of a step by name; their numbers are the places in these lists.
#pragma once

namespace isomorph {

enum Operation {
  kCopy, kNegate, kReciprocalRoot, kRoot, kReciprocal, kExp, kTanh, kSigmoid, kSilu, kGelu, kGeluTanh, kRelu, kCos, kSin,
  kPower, kClamp,
  kAdd, kSubtract, kMultiply, kDivide, kMaximum, kMinimum,
};
constexpr const char* kElementwiseNames[] = {
    "copy", "neg", "rsqrt", "sqrt", "reciprocal", "exp", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "relu", "cos", "sin",
    "pow", "clamp",
    "add", "sub", "mul", "div", "maximum", "minimum",
};

enum { kSum, kMean, kLargest };
constexpr const char* kReductionNames[] = {"sum", "mean", "amax"};

}  // namespace isomorph
