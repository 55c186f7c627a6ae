// The loops of a step in AVX2.
#if defined(__AVX2__)

#include "step_loops.h"

namespace isomorph {
const StepLoops* avx2_step_loops() { return &kLoops; }
}  // namespace isomorph

#else

#include "step.h"

namespace isomorph {
const StepLoops* avx2_step_loops() { return nullptr; }
}  // namespace isomorph

#endif
