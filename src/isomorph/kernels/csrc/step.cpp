#include "step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "dispatch.h"
#include "step_operations.h"

namespace isomorph {
namespace {

// Drops dimensions of one element and joins neighbours that every operand walks through alike.
void simplify(std::vector<View*> views) {
  View& first = *views.front();
  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides(views.size());
  for (size_t d = 0; d < first.sizes.size(); ++d) {
    const int64_t size = first.sizes[d];
    if (size == 1) continue;
    bool joins = !sizes.empty();
    for (size_t i = 0; joins && i < views.size(); ++i) joins = strides[i].back() == views[i]->strides[d] * size;
    if (joins) {
      sizes.back() *= size;
      for (size_t i = 0; i < views.size(); ++i) strides[i].back() = views[i]->strides[d];
    } else {
      sizes.push_back(size);
      for (size_t i = 0; i < views.size(); ++i) strides[i].push_back(views[i]->strides[d]);
    }
  }
  if (sizes.empty()) {
    sizes.push_back(1);
    for (auto& of_view : strides) of_view.push_back(1);
  }
  for (size_t i = 0; i < views.size(); ++i) views[i]->sizes = sizes, views[i]->strides = strides[i];
}

template <size_t N>
int find(const char* const (&names)[N], const std::string& name) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return int(i);
  throw std::invalid_argument("no operation of a step: " + name);
}

}  // namespace

int elementwise_operation(const std::string& name) { return find(kElementwiseNames, name); }
int reduction_operation(const std::string& name) { return find(kReductionNames, name); }

const StepLoops& step_loops() {
  const StepLoops* loops = nullptr;
  if (!std::strncmp(backend().name, "avx512", 6)) loops = avx512_step_loops();
  if (!std::strcmp(backend().name, "avx2")) loops = avx2_step_loops();
  return loops ? *loops : *portable_step_loops();
}

void Step::add(Elementwise instruction) {
  if (instruction.b.data) {
    simplify({&instruction.out, &instruction.a, &instruction.b});
  } else {
    simplify({&instruction.out, &instruction.a});
  }
  instructions_.push_back([instruction](const Slots&) { step_loops().elementwise(instruction); });
}

void Step::add(Reduction instruction) {
  instructions_.push_back([instruction](const Slots&) { step_loops().reduce(instruction); });
}

void Step::add(LayerNorm instruction) {
  instructions_.push_back([instruction](const Slots&) { step_loops().layer_norm(instruction); });
}

void Step::add(Softmax instruction) {
  instructions_.push_back([instruction](const Slots&) { step_loops().softmax(instruction); });
}

void Step::add(Attention instruction) {
  instructions_.push_back([instruction](const Slots& slots) { step_loops().attend(instruction, slots); });
}

}  // namespace isomorph
