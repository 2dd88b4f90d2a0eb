// Top-k ranking metrics; torch-free, so that the .cu compiles with nvcc alone.
//
// Nothing is sorted. A row is read once, counting the candidates that beat the target and those
// that equal it; its place in the list and every metric follow from these two numbers. The
// definitions are in lcr_fast/ops/ranking.py, the oracle in lcr_fast/reference.
#pragma once
#include <cstdint>

#include "parallel.h"

namespace lcr_fast {

enum class ScoreType { kFloat32, kFloat16, kBFloat16, kFloat64 };
enum class GradeType { kBool, kInt32, kInt64, kFloat32, kFloat64 };

// The numbers are those of lcr_fast/ops/ranking.py.
enum class Ties : int64_t { kPessimistic, kOptimistic, kAverage };
enum class MetricKind : int64_t { kHr, kNdcg, kNdcgExp, kMrr, kRecall, kPrecision, kMap, kRank };
enum class Output : int64_t { kRows32, kRows64, kSums };

struct Metric {
  MetricKind kind;
  int64_t k;  // cut-off; 0 means the whole list
};

constexpr int kMaxAxes = 4;
constexpr int kMaxMetrics = 64;

// A tensor [..., n_items] seen as rows: any strides, no copy.
struct Rows {
  const void* data = nullptr;
  int64_t item_step = 0;  // elements between neighbours of a row
  int n_axes = 0;
  int64_t size[kMaxAxes] = {};
  int64_t step[kMaxAxes] = {};

#ifdef __CUDACC__
  __host__ __device__
#endif
      int64_t offset(int64_t row) const {
    if (n_axes == 1) return row * step[0];
    int64_t elements = 0;
    for (int axis = n_axes - 1; axis >= 0; --axis) {
      elements += row % size[axis] * step[axis];
      row /= size[axis];
    }
    return elements;
  }
};

// How the places of a row become metrics and where these go.
struct MetricArgs {
  Metric metrics[kMaxMetrics];
  int64_t n_metrics;
  int64_t n_rows;
  int64_t n_items;
  Ties ties;
  Output output;
  void* out;  // [n_rows, n_metrics] float or double, or [n_metrics + 1] double: sums and row count
};

struct RankingArgs {
  MetricArgs metric;
  ScoreType score_type;
  Rows scores;
  const int64_t* target;  // [n_rows], or null where relevance is given
  GradeType grade_type;
  Rows relevance;         // data is null where target is given
  const int64_t* counts;  // [n_rows] candidates of each row, or null
  Rows excluded;          // bytes, nonzero: not a candidate; data may be null
};

// Scores of every item, users [n_rows, dim] times items [n_items, dim], never stored.
struct CatalogueArgs {
  MetricArgs metric;
  ScoreType type;
  Rows users;  // rows of `dim` elements
  Rows items;  // rows of `dim` elements
  int64_t dim;
  const int64_t* target;  // [n_rows]
  const int64_t* seen;    // [n_rows, n_seen] items that do not compete, or null
  int64_t n_seen;
};

// The first row with each kind of bad data; n_rows where there is none.
struct Faults {
  int64_t nan_row;
  int64_t target_row;
  int64_t counts_row;
};

// CPU.
Faults ranking_cpu(const RankingArgs& args, const Parallel& parallel);
Faults catalogue_cpu(const CatalogueArgs& args, const Parallel& parallel);

// The cudaError_t of asking for a kernel on the current GPU: not 0 where there is no code for it.
int ranking_cuda_error();

// CUDA. `counts` are zeros [n_rows, 2], which ranking_cuda takes if it keeps counts of rows this
// long, and `partial` is room for [ranking_partials(n_rows), n_metrics + 1] where the output is sums;
// `faults` is a device Faults. `stream` is a cudaStream_t. Returns the cudaError_t of the launches; a
// row with bad data becomes NaN.
int64_t ranking_partials(int64_t n_rows);
bool ranking_keeps_counts(int64_t n_items);
int ranking_cuda(const RankingArgs& args, int64_t* counts, double* partial, Faults* faults,
                 void* stream);
int catalogue_cuda(const CatalogueArgs& args, int64_t* counts, double* partial, Faults* faults,
                   void* stream);

}  // namespace lcr_fast
