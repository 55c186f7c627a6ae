// AVX2, FMA, F16C and BMI2: Haswell and later, Zen and later.
#if defined(__AVX2__) && defined(__FMA__) && defined(__BMI2__)

#include <immintrin.h>

#include "generic.h"

namespace isomorph {
namespace {

struct Avx2 {
  using vector = __m256;
  static vector zero() { return _mm256_setzero_ps(); }
  static vector set(float value) { return _mm256_set1_ps(value); }
  static vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, vector a) { _mm256_storeu_ps(p, a); }
  static vector add(vector a, vector b) { return _mm256_add_ps(a, b); }
  static vector fma(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(vector a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  template <int bits>
  static vector codes(uint64_t word) {
    constexpr uint64_t mask = 0x0101010101010101ull * ((1u << bits) - 1);
    if constexpr (bits != 8) word = _pdep_u64(word, mask);
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(word))));
  }
  // 16-bit products: 8-bit codes times int8 would saturate in vpmaddubsw.
  static int dot32(const uint8_t* codes, const int8_t* x) {
    __m256i total = _mm256_setzero_si256();
    for (int i = 0; i < 32; i += 16) {
      __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(a, b));
    }
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
  }
};

}  // namespace

const Backend* avx2_backend() {
  static const Backend backend{"avx2", multiply<Avx2>, multiply_bfloat16<Avx2>, dequantize<Avx2>, read, false};
  static const bool supported =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  return supported ? &backend : nullptr;
}

}  // namespace isomorph

#else

#include "backend.h"

namespace isomorph {
const Backend* avx2_backend() { return nullptr; }
}  // namespace isomorph

#endif
