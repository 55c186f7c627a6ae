// The loops of a step in AVX-512.
#if defined(__AVX512F__)

#include "step_loops.h"

namespace isomorph {
const StepLoops* avx512_step_loops() { return &kLoops; }
}  // namespace isomorph

#else

#include "step.h"

namespace isomorph {
const StepLoops* avx512_step_loops() { return nullptr; }
}  // namespace isomorph

#endif
