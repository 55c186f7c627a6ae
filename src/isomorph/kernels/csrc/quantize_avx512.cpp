// The codec in AVX-512.
#if defined(__AVX512F__)

#include "quantize_kernel.h"

namespace isomorph {
const Codec* avx512_codec() { return &kCodec; }
}  // namespace isomorph

#else

#include "quantize.h"

namespace isomorph {
const Codec* avx512_codec() { return nullptr; }
}  // namespace isomorph

#endif
