// Activations in the forms the skinny kernels read: fp32 rows, or int8 codes per group.
#pragma once

#include <cmath>
#include <cstdint>

#include "backend.h"
#include "pool.h"

namespace isomorph {
namespace {  // each backend compiles its own copy with its own instruction set

constexpr int kFloatSlot = 0, kCodeSlot = 1, kScaleSlot = 2, kSumSlot = 3;

inline void read_row(const void* x, Type type, int64_t k, float* out) {
  if (type == Type::float32) {
    std::memcpy(out, x, size_t(k) * 4);
  } else if (type == Type::bfloat16) {
    for (int64_t i = 0; i < k; ++i) {
      uint16_t bits;
      std::memcpy(&bits, static_cast<const char*>(x) + 2 * i, 2);
      out[i] = from_bfloat16(bits);
    }
  } else {
    for (int64_t i = 0; i < k; ++i) out[i] = load_float(type, x, i);
  }
}

// fp32 [count, K], rows contiguous.
inline const float* float_rows(const Rows& rows, int64_t k) {
  auto* out = static_cast<float*>(scratch(kFloatSlot, size_t(rows.count * k) * 4));
  for (int64_t m = 0; m < rows.count; ++m) read_row(rows.x[m], rows.x_type, k, out + m * k);
  return out;
}

struct CodedRows {
  int8_t* codes;   // [count, stride], zero beyond K, zero rows up to a multiple of 4
  int64_t stride;  // K rounded up to 64
  float* scales;   // [count, G]: x ~ scale * code
  float* sums;     // [count, G]: scale * sum of codes
};

inline CodedRows coded_memory(int64_t count, int64_t k, int64_t groups) {
  const int64_t stride = (k + 63) / 64 * 64, padded = (count + 3) / 4 * 4;
  auto* codes = static_cast<int8_t*>(scratch(kCodeSlot, size_t(padded * stride)));
  auto* scales = static_cast<float*>(scratch(kScaleSlot, size_t(padded * groups) * 4));
  auto* sums = static_cast<float*>(scratch(kSumSlot, size_t(padded * groups) * 4));
  if (stride != k) std::memset(codes, 0, size_t(count * stride));
  std::memset(codes + count * stride, 0, size_t((padded - count) * stride));
  std::memset(scales + count * groups, 0, size_t((padded - count) * groups) * 4);
  std::memset(sums + count * groups, 0, size_t((padded - count) * groups) * 4);
  return {codes, stride, scales, sums};
}

// y = s * scale * sum(q * code) + b * scale * sum(code) = sum(w * x~): the error is that of rounding x, weighted by w
// itself. With exact sums of x beside b it would be weighted by the codes q, which are large where w is near zero.
inline CodedRows code_rows(const Rows& rows, const float* x, int64_t k, int group) {
  const int64_t groups = k / group;
  const CodedRows coded = coded_memory(rows.count, k, groups);
  parallel(rows.count, std::max<int64_t>(1, 32768 / (k + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * groups; i < end * groups; ++i) {
      const float* values = x + i * group;
      int8_t* out = coded.codes + i / groups * coded.stride + i % groups * group;
      float largest = 0, sum = 0;
      for (int j = 0; j < group; ++j) {
        largest = std::max(largest, std::fabs(values[j]));
        sum += values[j];
      }
      const float inverse = largest > 0 ? 127.f / largest : 0.f;
      if (!std::isfinite(sum) || !std::isfinite(inverse)) {  // NaN and infinities must show in the result
        std::memset(out, 0, size_t(group));
        coded.scales[i] = coded.sums[i] = std::isfinite(sum) ? 0.f : std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      int total = 0;
      for (int j = 0; j < group; ++j) {
        const int code = int(std::nearbyintf(values[j] * inverse));
        out[j] = int8_t(code);
        total += code;
      }
      coded.scales[i] = largest / 127.f;
      coded.sums[i] = coded.scales[i] * float(total);
    }
  });
  return coded;
}

}  // namespace
}  // namespace isomorph
