// The kernels as custom calls of jitted JAX programs on a CPU; kernels/jax.py registers them, and checks shapes.
//
// Arguments: x [M, K], weight [E,] N, words, scales, biases (affine only), experts [R] int32 (multiply_experts only).
// Attributes: bits, group_size, mode as int64.
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "dispatch.h"
#include "xla_ffi.h"

using namespace isomorph;

namespace {

int64_t attribute(const xla::CallFrame& frame, std::string_view name) {
  for (int64_t i = 0; i < frame.attributes.count; ++i) {
    const xla::Span& found = *frame.attributes.names[i];
    if (std::string_view(found.data, found.size) == name)
      return *static_cast<const int64_t*>(static_cast<const xla::Scalar*>(frame.attributes.items[i])->value);
  }
  throw std::invalid_argument("missing attribute " + std::string(name));
}

const xla::Buffer& buffer(const xla::Buffers& buffers, int64_t index) {
  if (index >= buffers.count) throw std::invalid_argument("too few arrays");
  return *static_cast<const xla::Buffer*>(buffers.items[index]);
}

Type type_of(const xla::Buffer& array) {
  switch (array.dtype) {
    case xla::kFloat32: return Type::float32;
    case xla::kBfloat16: return Type::bfloat16;
    case xla::kFloat16: return Type::float16;
    default: throw std::invalid_argument("expected float32, bfloat16 or float16");
  }
}

// The packed weights whose parts are the arguments from `first` on; of the expert `index` where there are several.
Weights weights(const xla::CallFrame& frame, int64_t first, int64_t index = 0) {
  const xla::Buffer &codes = buffer(frame.arguments, first), &scales = buffer(frame.arguments, first + 1);
  const Mode mode = Mode(attribute(frame, "mode"));
  const bool affine = mode == Mode::affine;
  const int bits = int(attribute(frame, "bits")), group = int(attribute(frame, "group_size"));
  const int64_t rows = codes.dims[codes.rank - 2], groups = scales.dims[scales.rank - 1];
  Weights w{static_cast<const uint8_t*>(codes.data), scales.data, nullptr, mode, affine ? type_of(scales) : Type::float32,
            bits, group, rows, groups * group};
  const int64_t scale_bytes = index * rows * groups * (affine ? size_of(w.scale_type) : 1);
  w.codes += index * rows * w.row_bytes();
  w.scales = static_cast<const char*>(scales.data) + scale_bytes;
  if (affine) w.biases = static_cast<const char*>(buffer(frame.arguments, first + 2).data) + scale_bytes;
  return w;
}

// Row `results[i]` of y is row results[i] / repeats of x times w.
void multiply(const Weights& w, const xla::Buffer& x, const xla::Buffer& y, const std::vector<int64_t>& results,
              int64_t repeats) {
  const int64_t x_bytes = w.columns * size_of(type_of(x)), y_bytes = w.rows * size_of(type_of(y));
  std::vector<const void*> from;
  std::vector<void*> to;
  for (int64_t result : results) {
    from.push_back(static_cast<const char*>(x.data) + result / repeats * x_bytes);
    to.push_back(static_cast<char*>(y.data) + result * y_bytes);
  }
  // Products of this many rows at a time bound the scratch memory of packed activations.
  constexpr size_t kBlockRows = 2040;
  for (size_t start = 0; start < from.size(); start += kBlockRows) {
    const int64_t count = int64_t(std::min(kBlockRows, from.size() - start));
    const Rows rows{count, &from[start], type_of(x), &to[start], type_of(y)};
    backend().multiply(&w, &rows, 1, false);
  }
}

void multiply_all(const xla::CallFrame& frame) {
  const xla::Buffer &x = buffer(frame.arguments, 0), &y = buffer(frame.results, 0);
  std::vector<int64_t> results(size_t(y.dims[0]));
  for (size_t i = 0; i < results.size(); ++i) results[i] = int64_t(i);
  multiply(weights(frame, 1), x, y, results, 1);
}

void multiply_experts(const xla::CallFrame& frame) {
  const xla::Buffer &x = buffer(frame.arguments, 0), &y = buffer(frame.results, 0);
  const xla::Buffer& experts = buffer(frame.arguments, frame.arguments.count - 1);
  std::vector<std::vector<int64_t>> chosen(size_t(buffer(frame.arguments, 1).dims[0]));
  for (int64_t i = 0; i < y.dims[0]; ++i) {
    const int32_t expert = static_cast<const int32_t*>(experts.data)[i];
    if (expert < 0 || size_t(expert) >= chosen.size()) throw std::out_of_range("expert index out of range");
    chosen[size_t(expert)].push_back(i);
  }
  const int64_t repeats = x.dims[0] ? y.dims[0] / x.dims[0] : 1;
  for (size_t expert = 0; expert < chosen.size(); ++expert)
    if (!chosen[expert].empty()) multiply(weights(frame, 1, int64_t(expert)), x, y, chosen[expert], repeats);
}

void dequantize(const xla::CallFrame& frame) {
  const xla::Buffer& y = buffer(frame.results, 0);
  const Weights w = weights(frame, 0);
  backend().dequantize(w, nullptr, w.rows, y.data, type_of(y));
}

xla::Error* handle(xla::CallFrame* frame, void (*call)(const xla::CallFrame&)) {
  if (frame->extensions && frame->extensions->type == xla::kMetadataExtension) {  // asked for when registered
    xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(frame->extensions)->metadata;
    metadata.api_version = {sizeof(xla::ApiVersion), nullptr, xla::kMajor, xla::kMinor};
    metadata.traits = 0;
    return nullptr;
  }
  try {
    call(*frame);
    return nullptr;
  } catch (const std::exception& error) {
    xla::ErrorArguments arguments{sizeof(xla::ErrorArguments), nullptr, error.what(), xla::kInvalidArgument};
    return frame->api->create_error(&arguments);
  }
}

}  // namespace

#define ISOMORPH_XLA_HANDLER(name)                                                                              \
  extern "C" __attribute__((visibility("default"))) isomorph::xla::Error* isomorph_xla_##name(xla::CallFrame* frame) { \
    return handle(frame, name);                                                                                \
  }

ISOMORPH_XLA_HANDLER(multiply_all)
ISOMORPH_XLA_HANDLER(multiply_experts)
ISOMORPH_XLA_HANDLER(dequantize)
