// The kernels as custom calls of jitted JAX programs on a CPU; kernels/jax.py registers them, and checks shapes.
//
// Arguments: x [M, K], weight [E,] N, words, scales, biases (affine only), experts [R] int32 (multiply_experts only).
// Attributes: bits, group_size, mode as int64.
//
// multiply_dense: a [..., M, K] and b [..., K, N] of float32, each with its last two axes exchanged where the attribute
// transpose_a or transpose_b is 1. attend and attend_backward: as in dense.h, with the attribute window.
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "dense.h"
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

// The threads that XLA computes with: others would wait for a core while these look for work.
Threads threads(const xla::CallFrame& frame) {
  int64_t count = 1;
  xla::ThreadsArguments arguments{sizeof(xla::ThreadsArguments), nullptr, frame.context, &count};
  if (frame.api->threads(&arguments)) count = 1;
  struct Job {
    const std::function<void(int64_t)>* body;
    int64_t size;
    std::atomic<int64_t> next{0}, done{0};

    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < size; done.fetch_add(1)) (*body)(i);
    }
  };
  return {count, [&frame, count](int64_t size, const std::function<void(int64_t)>& body) {
    auto job = std::make_shared<Job>();
    job->body = &body, job->size = size;
    const auto task = [](void* data) {  // late ones find nothing to do
      const std::unique_ptr<std::shared_ptr<Job>> mine(static_cast<std::shared_ptr<Job>*>(data));
      (*mine)->work();
    };
    for (int64_t i = 1; i < std::min(count, size); ++i) {
      xla::ScheduleArguments arguments{sizeof(xla::ScheduleArguments), nullptr, frame.context, task, new std::shared_ptr<Job>(job)};
      frame.api->schedule(&arguments);
    }
    job->work();
    while (job->done.load() < size) std::this_thread::yield();
  }};
}

float* floats(const xla::Buffer& array) { return static_cast<float*>(array.data); }

DenseMatrix matrix(const xla::Buffer& array, bool transposed) {
  const int64_t rows = array.dims[array.rank - 2], columns = array.dims[array.rank - 1];
  const float* data = floats(array);
  return transposed ? DenseMatrix{data, rows * columns, 1, columns} : DenseMatrix{data, rows * columns, columns, 1};
}

void multiply_dense(const xla::CallFrame& frame) {
  const xla::Buffer &a = buffer(frame.arguments, 0), &b = buffer(frame.arguments, 1), &c = buffer(frame.results, 0);
  const bool transpose_a = attribute(frame, "transpose_a"), transpose_b = attribute(frame, "transpose_b");
  int64_t products = 1;
  for (int64_t d = 0; d < c.rank - 2; ++d) products *= c.dims[d];
  dense_loops().multiply({products, c.dims[c.rank - 2], c.dims[c.rank - 1], a.dims[a.rank - (transpose_a ? 2 : 1)],
                            matrix(a, transpose_a), matrix(b, transpose_b), floats(c)}, threads(frame));
}

DenseAttention attention(const xla::CallFrame& frame) {
  const xla::Buffer &q = buffer(frame.arguments, 0), &k = buffer(frame.arguments, 1), &v = buffer(frame.arguments, 2);
  DenseAttention of{};
  of.batch = q.dims[0], of.tokens = q.dims[1], of.heads = q.dims[2], of.kv_heads = k.dims[2], of.size = q.dims[3];
  of.window = attribute(frame, "window"), of.scale = 1 / std::sqrt(float(of.size));
  of.q = floats(q), of.k = floats(k), of.v = floats(v);
  return of;
}

void attend(const xla::CallFrame& frame) {
  DenseAttention of = attention(frame);
  of.out = floats(buffer(frame.results, 0)), of.inverse_totals = floats(buffer(frame.results, 1));
  dense_loops().attend(of, threads(frame));
}

void attend_backward(const xla::CallFrame& frame) {
  DenseAttention of = attention(frame);
  of.out = floats(buffer(frame.arguments, 3)), of.inverse_totals = floats(buffer(frame.arguments, 4));
  of.d_out = floats(buffer(frame.arguments, 5));
  of.d_q = floats(buffer(frame.results, 0)), of.d_k = floats(buffer(frame.results, 1)), of.d_v = floats(buffer(frame.results, 2));
  dense_loops().attend_backward(of, threads(frame));
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
ISOMORPH_XLA_HANDLER(multiply_dense)
ISOMORPH_XLA_HANDLER(attend)
ISOMORPH_XLA_HANDLER(attend_backward)
