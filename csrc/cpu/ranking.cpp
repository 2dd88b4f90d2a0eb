// Rows to places, places to metrics. The counting itself is in ranking_scan.h.
#include "../ranking.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "../cpu_level.h"
#include "ranking_scan.h"

namespace lcr_fast {
namespace {

constexpr int64_t kWholeList = std::numeric_limits<int64_t>::max();

const RankingKernels& kernels() {
#if defined(__x86_64__)
  if (cpu_level() >= 2) return kRankingAvx512;
  if (cpu_level() == 1) return kRankingAvx2;
#endif
  return kRankingBaseline;
}

// One storage format of scores: how to read a key, and its counting loop.
struct Float32 {
  using Scalar = float;
  using Key = float;
  static Key key(Scalar x) { return x; }
  static bool is_nan(Scalar x) { return x != x; }
  static const CountKernels<Scalar, Key>& functions() { return kernels().float32; }
};
struct Float64 {
  using Scalar = double;
  using Key = double;
  static Key key(Scalar x) { return x; }
  static bool is_nan(Scalar x) { return x != x; }
  static const CountKernels<Scalar, Key>& functions() { return kernels().float64; }
};
struct Float16 {
  using Scalar = uint16_t;
  using Key = int16_t;
  static Key key(Scalar x) { return half_key(x); }
  static bool is_nan(Scalar x) { return (x & 0x7fff) > 0x7c00; }
  static const CountKernels<Scalar, Key>& functions() { return kernels().float16; }
};
struct BFloat16 {
  using Scalar = uint16_t;
  using Key = int16_t;
  static Key key(Scalar x) { return half_key(x); }
  static bool is_nan(Scalar x) { return (x & 0x7fff) > 0x7f80; }
  static const CountKernels<Scalar, Key>& functions() { return kernels().bfloat16; }
};

// The lowest row that went wrong, whichever thread meets it first.
class FirstRow {
 public:
  explicit FirstRow(int64_t none) : row_(none) {}
  void note(int64_t row) {
    int64_t seen = row_.load();
    while (row < seen && !row_.compare_exchange_weak(seen, row)) {
    }
  }
  int64_t get() const { return row_.load(); }

 private:
  std::atomic<int64_t> row_;
};

struct FirstFaults {
  explicit FirstFaults(int64_t n_rows) : nan(n_rows), target(n_rows), counts(n_rows) {}
  Faults get() const { return {nan.get(), target.get(), counts.get()}; }
  FirstRow nan, target, counts;
};

CountMode count_mode(Ties ties) {
  if (ties == Ties::kPessimistic) return kAtLeast;
  if (ties == Ties::kOptimistic) return kGreater;
  return kBoth;
}

// A relevant item stands, with equal chance, at any of the places above + 1 .. above + tied.
struct Place {
  int64_t above;
  int64_t tied;
};

// `counts` are {greater, at_least} over the candidates, the target among them.
Place place_of(Ties ties, const int64_t* counts) {
  if (ties == Ties::kPessimistic) return {counts[1] - 1, 1};
  if (ties == Ties::kOptimistic) return {counts[0], 1};
  return {counts[0], counts[1] - counts[0]};
}

// 1 / log2(place + 1), of a place counted from 1.
double discount(int64_t place) {
  static const std::vector<double> table = [] {
    std::vector<double> values(1024);
    for (size_t i = 1; i < values.size(); ++i) values[i] = 1.0 / std::log2(i + 1.0);
    return values;
  }();
  return place < static_cast<int64_t>(table.size()) ? table[place] : 1.0 / std::log2(place + 1.0);
}

// Candidates with a grade above 0 and the same score.
struct Group {
  int64_t begin;  // into the relevant items, best score first
  int64_t size;
  int64_t counts[2];
};

// Metrics of one row from the places of its relevant items.
class Scorer {
 public:
  explicit Scorer(const MetricArgs& args) : args_(args) {
    for (int64_t m = 0; m < args.n_metrics; ++m) {
      const Metric metric = args.metrics[m];
      if (metric.kind == MetricKind::kRank) continue;
      deepest_ = std::max(deepest_, cutoff(metric));
      if (metric.kind != MetricKind::kMrr)
        enough_relevant_ = std::max(enough_relevant_, cutoff(metric));
    }
    if (args.ties == Ties::kAverage) sum_prefixes(std::min(deepest_, args.n_items));
    if (args.ties != Ties::kAverage && args.n_rows >= 2 * kTablePlaces) {
      table_places_ = std::min(kTablePlaces, args.n_items);
      table_.resize(table_places_ * args.n_metrics);
      for (int64_t i = 0; i < table_places_; ++i)
        one_target_direct({i, 1}, &table_[i * args.n_metrics]);
    }
  }

  // Relevant items after this many others cannot be within any cut-off.
  int64_t enough_relevant() const { return enough_relevant_; }

  // The values, in a table or in `space`.
  const double* one_target(Place place, double* space) const {
    if (place.above < table_places_) return &table_[place.above * args_.n_metrics];
    one_target_direct(place, space);
    return space;
  }

  // `places` from 1, in order, of the items with these `gains`; `ideal` holds all gains, falling.
  void strict(const std::vector<int64_t>& places, const std::vector<double>& grades,
              const std::vector<double>& ideal, double* values) const {
    const auto n_relevant = static_cast<double>(ideal.size());
    for (int64_t m = 0; m < args_.n_metrics; ++m) {
      const Metric metric = args_.metrics[m];
      const int64_t k = cutoff(metric);
      const size_t hits = std::upper_bound(places.begin(), places.end(), k) - places.begin();
      double value = 0;
      switch (metric.kind) {
        case MetricKind::kHr:
          value = hits > 0;
          break;
        case MetricKind::kRecall:
          value = hits / n_relevant;
          break;
        case MetricKind::kPrecision:
          value = static_cast<double>(hits) / k;
          break;
        case MetricKind::kMrr:
          value = hits > 0 ? 1.0 / places[0] : 0;
          break;
        case MetricKind::kRank:
          value = places[0];
          break;
        case MetricKind::kMap:
          for (size_t i = 0; i < hits; ++i) value += (i + 1.0) / places[i];
          value /= n_relevant;
          break;
        case MetricKind::kNdcg:
        case MetricKind::kNdcgExp:
          for (size_t i = 0; i < hits; ++i)
            value += gain(metric.kind, grades[i]) * discount(places[i]);
          value /= ideal_dcg(metric.kind, k, ideal);
          break;
      }
      values[m] = value;
    }
  }

  // The expectation over every order of the tied items.
  void expected(const std::vector<Group>& groups, const std::vector<double>& grades,
                const std::vector<double>& ideal, double* values) const {
    const auto n_relevant = static_cast<double>(ideal.size());
    for (int64_t m = 0; m < args_.n_metrics; ++m) {
      const Metric metric = args_.metrics[m];
      const int64_t k = cutoff(metric);
      double value = 0;
      switch (metric.kind) {
        case MetricKind::kHr:
        case MetricKind::kMrr:
          value = expected_first(metric.kind, k, groups[0]);
          break;
        case MetricKind::kRank:
          // The first of p among n shuffled items stands, on average, at (n + 1) / (p + 1).
          value = groups[0].counts[0] +
                  (groups[0].counts[1] - groups[0].counts[0] + 1.0) / (groups[0].size + 1.0);
          break;
        case MetricKind::kRecall:
        case MetricKind::kPrecision:
          for (const Group& group : groups)
            value += static_cast<double>(group.size) * reach(group, k) / tied(group);
          value /= metric.kind == MetricKind::kRecall ? n_relevant : static_cast<double>(k);
          break;
        case MetricKind::kMap:
          for (const Group& group : groups) value += expected_precisions(k, group);
          value /= n_relevant;
          break;
        case MetricKind::kNdcg:
        case MetricKind::kNdcgExp:
          for (const Group& group : groups) {
            double gains = 0;
            for (int64_t i = 0; i < group.size; ++i)
              gains += gain(metric.kind, grades[group.begin + i]);
            value += gains * mean_of(discounts_, group.counts[0], tied(group), reach(group, k));
          }
          value /= ideal_dcg(metric.kind, k, ideal);
          break;
      }
      values[m] = value;
    }
  }

 private:
  static constexpr int64_t kTablePlaces = 256;

  static int64_t cutoff(Metric metric) { return metric.k > 0 ? metric.k : kWholeList; }
  static int64_t tied(const Group& group) { return group.counts[1] - group.counts[0]; }
  // How many of a group's places are within the cut-off.
  static int64_t reach(const Group& group, int64_t k) {
    return std::clamp<int64_t>(k - group.counts[0], 0, tied(group));
  }
  static double gain(MetricKind kind, double grade) {
    return kind == MetricKind::kNdcgExp ? std::exp2(grade) - 1.0 : grade;
  }
  static double ideal_dcg(MetricKind kind, int64_t k, const std::vector<double>& ideal) {
    const int64_t n = std::min<int64_t>(k, ideal.size());
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += gain(kind, ideal[i]) * discount(i + 1);
    return sum;
  }

  void sum_prefixes(int64_t depth) {
    bool uses_discounts = false;
    for (int64_t m = 0; m < args_.n_metrics; ++m)
      uses_discounts |= args_.metrics[m].kind == MetricKind::kNdcg ||
                        args_.metrics[m].kind == MetricKind::kNdcgExp;
    reciprocals_.assign(depth + 1, 0.0);
    for (int64_t i = 1; i <= depth; ++i) reciprocals_[i] = reciprocals_[i - 1] + 1.0 / i;
    if (!uses_discounts) return;
    discounts_.assign(depth + 1, 0.0);
    for (int64_t i = 1; i <= depth; ++i) discounts_[i] = discounts_[i - 1] + discount(i);
  }

  // Mean over `tied` places after `above`, of which the first `reach` count, of a summed table.
  static double mean_of(const std::vector<double>& prefix, int64_t above, int64_t tied,
                        int64_t reach) {
    return reach > 0 ? (prefix[above + reach] - prefix[above]) / tied : 0.0;
  }

  void one_target_direct(Place place, double* values) const {
    for (int64_t m = 0; m < args_.n_metrics; ++m) {
      const Metric metric = args_.metrics[m];
      const int64_t k = cutoff(metric);
      const int64_t reach = std::clamp<int64_t>(k - place.above, 0, place.tied);
      double value = 0;
      switch (metric.kind) {
        case MetricKind::kHr:
        case MetricKind::kRecall:
          value = static_cast<double>(reach) / place.tied;
          break;
        case MetricKind::kPrecision:
          value = static_cast<double>(reach) / place.tied / k;
          break;
        case MetricKind::kMrr:
        case MetricKind::kMap:
          if (place.tied > 1)
            value = mean_of(reciprocals_, place.above, place.tied, reach);
          else if (reach > 0)
            value = 1.0 / (place.above + 1);
          break;
        case MetricKind::kNdcg:
        case MetricKind::kNdcgExp:
          if (place.tied > 1)
            value = mean_of(discounts_, place.above, place.tied, reach);
          else if (reach > 0)
            value = discount(place.above + 1);
          break;
        case MetricKind::kRank:
          value = place.above + (place.tied + 1) / 2.0;
          break;
      }
      values[m] = value;
    }
  }

  // The chance that a relevant item of the best group is within k, or the mean of 1 / its place.
  static double expected_first(MetricKind kind, int64_t k, const Group& group) {
    const int64_t n = tied(group);
    double none_yet = 1, mean = 0;
    for (int64_t i = 0; i < reach(group, k) && none_yet > 0; ++i) {
      const double here = none_yet * group.size / (n - i);
      mean += here / (group.counts[0] + i + 1);
      none_yet *= static_cast<double>(std::max<int64_t>(n - group.size - i, 0)) / (n - i);
    }
    return kind == MetricKind::kHr ? 1 - none_yet : mean;
  }

  // Sum over the group's places within k of P(relevant) times the expected precision there.
  static double expected_precisions(int64_t k, const Group& group) {
    const auto n = static_cast<double>(tied(group));
    const double others = n > 1 ? (group.size - 1) / (n - 1) : 0;
    double sum = 0;
    for (int64_t i = 0; i < reach(group, k); ++i)
      sum += (group.begin + 1 + i * others) / (group.counts[0] + i + 1);
    return sum * group.size / n;
  }

  const MetricArgs& args_;
  int64_t deepest_ = 0;
  int64_t enough_relevant_ = 1;
  int64_t table_places_ = 0;
  std::vector<double> table_;  // [table_places, n_metrics]
  std::vector<double> reciprocals_, discounts_;
};

// Writes rows, or adds them up in blocks whose borders do not depend on the number of threads.
class Sink {
 public:
  static constexpr int64_t kMaxRows = 512;

  explicit Sink(const MetricArgs& args)
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

template <class F>
class RowReader {
 public:
  using Scalar = typename F::Scalar;
  using Key = typename F::Key;

  explicit RowReader(const RankingArgs& args) : args_(args), count_(F::functions().count) {}

  // Point at a row; only its first n items are candidates.
  void seek(int64_t row, int64_t n) {
    scores_ = static_cast<const Scalar*>(args_.scores.data) + args_.scores.offset(row);
    excluded_ = nullptr;
    if (args_.excluded.data != nullptr)
      excluded_ = static_cast<const uint8_t*>(args_.excluded.data) + args_.excluded.offset(row);
    n_ = n;
  }

  Scalar score(int64_t item) const { return scores_[item * args_.scores.item_step]; }
  bool excluded(int64_t item) const {
    return excluded_ != nullptr && excluded_[item * args_.excluded.item_step] != 0;
  }

  // Add {greater, at_least} for each of the falling `thresholds` to `counts`; true on a NaN.
  bool count(const Key* thresholds, int64_t n_thresholds, CountMode mode, int64_t* counts) {
    const bool adjacent =
        args_.scores.item_step == 1 && (excluded_ == nullptr || args_.excluded.item_step == 1);
    if (adjacent && n_thresholds == 1)
      return count_(scores_, excluded_, n_, thresholds[0], mode, counts);
    bool nan = false;
    if (n_thresholds > kSearchAbove) tallies_.assign(2 * (n_thresholds + 1), 0);
    for (int64_t begin = 0; begin < n_; begin += kPiece) {
      const int64_t n = std::min(kPiece, n_ - begin);
      const Scalar* scores = gather(scores_, args_.scores.item_step, begin, n, score_piece_);
      const uint8_t* excluded = nullptr;
      if (excluded_ != nullptr)
        excluded = gather(excluded_, args_.excluded.item_step, begin, n, excluded_piece_);
      if (n_thresholds > kSearchAbove) {
        nan |= search(scores, excluded, n, thresholds, n_thresholds);
      } else {
        for (int64_t t = 0; t < n_thresholds; ++t)
          nan |= count_(scores, excluded, n, thresholds[t], mode, counts + 2 * t);
      }
    }
    if (n_thresholds > kSearchAbove) {
      int64_t at_least = 0;
      for (int64_t t = 0; t < n_thresholds; ++t) {
        at_least += tallies_[2 * t];
        counts[2 * t] += at_least - tallies_[2 * t + 1];
        counts[2 * t + 1] += at_least;
      }
    }
    return nan;
  }

 private:
  // Scores that stay in the first-level cache while several thresholds pass over them.
  static constexpr int64_t kPiece = 2048;
  // From here on a binary search per score beats a vector pass per threshold.
  static constexpr int64_t kSearchAbove = 128;

  template <class T>
  static const T* gather(const T* row, int64_t step, int64_t begin, int64_t n, T* piece) {
    if (step == 1) return row + begin;
    for (int64_t i = 0; i < n; ++i) piece[i] = row[(begin + i) * step];
    return piece;
  }

  // tallies[t] = {scores that reach threshold t and none before, scores equal to it}
  bool search(const Scalar* scores, const uint8_t* excluded, int64_t n, const Key* thresholds,
              int64_t n_thresholds) {
    bool nan = false;
    for (int64_t i = 0; i < n; ++i) {
      if (excluded != nullptr && excluded[i]) continue;
      nan |= F::is_nan(scores[i]);
      const Key key = F::key(scores[i]);
      const int64_t t = std::partition_point(thresholds, thresholds + n_thresholds,
                                             [key](Key threshold) { return threshold > key; }) -
                        thresholds;
      ++tallies_[2 * t];
      tallies_[2 * t + 1] += t < n_thresholds && thresholds[t] == key;
    }
    return nan;
  }

  const RankingArgs& args_;
  CountFn<Scalar, Key> count_;
  const Scalar* scores_ = nullptr;
  const uint8_t* excluded_ = nullptr;
  int64_t n_ = 0;
  std::vector<int64_t> tallies_;
  Scalar score_piece_[kPiece];
  uint8_t excluded_piece_[kPiece];
};

// The candidates of a row, or -1 where its count is impossible.
int64_t n_candidates(const RankingArgs& args, int64_t row) {
  if (args.counts == nullptr) return args.metric.n_items;
  const int64_t n = args.counts[row];
  return n >= 0 && n <= args.metric.n_items ? n : -1;
}

// The common case, whole rows a fixed step apart: a block of rows in one call.
template <class F>
bool count_block(const RankingArgs& args, int64_t begin, int64_t n_rows, const int64_t* target,
                 int64_t* counts, bool* nan) {
  const Rows& rows = args.scores;
  if (rows.n_axes != 1 || rows.item_step != 1 || args.counts || args.excluded.data) return false;
  const auto* scores = static_cast<const typename F::Scalar*>(rows.data) + rows.offset(begin);
  F::functions().count_rows(scores, rows.step[0], args.metric.n_items, target, n_rows,
                            count_mode(args.metric.ties), counts, nan);
  return true;
}

template <class F>
void target_rows(const RankingArgs& args, const Scorer& scorer, Sink& sink, FirstFaults& faults,
                 int64_t block) {
  const Ties ties = args.metric.ties;
  const int64_t begin = sink.begin(block), n_rows = sink.end(block) - begin;
  int64_t target[Sink::kMaxRows], counts[2 * Sink::kMaxRows];
  bool nan[Sink::kMaxRows];
  for (int64_t i = 0; i < n_rows; ++i) {
    const int64_t n = n_candidates(args, begin + i);
    target[i] = args.target[begin + i];
    if (n < 0)
      faults.counts.note(begin + i);
    else if (target[i] < -1 || target[i] >= n)
      faults.target.note(begin + i);
    if (n < 0 || target[i] >= n) target[i] = -1;
  }
  if (!count_block<F>(args, begin, n_rows, target, counts, nan)) {
    RowReader<F> reader(args);
    for (int64_t i = 0; i < n_rows; ++i) {
      if (target[i] < 0) continue;
      reader.seek(begin + i, n_candidates(args, begin + i));
      const auto score = reader.score(target[i]);
      const auto key = F::key(score);
      counts[2 * i] = 0;
      counts[2 * i + 1] = reader.excluded(target[i]) ? 1 : 0;
      nan[i] = reader.count(&key, 1, count_mode(ties), counts + 2 * i) || F::is_nan(score);
    }
  }
  double values[kMaxMetrics];
  for (int64_t i = 0; i < n_rows; ++i) {
    if (target[i] < 0) {
      sink.put_nothing(begin + i);
    } else if (nan[i]) {
      faults.nan.note(begin + i);
    } else {
      sink.put(block, begin + i, scorer.one_target(place_of(ties, counts + 2 * i), values));
    }
  }
}

template <class F>
struct Relevant {
  typename F::Key key;
  double grade;
  bool excluded;
};

template <class F, class Grade>
void find_relevant(const RankingArgs& args, const RowReader<F>& reader, int64_t row, int64_t n,
                   std::vector<Relevant<F>>& found, bool& nan) {
  const Grade* grades = static_cast<const Grade*>(args.relevance.data) + args.relevance.offset(row);
  const int64_t step = args.relevance.item_step;
  for (int64_t i = 0; i < n; ++i) {
    if (!(grades[i * step] > 0)) continue;
    nan |= F::is_nan(reader.score(i));
    found.push_back(
        {F::key(reader.score(i)), static_cast<double>(grades[i * step]), reader.excluded(i)});
  }
}

template <class F, class Grade>
void relevance_rows(const RankingArgs& args, const Scorer& scorer, Sink& sink, FirstFaults& faults,
                    int64_t block) {
  const Ties ties = args.metric.ties;
  const CountMode mode = count_mode(ties);
  RowReader<F> reader(args);
  std::vector<Relevant<F>> relevant;
  std::vector<typename F::Key> thresholds;
  std::vector<Group> groups;
  std::vector<int64_t> counts, places;
  std::vector<double> grades, ideal;
  double values[kMaxMetrics];
  for (int64_t row = sink.begin(block); row < sink.end(block); ++row) {
    const int64_t n = n_candidates(args, row);
    if (n < 0) {
      faults.counts.note(row);
      continue;
    }
    reader.seek(row, n);
    relevant.clear();
    bool nan = false;
    find_relevant<F, Grade>(args, reader, row, n, relevant, nan);
    if (relevant.empty()) {
      sink.put_nothing(row);
      continue;
    }
    if (nan) {
      faults.nan.note(row);
      continue;
    }
    // Best score first; among equal scores the order in which this rule lists them.
    std::sort(relevant.begin(), relevant.end(), [ties](const auto& a, const auto& b) {
      if (a.key != b.key) return a.key > b.key;
      return ties == Ties::kPessimistic ? a.grade < b.grade : a.grade > b.grade;
    });
    grades.clear();
    for (const auto& item : relevant) grades.push_back(item.grade);
    ideal = grades;
    std::sort(ideal.begin(), ideal.end(), std::greater<>());

    thresholds.clear();
    groups.clear();
    const auto n_relevant = static_cast<int64_t>(relevant.size());
    for (int64_t i = 0; i < n_relevant; ++i) {
      if (i > 0 && relevant[i].key == relevant[i - 1].key) {
        ++groups.back().size;
        continue;
      }
      if (i >= scorer.enough_relevant()) break;
      groups.push_back({i, 1, {0, 0}});
      thresholds.push_back(relevant[i].key);
    }
    counts.assign(2 * groups.size(), 0);
    if (reader.count(thresholds.data(), thresholds.size(), mode, counts.data())) {
      faults.nan.note(row);
      continue;
    }
    // Excluded relevant items compete, though the scan passed over them.
    for (const auto& item : relevant) {
      if (!item.excluded) continue;
      for (size_t g = 0; g < groups.size(); ++g) {
        counts[2 * g] += item.key > thresholds[g];
        counts[2 * g + 1] += item.key >= thresholds[g];
      }
    }
    for (size_t g = 0; g < groups.size(); ++g) std::copy_n(&counts[2 * g], 2, groups[g].counts);

    if (ties == Ties::kAverage) {
      scorer.expected(groups, grades, ideal, values);
    } else {
      places.clear();
      for (const Group& group : groups) {
        const int64_t first =
            ties == Ties::kPessimistic ? group.counts[1] - group.size + 1 : group.counts[0] + 1;
        for (int64_t i = 0; i < group.size; ++i) places.push_back(first + i);
      }
      scorer.strict(places, grades, ideal, values);
    }
    sink.put(block, row, values);
  }
}

template <class F>
void ranking_rows(const RankingArgs& args, const Scorer& scorer, Sink& sink, FirstFaults& faults,
                  int64_t block) {
  if (args.relevance.data == nullptr) return target_rows<F>(args, scorer, sink, faults, block);
  switch (args.grade_type) {
    case GradeType::kBool:
      return relevance_rows<F, uint8_t>(args, scorer, sink, faults, block);
    case GradeType::kInt32:
      return relevance_rows<F, int32_t>(args, scorer, sink, faults, block);
    case GradeType::kInt64:
      return relevance_rows<F, int64_t>(args, scorer, sink, faults, block);
    case GradeType::kFloat32:
      return relevance_rows<F, float>(args, scorer, sink, faults, block);
    case GradeType::kFloat64:
      return relevance_rows<F, double>(args, scorer, sink, faults, block);
  }
}

}  // namespace

Faults ranking_cpu(const RankingArgs& args, const Parallel& parallel) {
  const Scorer scorer(args.metric);
  Sink sink(args.metric);
  FirstFaults faults(args.metric.n_rows);
  parallel(sink.n_blocks(), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      switch (args.score_type) {
        case ScoreType::kFloat32:
          ranking_rows<Float32>(args, scorer, sink, faults, block);
          break;
        case ScoreType::kFloat64:
          ranking_rows<Float64>(args, scorer, sink, faults, block);
          break;
        case ScoreType::kFloat16:
          ranking_rows<Float16>(args, scorer, sink, faults, block);
          break;
        case ScoreType::kBFloat16:
          ranking_rows<BFloat16>(args, scorer, sink, faults, block);
          break;
      }
    }
  });
  sink.finish();
  return faults.get();
}

namespace {

double widen(double x) { return x; }
float widen(float x) { return x; }

template <ScoreType kType>
float widen_half(uint16_t bits) {
  if constexpr (kType == ScoreType::kBFloat16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
  } else {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float x;
    if (exponent == 31)
      x = fraction ? std::numeric_limits<float>::quiet_NaN()
                   : std::numeric_limits<float>::infinity();
    else
      x = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                        : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return bits & 0x8000 ? -x : x;
  }
}

// Read vectors of any float type and any strides as T.
template <ScoreType kType>
struct VectorReader {
  using Scalar =
      std::conditional_t<kType == ScoreType::kFloat32, float,
                         std::conditional_t<kType == ScoreType::kFloat64, double, uint16_t>>;
  using T = std::conditional_t<kType == ScoreType::kFloat64, double, float>;

  static T read(const Rows& rows, int64_t row, int64_t d) {
    const Scalar x = static_cast<const Scalar*>(rows.data)[rows.offset(row) + d * rows.item_step];
    if constexpr (sizeof(Scalar) == 2)
      return widen_half<kType>(x);
    else
      return widen(x);
  }
};

template <class T>
DotsFn<T> dots_function() {
  if constexpr (sizeof(T) == 8)
    return kernels().dots_float64;
  else
    return kernels().dots_float32;
}

template <class T>
CountFn<T, T> count_function() {
  if constexpr (sizeof(T) == 8)
    return kernels().float64.count;
  else
    return kernels().float32.count;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Write item `item` into column `slot` of a packed block; null items are zero vectors.
template <ScoreType kType, class T>
void pack(const CatalogueArgs& args, int64_t item, int64_t slot, T* packed) {
  T* column = packed + slot / kPanel * kPanel * args.dim + slot % kPanel;
  for (int64_t d = 0; d < args.dim; ++d)
    column[d * kPanel] = item < 0 ? T{} : VectorReader<kType>::read(args.items, item, d);
}

template <ScoreType kType>
Faults catalogue(const CatalogueArgs& args, const Parallel& parallel) {
  using T = typename VectorReader<kType>::T;
  constexpr int64_t kBlock = 512;  // items of a task; 128 KB of floats at 64 dimensions
  const int64_t n_users = args.metric.n_rows, n_items = args.metric.n_items, dim = args.dim;
  const int64_t n_tiles = (n_users + kUsers - 1) / kUsers;
  const Ties ties = args.metric.ties;
  const CountMode mode = count_mode(ties);
  const DotsFn<T> dots = dots_function<T>();
  const CountFn<T, T> count = count_function<T>();
  FirstFaults faults(n_users);

  std::vector<T> users(n_tiles * kUsers * dim);  // padded with zero users
  std::vector<T> threshold(n_tiles * kUsers);
  std::unique_ptr<std::atomic<int64_t>[]> totals(new std::atomic<int64_t>[2 * n_users]());
  const auto absent = [&](int64_t user) {
    return args.target[user] < 0 || args.target[user] >= n_items;
  };

  // The targets' scores, and minus what the seen items will add to the counts below.
  parallel(n_tiles, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> seen;
    std::vector<T> packed, scores;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kUsers;
      const int64_t last = std::min(n_users, first + kUsers);
      for (int64_t user = first; user < last; ++user)
        for (int64_t d = 0; d < dim; ++d)
          users[user * dim + d] = VectorReader<kType>::read(args.users, user, d);
      packed.resize(kPanel * dim);
      scores.resize(kUsers * kPanel);
      for (int64_t slot = 0; slot < kPanel; ++slot) {
        const int64_t user = first + slot;
        pack<kType>(args, user < last && !absent(user) ? args.target[user] : -1, slot,
                    packed.data());
      }
      dots(&users[first * dim], packed.data(), kPanel, dim, scores.data());
      for (int64_t user = first; user < last; ++user) {
        const int64_t i = user - first;
        threshold[user] = scores[i * kPanel + i];
        if (args.target[user] < -1 || args.target[user] >= n_items) faults.target.note(user);
      }
      if (args.seen == nullptr) continue;
      for (int64_t user = first; user < last; ++user) {
        if (absent(user)) continue;
        seen.clear();
        for (int64_t i = 0; i < args.n_seen; ++i) {
          const int64_t item = args.seen[user * args.n_seen + i];
          if (item >= n_items)
            faults.counts.note(user);
          else if (item >= 0 && item != args.target[user])
            seen.push_back(item);
        }
        std::sort(seen.begin(), seen.end());
        seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
        const auto n_seen = static_cast<int64_t>(seen.size());
        const int64_t width = round_up(n_seen, kPanel);
        packed.resize(std::max(width, int64_t{kPanel}) * dim);
        scores.resize(kUsers * std::max(width, int64_t{kPanel}));
        for (int64_t slot = 0; slot < width; ++slot)
          pack<kType>(args, slot < n_seen ? seen[slot] : -1, slot, packed.data());
        dots(&users[first * dim], packed.data(), width, dim, scores.data());
        int64_t counts[2] = {0, 0};
        count(&scores[(user - first) * width], nullptr, n_seen, threshold[user], mode, counts);
        totals[2 * user] -= counts[0];
        totals[2 * user + 1] -= counts[1];
      }
    }
  });

  parallel((n_items + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
    std::vector<T> packed(kBlock * dim), scores(kUsers * kBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock;
      const int64_t n = std::min(kBlock, n_items - first);
      const int64_t width = round_up(n, kPanel);
      for (int64_t slot = 0; slot < width; ++slot)
        pack<kType>(args, slot < n ? first + slot : -1, slot, packed.data());
      for (int64_t tile = 0; tile < n_tiles; ++tile) {
        dots(&users[tile * kUsers * dim], packed.data(), width, dim, scores.data());
        for (int64_t user = tile * kUsers; user < std::min(n_users, (tile + 1) * kUsers); ++user) {
          if (absent(user)) continue;
          int64_t counts[2] = {0, 0};
          if (count(&scores[(user - tile * kUsers) * width], nullptr, n, threshold[user], mode,
                    counts))
            faults.nan.note(user);
          if (counts[0]) totals[2 * user].fetch_add(counts[0], std::memory_order_relaxed);
          if (counts[1]) totals[2 * user + 1].fetch_add(counts[1], std::memory_order_relaxed);
        }
      }
    }
  });

  const Scorer scorer(args.metric);
  Sink sink(args.metric);
  double values[kMaxMetrics];
  for (int64_t block = 0; block < sink.n_blocks(); ++block) {
    for (int64_t user = sink.begin(block); user < sink.end(block); ++user) {
      if (absent(user)) {
        sink.put_nothing(user);
        continue;
      }
      const int64_t counts[2] = {totals[2 * user], totals[2 * user + 1]};
      sink.put(block, user, scorer.one_target(place_of(ties, counts), values));
    }
  }
  sink.finish();
  return faults.get();
}

}  // namespace

Faults catalogue_cpu(const CatalogueArgs& args, const Parallel& parallel) {
  switch (args.type) {
    case ScoreType::kFloat32:
      return catalogue<ScoreType::kFloat32>(args, parallel);
    case ScoreType::kFloat64:
      return catalogue<ScoreType::kFloat64>(args, parallel);
    case ScoreType::kFloat16:
      return catalogue<ScoreType::kFloat16>(args, parallel);
    default:
      return catalogue<ScoreType::kBFloat16>(args, parallel);
  }
}

}  // namespace lcr_fast
