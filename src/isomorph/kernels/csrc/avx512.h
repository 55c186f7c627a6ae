// The products of AVX-512: a source each, so that they compile side by side.
#pragma once

#include "backend.h"

#if defined(__AVX512F__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define ISOMORPH_AVX512
#endif

namespace isomorph {
namespace avx512 {

// A few rows: weights are streamed once and decoded in registers, those of `count` matrices in one go.
void few_exact(const Weights* w, const Rows* rows, int count);
// One row of 16-bit activations and weights of four bits; false, with nothing done, where few_exact has to do it.
bool one_exact(const Weights* w, const Rows* rows, int count);
void few_fast(const Weights* w, const Rows* rows, int count);  // rows share x
void multiply_bfloat16(const void* w, int64_t n, int64_t k, const Rows& rows);
// Many rows: weights are decoded into panels once for all.
void wide_float32(const Weights& w, const Rows& rows);
void wide_bfloat16(const Weights& w, const Rows& rows);  // x is bfloat16; affine and mxfp4
void wide_int8(const Weights& w, const Rows& rows);      // affine and mxfp4

}  // namespace avx512
}  // namespace isomorph
