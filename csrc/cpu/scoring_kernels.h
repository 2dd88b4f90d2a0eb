// The inner loops of the CPU scoring path, compiled once per instruction set.
//
// Each scoring_<level>.cpp defines LCR_TARGET (the function attribute that enables its
// instructions) and LCR_BYTES (its vector width), includes this file, and exports one table of
// functions; each pairs_<level>.cpp defines LCR_PAIRS too (see operands.h). All code here is in an
// unnamed namespace and calls nothing from the standard library, so no instruction of one level can
// reach a function that another level shares.
//
// A lane is a column (a candidate), and sums run over rows in order. So a candidate's score is the
// same number wherever its column stands.
#pragma once
#include <cstdint>

#include "../noise.h"
#include "matrix.h"

namespace lcr_fast {

struct ScoringKernels {
  // C [m, n] = A [m, k] B [k, n] for factors that the functions below made. A sum over k is one of
  // partial sums, of even lengths; of pairs, it is in order.
  void (*gemm)(int64_t m, int64_t n, int64_t k, const MatrixA& a, const float* b, int64_t ldb,
               float* c, int64_t ldc, const Epilogue& epilogue);
  // A = x [m, k]: x itself or, of pairs, words in `words` [m, pair_row(k)].
  MatrixA (*left)(int64_t m, int64_t k, const float* x, int64_t ld, float* words);
  // B = x [k, n]: x itself or, of pairs, words in `words` [pair_count(k), ld].
  const float* (*right)(int64_t k, int64_t n, const float* x, int64_t ld, float* words);
  // B = x^T for n rows of x, which stand anywhere: `out` [k, ld] or, of pairs, [pair_count(k), ld].
  void (*right_of_rows)(const float* const* rows, int64_t n, int64_t k, float* out, int64_t ld);
  // Softmax of every column of s [rows, n], in place.
  void (*softmax)(float* s, int64_t ld, int64_t rows, int64_t n);
  // dS = alpha * (dalpha - sum over rows of alpha * dalpha), in place of dalpha.
  void (*softmax_bwd)(const float* alpha, float* dalpha, int64_t ld, int64_t rows, int64_t n);
  // out[c] (+)= sum over rows of x * y, for every column.
  void (*column_dots)(const float* x, const float* y, int64_t ld, int64_t rows, int64_t n,
                      float* out, bool add);
  // Add the sum over the columns of x [rows, n] to out [rows].
  void (*row_sums)(const float* x, int64_t ld, int64_t rows, int64_t n, double* out);
  // out [n, m] = in [m, n], transposed.
  void (*transpose)(const float* in, int64_t ld_in, int64_t m, int64_t n, float* out,
                    int64_t ld_out);
  // The same of n rows that stand anywhere.
  void (*transpose_rows)(const float* const* rows, int64_t n, int64_t dim, float* out,
                         int64_t ld_out);
  // x [rows, n] = y + bias [rows], of one leading dimension.
  void (*add_bias)(const float* y, const float* bias, int64_t ld, int64_t rows, int64_t n,
                   float* x);
  // d = d * kept where x > 0, else 0: a unit is 0 where ReLU or dropout made it so.
  void (*relu_bwd)(const float* x, float kept, int64_t ld, int64_t rows, int64_t n, float* d);
  // Drop units of x [rows, n]: row h, column c is coordinate h of position first + c.
  void (*dropout)(const DropoutKey& key, int64_t row, int64_t site, int64_t first, float* x,
                  int64_t ld, int64_t rows, int64_t n);
};

extern const ScoringKernels kScoringBaseline;
extern const ScoringKernels kScoringAvx2;
extern const ScoringKernels kScoringAvx512;
extern const ScoringKernels kScoringPairsBaseline;
extern const ScoringKernels kScoringPairsAvx2;
extern const ScoringKernels kScoringPairsAvx512;
extern const ScoringKernels kScoringPairsAvx512Bf16;

}  // namespace lcr_fast

#ifdef LCR_TARGET

#include "../philox.h"
#include "operands.h"

namespace lcr_fast {
namespace {

#ifdef LCR_PAIRS
constexpr bool kOfPairs = true;
constexpr int64_t kChain = INT64_MAX;  // the factors' rounding is more than that of any sum
#else
constexpr bool kOfPairs = false;
// Products summed in one chain; chains are added up, which halves the rounding of long sums.
// Shorter without fused multiply-add, where every product rounds too.
constexpr int64_t kChain = LCR_BYTES == 16 ? 16 : 32;
#endif

LCR_TARGET void chained_gemm(int64_t m, int64_t n, int64_t k, const MatrixA& a, const float* b,
                             int64_t ldb, float* c, int64_t ldc, const Epilogue& epilogue) {
  k = inner_size(k);
  const int64_t chains = k > kChain ? (k + kChain - 1) / kChain : 1;
  // Columns outside, so that a tile of B stays in the first cache while A passes by.
  for (int64_t column = 0; column < n; column += kTileColumns) {
    const int64_t width = n - column < kTileColumns ? n - column : kTileColumns;
    Product p{a, row_major(b, ldb), c, ldc, 0, epilogue};
    int64_t left = k;
    for (int64_t chain = chains; chain > 0; --chain) {
      p.k = (left + chain - 1) / chain;
      p.epilogue.relu = epilogue.relu && chain == 1;
      if (width % kLanes == 0)
        gemm_columns<kOfPairs, false>(p, m, column, width);
      else
        gemm_columns<kOfPairs, true>(p, m, column, width);
      p.a.data += p.k * a.col;
      p.b.data += p.k * ldb;
      p.epilogue.row_bias = nullptr;
      p.epilogue.add = true;
      left -= p.k;
    }
  }
}

LCR_TARGET const float* right(int64_t k, int64_t n, const float* x, int64_t ld, float* words) {
  return row_operand(k, n, x, ld, words, ld).data;
}

LCR_TARGET void right_of_rows(const float* const* rows, int64_t n, int64_t k, float* out,
                              int64_t ld) {
#ifdef LCR_PAIRS
  transpose_pairs<true>(rows, n, k, out, ld);
#else
  transpose_rows<true>(rows, n, k, out, ld);
#endif
}

// e^x for x <= 0 or NaN, within 2 ulp: the polynomial of Cephes' expf. 0 below the normal numbers.
LCR_INLINE Vec exponential(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec safe = x < -87.0f ? Vec{} - 87.0f : x;
  const Vec n = fma(safe, splat(1.44269504f), splat(kRound)) - kRound;
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), safe));
  Vec p = fma(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  const Vec value = p * (Vec)power;
  return x < -87.0f ? Vec{} : value;
}

template <bool kTail>
LCR_INLINE Vec load_column(const float* p, int64_t tail) {
  return kTail ? load_first(p, tail) : load(p);
}
template <bool kTail>
LCR_INLINE void store_column(float* p, int64_t tail, Vec v) {
  if (kTail)
    store_first(p, v, tail);
  else
    store(p, v);
}

template <bool kTail>
LCR_INLINE void softmax_column(float* s, int64_t ld, int64_t rows, int64_t tail) {
  Vec top = load_column<kTail>(s, tail);
  for (int64_t j = 1; j < rows; ++j) {
    const Vec x = load_column<kTail>(s + j * ld, tail);
    top = x > top ? x : top;
  }
  Vec sum = {};
  for (int64_t j = 0; j < rows; ++j) {
    const Vec e = exponential(load_column<kTail>(s + j * ld, tail) - top);
    sum += e;
    store_column<kTail>(s + j * ld, tail, e);
  }
  const Vec scale = 1.0f / sum;
  for (int64_t j = 0; j < rows; ++j)
    store_column<kTail>(s + j * ld, tail, load_column<kTail>(s + j * ld, tail) * scale);
}

LCR_TARGET void softmax(float* s, int64_t ld, int64_t rows, int64_t n) {
  if (rows == 0) return;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) softmax_column<false>(s + c, ld, rows, 0);
  if (c < n) softmax_column<true>(s + c, ld, rows, n - c);
}

template <bool kTail>
LCR_INLINE void softmax_bwd_column(const float* alpha, float* d, int64_t ld, int64_t rows,
                                   int64_t tail) {
  Vec mean = {};
  for (int64_t j = 0; j < rows; ++j)
    mean =
        fma(load_column<kTail>(alpha + j * ld, tail), load_column<kTail>(d + j * ld, tail), mean);
  for (int64_t j = 0; j < rows; ++j)
    store_column<kTail>(
        d + j * ld, tail,
        load_column<kTail>(alpha + j * ld, tail) * (load_column<kTail>(d + j * ld, tail) - mean));
}

LCR_TARGET void softmax_bwd(const float* alpha, float* d, int64_t ld, int64_t rows, int64_t n) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) softmax_bwd_column<false>(alpha + c, d + c, ld, rows, 0);
  if (c < n) softmax_bwd_column<true>(alpha + c, d + c, ld, rows, n - c);
}

template <bool kTail>
LCR_INLINE void column_dot(const float* x, const float* y, int64_t ld, int64_t rows, float* out,
                           bool add, int64_t tail) {
  Vec sum = {};
  for (int64_t j = 0; j < rows; ++j)
    sum = fma(load_column<kTail>(x + j * ld, tail), load_column<kTail>(y + j * ld, tail), sum);
  if (add) sum += load_column<kTail>(out, tail);
  store_column<kTail>(out, tail, sum);
}

LCR_TARGET void column_dots(const float* x, const float* y, int64_t ld, int64_t rows, int64_t n,
                            float* out, bool add) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) column_dot<false>(x + c, y + c, ld, rows, out + c, add, 0);
  if (c < n) column_dot<true>(x + c, y + c, ld, rows, out + c, add, n - c);
}

LCR_TARGET void row_sums(const float* x, int64_t ld, int64_t rows, int64_t n, double* out) {
  for (int64_t h = 0; h < rows; ++h, x += ld) {
    int64_t c = 0;
    if (n >= kLanes) {
      double lanes[kLanes] = {};
      for (; c + kLanes <= n; c += kLanes)
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] += x[c + i];
      for (int64_t i = 0; i < kLanes; ++i) out[h] += lanes[i];
    }
    for (; c < n; ++c) out[h] += x[c];
  }
}

LCR_TARGET void add_bias(const float* y, const float* bias, int64_t ld, int64_t rows, int64_t n,
                         float* x) {
  for (int64_t h = 0; h < rows; ++h)
    for (int64_t c = 0; c < n; ++c) x[h * ld + c] = y[h * ld + c] + bias[h];
}

LCR_TARGET void relu_bwd(const float* x, float kept, int64_t ld, int64_t rows, int64_t n,
                         float* d) {
  for (int64_t h = 0; h < rows; ++h)
    for (int64_t c = 0; c < n; ++c)  // NaN passes
      d[h * ld + c] = x[h * ld + c] <= 0 ? 0.0f : d[h * ld + c] * kept;
}

LCR_TARGET void dropout(const DropoutKey& key, int64_t row, int64_t site, int64_t first, float* x,
                        int64_t ld, int64_t rows, int64_t n) {
  constexpr int kPositions = 16;  // side by side, so that the compiler vectorises the rounds
  const float kept = keep_scale(key.threshold);
  for (int64_t octet = 0; 8 * octet < rows; ++octet) {
    for (int64_t c = 0; c < n; c += kPositions) {
      uint32_t words[4][kPositions];
      for (int i = 0; i < kPositions; ++i) {
        words[0][i] = static_cast<uint32_t>(octet);
        words[1][i] = static_cast<uint32_t>(first + c + i);
        words[2][i] = site_word(site);
        words[3][i] = static_cast<uint32_t>(row);
      }
      philox(words, key.seed);
      const int64_t width = n - c < kPositions ? n - c : kPositions;
      for (int64_t u = 0; u < 8 && 8 * octet + u < rows; ++u) {
        float* out = x + (8 * octet + u) * ld + c;
        const uint32_t* word = words[u / 2];
        const int shift = u % 2 ? 16 : 0;
        for (int64_t i = 0; i < width; ++i)
          out[i] *= ((word[i] >> shift) & 0xFFFF) >= key.threshold ? kept : 0.0f;
      }
    }
  }
}

constexpr ScoringKernels kScoringTable = {
    chained_gemm,
    operand,
    right,
    right_of_rows,
    softmax,
    softmax_bwd,
    column_dots,
    row_sums,
    transpose<true>,
    transpose_rows<true, const float* const*>,
    add_bias,
    relu_bwd,
    dropout,
};

}  // namespace
}  // namespace lcr_fast

#endif  // LCR_TARGET
