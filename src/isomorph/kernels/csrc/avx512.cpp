// AVX-512 with VBMI, VNNI and BF16: Zen 4 and later, Sapphire Rapids and later.
#include "avx512.h"

#ifdef ISOMORPH_AVX512

namespace isomorph {
namespace {

// Up to here the weights are streamed and decoded in registers; beyond, decoding into panels pays.
constexpr int64_t kFew = 16;

template <bool bfloat16_tiles>
void multiply(const Weights* w, const Rows* rows, int count, bool fast) {
  const bool codes_fit = w->mode == Mode::affine || w->mode == Mode::mxfp4;
  const bool coded = fast && codes_fit;
  const bool one = rows->count == 1 && codes_fit && w->bits == 4 && rows->x_type != Type::float32;
  if (one && !fast && avx512::one_exact(w, rows, count)) return;
  if (rows->count <= kFew && !coded) return avx512::few_exact(w, rows, count);
  if (rows->count <= kFew && share_x(rows, count)) return avx512::few_fast(w, rows, count);
  const bool bfloat16 = bfloat16_tiles && codes_fit && rows->x_type == Type::bfloat16;
  const auto wide = coded ? avx512::wide_int8 : bfloat16 ? avx512::wide_bfloat16 : avx512::wide_float32;
  for (int i = 0; i < count; ++i) rows->count <= kFew ? avx512::few_fast(w + i, rows + i, 1) : wide(w[i], rows[i]);
}

void dequantize(const Weights& w, const int64_t* indices, int64_t count, void* out, Type type) {
  avx2_backend()->dequantize(w, indices, count, out, type);
}

uint64_t read(const uint8_t* p, int64_t bytes) { return avx2_backend()->read(p, bytes); }

}  // namespace

std::vector<const Backend*> avx512_backends() {
  static const Backend float32{"avx512", multiply<false>, avx512::multiply_bfloat16, dequantize, read, true};
  static const Backend bfloat16{"avx512_bf16", multiply<true>, avx512::multiply_bfloat16, dequantize, read, true};
  const bool supported = avx2_backend() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                         __builtin_cpu_supports("avx512bf16");
  if (!supported) return {};
  // Intel runs vdpbf16ps at a quarter of the rate of fp32 multiply-adds, AMD at the same.
  if (__builtin_cpu_is("intel")) return {&float32, &bfloat16};
  return {&bfloat16, &float32};
}

}  // namespace isomorph

#else

#include "backend.h"

namespace isomorph {
std::vector<const Backend*> avx512_backends() { return {}; }
}  // namespace isomorph

#endif
