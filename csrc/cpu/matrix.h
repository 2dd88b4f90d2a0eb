// How a matrix product names its left factor and what becomes of the sum.
#pragma once
#include <cstdint>

namespace lcr_fast {

// Element (m, k) is at data[m * row + k * col].
struct MatrixA {
  const float* data;
  int64_t row;
  int64_t col = 1;
};

// C = relu(sum + bias + row_bias + C), each where given. ReLU keeps NaN.
struct Epilogue {
  const float* bias = nullptr;      // [N]
  const float* row_bias = nullptr;  // [M]
  bool add = false;                 // what C holds
  bool relu = false;
};

}  // namespace lcr_fast
