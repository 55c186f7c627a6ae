// Python binding. Pointers come from tensors' data_ptr(): the caller has checked shapes, dtypes and contiguity.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "checksum.h"
#include "dispatch.h"
#include "pool.h"
#include "quantize.h"
#include "step.h"

namespace nb = nanobind;
using namespace isomorph;

namespace {

// One packed weight; `experts` of them lie behind one another.
struct Packed {
  Weights weights;
  int64_t experts;

  Packed(uintptr_t codes, uintptr_t scales, uintptr_t biases, int mode, int scale_type, int bits, int group, int64_t rows,
         int64_t columns, int64_t experts)
      : weights{reinterpret_cast<const uint8_t*>(codes), reinterpret_cast<const void*>(scales),
                reinterpret_cast<const void*>(biases), Mode(mode), Type(scale_type), bits, group, rows, columns},
        experts(experts) {
    const bool affine = mode == 0;
    const bool bits_fit = affine ? bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8
                                 : bits == (Mode(mode) == Mode::mxfp8 ? 8 : 4);
    const bool group_fits = affine ? group == 32 || group == 64 || group == 128 : group == (Mode(mode) == Mode::nvfp4 ? 16 : 32);
    if (mode < 0 || mode > 3 || scale_type < 0 || scale_type > 2 || !bits_fit || !group_fits || rows < 0 || columns < 0 ||
        columns % group != 0 || experts < 1)
      throw std::invalid_argument("unsupported packed layout");
  }

  Weights expert(int64_t index) const {
    Weights one = weights;
    const int64_t scale_bytes = weights.mode == Mode::affine ? size_of(weights.scale_type) : 1;
    const int64_t terms = index * weights.rows * weights.groups() * scale_bytes;
    one.codes += index * weights.rows * weights.row_bytes();
    one.scales = static_cast<const char*>(weights.scales) + terms;
    if (weights.biases) one.biases = static_cast<const char*>(weights.biases) + terms;
    return one;
  }
};

struct RowPointers {
  std::vector<const void*> x;
  std::vector<void*> y;

  void add(uintptr_t x_base, int64_t x_bytes, uintptr_t y_base, int64_t y_bytes, int64_t from, int64_t to) {
    x.push_back(reinterpret_cast<const void*>(x_base + uintptr_t(from * x_bytes)));
    y.push_back(reinterpret_cast<void*>(y_base + uintptr_t(to * y_bytes)));
  }
  Rows rows(Type x_type, Type y_type) const { return {int64_t(x.size()), x.data(), x_type, y.data(), y_type}; }
};

// Products of this many rows at a time bound the scratch memory of packed activations.
constexpr int64_t kBlockRows = 2040;

// x_stride is in elements; y is contiguous [count, rows of w].
void multiply(const Packed& w, uintptr_t x, int x_type, int64_t x_stride, int64_t count, uintptr_t y, int y_type, bool fast) {
  const int64_t x_bytes = x_stride * size_of(Type(x_type)), y_bytes = w.weights.rows * size_of(Type(y_type));
  for (int64_t start = 0; start < count; start += kBlockRows) {
    RowPointers pointers;
    for (int64_t m = start; m < std::min(count, start + kBlockRows); ++m) pointers.add(x, x_bytes, y, y_bytes, m, m);
    const Rows rows = pointers.rows(Type(x_type), Type(y_type));
    backend().multiply(&w.weights, &rows, 1, fast);
  }
}

// Several products with the same x: y[i] is contiguous [count, rows of w[i]].
struct Together {
  std::vector<Weights> weights;
  std::vector<RowPointers> pointers;
  std::vector<Rows> rows;

  Together(const std::vector<const Packed*>& packed, uintptr_t x, int x_type, int64_t x_stride, int64_t count,
           const std::vector<uintptr_t>& y, int y_type)
      : pointers(packed.size()) {
    if (packed.empty() || packed.size() != y.size() || count < 1)
      throw std::invalid_argument("expected a result for each product, and rows");
    for (size_t i = 0; i < packed.size(); ++i) {
      const Weights &w = packed[i]->weights, &first = packed[0]->weights;
      if (w.mode != first.mode || w.bits != first.bits || w.group != first.group || w.columns != first.columns)
        throw std::invalid_argument("weights of different formats");
      for (int64_t m = 0; m < count; ++m)
        pointers[i].add(x, x_stride * size_of(Type(x_type)), y[i], w.rows * size_of(Type(y_type)), m, m);
      weights.push_back(w);
      rows.push_back(pointers[i].rows(Type(x_type), Type(y_type)));
    }
  }
};

// Row i of y is row i / repeats of x times the expert experts[i]; only the experts named are read.
void multiply_experts(const Packed& w, uintptr_t x, int x_type, int64_t x_stride, int64_t repeats, uintptr_t experts,
                      int64_t count, uintptr_t y, int y_type, bool fast) {
  const auto* chosen = reinterpret_cast<const int64_t*>(experts);
  for (int64_t i = 0; i < count; ++i)
    if (chosen[i] < 0 || chosen[i] >= w.experts) throw std::out_of_range("expert index out of range");
  std::vector<RowPointers> by_expert(size_t(w.experts));
  const int64_t x_bytes = x_stride * size_of(Type(x_type)), y_bytes = w.weights.rows * size_of(Type(y_type));
  for (int64_t i = 0; i < count; ++i) by_expert[size_t(chosen[i])].add(x, x_bytes, y, y_bytes, i / repeats, i);
  std::vector<Weights> weights;
  std::vector<Rows> rows;
  for (int64_t e = 0; e < w.experts; ++e)
    if (!by_expert[size_t(e)].x.empty()) {
      weights.push_back(w.expert(e));
      rows.push_back(by_expert[size_t(e)].rows(Type(x_type), Type(y_type)));
    }
  // Experts that take equally many rows, as on a step of one token, are worked on together.
  for (size_t begin = 0, end; begin < rows.size(); begin = end) {
    for (end = begin + 1; end < rows.size() && rows[end].count == rows[begin].count;) ++end;
    backend().multiply(&weights[begin], &rows[begin], int(end - begin), fast);
  }
}

void multiply_bfloat16(uintptr_t w, int64_t n, int64_t k, uintptr_t x, int x_type, int64_t x_stride, int64_t count, uintptr_t y,
                       int y_type) {
  RowPointers pointers;
  for (int64_t m = 0; m < count; ++m)
    pointers.add(x, x_stride * size_of(Type(x_type)), y, n * size_of(Type(y_type)), m, m);
  backend().multiply_bfloat16(reinterpret_cast<const void*>(w), n, k, pointers.rows(Type(x_type), Type(y_type)));
}

// `indices` 0 means rows 0..count-1 of all experts together.
void dequantize(const Packed& w, uintptr_t indices, int64_t count, uintptr_t out, int type) {
  const auto* rows = reinterpret_cast<const int64_t*>(indices);
  Weights all = w.weights;
  all.rows *= w.experts;
  if (!rows && count > all.rows) throw std::out_of_range("more rows asked for than there are");
  for (int64_t i = 0; rows && i < count; ++i)
    if (rows[i] < 0 || rows[i] >= all.rows) throw std::out_of_range("row index out of range");
  backend().dequantize(all, rows, count, reinterpret_cast<void*>(out), Type(type));
}

PackedGroups packed_groups(uintptr_t codes, uintptr_t scales, uintptr_t biases) {
  return {reinterpret_cast<uint8_t*>(codes), reinterpret_cast<void*>(scales), reinterpret_cast<void*>(biases)};
}

// mx.quantize over `groups` groups; `squares` is [blocks / stride, 2] doubles or 0. False when a weight is not finite.
bool encode_weights(uintptr_t weights, int type, int64_t groups, int mode, int bits, int group, uintptr_t codes, uintptr_t scales,
                    uintptr_t biases, int64_t block_groups, int64_t stride, uintptr_t squares) {
  nb::gil_scoped_release release;
  return encode({Mode(mode), bits, group, Type(type)}, reinterpret_cast<const void*>(weights), groups,
                packed_groups(codes, scales, biases), {block_groups, stride, reinterpret_cast<Squares*>(squares)});
}

// mx.dequantize over `groups` groups.
void decode_weights(uintptr_t codes, uintptr_t scales, uintptr_t biases, int scale_type, int64_t groups, int mode, int bits,
                    int group, uintptr_t weights, int type) {
  nb::gil_scoped_release release;
  decode({Mode(mode), bits, group, Type(scale_type)}, packed_groups(codes, scales, biases), groups,
         reinterpret_cast<void*>(weights), Type(type));
}

// The 16 bytes of checksum.h, or none where the processor cannot.
nb::bytes fold_crc32_bytes(uintptr_t data, int64_t bytes, uint32_t state) {
  if (bytes < 64 || bytes % 64 != 0) throw std::invalid_argument("expected a multiple of 64 bytes");
  uint8_t folded[16];
  bool done;
  {
    nb::gil_scoped_release release;
    done = fold_crc32(reinterpret_cast<const uint8_t*>(data), bytes, state, folded);
  }
  return nb::bytes(folded, done ? sizeof folded : 0);
}

// GB/s of reading `bytes` at `data` once with all threads: what a memory-bound kernel can reach at best.
double read_bandwidth(uintptr_t data, int64_t bytes) {
  nb::gil_scoped_release release;
  std::atomic<uint64_t> sink{0};
  auto start = std::chrono::steady_clock::now();
  constexpr int64_t kBlock = 1 << 18;
  parallel(bytes / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sink ^= backend().read(reinterpret_cast<const uint8_t*>(data) + i * kBlock, kBlock);
  });
  return double(bytes / kBlock * kBlock) / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 1e9;
}

View view(uintptr_t data, int type, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  if (sizes.size() != strides.size() || sizes.size() > size_t(kMaxRank) || type < 0 || type > 2)
    throw std::invalid_argument("unsupported view");
  return {reinterpret_cast<void*>(data), Type(type), sizes, strides};
}

void run_step(const Step& step, const std::vector<uint64_t>& keys, const std::vector<uint64_t>& values,
              const std::vector<int64_t>& rooms, const std::vector<int64_t>& dropped, int64_t filled, uintptr_t starts) {
  if (values.size() != keys.size() || rooms.size() != keys.size() || dropped.size() != keys.size())
    throw std::invalid_argument("caches of different numbers of layers");
  for (size_t layer = 0; layer < rooms.size(); ++layer)
    if (filled < dropped[layer] || filled - dropped[layer] >= rooms[layer]) throw std::out_of_range("no slot is left");
  nb::gil_scoped_release release;
  step.run({keys.data(), values.data(), rooms.data(), dropped.data(), filled, reinterpret_cast<const int64_t*>(starts)});
}

void bind_step(nb::module_& m) {
  nb::class_<View>(m, "View").def("__init__", [](View* self, uintptr_t data, int type, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    new (self) View(view(data, type, sizes, strides));
  });
  nb::class_<Step>(m, "Step")
      .def(nb::init<>())
      .def("__len__", &Step::size)
      .def("run", &run_step)
      .def("elementwise",
           [](Step& self, const std::string& name, const View& out, const View& a, std::optional<View> b, float p, float q) {
             self.add(Elementwise{elementwise_operation(name), out, a, b.value_or(View{}), p, q});
           }, nb::arg("name"), nb::arg("out"), nb::arg("a"), nb::arg("b").none(), nb::arg("p"), nb::arg("q"))
      .def("reduce", [](Step& self, const std::string& name, const View& out, const View& a) {
        self.add(Reduction{reduction_operation(name), out, a});
      })
      .def("layer_norm",
           [](Step& self, const View& out, const View& x, uintptr_t weight, uintptr_t bias, int type, float eps) {
             self.add(LayerNorm{out, x, reinterpret_cast<const void*>(weight), reinterpret_cast<const void*>(bias), Type(type), eps});
           })
      .def("softmax", [](Step& self, const View& out, const View& x) { self.add(Softmax{out, x}); })
      .def("attend",
           [](Step& self, const View& q, const View& k, const View& v, const View& out, int layer, float scale, int64_t window,
              float cap, uintptr_t sinks) {
             self.add(Attention{q, k, v, out, layer, scale, window, cap, reinterpret_cast<const float*>(sinks)});
           })
      .def("multiply",
           [](Step& self, const std::vector<const Packed*>& w, uintptr_t x, int x_type, int64_t x_stride, int64_t count,
              const std::vector<uintptr_t>& y, int y_type, bool fast) {
             auto all = std::make_shared<Together>(w, x, x_type, x_stride, count, y, y_type);
             self.add([all, fast](const Slots&) {
               backend().multiply(all->weights.data(), all->rows.data(), int(all->weights.size()), fast);
             });
           })
      .def("take",
           [](Step& self, uintptr_t table, size_t row_bytes, uintptr_t indices, int64_t count, uintptr_t out) {
             self.add([=](const Slots&) {
               const auto* rows = reinterpret_cast<const int64_t*>(indices);
               for (int64_t i = 0; i < count; ++i)
                 std::memcpy(reinterpret_cast<char*>(out) + i * row_bytes,
                             reinterpret_cast<const char*>(table) + rows[i] * row_bytes, row_bytes);
             });
           })
      .def("dequantize",
           [](Step& self, const Packed& w, uintptr_t indices, int64_t count, uintptr_t out, int type) {
             self.add([=](const Slots&) { dequantize(w, indices, count, out, type); });
           })
      .def("multiply_experts",
           [](Step& self, const Packed& w, uintptr_t x, int x_type, int64_t x_stride, int64_t repeats, uintptr_t experts,
              int64_t count, uintptr_t y, int y_type, bool fast) {
             self.add([=](const Slots&) { multiply_experts(w, x, x_type, x_stride, repeats, experts, count, y, y_type, fast); });
           })
      .def("multiply_bfloat16",
           [](Step& self, uintptr_t w, int64_t n, int64_t k, uintptr_t x, int x_type, int64_t x_stride, int64_t count, uintptr_t y,
              int y_type) { self.add([=](const Slots&) { multiply_bfloat16(w, n, k, x, x_type, x_stride, count, y, y_type); }); });
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Products with weights in MLX's packed layout, on this CPU.";
  nb::class_<Packed>(m, "Packed").def(nb::init<uintptr_t, uintptr_t, uintptr_t, int, int, int, int, int64_t, int64_t, int64_t>());
  bind_step(m);
  m.def("multiply", &multiply, nb::call_guard<nb::gil_scoped_release>());
  m.def("multiply_experts", &multiply_experts, nb::call_guard<nb::gil_scoped_release>());
  m.def("multiply_bfloat16", &multiply_bfloat16, nb::call_guard<nb::gil_scoped_release>());
  m.def("dequantize", &dequantize, nb::call_guard<nb::gil_scoped_release>());
  m.def("encode", &encode_weights);
  m.def("decode", &decode_weights);
  m.def("fold_crc32", &fold_crc32_bytes);
  m.def("read_bandwidth", &read_bandwidth);
  m.def("backends", [] {
    std::vector<std::string> names;
    for (const Backend* found : available_backends()) names.push_back(found->name);
    return names;
  });
  m.def("backend", [] { return std::string(backend().name); });
  m.def("choose_backend", &choose_backend);
  m.def("has_wide", [] { return backend().wide; });
  m.def("thread_count", &thread_count);
  m.def("set_thread_count", &set_thread_count);
  m.def("borrow_openmp", &borrow_openmp);
  m.def("pool_name", [] { return std::string(pool_name()); });
}
