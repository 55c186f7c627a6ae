// Dense products and attention with the vectors that every processor of this kind has (SSE2, NEON).
#include "dense_attention.h"

namespace isomorph {
const DenseLoops* portable_dense_loops() {
  static constexpr DenseLoops loops{multiply_dense, attend, attend_backward};
  return &loops;
}
}  // namespace isomorph
