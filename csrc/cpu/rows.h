// Row-wise parts of a Transformer: softmax and LayerNorm, forward and backward.
//
// A matrix of width n has rows `row` floats apart, row >= round_up(n, kLanes); where a function
// says so, the columns behind n must be 0, and are 0 in what it writes.
#pragma once
#include "simd.h"

namespace lcr_fast {
namespace {

constexpr float kNormEps = 1e-5f;

// Softmax of scale * x over each row of x [m, n], in place; columns up to the next multiple of
// kLanes become 0.
[[maybe_unused]] LCR_TARGET void softmax_rows(float* x, int64_t row, int64_t m, int64_t n,
                                              float scale) {
  const int64_t tail = (n - 1) / kLanes * kLanes;  // where the last vector starts
  const IntVec live = first_lanes(n - tail);
  for (int64_t i = 0; i < m; ++i, x += row) {
    const Vec lowest = splat(-3.402823466e38f);
    Vec top = lowest;
    for (int64_t j = 0; j < tail; j += kLanes) top = maximum(top, load(x + j));
    top = maximum(top, select(live, load(x + tail), lowest));
    const float peak = max_lanes(top);
    Vec sum = {};
    for (int64_t j = 0; j < tail; j += kLanes) {
      const Vec e = exp((load(x + j) - peak) * scale);
      sum += e;
      store(x + j, e);
    }
    const Vec e = select(live, exp((load(x + tail) - peak) * scale), Vec{});
    const Vec share = splat(1.0f / sum_lanes(sum + e));
    for (int64_t j = 0; j < tail; j += kLanes) store(x + j, load(x + j) * share);
    store(x + tail, e * share);
  }
}

// Backward of softmax_rows: turn dp = d loss / d p into d loss / d x, in place. Columns behind n:
// those of p must be 0, those of dp finite; the results are 0.
[[maybe_unused]] LCR_TARGET void softmax_rows_bwd(const float* p, float* dp, int64_t row, int64_t m,
                                                  int64_t n, float scale) {
  for (int64_t i = 0; i < m; ++i, p += row, dp += row) {
    Vec dot = {};
    for (int64_t j = 0; j < n; j += kLanes) dot += load(p + j) * load(dp + j);
    const float mean = sum_lanes(dot);
    for (int64_t j = 0; j < n; j += kLanes)
      store(dp + j, load(p + j) * (load(dp + j) - mean) * scale);
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

// Columns behind n of x and update must be 0; those of out are 0.
[[maybe_unused]] LCR_TARGET void add_norm_rows(const NormRows& args, int64_t m, int64_t n) {
  const int64_t tail = (n - 1) / kLanes * kLanes;
  const IntVec live = first_lanes(n - tail);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t at = i * args.row;
    float* out = args.out + at;
    Vec sum = {};
    for (int64_t j = 0; j < n; j += kLanes) {
      Vec v = load(args.x + at + j);
      if (args.update != nullptr) {
        const Vec update = load(args.update + at + j);
        v += args.mask != nullptr ? update * load(args.mask + at + j) : update;
      }
      sum += v;
      store(out + j, v);
    }
    const float mean = sum_lanes(sum) / static_cast<float>(n);
    Vec squares = {};
    for (int64_t j = 0; j < tail; j += kLanes) {
      const Vec v = load(out + j) - mean;
      squares += v * v;
    }
    const Vec v = select(live, load(out + tail) - mean, Vec{});
    const float variance = sum_lanes(squares + v * v) / static_cast<float>(n);
    const float scale = 1.0f / __builtin_sqrtf(variance + kNormEps);
    if (args.scale != nullptr) args.scale[i] = scale;
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec normal = (load(out + j) - mean) * scale;
      if (args.normal != nullptr) store(args.normal + at + j, normal);
      store(out + j, normal * load(args.weight + j) + load(args.bias + j));
    }
  }
}

// Backward of the normalisation: from dy [m, n] the gradient of the sum x + update * mask, into
// dsum (may be dy), and of weight and bias, added to dweight and dbias. Columns behind n of dy and
// of weight must be 0; those of dsum are 0.
[[maybe_unused]] LCR_TARGET void norm_rows_bwd(const float* dy, const float* normal,
                                               const float* scale, const float* weight, int64_t row,
                                               int64_t m, int64_t n, float* dsum, float* dweight,
                                               float* dbias) {
  const int64_t tail = (n - 1) / kLanes * kLanes;
  const IntVec live = first_lanes(n - tail);
  const float share = 1.0f / static_cast<float>(n);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t at = i * row;
    Vec sum = {}, dot = {};
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec g = load(dy + at + j), x = load(normal + at + j);
      store(dweight + j, load(dweight + j) + g * x);
      store(dbias + j, load(dbias + j) + g);
      const Vec h = g * load(weight + j);
      sum += h;
      dot += h * x;
    }
    const float mean = sum_lanes(sum) * share, slope = sum_lanes(dot) * share;
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec h = load(dy + at + j) * load(weight + j);
      const Vec g = (h - mean - load(normal + at + j) * slope) * scale[i];
      store(dsum + at + j, j < tail ? g : select(live, g, Vec{}));
    }
  }
}

}  // namespace
}  // namespace lcr_fast
