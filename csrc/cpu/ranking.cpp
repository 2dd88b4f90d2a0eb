// Metrics of rows of given scores: the relevant items of a row, its counts, its places. The
// counting itself is in ranking_scan.h.
#include "../ranking.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "ranking_counts.h"

namespace lcr_fast {
namespace {

// One storage format of scores: how to read a key, and its counting loop.
struct Float32 {
  using Scalar = float;
  using Key = float;
  static Key key(Scalar x) { return x; }
  static bool is_nan(Scalar x) { return x != x; }
  static const CountKernels<Scalar, Key>& functions() { return ranking_kernels().float32; }
};
struct Float64 {
  using Scalar = double;
  using Key = double;
  static Key key(Scalar x) { return x; }
  static bool is_nan(Scalar x) { return x != x; }
  static const CountKernels<Scalar, Key>& functions() { return ranking_kernels().float64; }
};
struct Float16 {
  using Scalar = uint16_t;
  using Key = int16_t;
  static Key key(Scalar x) { return half_key(x); }
  static bool is_nan(Scalar x) { return (x & 0x7fff) > 0x7c00; }
  static const CountKernels<Scalar, Key>& functions() { return ranking_kernels().float16; }
};
struct BFloat16 {
  using Scalar = uint16_t;
  using Key = int16_t;
  static Key key(Scalar x) { return half_key(x); }
  static bool is_nan(Scalar x) { return (x & 0x7fff) > 0x7f80; }
  static const CountKernels<Scalar, Key>& functions() { return ranking_kernels().bfloat16; }
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
void target_rows(const RankingArgs& args, const MetricScorer& scorer, MetricSink& sink,
                 FirstFaults& faults, int64_t block) {
  const Ties ties = args.metric.ties;
  const int64_t begin = sink.begin(block), n_rows = sink.end(block) - begin;
  int64_t target[MetricSink::kMaxRows], counts[2 * MetricSink::kMaxRows];
  bool nan[MetricSink::kMaxRows];
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
void relevance_rows(const RankingArgs& args, const MetricScorer& scorer, MetricSink& sink,
                    FirstFaults& faults, int64_t block) {
  const Ties ties = args.metric.ties;
  const CountMode mode = count_mode(ties);
  RowReader<F> reader(args);
  std::vector<Relevant<F>> relevant;
  std::vector<typename F::Key> thresholds;
  std::vector<TiedGroup> groups;
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
      for (const TiedGroup& group : groups) {
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
void ranking_rows(const RankingArgs& args, const MetricScorer& scorer, MetricSink& sink,
                  FirstFaults& faults, int64_t block) {
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
  const MetricScorer scorer(args.metric);
  MetricSink sink(args.metric);
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

}  // namespace lcr_fast
