#include "ranking_metrics.h"

#include <cmath>
#include <limits>

namespace lcr_fast {
namespace {

constexpr int64_t kWholeList = std::numeric_limits<int64_t>::max();

// 1 / log2(place + 1), of a place counted from 1.
double discount(int64_t place) {
  static const std::vector<double> table = [] {
    std::vector<double> values(1024);
    for (size_t i = 1; i < values.size(); ++i) values[i] = 1.0 / std::log2(i + 1.0);
    return values;
  }();
  return place < static_cast<int64_t>(table.size()) ? table[place] : 1.0 / std::log2(place + 1.0);
}

int64_t cutoff(Metric metric) { return metric.k > 0 ? metric.k : kWholeList; }
int64_t tied(const TiedGroup& group) { return group.counts[1] - group.counts[0]; }
// How many of a group's places are within the cut-off.
int64_t reach(const TiedGroup& group, int64_t k) {
  return std::clamp<int64_t>(k - group.counts[0], 0, tied(group));
}
double gain(MetricKind kind, double grade) {
  return kind == MetricKind::kNdcgExp ? std::exp2(grade) - 1.0 : grade;
}
double ideal_dcg(MetricKind kind, int64_t k, const std::vector<double>& ideal) {
  const int64_t n = std::min<int64_t>(k, ideal.size());
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += gain(kind, ideal[i]) * discount(i + 1);
  return sum;
}

// Mean over `tied` places after `above`, of which the first `reach` count, of a summed table.
double mean_of(const std::vector<double>& prefix, int64_t above, int64_t tied, int64_t reach) {
  return reach > 0 ? (prefix[above + reach] - prefix[above]) / tied : 0.0;
}

// The chance that a relevant item of the best group is within k, or the mean of 1 / its place.
double expected_first(MetricKind kind, int64_t k, const TiedGroup& group) {
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
double expected_precisions(int64_t k, const TiedGroup& group) {
  const auto n = static_cast<double>(tied(group));
  const double others = n > 1 ? (group.size - 1) / (n - 1) : 0;
  double sum = 0;
  for (int64_t i = 0; i < reach(group, k); ++i)
    sum += (group.begin + 1 + i * others) / (group.counts[0] + i + 1);
  return sum * group.size / n;
}

}  // namespace

MetricScorer::MetricScorer(const MetricArgs& args) : args_(args) {
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
      one_target_direct({i, 1}, table_.data() + i * args.n_metrics);
  }
}

void MetricScorer::strict(const std::vector<int64_t>& places, const std::vector<double>& grades,
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

void MetricScorer::expected(const std::vector<TiedGroup>& groups, const std::vector<double>& grades,
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
        for (const TiedGroup& group : groups)
          value += static_cast<double>(group.size) * reach(group, k) / tied(group);
        value /= metric.kind == MetricKind::kRecall ? n_relevant : static_cast<double>(k);
        break;
      case MetricKind::kMap:
        for (const TiedGroup& group : groups) value += expected_precisions(k, group);
        value /= n_relevant;
        break;
      case MetricKind::kNdcg:
      case MetricKind::kNdcgExp:
        for (const TiedGroup& group : groups) {
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

void MetricScorer::sum_prefixes(int64_t depth) {
  bool uses_discounts = false;
  for (int64_t m = 0; m < args_.n_metrics; ++m)
    uses_discounts |=
        args_.metrics[m].kind == MetricKind::kNdcg || args_.metrics[m].kind == MetricKind::kNdcgExp;
  reciprocals_.assign(depth + 1, 0.0);
  for (int64_t i = 1; i <= depth; ++i) reciprocals_[i] = reciprocals_[i - 1] + 1.0 / i;
  if (!uses_discounts) return;
  discounts_.assign(depth + 1, 0.0);
  for (int64_t i = 1; i <= depth; ++i) discounts_[i] = discounts_[i - 1] + discount(i);
}

void MetricScorer::one_target_direct(Place place, double* values) const {
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

}  // namespace lcr_fast
