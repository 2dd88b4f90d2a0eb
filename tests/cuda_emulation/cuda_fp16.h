#pragma once
#include <cstring>

struct __half {
  unsigned short bits;
};

inline float __half2float(__half x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof x);
  return static_cast<float>(value);
}
