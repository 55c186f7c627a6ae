// The codec with the vectors that every processor of this kind has (SSE2, NEON).
#include "quantize_kernel.h"

namespace isomorph {
const Codec* portable_codec() { return &kCodec; }
}  // namespace isomorph
