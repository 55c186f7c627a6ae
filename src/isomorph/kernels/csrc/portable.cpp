// Plain C++: correct anywhere, and the yardstick of the other backends in the fuzzer.
#include "generic.h"

namespace isomorph {
namespace {

struct Plain {
  struct vector {
    float v[8];
  };
  static vector zero() { return {}; }
  static vector set(float value) {
    vector out;
    for (float& v : out.v) v = value;
    return out;
  }
  static vector load(const float* p) {
    vector out;
    std::memcpy(out.v, p, 32);
    return out;
  }
  static void store(float* p, const vector& a) { std::memcpy(p, a.v, 32); }
  static vector add(vector a, const vector& b) {
    for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
    return a;
  }
  // In double as scale * code + bias may cancel and there is no fused multiply-add to rely on.
  static vector fma(const vector& a, const vector& b, const vector& c) {
    vector out;
    for (int i = 0; i < 8; ++i) out.v[i] = float(double(a.v[i]) * b.v[i] + c.v[i]);
    return out;
  }
  static float sum(const vector& a) {
    return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
  }
  template <int bits>
  static vector codes(uint64_t word) {
    vector out;
    for (int i = 0; i < 8; ++i) out.v[i] = float(int(word >> (i * bits) & ((1 << bits) - 1)));
    return out;
  }
  static int dot32(const uint8_t* codes, const int8_t* x) {
    int total = 0;
    for (int i = 0; i < 32; ++i) total += int(codes[i]) * x[i];
    return total;
  }
};

}  // namespace

const Backend* portable_backend() {
  static const Backend backend{"portable", multiply<Plain>, multiply_bfloat16<Plain>, dequantize<Plain>, read, false};
  return &backend;
}

}  // namespace isomorph
