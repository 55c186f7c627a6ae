// Dense products and attention in AVX-512.
#if defined(__AVX512F__)

#include "dense_attention.h"

namespace isomorph {
const DenseLoops* avx512_dense_loops() {
  static constexpr DenseLoops loops{multiply_dense, attend, attend_backward};
  return &loops;
}
}  // namespace isomorph

#else

#include "dense.h"

namespace isomorph {
const DenseLoops* avx512_dense_loops() { return nullptr; }
}  // namespace isomorph

#endif
