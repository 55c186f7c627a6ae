// NEON, part of every 64-bit Arm processor.
#if defined(__aarch64__) && defined(__ARM_NEON)

#include <arm_neon.h>

#include "generic.h"

namespace isomorph {
namespace {

struct Neon {
  struct vector {
    float32x4_t low, high;
  };
  static vector zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
  static vector set(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
  static vector load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void store(float* p, vector a) {
    vst1q_f32(p, a.low);
    vst1q_f32(p + 4, a.high);
  }
  static vector add(vector a, vector b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static vector fma(vector a, vector b, vector c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  static float sum(vector a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }
  // Each 16-bit lane gathers the two bytes its code lies in, then shifts by its own count.
  template <int bits>
  static vector codes(uint64_t word) {
    alignas(16) static constexpr uint8_t gather[16] = {
        0 * bits / 8, 0 * bits / 8 + 1, 1 * bits / 8, 1 * bits / 8 + 1, 2 * bits / 8, 2 * bits / 8 + 1,
        3 * bits / 8, 3 * bits / 8 + 1, 4 * bits / 8, 4 * bits / 8 + 1, 5 * bits / 8, 5 * bits / 8 + 1,
        6 * bits / 8, 6 * bits / 8 + 1, 7 * bits / 8, 7 * bits / 8 + 1};
    alignas(16) static constexpr int16_t shift[8] = {-(0 * bits % 8), -(1 * bits % 8), -(2 * bits % 8), -(3 * bits % 8),
                                                     -(4 * bits % 8), -(5 * bits % 8), -(6 * bits % 8), -(7 * bits % 8)};
    uint8x16_t bytes = vcombine_u8(vcreate_u8(word), vdup_n_u8(0));
    uint16x8_t lanes = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(gather)));
    lanes = vandq_u16(vshlq_u16(lanes, vld1q_s16(shift)), vdupq_n_u16((1 << bits) - 1));
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(lanes))), vcvtq_f32_u32(vmovl_high_u16(lanes))};
  }
  static int dot32(const uint8_t* codes, const int8_t* x) {
    int32x4_t total = vdupq_n_s32(0);
    for (int i = 0; i < 32; i += 8) {
      int16x8_t a = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(codes + i)));
      int16x8_t b = vmovl_s8(vld1_s8(x + i));
      total = vmlal_s16(vmlal_high_s16(total, a, b), vget_low_s16(a), vget_low_s16(b));
    }
    return vaddvq_s32(total);
  }
};

}  // namespace

const Backend* neon_backend() {
  static const Backend backend{"neon", multiply<Neon>, multiply_bfloat16<Neon>, dequantize<Neon>, read, false};
  return &backend;
}

}  // namespace isomorph

#else

#include "backend.h"

namespace isomorph {
const Backend* neon_backend() { return nullptr; }
}  // namespace isomorph

#endif
