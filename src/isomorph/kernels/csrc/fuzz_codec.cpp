// Packing and unpacking: every instruction set against plain C++, byte by byte.
#include <cstdio>
#include <vector>

#include "dispatch.h"
#include "fuzz.h"
#include "quantize.h"

using namespace isomorph;

bool codec_is_right(std::mt19937& random, const std::string& fault) {
  const Mode mode = pick(random, {Mode::affine, Mode::affine, Mode::mxfp4, Mode::mxfp8, Mode::nvfp4});
  const Packing as{mode, mode == Mode::affine ? pick(random, {2, 3, 4, 5, 6, 8}) : mode == Mode::mxfp8 ? 8 : 4,
                   mode == Mode::affine ? pick(random, {32, 64, 128}) : mode == Mode::nvfp4 ? 16 : 32,
                   pick(random, {Type::float32, Type::bfloat16, Type::float16})};
  const int64_t groups = 1 + random() % 40, count = groups * as.group;
  Buffer weights(size_t(count) * size_of(as.type), random() % 4);
  std::normal_distribution<float> normal;
  for (int64_t g = 0; g < groups; ++g) {
    const float size = pick(random, {0.f, 1.f, 1.f, 1e-3f, 100.f}), middle = pick(random, {0.f, 0.f, 3.f});
    for (int i = 0; i < as.group; ++i) store_float(as.type, weights.data, g * as.group + i, middle + size * normal(random));
  }
  const size_t code_bytes = size_t(count / 8 * as.bits), term_bytes = size_t(groups) * (mode == Mode::affine ? size_of(as.type) : 1);
  std::vector<uint8_t> expected;
  for (const std::string& name : plain_first()) {
    choose_backend(name);
    Buffer codes(code_bytes, random() % 4), scales(term_bytes, random() % 4), biases(term_bytes - (fault == "overrun"), random() % 4);
    Buffer back(size_t(count) * 4, random() % 4);
    const PackedGroups packed{codes.data, scales.data, mode == Mode::affine || fault == "overrun" ? biases.data : nullptr};
    if (!encode(as, weights.data, groups, packed, {1 + int64_t(random() % 8), 1, nullptr})) {
      std::printf("%s: finite weights were refused\n", name.c_str());
      return false;
    }
    decode(as, packed, groups, back.data, Type::float32);
    if (fault == "wrong" && !expected.empty()) codes.data[0] ^= 1;
    std::vector<uint8_t> all(codes.data, codes.data + code_bytes);
    all.insert(all.end(), scales.data, scales.data + term_bytes);
    if (mode == Mode::affine) all.insert(all.end(), biases.data, biases.data + term_bytes - (fault == "overrun"));
    all.insert(all.end(), back.data, back.data + size_t(count) * 4);
    if (expected.empty()) expected = all;
    for (size_t i = 0; i < all.size(); ++i)
      if (all[i] != expected[i]) {
        std::printf("%s: mode %d bits %d group %d: byte %zu is %d, expected %d\n", name.c_str(), int(mode), as.bits, as.group, i, all[i], expected[i]);
        return false;
      }
  }
  return true;
}
