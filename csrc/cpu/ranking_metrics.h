// Places to metrics, metrics to the output.
#pragma once
#include <algorithm>
#include <vector>

#include "../ranking.h"

namespace lcr_fast {

// A relevant item stands, with equal chance, at any of the places above + 1 .. above + tied.
struct Place {
  int64_t above;
  int64_t tied;
};

// Candidates with a grade above 0 and the same score.
struct TiedGroup {
  int64_t begin;  // into the relevant items, best score first
  int64_t size;
  int64_t counts[2];
};

// Metrics of one row from the places of its relevant items.
class MetricScorer {
 public:
  explicit MetricScorer(const MetricArgs& args);

  // Relevant items after this many others cannot be within any cut-off.
  int64_t enough_relevant() const { return enough_relevant_; }

  // The values, in a table or in `space`.
  const double* one_target(Place place, double* space) const {
    if (place.above < table_places_) return table_.data() + place.above * args_.n_metrics;
    one_target_direct(place, space);
    return space;
  }

  // `places` from 1, in order, of the items with these `grades`; `ideal` holds all grades, falling.
  void strict(const std::vector<int64_t>& places, const std::vector<double>& grades,
              const std::vector<double>& ideal, double* values) const;

  // The expectation over every order of the tied items.
  void expected(const std::vector<TiedGroup>& groups, const std::vector<double>& grades,
                const std::vector<double>& ideal, double* values) const;

 private:
  static constexpr int64_t kTablePlaces = 256;

  void sum_prefixes(int64_t depth);
  void one_target_direct(Place place, double* values) const;

  const MetricArgs& args_;
  int64_t deepest_ = 0;
  int64_t enough_relevant_ = 1;
  int64_t table_places_ = 0;
  std::vector<double> table_;  // [table_places, n_metrics]
  std::vector<double> reciprocals_, discounts_;
};

// Writes rows, or adds them up in blocks whose borders do not depend on the number of threads.
class MetricSink {
 public:
  static constexpr int64_t kMaxRows = 512;

  explicit MetricSink(const MetricArgs& args)
      : args_(args),
        block_rows_(std::clamp<int64_t>(65536 / std::max<int64_t>(1, args.n_items), 1, kMaxRows)),
        n_blocks_((args.n_rows + block_rows_ - 1) / block_rows_) {
    if (args.output == Output::kSums) sums_.assign(n_blocks_ * (args.n_metrics + 1), 0.0);
  }

  int64_t n_blocks() const { return n_blocks_; }
  int64_t begin(int64_t block) const { return block * block_rows_; }
  int64_t end(int64_t block) const { return std::min(args_.n_rows, begin(block) + block_rows_); }

  void put(int64_t block, int64_t row, const double* values) {
    const int64_t n = args_.n_metrics;
    if (args_.output == Output::kRows32) {
      auto* out = static_cast<float*>(args_.out) + row * n;
      for (int64_t m = 0; m < n; ++m) out[m] = static_cast<float>(values[m]);
    } else if (args_.output == Output::kRows64) {
      std::copy_n(values, n, static_cast<double*>(args_.out) + row * n);
    } else {
      double* sums = &sums_[block * (n + 1)];
      for (int64_t m = 0; m < n; ++m) sums[m] += values[m];
      sums[n] += 1;
    }
  }

  // A row without a relevant item: zeros, and not counted.
  void put_nothing(int64_t row) {
    const int64_t n = args_.n_metrics;
    if (args_.output == Output::kRows32)
      std::fill_n(static_cast<float*>(args_.out) + row * n, n, 0.0f);
    else if (args_.output == Output::kRows64)
      std::fill_n(static_cast<double*>(args_.out) + row * n, n, 0.0);
  }

  void finish() {
    if (args_.output != Output::kSums) return;
    auto* out = static_cast<double*>(args_.out);
    const int64_t n = args_.n_metrics + 1;
    std::fill_n(out, n, 0.0);
    for (int64_t block = 0; block < n_blocks_; ++block)
      for (int64_t m = 0; m < n; ++m) out[m] += sums_[block * n + m];
  }

 private:
  const MetricArgs& args_;
  int64_t block_rows_;
  int64_t n_blocks_;
  std::vector<double> sums_;  // [n_blocks, n_metrics + 1]
};

}  // namespace lcr_fast
