#include "quantize.h"

#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "pool.h"

namespace isomorph {
namespace {

const Codec& codec() {
  const std::string name = backend().name;
  if (name.rfind("avx512", 0) == 0) return *avx512_codec();
  if (name == "avx2") return *avx2_codec();
  return *portable_codec();
}

// The part that begins at group `start`.
PackedGroups from_group(const Packing& as, const PackedGroups& all, int64_t start) {
  const int64_t terms = start * (as.mode == Mode::affine ? size_of(as.type) : 1);
  return {all.codes + start * as.group / 8 * as.bits, static_cast<char*>(all.scales) + terms,
          all.biases ? static_cast<char*>(all.biases) + terms : nullptr};
}

constexpr int64_t kDecodeGroups = 1024;

}  // namespace

bool encode(const Packing& as, const void* weights, int64_t groups, const PackedGroups& out, const Sample& sample) {
  std::atomic<bool> finite{true};
  const int64_t blocks = (groups + sample.block_groups - 1) / sample.block_groups;
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block * sample.block_groups, count = std::min(sample.block_groups, groups - start);
      const char* from = static_cast<const char*>(weights) + start * as.group * size_of(as.type);
      const bool measured = sample.squares && block % sample.stride == 0;
      Squares* squares = measured ? sample.squares + block / sample.stride : nullptr;
      if (!codec().encode(as, from, count, from_group(as, out, start), squares)) finite = false;
    }
  });
  return finite;
}

void decode(const Packing& as, const PackedGroups& from, int64_t groups, void* weights, Type type) {
  parallel(groups, kDecodeGroups, [&](int64_t begin, int64_t end) {
    char* to = static_cast<char*>(weights) + begin * as.group * size_of(type);
    codec().decode(as, from_group(as, from, begin), end - begin, to, type);
  });
}

}  // namespace isomorph
