#include "dense.h"

#include <cstring>

#include "dispatch.h"

namespace isomorph {

const DenseLoops& dense_loops() {
  const DenseLoops* loops = nullptr;
  if (!std::strncmp(backend().name, "avx512", 6)) loops = avx512_dense_loops();
  if (!std::strcmp(backend().name, "avx2")) loops = avx2_dense_loops();
  return loops ? *loops : *portable_dense_loops();
}

}  // namespace isomorph
