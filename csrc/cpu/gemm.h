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
// needs kLanes floats to spare); what it holds there does not matter. Any M, N, K >= 0 and any
// alignment. A sum over K is in order, whatever M and N, so a row does not depend on its company.
//
// Where LCR_PAIRS is defined, gemm<true> takes words for floats: K counts pairs of bfloat16, two
// numbers of a row of A and of a column of B, whose products are added in float32.
#pragma once
#include "simd.h"

namespace lcr_fast {
namespace {

// The same at every level: weights.h lays packed weights out for all of them.
constexpr int64_t kPanel = 32;

struct MatrixA {
  const float* data;
  int64_t row;
  int64_t col = 1;
};

struct MatrixB {
  const float* data;
  int64_t row;
  int64_t panel;
};

constexpr MatrixA transposed(const float* data, int64_t row) { return {data, 1, row}; }
constexpr MatrixB packed(const float* data, int64_t k) { return {data, kPanel, k * kPanel}; }
constexpr MatrixB row_major(const float* data, int64_t row) { return {data, row, kPanel}; }

// What becomes of the sum: C (+)= relu(sum + bias).
struct Epilogue {
  const float* bias = nullptr;  // [N]
  bool relu = false;
  bool add = false;  // add to what C holds
};

// Floats that pack() writes for B [K, N].
constexpr int64_t packed_size(int64_t k, int64_t n) { return round_up(n, kPanel) * k; }

// Pack B, whose element (k, n) is at b[k * row + n * col], with zeros behind column N.
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
  if constexpr (kPairs)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(x), (__m512bh)row);
#endif
  return fma(splat(x), row, sum);
}

template <bool kPairs, int kRows, int kVecs>
LCR_TARGET __attribute__((noinline)) void gemm_tile(const float* a, int64_t a_row, int64_t a_col,
                                                    const float* b, int64_t b_row, int64_t k,
                                                    float* c, int64_t c_row, int64_t width,
                                                    const Epilogue& epilogue, int64_t column) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec{};
  for (int64_t p = 0; p < k; ++p, a += a_col, b += b_row) {
    Vec row[kVecs];
    for (int j = 0; j < kVecs; ++j) row[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float x = a[i * a_row];
      for (int j = 0; j < kVecs; ++j) sum[i][j] = multiply_add<kPairs>(x, row[j], sum[i][j]);
    }
  }
  const int64_t last = width - (kVecs - 1) * kLanes;  // columns of the last vector
  if (epilogue.bias != nullptr) {
    Vec bias[kVecs];
    for (int j = 0; j < kVecs; ++j)
      bias[j] = load_first(epilogue.bias + column + j * kLanes, j + 1 < kVecs ? kLanes : last);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j] += bias[j];
  }
  if (epilogue.relu) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j] = maximum(sum[i][j], Vec{});
  }
  if (epilogue.add) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j)
        sum[i][j] += load_first(c + i * c_row + j * kLanes, j + 1 < kVecs ? kLanes : last);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j + 1 < kVecs; ++j) store(c + i * c_row + j * kLanes, sum[i][j]);
    store_first(c + i * c_row + (kVecs - 1) * kLanes, sum[i][kVecs - 1], last);
  }
}

using TileFn = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*,
                        int64_t, int64_t, const Epilogue&, int64_t);

// The tile of `rows` rows and one or two vectors.
template <bool kPairs>
constexpr TileFn kTiles[][kTileVecs] = {
    {nullptr, nullptr},
    {gemm_tile<kPairs, 1, 1>, gemm_tile<kPairs, 1, 2>},
    {gemm_tile<kPairs, 2, 1>, gemm_tile<kPairs, 2, 2>},
    {gemm_tile<kPairs, 3, 1>, gemm_tile<kPairs, 3, 2>},
    {gemm_tile<kPairs, 4, 1>, gemm_tile<kPairs, 4, 2>},
    {gemm_tile<kPairs, 5, 1>, gemm_tile<kPairs, 5, 2>},
    {gemm_tile<kPairs, 6, 1>, gemm_tile<kPairs, 6, 2>},
#if LCR_BYTES == 64
    {gemm_tile<kPairs, 7, 1>, gemm_tile<kPairs, 7, 2>},
    {gemm_tile<kPairs, 8, 1>, gemm_tile<kPairs, 8, 2>},
    {gemm_tile<kPairs, 9, 1>, gemm_tile<kPairs, 9, 2>},
    {gemm_tile<kPairs, 10, 1>, gemm_tile<kPairs, 10, 2>},
    {gemm_tile<kPairs, 11, 1>, gemm_tile<kPairs, 11, 2>},
    {gemm_tile<kPairs, 12, 1>, gemm_tile<kPairs, 12, 2>},
#endif
};

// Columns of B are taken one tile at a time, and for each all rows of A, in tiles of nearly equal
// height: a tile of B stays in the first-level cache.
template <bool kPairs = false>
LCR_TARGET void gemm(int64_t m, int64_t n, int64_t k, const MatrixA& a, const MatrixB& b, float* c,
                     int64_t c_row, const Epilogue& epilogue = {}) {
  const int64_t n_tiles = (m + kMaxRows - 1) / kMaxRows;
  for (int64_t column = 0; column < n; column += kTileVecs * kLanes) {
    const float* tile_b = b.data + column / kPanel * b.panel + column % kPanel;
    const int64_t left = n - column;
    const int64_t width = left < kTileVecs * kLanes ? left : kTileVecs * kLanes;
    const int64_t vecs = (width + kLanes - 1) / kLanes;
    for (int64_t tile = 0; tile < n_tiles; ++tile) {
      const int64_t begin = m * tile / n_tiles, end = m * (tile + 1) / n_tiles;
      const TileFn tile_fn = kTiles<kPairs>[end - begin][vecs - 1];
      tile_fn(a.data + begin * a.row, a.row, a.col, tile_b, b.row, k, c + begin * c_row + column,
              c_row, width, epilogue, column);
    }
  }
}

}  // namespace
}  // namespace lcr_fast
