// The inner loops of the CPU scoring path, compiled once per instruction set.
//
// Each scoring_<level>.cpp defines LCR_TARGET (the function attribute that enables its
// instructions) and LCR_BYTES (its vector width), includes this file, and exports one table of
// functions. All code here is in an unnamed namespace and calls nothing from the standard library,
// so no instruction of one level can reach a function that another level shares.
//
// A lane is a column (a candidate), and sums run over rows in order. So a candidate's score is the
// same number wherever its column stands.
#pragma once
#include <cstdint>

#include "../philox.h"

namespace lcr_fast {

// Element (i, k) is at data[i * row + k * col].
struct Strided {
  const float* data;
  int64_t row;
  int64_t col;
};

struct ScoringKernels {
  // C [m, n] = A [m, k] B [k, n]; plus C where `add`; plus bias [m] unless null; then ReLU.
  void (*gemm)(int64_t m, int64_t n, int64_t k, Strided a, const float* b, int64_t ldb, float* c,
               int64_t ldc, const float* bias, bool add, bool relu);
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
  // x [rows, n] = y + bias [rows], of one leading dimension.
  void (*add_bias)(const float* y, const float* bias, int64_t ld, int64_t rows, int64_t n,
                   float* x);
  // x = max(x, 0), NaN kept.
  void (*relu)(float* x, int64_t ld, int64_t rows, int64_t n);
  // d = d * kept where x > 0, else 0: a unit is 0 where ReLU or dropout made it so.
  void (*relu_bwd)(const float* x, float kept, int64_t ld, int64_t rows, int64_t n, float* d);
  // Drop units of x [rows, n]: row h, column c is coordinate h of position first + c.
  void (*dropout)(float* x, int64_t ld, int64_t rows, int64_t n, int64_t first, uint32_t site,
                  uint32_t row, uint64_t seed, uint32_t threshold);
};

extern const ScoringKernels kScoringBaseline;
extern const ScoringKernels kScoringAvx2;
extern const ScoringKernels kScoringAvx512;

}  // namespace lcr_fast

#ifdef LCR_TARGET

#include "simd.h"

namespace lcr_fast {
namespace {

typedef float V __attribute__((vector_size(LCR_BYTES)));
typedef int32_t VI __attribute__((vector_size(LCR_BYTES)));
constexpr int64_t kWidth = LCR_BYTES / 4;
// Sums held in registers: AVX-512 has 32 vectors, the others 16.
constexpr int kMaxRows = LCR_BYTES == 64 ? 12 : 6;

// The first lanes of a vector, 1 to kWidth - 1 of them.
#if LCR_BYTES == 64
typedef __mmask16 Tail;
LCR_INLINE Tail tail_of(int64_t n) { return static_cast<Tail>((1u << n) - 1); }
LCR_INLINE V load_tail(const float* p, Tail tail) { return (V)_mm512_maskz_loadu_ps(tail, p); }
LCR_INLINE void store_tail(float* p, Tail tail, V v) {
  _mm512_mask_storeu_ps(p, tail, (__m512)v);
}
#elif LCR_BYTES == 32
typedef __m256i Tail;
LCR_INLINE Tail tail_of(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LCR_INLINE V load_tail(const float* p, Tail tail) { return (V)_mm256_maskload_ps(p, tail); }
LCR_INLINE void store_tail(float* p, Tail tail, V v) { _mm256_maskstore_ps(p, tail, (__m256)v); }
#else
typedef int64_t Tail;
LCR_INLINE Tail tail_of(int64_t n) { return n; }
LCR_INLINE V load_tail(const float* p, Tail tail) {
  V v = {};
  for (int64_t i = 0; i < tail; ++i) v[i] = p[i];
  return v;
}
LCR_INLINE void store_tail(float* p, Tail tail, V v) {
  for (int64_t i = 0; i < tail; ++i) p[i] = v[i];
}
#endif

template <int kRows, int kVectors, bool kTail>
LCR_INLINE void gemm_block(int64_t k, Strided a, const float* b, int64_t ldb, float* c, int64_t ldc,
                           const float* bias, bool add, bool relu, Tail tail) {
  V sum[kRows][kVectors] = {};
  // Rows in threes, so that addresses need few registers: base, base + row, base + 2 row.
  constexpr int kBases = (kRows + 2) / 3;
  const float* base[kBases];
#pragma GCC unroll 4
  for (int i = 0; i < kBases; ++i) base[i] = a.data + 3 * i * a.row;
  const int64_t row = a.row;
  for (int64_t p = 0; p < k; ++p) {
    V column[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      column[v] = kTail && v == kVectors - 1 ? load_tail(b + v * kWidth, tail)
                                             : load(b + v * kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const V x = splat(base[r / 3][(r % 3) * row]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x, column[v], sum[r][v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) base[i] += a.col;
    b += ldb;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + r * ldc + v * kWidth;
      const bool partial = kTail && v == kVectors - 1;
      V value = sum[r][v];
      if (bias) value += bias[r];
      if (add) value += partial ? load_tail(out, tail) : load(out);
      if (relu) value = value < 0 ? V{} : value;
      if (partial)
        store_tail(out, tail, value);
      else
        store(out, value);
    }
}

template <int kVectors, bool kTail>
LCR_TARGET void gemm_columns(int64_t m, int64_t k, Strided a, const float* b, int64_t ldb, float* c,
                             int64_t ldc, const float* bias, bool add, bool relu, Tail tail) {
  int64_t blocks = (m + kMaxRows - 1) / kMaxRows;
  while (m > 0) {
    const int64_t rows = (m + blocks - 1) / blocks;  // of even sizes: 64 is 11 + 11 + 11 + ...
#define LCR_ROWS(R)                                                                       \
  case R:                                                                                 \
    if constexpr (R <= kMaxRows)                                                          \
      gemm_block<R, kVectors, kTail>(k, a, b, ldb, c, ldc, bias, add, relu, tail);        \
    break;
    switch (rows) {
      LCR_ROWS(1)
      LCR_ROWS(2)
      LCR_ROWS(3)
      LCR_ROWS(4)
      LCR_ROWS(5)
      LCR_ROWS(6)
      LCR_ROWS(7)
      LCR_ROWS(8)
      LCR_ROWS(9)
      LCR_ROWS(10)
      LCR_ROWS(11)
      LCR_ROWS(12)
    }
#undef LCR_ROWS
    a.data += rows * a.row;
    c += rows * ldc;
    if (bias) bias += rows;
    m -= rows;
    --blocks;
  }
}

// Products summed in one chain; chains are added up, which halves the rounding of long sums. Shorter
// without fused multiply-add, where every product rounds too.
constexpr int64_t kChain = LCR_BYTES == 16 ? 16 : 32;

template <int kVectors, bool kTail>
LCR_TARGET void gemm_panel(int64_t m, int64_t k, Strided a, const float* b, int64_t ldb, float* c,
                           int64_t ldc, const float* bias, bool add, bool relu, Tail tail) {
  int64_t chains = k > kChain ? (k + kChain - 1) / kChain : 1;
  for (bool first = true; chains > 0; first = false, --chains) {
    const int64_t depth = (k + chains - 1) / chains;
    gemm_columns<kVectors, kTail>(m, depth, a, b, ldb, c, ldc, first ? bias : nullptr,
                                  add || !first, relu && chains == 1, tail);
    a.data += depth * a.col;
    b += depth * ldb;
    k -= depth;
  }
}

LCR_TARGET void gemm(int64_t m, int64_t n, int64_t k, Strided a, const float* b, int64_t ldb,
                     float* c, int64_t ldc, const float* bias, bool add, bool relu) {
  // Columns outside, so that a block of B stays in the first cache while A passes by.
  while (n >= 2 * kWidth) {
    gemm_panel<2, false>(m, k, a, b, ldb, c, ldc, bias, add, relu, Tail{});
    n -= 2 * kWidth;
    b += 2 * kWidth;
    c += 2 * kWidth;
  }
  if (n > kWidth)
    gemm_panel<2, true>(m, k, a, b, ldb, c, ldc, bias, add, relu, tail_of(n - kWidth));
  else if (n == kWidth)
    gemm_panel<1, false>(m, k, a, b, ldb, c, ldc, bias, add, relu, Tail{});
  else if (n > 0)
    gemm_panel<1, true>(m, k, a, b, ldb, c, ldc, bias, add, relu, tail_of(n));
}

// e^x for x <= 0 or NaN, within 2 ulp: the polynomial of Cephes' expf. 0 below the normal numbers.
LCR_INLINE V exponential(V x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V safe = x < -87.0f ? V{} - 87.0f : x;
  const V n = fma(safe, splat(1.44269504f), splat(kRound)) - kRound;
  const V r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), safe));
  V p = fma(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const VI power = (__builtin_convertvector(n, VI) + 127) << 23;
  const V value = p * (V)power;
  return x < -87.0f ? V{} : value;
}

template <bool kTail>
LCR_INLINE V load_column(const float* p, Tail tail) {
  return kTail ? load_tail(p, tail) : load(p);
}
template <bool kTail>
LCR_INLINE void store_column(float* p, Tail tail, V v) {
  if (kTail)
    store_tail(p, tail, v);
  else
    store(p, v);
}

template <bool kTail>
LCR_INLINE void softmax_column(float* s, int64_t ld, int64_t rows, Tail tail) {
  V top = load_column<kTail>(s, tail);
  for (int64_t j = 1; j < rows; ++j) {
    const V x = load_column<kTail>(s + j * ld, tail);
    top = x > top ? x : top;
  }
  V sum = {};
  for (int64_t j = 0; j < rows; ++j) {
    const V e = exponential(load_column<kTail>(s + j * ld, tail) - top);
    sum += e;
    store_column<kTail>(s + j * ld, tail, e);
  }
  const V scale = 1.0f / sum;
  for (int64_t j = 0; j < rows; ++j)
    store_column<kTail>(s + j * ld, tail, load_column<kTail>(s + j * ld, tail) * scale);
}

LCR_TARGET void softmax(float* s, int64_t ld, int64_t rows, int64_t n) {
  if (rows == 0) return;
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) softmax_column<false>(s + c, ld, rows, Tail{});
  if (c < n) softmax_column<true>(s + c, ld, rows, tail_of(n - c));
}

template <bool kTail>
LCR_INLINE void softmax_bwd_column(const float* alpha, float* d, int64_t ld, int64_t rows,
                                   Tail tail) {
  V mean = {};
  for (int64_t j = 0; j < rows; ++j)
    mean = fma(load_column<kTail>(alpha + j * ld, tail), load_column<kTail>(d + j * ld, tail), mean);
  for (int64_t j = 0; j < rows; ++j)
    store_column<kTail>(
        d + j * ld, tail,
        load_column<kTail>(alpha + j * ld, tail) * (load_column<kTail>(d + j * ld, tail) - mean));
}

LCR_TARGET void softmax_bwd(const float* alpha, float* d, int64_t ld, int64_t rows, int64_t n) {
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) softmax_bwd_column<false>(alpha + c, d + c, ld, rows, Tail{});
  if (c < n) softmax_bwd_column<true>(alpha + c, d + c, ld, rows, tail_of(n - c));
}

template <bool kTail>
LCR_INLINE void column_dot(const float* x, const float* y, int64_t ld, int64_t rows, float* out,
                           bool add, Tail tail) {
  V sum = {};
  for (int64_t j = 0; j < rows; ++j)
    sum = fma(load_column<kTail>(x + j * ld, tail), load_column<kTail>(y + j * ld, tail), sum);
  if (add) sum += load_column<kTail>(out, tail);
  store_column<kTail>(out, tail, sum);
}

LCR_TARGET void column_dots(const float* x, const float* y, int64_t ld, int64_t rows, int64_t n,
                            float* out, bool add) {
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth)
    column_dot<false>(x + c, y + c, ld, rows, out + c, add, Tail{});
  if (c < n) column_dot<true>(x + c, y + c, ld, rows, out + c, add, tail_of(n - c));
}

LCR_TARGET void row_sums(const float* x, int64_t ld, int64_t rows, int64_t n, double* out) {
  for (int64_t h = 0; h < rows; ++h, x += ld) {
    int64_t c = 0;
    if (n >= kWidth) {
      double lanes[kWidth] = {};
      for (; c + kWidth <= n; c += kWidth)
        for (int64_t i = 0; i < kWidth; ++i) lanes[i] += x[c + i];
      for (int64_t i = 0; i < kWidth; ++i) out[h] += lanes[i];
    }
    for (; c < n; ++c) out[h] += x[c];
  }
}

// Unlike transpose(), writes nothing behind column m of out.
LCR_TARGET void transpose_within(const float* in, int64_t ld_in, int64_t m, int64_t n, float* out,
                                 int64_t ld_out) {
  for (int64_t i = 0; i < m; i += kLanes) {
    const int64_t rows = m - i < kLanes ? m - i : kLanes;
    for (int64_t j = 0; j < n; j += kLanes) {
      const int64_t columns = n - j < kLanes ? n - j : kLanes;
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r)
        block[r] = r < rows ? load_first(in + (i + r) * ld_in + j, columns) : Vec{};
      transpose_block(block);
      for (int64_t c = 0; c < columns; ++c) store_first(out + (j + c) * ld_out + i, block[c], rows);
    }
  }
}

LCR_TARGET void add_bias(const float* y, const float* bias, int64_t ld, int64_t rows, int64_t n,
                         float* x) {
  for (int64_t h = 0; h < rows; ++h)
    for (int64_t c = 0; c < n; ++c) x[h * ld + c] = y[h * ld + c] + bias[h];
}

LCR_TARGET void relu(float* x, int64_t ld, int64_t rows, int64_t n) {
  for (int64_t h = 0; h < rows; ++h)
    for (int64_t c = 0; c < n; ++c) x[h * ld + c] = x[h * ld + c] < 0 ? 0.0f : x[h * ld + c];
}

LCR_TARGET void relu_bwd(const float* x, float kept, int64_t ld, int64_t rows, int64_t n,
                         float* d) {
  for (int64_t h = 0; h < rows; ++h)
    for (int64_t c = 0; c < n; ++c) d[h * ld + c] = x[h * ld + c] > 0 ? d[h * ld + c] * kept : 0.0f;
}

LCR_TARGET void dropout(float* x, int64_t ld, int64_t rows, int64_t n, int64_t first, uint32_t site,
                        uint32_t row, uint64_t seed, uint32_t threshold) {
  constexpr int kLanes = 16;  // positions side by side, so that the compiler vectorises the rounds
  const float kept = 65536.0f / static_cast<float>(65536 - threshold);
  for (int64_t octet = 0; 8 * octet < rows; ++octet) {
    for (int64_t c = 0; c < n; c += kLanes) {
      uint32_t w[4][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        w[0][i] = static_cast<uint32_t>(octet);
        w[1][i] = static_cast<uint32_t>(first + c + i);
        w[2][i] = site;
        w[3][i] = row;
      }
      uint32_t key0 = static_cast<uint32_t>(seed);
      uint32_t key1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kLanes; ++i) {
          const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * w[0][i];
          const uint64_t p1 = uint64_t{kPhiloxMultiplier1} * w[2][i];
          w[0][i] = static_cast<uint32_t>(p1 >> 32) ^ w[1][i] ^ key0;
          w[2][i] = static_cast<uint32_t>(p0 >> 32) ^ w[3][i] ^ key1;
          w[1][i] = static_cast<uint32_t>(p1);
          w[3][i] = static_cast<uint32_t>(p0);
        }
        key0 += kPhiloxWeyl0;
        key1 += kPhiloxWeyl1;
      }
      const int64_t lanes = n - c < kLanes ? n - c : kLanes;
      for (int64_t u = 0; u < 8 && 8 * octet + u < rows; ++u) {
        float* out = x + (8 * octet + u) * ld + c;
        const uint32_t* word = w[u / 2];
        const int shift = u % 2 ? 16 : 0;
        for (int64_t i = 0; i < lanes; ++i)
          out[i] *= ((word[i] >> shift) & 0xFFFF) >= threshold ? kept : 0.0f;
      }
    }
  }
}

constexpr ScoringKernels kThisLevel = {gemm,     softmax,          softmax_bwd, column_dots,
                                       row_sums, transpose_within, add_bias,    relu,
                                       relu_bwd, dropout};

}  // namespace
}  // namespace lcr_fast

#endif  // LCR_TARGET
