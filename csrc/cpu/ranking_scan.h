// The inner loops of the CPU ranking path, compiled once per instruction set.
//
// Each ranking_<level>.cpp defines LCR_TARGET (the function attribute that enables its
// instructions) and LCR_BYTES (its vector width), includes this file, and exports one table of
// functions. All code here is in an unnamed namespace and calls nothing from the standard library,
// so no instruction of one level can reach a function that another level shares.
//
// Vectors are those of GCC and Clang: a comparison gives lanes of 0 or -1, so subtracting it
// counts.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace lcr_fast {

// What to count in a row: all that rank order needs depends on how ties are resolved.
enum CountMode { kGreater = 1, kAtLeast = 2, kBoth = 3 };

// Count, over `n` adjacent scores, those above `threshold` and those not below it, skipping the
// excluded ones (null: none), and add to `counts` {greater, at_least}. True if one is NaN.
template <class Scalar, class Key>
using CountFn = bool (*)(const Scalar* scores, const uint8_t* excluded, int64_t n, Key threshold,
                         CountMode mode, int64_t* counts);

// The same for `n_rows` whole rows, `step` scores apart, against their own targets; `counts` is
// [n_rows, 2] and `nan` [n_rows], both set. Rows with a negative target are left alone.
template <class Scalar>
using CountRowsFn = void (*)(const Scalar* scores, int64_t step, int64_t n_items,
                             const int64_t* target, int64_t n_rows, CountMode mode, int64_t* counts,
                             bool* nan);

// Multiply kUsers rows of `users` [kUsers, dim] with `n_items` packed items, whose coordinates lie
// as [n_items / kPanel][dim][kPanel], into out [kUsers, n_items]. The sum over `dim` is in order,
// so a score depends on its two vectors alone.
constexpr int kUsers = 4;
constexpr int kPanel = 32;
template <class T>
using DotsFn = void (*)(const T* users, const T* packed, int64_t n_items, int64_t dim, T* out);

// Half-precision scores are compared as integers of the same order: no conversion, twice the lanes.
inline int16_t half_key(uint16_t bits) {
  const int magnitude = bits & 0x7fff;
  return static_cast<int16_t>(bits & 0x8000 ? -magnitude : magnitude);
}

template <class Scalar, class Key>
struct CountKernels {
  CountFn<Scalar, Key> count;
  CountRowsFn<Scalar> count_rows;
};

struct RankingKernels {
  CountKernels<float, float> float32;
  CountKernels<double, double> float64;
  CountKernels<uint16_t, int16_t> float16;
  CountKernels<uint16_t, int16_t> bfloat16;
  DotsFn<float> dots_float32;
  DotsFn<double> dots_float64;
};

extern const RankingKernels kRankingBaseline;
extern const RankingKernels kRankingAvx2;
extern const RankingKernels kRankingAvx512;

}  // namespace lcr_fast

#ifdef LCR_TARGET

#include "fma.h"

namespace lcr_fast {
namespace {

template <class T, int kBytes = LCR_BYTES>
struct Vector {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <class T>
struct FloatFormat {
  using Scalar = T;
  using Key = T;
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Raw = typename Vector<T>::type;
  using Keys = Raw;
  using Lanes = typename Vector<Lane>::type;

  LCR_INLINE void keys(const Raw& raw, Keys& out) { out = raw; }
  LCR_INLINE void nan(const Raw& raw, Lanes& out) { out = raw != raw; }
  LCR_INLINE Key key(Scalar raw) { return raw; }
  LCR_INLINE bool nan(Scalar raw) { return raw != raw; }
};

template <int16_t kInfinity>
struct HalfFormat {
  using Scalar = uint16_t;
  using Key = int16_t;
  using Lane = int16_t;
  using Raw = typename Vector<int16_t>::type;
  using Keys = Raw;
  using Lanes = Raw;

  LCR_INLINE void keys(const Raw& raw, Keys& out) {
    const Lanes sign = raw >> 15;
    out = ((raw & 0x7fff) ^ sign) - sign;
  }
  LCR_INLINE void nan(const Raw& raw, Lanes& out) { out = (raw & 0x7fff) > kInfinity; }
  LCR_INLINE Key key(Scalar raw) { return half_key(raw); }
  LCR_INLINE bool nan(Scalar raw) { return (raw & 0x7fff) > kInfinity; }
};

using Float32 = FloatFormat<float>;
using Float64 = FloatFormat<double>;
using Float16 = HalfFormat<0x7c00>;
using BFloat16 = HalfFormat<0x7f80>;

template <class F>
constexpr int64_t kLanes = LCR_BYTES / sizeof(typename F::Scalar);

// Sums over lanes of 0 and 1; `less` because its complement would cost an instruction a vector.
template <class F>
struct Tally {
  typename F::Lanes greater = {};
  typename F::Lanes less = {};
  typename F::Lanes nan = {};
  typename F::Lanes live = {};
};

// Add the vector at `scores`; `live` has -1 in the lanes that count.
template <class F, int kMode, bool kMasked>
LCR_INLINE void tally_vector(const typename F::Scalar* scores, const typename F::Keys& threshold,
                             const typename F::Lanes& live, Tally<F>& tally) {
  typename F::Raw raw;
  std::memcpy(&raw, scores, sizeof raw);
  typename F::Keys keys;
  F::keys(raw, keys);
  typename F::Lanes nan;
  F::nan(raw, nan);
  typename F::Lanes greater = keys > threshold;
  typename F::Lanes less = keys < threshold;
  if (kMasked) {
    greater &= live;
    less &= live;
    nan &= live;
    tally.live -= live;
  }
  if (kMode & kGreater) tally.greater -= greater;
  if (kMode & kAtLeast) tally.less -= less;
  tally.nan -= nan;
}

// -1 where the byte is 0. Widened in steps of two, which compilers turn into single instructions.
template <class F>
LCR_INLINE void live_lanes(const uint8_t* excluded, typename F::Lanes& live) {
  constexpr int kWidth = kLanes<F>;
  typename Vector<uint8_t, kWidth>::type bytes;
  std::memcpy(&bytes, excluded, sizeof bytes);
  const auto words = __builtin_convertvector(bytes, typename Vector<int16_t, 2 * kWidth>::type);
  if constexpr (sizeof(typename F::Lane) == 2) {
    live = words == 0;
  } else {
    const auto longs = __builtin_convertvector(words, typename Vector<int32_t, 4 * kWidth>::type);
    if constexpr (sizeof(typename F::Lane) == 4)
      live = longs == 0;
    else
      live = __builtin_convertvector(longs, typename F::Lanes) == 0;
  }
}

// Sums of lanes: halve the vector down to 16 bytes, then add one by one.
template <class Lane, int kBytes>
LCR_INLINE int64_t lane_sum(const typename Vector<Lane, kBytes>::type& lanes) {
  if constexpr (kBytes > 16) {
    typename Vector<Lane, kBytes / 2>::type halves[2];
    std::memcpy(halves, &lanes, sizeof halves);
    return lane_sum<Lane, kBytes / 2>(halves[0] + halves[1]);
  } else {
    int64_t sum = 0;
    for (size_t i = 0; i < kBytes / sizeof(Lane); ++i) sum += lanes[i];
    return sum;
  }
}

template <class Lane, int kBytes>
LCR_INLINE bool any_lane(const typename Vector<Lane, kBytes>::type& lanes) {
  int64_t words[kBytes / 8];
  std::memcpy(words, &lanes, sizeof words);
  int64_t any = 0;
  for (int64_t word : words) any |= word;
  return any != 0;
}

template <class F>
LCR_INLINE typename F::Lanes lane_numbers() {
  typename F::Lanes lanes;
  for (int i = 0; i < kLanes<F>; ++i) lanes[i] = i;
  return lanes;
}

// A lane counts at most one a vector, lane_sum adds up to four lanes, and int16 holds 32767.
template <class F>
constexpr int64_t kChunk = kLanes<F> * 8000;

template <class F, int kMode, bool kExcluded>
LCR_INLINE bool count_chunk(const typename F::Scalar* scores, const uint8_t* excluded, int64_t n,
                            typename F::Key key, int64_t* counts) {
  constexpr int64_t kWidth = kLanes<F>;
  bool nan = false;
  int64_t i = 0;
  if (n >= kWidth) {
    int64_t n_live = 0;
    Tally<F> tally;
    const typename F::Keys threshold = typename F::Keys{} + key;
    typename F::Lanes live = {};
    if constexpr (!kExcluded) {
      // Two chains of additions, so that they overlap.
      Tally<F> other;
      for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
        tally_vector<F, kMode, false>(scores + i, threshold, live, tally);
        tally_vector<F, kMode, false>(scores + i + kWidth, threshold, live, other);
        tally_vector<F, kMode, false>(scores + i + 2 * kWidth, threshold, live, tally);
        tally_vector<F, kMode, false>(scores + i + 3 * kWidth, threshold, live, other);
      }
      tally.greater += other.greater;
      tally.less += other.less;
      tally.nan += other.nan;
    }
    for (; i + kWidth <= n; i += kWidth) {
      if (kExcluded) live_lanes<F>(excluded + i, live);
      tally_vector<F, kMode, kExcluded>(scores + i, threshold, live, tally);
    }
    if (!kExcluded) n_live = i;
    if (i < n) {
      // The last vector again, without the lanes that are counted already.
      const int64_t start = n - kWidth;
      typename F::Lanes fresh = lane_numbers<F>() >= static_cast<typename F::Lane>(i - start);
      if (kExcluded) {
        live_lanes<F>(excluded + start, live);
        fresh &= live;
      }
      tally_vector<F, kMode, true>(scores + start, threshold, fresh, tally);
    }
    using Lane = typename F::Lane;
    if (kMode & kGreater) counts[0] += lane_sum<Lane, LCR_BYTES>(tally.greater);
    if (kMode & kAtLeast) {
      if (kExcluded || i < n) n_live += lane_sum<Lane, LCR_BYTES>(tally.live);
      counts[1] += n_live - lane_sum<Lane, LCR_BYTES>(tally.less);
    }
    return any_lane<Lane, LCR_BYTES>(tally.nan);
  }
  for (; i < n; ++i) {
    if (kExcluded && excluded[i]) continue;
    const typename F::Key candidate = F::key(scores[i]);
    if (kMode & kGreater) counts[0] += candidate > key;
    if (kMode & kAtLeast) counts[1] += !(candidate < key);
    nan |= F::nan(scores[i]);
  }
  return nan;
}

template <class F, int kMode>
LCR_TARGET bool count_mode(const typename F::Scalar* scores, const uint8_t* excluded, int64_t n,
                           typename F::Key key, int64_t* counts) {
  bool nan = false;
  for (int64_t i = 0; i < n; i += kChunk<F>) {
    const int64_t m = n - i < kChunk<F> ? n - i : kChunk<F>;
    nan |= excluded ? count_chunk<F, kMode, true>(scores + i, excluded + i, m, key, counts)
                    : count_chunk<F, kMode, false>(scores + i, nullptr, m, key, counts);
  }
  return nan;
}

template <class F>
LCR_TARGET bool count(const typename F::Scalar* scores, const uint8_t* excluded, int64_t n,
                      typename F::Key key, CountMode mode, int64_t* counts) {
  switch (mode) {
    case kGreater:
      return count_mode<F, kGreater>(scores, excluded, n, key, counts);
    case kAtLeast:
      return count_mode<F, kAtLeast>(scores, excluded, n, key, counts);
    default:
      return count_mode<F, kBoth>(scores, excluded, n, key, counts);
  }
}

template <class F, int kMode>
LCR_TARGET void count_rows_mode(const typename F::Scalar* scores, int64_t step, int64_t n_items,
                                const int64_t* target, int64_t n_rows, int64_t* counts, bool* nan) {
  // Short rows outrun the hardware's prefetching: 512 bytes ahead took a sixth off the time of
  // 200,000 rows of 100 floats on a Zen 3 core.
  constexpr int64_t kAhead = 512;
  const int64_t row_bytes = n_items * static_cast<int64_t>(sizeof(typename F::Scalar));
  for (int64_t row = 0; row < n_rows; ++row, scores += step) {
    if (row_bytes <= 4096)
      for (int64_t b = 0; b < row_bytes; b += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(scores) + kAhead + b);
    if (target[row] < 0) continue;
    counts[2 * row] = counts[2 * row + 1] = 0;
    nan[row] = count_mode<F, kMode>(scores, nullptr, n_items, F::key(scores[target[row]]),
                                    counts + 2 * row);
  }
}

template <class F>
LCR_TARGET void count_rows(const typename F::Scalar* scores, int64_t step, int64_t n_items,
                           const int64_t* target, int64_t n_rows, CountMode mode, int64_t* counts,
                           bool* nan) {
  switch (mode) {
    case kGreater:
      return count_rows_mode<F, kGreater>(scores, step, n_items, target, n_rows, counts, nan);
    case kAtLeast:
      return count_rows_mode<F, kAtLeast>(scores, step, n_items, target, n_rows, counts, nan);
    default:
      return count_rows_mode<F, kBoth>(scores, step, n_items, target, n_rows, counts, nan);
  }
}

template <class F>
constexpr CountKernels<typename F::Scalar, typename F::Key> kCount = {count<F>, count_rows<F>};

template <class T>
LCR_TARGET void dots(const T* users, const T* packed, int64_t n_items, int64_t dim, T* out) {
  using V = typename Vector<T>::type;
  constexpr int kWidth = LCR_BYTES / sizeof(T);
  constexpr int kStep = kWidth * 2 < kPanel ? 2 : 1;  // vectors of items at a time
  for (int64_t item = 0; item < n_items; item += kWidth * kStep) {
    const T* column = packed + item / kPanel * kPanel * dim + item % kPanel;
    V sum[kUsers][kStep] = {};
    for (int64_t d = 0; d < dim; ++d) {
      // One vector a memcpy: a copy of the whole array would go through the stack.
      V coordinate[kStep];
      for (int j = 0; j < kStep; ++j)
        std::memcpy(&coordinate[j], column + d * kPanel + j * kWidth, sizeof(V));
      for (int user = 0; user < kUsers; ++user) {
        const V factor = splat(users[user * dim + d]);
        for (int j = 0; j < kStep; ++j) sum[user][j] = fma(factor, coordinate[j], sum[user][j]);
      }
    }
    for (int user = 0; user < kUsers; ++user)
      for (int j = 0; j < kStep; ++j)
        std::memcpy(out + user * n_items + item + j * kWidth, &sum[user][j], sizeof(V));
  }
}

}  // namespace
}  // namespace lcr_fast

#endif  // LCR_TARGET
