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

// Words of two bfloat16 (operands.h) that hold k numbers, and floats between rows of them.
constexpr int64_t pair_count(int64_t k) { return (k + 1) / 2; }
constexpr int64_t pair_row(int64_t k) { return (pair_count(k) + 15) / 16 * 16; }

}  // namespace lcr_fast
