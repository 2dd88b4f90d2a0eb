// What rows of scores and catalogues have in common: which counts rank order needs, what they say,
// and what went wrong on the way.
#pragma once
#include <atomic>

#include "../cpu_level.h"
#include "../ranking.h"
#include "ranking_metrics.h"
#include "ranking_scan.h"

namespace lcr_fast {

inline const RankingKernels& ranking_kernels() {
#if defined(__x86_64__)
  if (cpu_level() >= CpuLevel::kAvx512) return kRankingAvx512;
  if (cpu_level() >= CpuLevel::kAvx2) return kRankingAvx2;
#endif
  return kRankingBaseline;
}

inline CountMode count_mode(Ties ties) {
  if (ties == Ties::kPessimistic) return kAtLeast;
  if (ties == Ties::kOptimistic) return kGreater;
  return kBoth;
}

// `counts` are {greater, at_least} over the candidates, the target among them.
inline Place place_of(Ties ties, const int64_t* counts) {
  if (ties == Ties::kPessimistic) return {counts[1] - 1, 1};
  if (ties == Ties::kOptimistic) return {counts[0], 1};
  return {counts[0], counts[1] - counts[0]};
}

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

}  // namespace lcr_fast
