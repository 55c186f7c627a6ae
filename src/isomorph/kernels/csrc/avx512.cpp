// AVX-512 with VBMI, VNNI and BF16: Zen 4 and later, Sapphire Rapids and later.
//
// Exact products use vdpbf16ps on integer codes. A code minus its group's zero point (the code nearest to w = 0) is an
// integer of at most 9 bits, exact in bfloat16, so products are exact and sums are fp32; what remains of the bias after
// the zero point is at most about half a scale, so nothing large cancels. Wider activations are split into two or three
// bfloat16 pieces that add up to them exactly.
#if defined(__AVX512F__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)

#include "avx512_decode.h"
#include "avx512_skinny.h"
#include "avx512_wide.h"

namespace isomorph {
namespace {

// Below this many rows the weights are streamed once and decoded in registers; from it on, decoding into tiles pays.
constexpr int64_t kWideRows = 12;

void multiply(const Weights& w, const Rows& rows, bool fast) {
  if (w.mode == Mode::mxfp8 || w.mode == Mode::nvfp4) return avx2_backend()->multiply(w, rows, fast);
  if (fast) {
    if (rows.count >= kWideRows) return wide_fast(w, rows);
    return skinny_fast(w, rows);
  }
  if (rows.count >= kWideRows && rows.x_type == Type::bfloat16) return wide_exact(w, rows);
  skinny_exact(w, rows);
}

void dequantize(const Weights& w, const int64_t* indices, int64_t count, void* out, Type type) {
  avx2_backend()->dequantize(w, indices, count, out, type);
}

}  // namespace

const Backend* avx512_backend() {
  static const Backend backend{"avx512", multiply, multiply_bfloat16, dequantize, true};
  static const bool supported =
      avx2_backend() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  return supported ? &backend : nullptr;
}

}  // namespace isomorph

#else

#include "backend.h"

namespace isomorph {
const Backend* avx512_backend() { return nullptr; }
}  // namespace isomorph

#endif
