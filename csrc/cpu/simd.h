// Vectors of floats: the alphabet of the CPU kernels, compiled once per instruction set.
//
// A <kernel>_<level>.cpp defines LCR_TARGET (the function attribute that enables its instructions)
// and LCR_BYTES (its vector width), then includes the kernel's headers, this one among them. All
// code here is in an unnamed namespace, so no instruction of one level can reach a function that
// another level shares. Lambdas do not inherit LCR_TARGET: keep them out of inner loops.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "fma.h"

namespace lcr_fast {
namespace {

typedef int32_t IntVec __attribute__((vector_size(LCR_BYTES)));
typedef uint32_t WordVec __attribute__((vector_size(LCR_BYTES)));

constexpr int64_t kLanes = LCR_BYTES / sizeof(float);

// Rows of scratch matrices start at multiples of this many floats, whatever the level: 64 bytes.
constexpr int64_t kAlign = 16;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

LCR_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

LCR_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Literals, not a loop: shuffles by them must be known to the compiler from the start.
#if LCR_BYTES == 64
LCR_INLINE IntVec lane_numbers() {
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}
#elif LCR_BYTES == 32
LCR_INLINE IntVec lane_numbers() { return IntVec{0, 1, 2, 3, 4, 5, 6, 7}; }
#else
LCR_INLINE IntVec lane_numbers() { return IntVec{0, 1, 2, 3}; }
#endif

// All bits set in the first `n` lanes.
LCR_INLINE IntVec first_lanes(int64_t n) { return lane_numbers() < static_cast<int32_t>(n); }

// The first `n` lanes, 1 <= n <= kLanes, and 0 in the others; reads nothing behind them.
LCR_INLINE Vec load_first(const float* p, int64_t n) {
#if LCR_BYTES == 64 && defined(__x86_64__)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#elif LCR_BYTES == 32 && defined(__x86_64__)
  return (Vec)_mm256_maskload_ps(p, (__m256i)first_lanes(n));
#else
  Vec v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

LCR_INLINE void store_first(float* p, Vec v, int64_t n) {
#if LCR_BYTES == 64 && defined(__x86_64__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#elif LCR_BYTES == 32 && defined(__x86_64__)
  _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

LCR_INLINE Vec select(IntVec mask, Vec yes, Vec no) {
  return (Vec)((mask & (IntVec)yes) | (~mask & (IntVec)no));
}

// The larger of both; b where one is NaN or both are 0.
LCR_INLINE Vec maximum(Vec a, Vec b) {
#if LCR_BYTES == 64 && defined(__x86_64__)
  return (Vec)_mm512_mask_max_ps((__m512)a, 0xffff, (__m512)a, (__m512)b);  // all lanes
#elif LCR_BYTES == 32 && defined(__x86_64__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

// Lane i becomes lane i ^ kStep.
#if defined(__clang__)
template <int kStep, int... kLane>
LCR_INLINE Vec swap_lanes(Vec v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}
template <int kStep>
LCR_INLINE Vec swap_lanes(Vec v) {
  return swap_lanes<kStep>(v, std::make_integer_sequence<int, kLanes>{});
}
#else
template <int kStep>
LCR_INLINE Vec swap_lanes(Vec v) {
  return __builtin_shuffle(v, lane_numbers() ^ kStep);
}
#endif

LCR_INLINE float sum_lanes(Vec v) {
  if constexpr (kLanes >= 16) v += swap_lanes<8>(v);
  if constexpr (kLanes >= 8) v += swap_lanes<4>(v);
  v += swap_lanes<2>(v);
  v += swap_lanes<1>(v);
  return v[0];
}

LCR_INLINE float max_lanes(Vec v) {
  if constexpr (kLanes >= 16) v = maximum(v, swap_lanes<8>(v));
  if constexpr (kLanes >= 8) v = maximum(v, swap_lanes<4>(v));
  v = maximum(v, swap_lanes<2>(v));
  v = maximum(v, swap_lanes<1>(v));
  return v[0];
}

// exp(x) within 1 ulp for x in [-87, 88]; below, the smallest normal number, and no infinities.
// NaN stays NaN: through both bounds, and through 2^n, which is multiplied with.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is exact; e^r by its Taylor
// polynomial of degree 7, whose error at that r is 5e-9; 2^n by its exponent bits.
LCR_INLINE Vec exp(Vec x) {
  x = maximum(splat(-87.0f), x);
  x = select(x > 88.0f, splat(88.0f), x);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(x, splat(1.44269504089f), splat(kRound));
  const Vec n = shifted - kRound;
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  Vec p = fma(r, splat(1.0f / 5040), splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  const IntVec power = ((IntVec)shifted + 127) << 23;  // the low bits of `shifted` hold n
  return p * (Vec)power;
}

// Pairs of rows `kStep` apart exchange their off-diagonal blocks of `kStep` lanes.
template <int kStep>
LCR_INLINE void exchange(Vec (&rows)[kLanes]) {
  const IntVec upper = (lane_numbers() & kStep) != 0;
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vec a = rows[i], b = rows[i + kStep];
    rows[i] = select(upper, swap_lanes<kStep>(b), a);
    rows[i + kStep] = select(upper, b, swap_lanes<kStep>(a));
  }
}

LCR_INLINE void transpose_block(Vec (&rows)[kLanes]) {
  exchange<1>(rows);
  exchange<2>(rows);
  if constexpr (kLanes >= 8) exchange<4>(rows);
  if constexpr (kLanes >= 16) exchange<8>(rows);
}

// Rows `row` floats apart.
struct EvenRows {
  const float* data;
  int64_t row;
  LCR_TARGET const float* operator[](int64_t i) const { return data + i * row; }
};

// out[c][r] = in[r][c]: `in` [n_rows, n_cols], an EvenRows or pointers to the rows; the rows of
// `out` are `out_row` floats apart. Columns of `out` up to the next multiple of kLanes become 0 or,
// where kInside, stay as they are.
template <bool kInside, class Rows>
LCR_TARGET void transpose_rows(const Rows in, int64_t n_rows, int64_t n_cols, float* out,
                               int64_t out_row) {
  for (int64_t r = 0; r < n_rows; r += kLanes) {
    const int64_t n_r = n_rows - r < kLanes ? n_rows - r : kLanes;
    for (int64_t c = 0; c < n_cols; c += kLanes) {
      const int64_t n_c = n_cols - c < kLanes ? n_cols - c : kLanes;
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = i < n_r ? load_first(in[r + i] + c, n_c) : Vec{};
      transpose_block(block);
      for (int64_t i = 0; i < n_c; ++i) {
        float* row = out + (c + i) * out_row + r;
        if (kInside)
          store_first(row, block[i], n_r);
        else
          store(row, block[i]);
      }
    }
  }
}

// The same of rows `in_row` floats apart.
template <bool kInside = false>
LCR_TARGET void transpose(const float* in, int64_t in_row, int64_t n_rows, int64_t n_cols,
                          float* out, int64_t out_row) {
  transpose_rows<kInside>(EvenRows{in, in_row}, n_rows, n_cols, out, out_row);
}

}  // namespace
}  // namespace lcr_fast
