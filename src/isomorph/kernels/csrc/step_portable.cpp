// The loops of a step in whatever the compiler takes for granted.
#include "step_loops.h"

namespace isomorph {
const StepLoops* portable_step_loops() { return &kLoops; }
}  // namespace isomorph
