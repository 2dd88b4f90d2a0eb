// What the products of a forward pass multiply: floats as they stand or, where LCR_PAIRS is
// defined, words of two bfloat16. The rest of a forward pass is float32, and so is all of backward.
//
// A word holds two neighbours on the inner axis, the first in its low half; an odd axis ends with a
// 0. Rounding is to nearest even; numbers below the normal ones become 0. So at every level: packed
// weights are the same on all CPUs.
#pragma once
#include "gemm.h"

namespace lcr_fast {
namespace {

#ifdef LCR_PAIRS

constexpr int64_t inner_size(int64_t k) { return pair_count(k); }
constexpr int64_t operand_row(int64_t k) { return pair_row(k); }

#if LCR_PAIRS == 2

// Words of the neighbours in `low` and then `high`.
LCR_INLINE Vec neighbour_words(Vec low, Vec high) {
  return (Vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// Words whose halves are of one lane.
LCR_INLINE Vec lane_words(Vec low, Vec high) {
  alignas(64) static constexpr int16_t kInterleave[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave),
                                       (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

#else

// x as bfloat16 in the high halves, 0 in the low ones.
LCR_INLINE WordVec rounded(Vec x) {
  const WordVec bits = (WordVec)x;
  const WordVec nearest = bits + 0x7fffu + (bits >> 16 & 1u);
  const WordVec number = (bits & 0x7f800000u) == 0u ? bits & 0x80000000u : nearest;
  return (x == x ? number : bits | 0x400000u) & 0xffff0000u;
}

LCR_INLINE Vec neighbour_words(Vec low, Vec high) {
  uint32_t bits[2 * kLanes], words[kLanes];
  const WordVec halves[2] = {rounded(low), rounded(high)};
  std::memcpy(bits, halves, sizeof bits);
  for (int64_t i = 0; i < kLanes; ++i) words[i] = bits[2 * i] >> 16 | bits[2 * i + 1];
  Vec out;
  std::memcpy(&out, words, sizeof out);
  return out;
}

LCR_INLINE Vec lane_words(Vec low, Vec high) { return (Vec)(rounded(low) >> 16 | rounded(high)); }

#endif

// The first `n` >= 1 of 2 kLanes floats, as kLanes words; reads nothing behind them.
LCR_INLINE Vec load_pairs(const float* x, int64_t n) {
  if (n >= 2 * kLanes) return neighbour_words(load(x), load(x + kLanes));
  const Vec low = load_first(x, n < kLanes ? n : kLanes);
  Vec high = {};
  if (n > kLanes) high = load_first(x + kLanes, n < 2 * kLanes ? n - kLanes : kLanes);
  return neighbour_words(low, high);
}

// A = x [m, k], in `scratch` [m, operand_row(k)].
LCR_TARGET MatrixA operand(int64_t m, int64_t k, const float* x, int64_t x_row, float* scratch) {
  const int64_t row = operand_row(k);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < k; j += 2 * kLanes)
      store(scratch + i * row + j / 2, load_pairs(x + i * x_row + j, k - j));
  return {scratch, row};
}

// Words of x^T: out[p][r] = (x[r][2 p], x[r][2 p + 1]); `x` [n_rows, n_cols], an EvenRows or
// pointers to the rows. Columns of `out` up to the next multiple of kLanes become 0 or, where
// kInside, stay as they are.
template <bool kInside, class Rows>
LCR_TARGET void transpose_pairs(const Rows x, int64_t n_rows, int64_t n_cols, float* out,
                                int64_t out_row) {
  for (int64_t r = 0; r < n_rows; r += kLanes) {
    const int64_t n_r = n_rows - r < kLanes ? n_rows - r : kLanes;
    for (int64_t c = 0; c < n_cols; c += 2 * kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = i < n_r ? load_pairs(x[r + i] + c, n_cols - c) : Vec{};
      transpose_block(block);
      const int64_t n_p = inner_size(n_cols - c < 2 * kLanes ? n_cols - c : 2 * kLanes);
      for (int64_t p = 0; p < n_p; ++p) {
        float* row = out + (c / 2 + p) * out_row + r;
        if (kInside)
          store_first(row, block[p], n_r);
        else
          store(row, block[p]);
      }
    }
  }
}

// B = x^T for x [n, k]; `scratch` [k, row].
[[maybe_unused]] LCR_TARGET MatrixB turned_operand(int64_t n, int64_t k, const float* x,
                                                   int64_t x_row, float* scratch, int64_t row) {
  transpose_pairs<false>(EvenRows{x, x_row}, n, k, scratch, row);
  return row_major(scratch, row);
}

// B = x [k, n], in `scratch` [inner_size(k), row]; nothing behind column n is written.
LCR_TARGET MatrixB row_operand(int64_t k, int64_t n, const float* x, int64_t x_row, float* scratch,
                               int64_t row) {
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  for (int64_t p = 0; p < k; p += 2) {
    const float* even = x + p * x_row;
    const float* odd = even + x_row;
    float* out = scratch + p / 2 * row;
    const bool both = p + 1 < k;
    for (int64_t j = 0; j < whole; j += kLanes)
      store(out + j, lane_words(load(even + j), both ? load(odd + j) : Vec{}));
    if (rest > 0)
      store_first(
          out + whole,
          lane_words(load_first(even + whole, rest), both ? load_first(odd + whole, rest) : Vec{}),
          rest);
  }
  return row_major(scratch, row);
}

// B = W^T of a linear layer W [n, k], in panels. Takes at most as many floats as pack().
[[maybe_unused]] LCR_TARGET void pack_operand(const float* w, int64_t k, int64_t n, float* out) {
  for (int64_t n0 = 0; n0 < n; n0 += kPanel, out += inner_size(k) * kPanel) {
    const int64_t width = n - n0 < kPanel ? n - n0 : kPanel;
    if (width < kPanel) std::memset(out, 0, sizeof(float) * inner_size(k) * kPanel);
    transpose_pairs<false>(EvenRows{w + n0 * k, k}, width, k, out, kPanel);
  }
}

[[maybe_unused]] LCR_TARGET void product(int64_t m, int64_t n, int64_t k, const MatrixA& a,
                                         const MatrixB& b, float* c, int64_t c_row,
                                         const Epilogue& epilogue = {}) {
  gemm<true>(m, n, inner_size(k), a, b, c, c_row, epilogue);
}

#else

constexpr int64_t inner_size(int64_t k) { return k; }
constexpr int64_t operand_row(int64_t) { return 0; }

LCR_TARGET MatrixA operand(int64_t, int64_t, const float* x, int64_t x_row, float*) {
  return {x, x_row};
}

[[maybe_unused]] LCR_TARGET MatrixB turned_operand(int64_t n, int64_t k, const float* x,
                                                   int64_t x_row, float* scratch, int64_t row) {
  transpose(x, x_row, n, k, scratch, row);
  return row_major(scratch, row);
}

LCR_TARGET MatrixB row_operand(int64_t, int64_t, const float* x, int64_t x_row, float*, int64_t) {
  return row_major(x, x_row);
}

[[maybe_unused]] LCR_TARGET void pack_operand(const float* w, int64_t k, int64_t n, float* out) {
  pack(w, 1, k, k, n, out);
}

[[maybe_unused]] LCR_TARGET void product(int64_t m, int64_t n, int64_t k, const MatrixA& a,
                                         const MatrixB& b, float* c, int64_t c_row,
                                         const Epilogue& epilogue = {}) {
  gemm(m, n, k, a, b, c, c_row, epilogue);
}

#endif

}  // namespace
}  // namespace lcr_fast
