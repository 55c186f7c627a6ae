// Dense products and attention in AVX2.
#if defined(__AVX2__)

#include "dense_attention.h"

namespace isomorph {
const DenseLoops* avx2_dense_loops() {
  static constexpr DenseLoops loops{multiply_dense, attend, attend_backward};
  return &loops;
}
}  // namespace isomorph

#else

#include "dense.h"

namespace isomorph {
const DenseLoops* avx2_dense_loops() { return nullptr; }
}  // namespace isomorph

#endif
