// The codec in AVX2.
#if defined(__AVX2__)

#include "quantize_kernel.h"

namespace isomorph {
const Codec* avx2_codec() { return &kCodec; }
}  // namespace isomorph

#else

#include "quantize.h"

namespace isomorph {
const Codec* avx2_codec() { return nullptr; }
}  // namespace isomorph

#endif
