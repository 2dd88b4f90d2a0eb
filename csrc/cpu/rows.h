// Row-wise parts of a Transformer: softmax and LayerNorm, forward and backward.
//
// A matrix of width n has rows `row` floats apart, row >= round_up(n, kLanes).
#pragma once
#include "simd.h"

namespace lcr_fast {
namespace {

constexpr float kNormEps = 1e-5f;

// Rows that are worked on side by side: each waits for sums over its lanes, and one row's wait is
// another's work. A row's bits do not depend on it.
constexpr int kRowGroup = 4;

template <int kRows>
LCR_TARGET void softmax_group(float* x, int64_t row, int64_t n, float scale) {
  const int64_t tail = (n - 1) / kLanes * kLanes;  // where the last vector starts
  const IntVec live = first_lanes(n - tail);
  const Vec lowest = splat(-__builtin_inff());  // of which a row of nothing else makes NaN
  float peak[kRows];
  Vec sum[kRows], last[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    Vec top = lowest;
    for (int64_t j = 0; j < tail; j += kLanes) top = maximum(top, load(x + i * row + j));
    top = maximum(top, select(live, load(x + i * row + tail), lowest));
    peak[i] = max_lanes(top);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    float* out = x + i * row;
    sum[i] = Vec{};
    for (int64_t j = 0; j < tail; j += kLanes) {
      const Vec e = exp((load(out + j) - peak[i]) * scale);
      sum[i] += e;
      store(out + j, e);
    }
    last[i] = select(live, exp((load(out + tail) - peak[i]) * scale), Vec{});
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    float* out = x + i * row;
    const Vec share = splat(1.0f / sum_lanes(sum[i] + last[i]));
    for (int64_t j = 0; j < tail; j += kLanes) store(out + j, load(out + j) * share);
    store(out + tail, last[i] * share);
  }
}

// Softmax of scale * x over each row of x [m, n], in place; columns up to the next multiple of
// kLanes become 0.
[[maybe_unused]] LCR_TARGET void softmax_rows(float* x, int64_t row, int64_t m, int64_t n,
                                              float scale) {
  int64_t i = 0;
  for (; i + kRowGroup <= m; i += kRowGroup) softmax_group<kRowGroup>(x + i * row, row, n, scale);
  for (; i < m; ++i) softmax_group<1>(x + i * row, row, n, scale);
}

// Backward of softmax_rows: turn dp = d loss / d p into d loss / d x, in place. Columns behind n
// become 0; those of dp are not used.
[[maybe_unused]] LCR_TARGET void softmax_rows_bwd(const float* p, float* dp, int64_t row, int64_t m,
                                                  int64_t n, float scale) {
  const int64_t tail = (n - 1) / kLanes * kLanes;
  const IntVec live = first_lanes(n - tail);
  for (int64_t i = 0; i < m; ++i, p += row, dp += row) {
    const Vec end = select(live, load(dp + tail), Vec{});
    Vec dot = load(p + tail) * end;
    for (int64_t j = 0; j < tail; j += kLanes) dot = fma(load(p + j), load(dp + j), dot);
    const float mean = sum_lanes(dot);
    for (int64_t j = 0; j < tail; j += kLanes)
      store(dp + j, load(p + j) * (load(dp + j) - mean) * scale);
    store(dp + tail, load(p + tail) * (end - mean) * scale);
  }
}

// out = LN(x + update * mask) over rows of width n, with what backward needs of it.
struct NormRows {
  const float* x;
  const float* update = nullptr;  // null: none
  const float* mask = nullptr;    // null: ones
  const float* weight = nullptr;  // [round_up(n, kLanes)], 0 behind n
  const float* bias = nullptr;    // likewise
  float* out = nullptr;           // may be x or update
  float* normal = nullptr;        // (sum - mean) / deviation, or null; may be update
  float* scale = nullptr;         // [m] 1 / deviation, or null
  int64_t row = 0;                // of all matrices
};

// Rows `first` .. first + kRows - 1 of add_norm_rows().
template <int kRows>
LCR_TARGET void add_norm_group(const NormRows& args, int64_t first, int64_t n) {
  const int64_t tail = (n - 1) / kLanes * kLanes, row = args.row, at = first * row;
  const IntVec live = first_lanes(n - tail);
  const auto width = static_cast<float>(n);
  float mean[kRows], scale[kRows];
  Vec sum[kRows], squares[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const int64_t from = at + i * row;
    sum[i] = Vec{};
    for (int64_t j = 0; j < n; j += kLanes) {
      Vec v = load(args.x + from + j);
      if (args.update != nullptr) {
        const Vec update = load(args.update + from + j);
        v = args.mask != nullptr ? fma(update, load(args.mask + from + j), v) : v + update;
      }
      if (j == tail) v = select(live, v, Vec{});
      sum[i] += v;
      store(args.out + from + j, v);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) mean[i] = sum_lanes(sum[i]) / width;
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const float* out = args.out + at + i * row;
    squares[i] = Vec{};
    for (int64_t j = 0; j < tail; j += kLanes) {
      const Vec v = load(out + j) - mean[i];
      squares[i] = fma(v, v, squares[i]);
    }
    const Vec v = select(live, load(out + tail) - mean[i], Vec{});
    squares[i] = fma(v, v, squares[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
    scale[i] = 1.0f / __builtin_sqrtf(sum_lanes(squares[i]) / width + kNormEps);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const int64_t to = at + i * row;
    if (args.scale != nullptr) args.scale[first + i] = scale[i];
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec normal = (load(args.out + to + j) - mean[i]) * scale[i];
      if (args.normal != nullptr) store(args.normal + to + j, normal);
      store(args.out + to + j, fma(normal, load(args.weight + j), load(args.bias + j)));
    }
  }
}

// Columns behind n are not used, and are 0 in out.
[[maybe_unused]] LCR_TARGET void add_norm_rows(const NormRows& args, int64_t m, int64_t n) {
  int64_t i = 0;
  for (; i + kRowGroup <= m; i += kRowGroup) add_norm_group<kRowGroup>(args, i, n);
  for (; i < m; ++i) add_norm_group<1>(args, i, n);
}

// Backward of the normalisation: from dy [m, n] the gradient of the sum x + update * mask, into
// dsum (may be dy), and of weight and bias, added to dweight and dbias [round_up(n, kLanes)].
// Columns behind n of dy are not used; there, dsum, dweight and dbias stay or become 0.
[[maybe_unused]] LCR_TARGET void norm_rows_bwd(const float* dy, const float* normal,
                                               const float* scale, const float* weight, int64_t row,
                                               int64_t m, int64_t n, float* dsum, float* dweight,
                                               float* dbias) {
  const int64_t tail = (n - 1) / kLanes * kLanes;
  const IntVec live = first_lanes(n - tail);
  const float share = 1.0f / static_cast<float>(n);
  // Sums over the rows of this call first, so that a long sum is one of partial sums.
  for (int64_t j = 0; j < n; j += kLanes) {
    Vec slope = {}, offset = {};
    for (int64_t i = 0; i < m; ++i) {
      const Vec g = load(dy + i * row + j);
      slope = fma(g, load(normal + i * row + j), slope);
      offset += g;
    }
    if (j == tail) slope = select(live, slope, Vec{}), offset = select(live, offset, Vec{});
    store(dweight + j, load(dweight + j) + slope);
    store(dbias + j, load(dbias + j) + offset);
  }
  for (int64_t i = 0; i < m; ++i) {
    const int64_t at = i * row;
    Vec sum = {}, dot = {};
    for (int64_t j = 0; j < n; j += kLanes) {
      Vec h = load(dy + at + j) * load(weight + j);
      if (j == tail) h = select(live, h, Vec{});
      sum += h;
      dot = fma(h, load(normal + at + j), dot);
    }
    const float mean = sum_lanes(sum) * share, slope = sum_lanes(dot) * share;
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec h = load(dy + at + j) * load(weight + j);
      const Vec g = fma(load(normal + at + j), splat(-slope), h - mean) * scale[i];
      store(dsum + at + j, j < tail ? g : select(live, g, Vec{}));
    }
  }
}

}  // namespace
}  // namespace lcr_fast
