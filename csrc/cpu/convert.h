// Rows of stored numbers to float32 and back, rounding to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

#include "../float_type.h"

namespace lcr_fast {

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

inline uint16_t float_to_bfloat16(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if (x != x) return static_cast<uint16_t>(word >> 16 | 0x40);
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline float float16_to_float(uint16_t bits) {
  // Shifted into place, the exponent is short by 112, which the product makes up for, subnormal
  // numbers included; what then reaches 2^16 was infinite or NaN.
  const uint32_t word = (bits & uint32_t{0x7fff}) << 13;
  float x;
  std::memcpy(&x, &word, sizeof x);
  x *= 0x1p112f;
  uint32_t out;
  std::memcpy(&out, &x, sizeof out);
  if (x >= 65536.0f) out |= 0x7f800000;
  out |= (bits & uint32_t{0x8000}) << 16;
  std::memcpy(&x, &out, sizeof x);
  return x;
}

inline uint16_t float_to_float16(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  const uint32_t sign = word >> 16 & 0x8000;
  word &= 0x7fffffff;
  if (word > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (word >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // from 2^16 on
  if (word < 0x38800000) {  // below 2^-14: adding 1/2 aligns the bits of a subnormal number
    float magnitude;
    std::memcpy(&magnitude, &word, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&word, &magnitude, sizeof word);
    return static_cast<uint16_t>(sign | (word - 0x3f000000));
  }
  word -= 0x38000000;
  return static_cast<uint16_t>(sign | (word + 0xfff + (word >> 13 & 1)) >> 13);
}

inline int64_t float_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// `n` numbers from element `offset` of `data`.
inline void read_floats(const void* data, FloatType type, int64_t offset, int64_t n, float* out) {
  if (type == FloatType::kFloat32) {
    std::memcpy(out, static_cast<const float*>(data) + offset, sizeof(float) * n);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(data) + offset;
  if (type == FloatType::kBFloat16)
    for (int64_t i = 0; i < n; ++i) out[i] = bfloat16_to_float(bits[i]);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = float16_to_float(bits[i]);
}

inline void write_floats(void* data, FloatType type, int64_t offset, int64_t n, const float* in) {
  if (type == FloatType::kFloat32) {
    std::memcpy(static_cast<float*>(data) + offset, in, sizeof(float) * n);
    return;
  }
  uint16_t* bits = static_cast<uint16_t*>(data) + offset;
  if (type == FloatType::kBFloat16)
    for (int64_t i = 0; i < n; ++i) bits[i] = float_to_bfloat16(in[i]);
  else
    for (int64_t i = 0; i < n; ++i) bits[i] = float_to_float16(in[i]);
}

// All-zero bits are 0 in every type.
inline void zero_floats(void* data, FloatType type, int64_t offset, int64_t n) {
  if (n == 0) return;  // `data` may then be null
  std::memset(static_cast<char*>(data) + offset * float_bytes(type), 0, n * float_bytes(type));
}

}  // namespace lcr_fast
