// Small dense matrix products, C = A B, on matrices that stay in the cache.
//
//   A [M, K]  element (m, k) at data[m * row + k * col]; a transposed matrix has row == 1
//   B [K, N]  in panels of kPanel columns: element (k, n) at
//             data[n / kPanel * panel + k * row + n % kPanel]
//             packed(): panels one after another, each [K][kPanel]; see pack()
//             row_major(): an ordinary matrix, rows `row` floats apart
//   C [M, N]  rows `c_row` floats apart; nothing behind column N is written
//
// B must be readable up to the next multiple of kLanes columns (pack() pads with zeros; scratch
// needs kLanes floats to spare), unless kInside; what it holds there does not matter. Any M, N, K
// >= 0 and any alignment. A sum over K is in order, whatever M and N, so a row does not depend on
// its company.
//
// Where LCR_PAIRS is defined, gemm<true> takes words for floats: K counts pairs of bfloat16, two
// numbers of a row of A and of a column of B, whose products are added in float32. The instruction
// for that is used where LCR_PAIRS is 2; elsewhere two fused operations on the numbers, turned into
// floats, give the bits that it gives for numbers which are not subnormal.
#pragma once
#include "matrix.h"
#include "simd.h"

namespace lcr_fast {
namespace {

// The same at every level: weights.h lays packed weights out for all of them.
constexpr int64_t kPanel = 32;

struct MatrixB {
  const float* data;
  int64_t row;
  int64_t panel;
};

constexpr MatrixA transposed(const float* data, int64_t row) { return {data, 1, row}; }
constexpr MatrixB packed(const float* data, int64_t k) { return {data, kPanel, k * kPanel}; }
constexpr MatrixB row_major(const float* data, int64_t row) { return {data, row, kPanel}; }

// Pack B [K, N], whose element (k, n) is at b[k * row + n * col], with zeros behind column N: in
// all round_up(N, kPanel) * K floats.
// Weights [out, in] of a linear layer: row 1, col in, K = in, N = out; for its backward with
// respect to the input, row in, col 1, K = out, N = in.
[[maybe_unused]] LCR_TARGET void pack(const float* b, int64_t row, int64_t col, int64_t k,
                                      int64_t n, float* out) {
  for (int64_t n0 = 0; n0 < n; n0 += kPanel, out += k * kPanel) {
    const int64_t width = n - n0 < kPanel ? n - n0 : kPanel;
    if (row == 1) {
      if (width < kPanel) std::memset(out, 0, sizeof(float) * k * kPanel);
      transpose(b + n0 * col, col, width, k, out, kPanel);
      continue;
    }
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < kPanel; ++j)
        out[i * kPanel + j] = j < width ? b[i * row + (n0 + j) * col] : 0.0f;
  }
}

// Rows of C at a time: with two vectors a row, the accumulators fill the registers (32 in
// AVX-512, else 16) but for those that hold B and one element of A.
constexpr int64_t kMaxRows = LCR_BYTES == 64 ? 12 : 6;
constexpr int64_t kTileVecs = 2;

// sum + x * row; of words, the sum of both products.
template <bool kPairs>
LCR_INLINE Vec multiply_add(float x, Vec row, Vec sum) {
#ifdef LCR_PAIRS
  if constexpr (kPairs) {
#if LCR_PAIRS == 2
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(x), (__m512bh)row);
#else
    const WordVec left = (WordVec)splat(x), right = (WordVec)row;
    sum = fma((Vec)(left & 0xffff0000u), (Vec)(right & 0xffff0000u), sum);
    return fma((Vec)(left << 16), (Vec)(right << 16), sum);
#endif
  }
#endif
  return fma(splat(x), row, sum);
}

// C = A B, the sum over `k`, and what becomes of it.
struct Product {
  MatrixA a;
  MatrixB b;
  float* c;
  int64_t c_row;
  int64_t k;
  Epilogue epilogue;
};

// The tile of C from `row` and `column` on, `width` columns wide.
template <bool kPairs, bool kInside, int kRows, int kVecs>
LCR_TARGET __attribute__((noinline)) void gemm_tile(const Product& p, int64_t row, int64_t column,
                                                    int64_t width) {
  const int64_t last = width - (kVecs - 1) * kLanes;  // columns of the last vector
  Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec{};
  const float* b = p.b.data + column / kPanel * p.b.panel + column % kPanel;
  // Rows of A in threes, so that addresses need few registers: base, base + row, base + 2 row.
  constexpr int kBases = (kRows + 2) / 3;
  const float* base[kBases];
  const int64_t a_row = p.a.row, a_col = p.a.col, b_row = p.b.row, k = p.k;
#pragma GCC unroll 16
  for (int i = 0; i < kBases; ++i) base[i] = p.a.data + (row + 3 * i) * a_row;
  for (int64_t n = 0; n < k; ++n, b += b_row) {
    Vec columns[kVecs];
    for (int j = 0; j < kVecs; ++j)
      columns[j] =
          kInside && j + 1 == kVecs ? load_first(b + j * kLanes, last) : load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float x = base[i / 3][i % 3 * a_row];
      for (int j = 0; j < kVecs; ++j) sum[i][j] = multiply_add<kPairs>(x, columns[j], sum[i][j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kBases; ++i) base[i] += a_col;
  }
  const Epilogue& epilogue = p.epilogue;
  float* c = p.c + row * p.c_row + column;
  if (epilogue.bias != nullptr) {
    Vec bias[kVecs];
    for (int j = 0; j < kVecs; ++j)
      bias[j] = load_first(epilogue.bias + column + j * kLanes, j + 1 < kVecs ? kLanes : last);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j] += bias[j];
  }
  if (epilogue.row_bias != nullptr) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j] += epilogue.row_bias[row + i];
  }
  if (epilogue.add) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j)
        sum[i][j] += load_first(c + i * p.c_row + j * kLanes, j + 1 < kVecs ? kLanes : last);
  }
  if (epilogue.relu) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j] = maximum(Vec{}, sum[i][j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j + 1 < kVecs; ++j) store(c + i * p.c_row + j * kLanes, sum[i][j]);
    store_first(c + i * p.c_row + (kVecs - 1) * kLanes, sum[i][kVecs - 1], last);
  }
}

using TileFn = void (*)(const Product&, int64_t row, int64_t column, int64_t width);

// The tile of `rows` rows and one or two vectors.
template <bool kPairs, bool kInside>
constexpr TileFn kTiles[][kTileVecs] = {
    {nullptr, nullptr},
    {gemm_tile<kPairs, kInside, 1, 1>, gemm_tile<kPairs, kInside, 1, 2>},
    {gemm_tile<kPairs, kInside, 2, 1>, gemm_tile<kPairs, kInside, 2, 2>},
    {gemm_tile<kPairs, kInside, 3, 1>, gemm_tile<kPairs, kInside, 3, 2>},
    {gemm_tile<kPairs, kInside, 4, 1>, gemm_tile<kPairs, kInside, 4, 2>},
    {gemm_tile<kPairs, kInside, 5, 1>, gemm_tile<kPairs, kInside, 5, 2>},
    {gemm_tile<kPairs, kInside, 6, 1>, gemm_tile<kPairs, kInside, 6, 2>},
#if LCR_BYTES == 64
    {gemm_tile<kPairs, kInside, 7, 1>, gemm_tile<kPairs, kInside, 7, 2>},
    {gemm_tile<kPairs, kInside, 8, 1>, gemm_tile<kPairs, kInside, 8, 2>},
    {gemm_tile<kPairs, kInside, 9, 1>, gemm_tile<kPairs, kInside, 9, 2>},
    {gemm_tile<kPairs, kInside, 10, 1>, gemm_tile<kPairs, kInside, 10, 2>},
    {gemm_tile<kPairs, kInside, 11, 1>, gemm_tile<kPairs, kInside, 11, 2>},
    {gemm_tile<kPairs, kInside, 12, 1>, gemm_tile<kPairs, kInside, 12, 2>},
#endif
};

// Columns of C that are made at a time, for all of its rows: a tile of B stays in the first cache.
constexpr int64_t kTileColumns = kTileVecs * kLanes;

// All `m` rows of C, from `column` on at most kTileColumns of its columns, in tiles of nearly equal
// height. Where kInside, nothing behind those columns is read of B.
template <bool kPairs, bool kInside>
LCR_TARGET void gemm_columns(const Product& p, int64_t m, int64_t column, int64_t width) {
  const int64_t n_tiles = (m + kMaxRows - 1) / kMaxRows;
  const int64_t vecs = (width + kLanes - 1) / kLanes;
  for (int64_t tile = 0; tile < n_tiles; ++tile) {
    const int64_t begin = m * tile / n_tiles, end = m * (tile + 1) / n_tiles;
    kTiles<kPairs, kInside>[end - begin][vecs - 1](p, begin, column, width);
  }
}

template <bool kPairs = false>
LCR_TARGET void gemm(int64_t m, int64_t n, int64_t k, const MatrixA& a, const MatrixB& b, float* c,
                     int64_t c_row, const Epilogue& epilogue = {}) {
  const Product p{a, b, c, c_row, k, epilogue};
  for (int64_t column = 0; column < n; column += kTileColumns)
    gemm_columns<kPairs, false>(p, m, column,
                                n - column < kTileColumns ? n - column : kTileColumns);
}

}  // namespace
}  // namespace lcr_fast
