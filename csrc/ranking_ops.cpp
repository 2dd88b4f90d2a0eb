// Schemas and dispatch of the ranking ops, on the LibTorch stable ABI only.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_level.h"
#include "ranking.h"
#include "torch_api.h"

namespace lcr_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;

ScoreType score_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return ScoreType::kFloat32;
    case ScalarType::Half:
      return ScoreType::kFloat16;
    case ScalarType::BFloat16:
      return ScoreType::kBFloat16;
    case ScalarType::Double:
      return ScoreType::kFloat64;
    default:
      fail(name, " must be float32, float16, bfloat16 or float64");
  }
}

GradeType grade_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Bool:
      return GradeType::kBool;
    case ScalarType::Int:
      return GradeType::kInt32;
    case ScalarType::Long:
      return GradeType::kInt64;
    case ScalarType::Float:
      return GradeType::kFloat32;
    case ScalarType::Double:
      return GradeType::kFloat64;
    default:
      fail("relevance must be bool, int32, int64, float32 or float64");
  }
}

// Merge the axes before the last wherever their strides allow it.
Rows rows_of(const Tensor& t, const char* name) {
  check(t.dim() >= 1, name, " must have at least one axis");
  Rows rows;
  rows.data = t.const_data_ptr();
  rows.item_step = t.stride(t.dim() - 1);
  for (int64_t axis = 0; axis < t.dim() - 1; ++axis) {
    const int64_t size = t.size(axis), step = t.stride(axis);
    if (size == 1) continue;
    const int last = rows.n_axes - 1;
    if (last >= 0 && rows.step[last] == size * step) {
      rows.size[last] *= size;
      rows.step[last] = step;
      continue;
    }
    check(rows.n_axes < kMaxAxes, name, " has more than ", kMaxAxes,
          " axes of independent strides before its last; make it contiguous");
    rows.size[rows.n_axes] = size;
    rows.step[rows.n_axes] = step;
    ++rows.n_axes;
  }
  if (rows.n_axes == 0) {
    rows.n_axes = 1;
    rows.size[0] = 1;
  }
  return rows;
}

std::vector<int64_t> leading_sizes(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end() - 1};
}

const int64_t* indices(const Tensor& t, int64_t n, const char* name) {
  check(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() == n, name,
        " must be contiguous int64, one element a row");
  return t.const_data_ptr<int64_t>();
}

MetricArgs metric_args(int64_t n_rows, int64_t n_items, const std::vector<int64_t>& kinds,
                       const std::vector<int64_t>& ks, int64_t ties) {
  check(kinds.size() == ks.size() && kinds.size() <= kMaxMetrics,
        "kinds and ks must have one length, at most ", kMaxMetrics);
  check(ties >= 0 && ties <= 2, "ties must be 0, 1 or 2");
  MetricArgs args{};
  args.n_metrics = static_cast<int64_t>(kinds.size());
  for (size_t m = 0; m < kinds.size(); ++m) {
    check(kinds[m] >= 0 && kinds[m] <= static_cast<int64_t>(MetricKind::kRank) && ks[m] >= 0,
          "kinds[", m, "] or ks[", m, "] is out of range");
    args.metrics[m] = {static_cast<MetricKind>(kinds[m]), ks[m]};
  }
  args.n_rows = n_rows;
  args.n_items = n_items;
  args.ties = static_cast<Ties>(ties);
  return args;
}

// The output of `args`: rows [*leading, n_metrics], or sums [n_metrics + 1].
Tensor new_output(const Tensor& like, std::vector<int64_t> leading, int64_t output,
                  MetricArgs& args) {
  check(output >= 0 && output <= 2, "output must be 0, 1 or 2");
  args.output = static_cast<Output>(output);
  const bool sums = args.output == Output::kSums;
  if (sums) leading.clear();
  leading.push_back(args.n_metrics + sums);
  Tensor out = torch::stable::new_empty(
      like, leading, args.output == Output::kRows32 ? ScalarType::Float : ScalarType::Double);
  args.out = out.mutable_data_ptr();
  return out;
}

RankingArgs ranking_args(const Tensor& scores, const OptionalTensor& target,
                         const OptionalTensor& relevance, const OptionalTensor& counts,
                         const OptionalTensor& excluded, const std::vector<int64_t>& kinds,
                         const std::vector<int64_t>& ks, int64_t ties) {
  RankingArgs args{};
  args.score_type = score_type(scores, "scores");
  args.scores = rows_of(scores, "scores");
  int64_t n_rows = 1;
  for (int64_t size : leading_sizes(scores)) n_rows *= size;
  args.metric = metric_args(n_rows, scores.size(scores.dim() - 1), kinds, ks, ties);
  check(target.has_value() != relevance.has_value(), "give either target or relevance, not both");
  const auto same_shape = [&](const Tensor& t) {
    return t.dim() == scores.dim() &&
           std::equal(t.sizes().begin(), t.sizes().end(), scores.sizes().begin());
  };
  if (target.has_value()) args.target = indices(*target, n_rows, "target");
  if (relevance.has_value()) {
    check(same_shape(*relevance), "relevance must have the shape of scores");
    args.grade_type = grade_type(*relevance);
    args.relevance = rows_of(*relevance, "relevance");
    // An empty tensor may have no storage, and null data would mean that target is given.
    static const char kNothing = 0;
    if (args.relevance.data == nullptr) args.relevance.data = &kNothing;
  }
  if (counts.has_value()) args.counts = indices(*counts, n_rows, "counts");
  if (excluded.has_value()) {
    check(same_shape(*excluded) && excluded->scalar_type() == ScalarType::Bool,
          "excluded must be bool, of the shape of scores");
    args.excluded = rows_of(*excluded, "excluded");
  }
  return args;
}

// "2, 1" for the row at [2, 1].
std::string row_text(const std::vector<int64_t>& leading, int64_t row) {
  std::string text;
  for (auto size = leading.rbegin(); size != leading.rend(); ++size) {
    text = std::to_string(row % *size) + (text.empty() ? "" : ", " + text);
    row /= *size;
  }
  return text;
}

// Faults as a tensor [3]: the first row with a NaN, a bad target, a bad count; n_rows if none.
Tensor fault_tensor(const Tensor& like, int64_t n_rows) {
  Tensor faults = torch::stable::new_empty(like, {3}, ScalarType::Long);
  torch::stable::fill_(faults, static_cast<double>(n_rows));
  return faults;
}

std::tuple<Tensor, Tensor> ranking_metrics_cpu(const Tensor& scores, const OptionalTensor& target,
                                               const OptionalTensor& relevance,
                                               const OptionalTensor& counts,
                                               const OptionalTensor& excluded,
                                               std::vector<int64_t> kinds, std::vector<int64_t> ks,
                                               int64_t ties, int64_t output) {
  RankingArgs args = ranking_args(scores, target, relevance, counts, excluded, kinds, ks, ties);
  const std::vector<int64_t> leading = leading_sizes(scores);
  Tensor out = new_output(scores, leading, output, args.metric);
  const Faults faults = ranking_cpu(args, parallel);
  const int64_t n_rows = args.metric.n_rows, n_items = args.metric.n_items;
  if (faults.counts_row < n_rows)
    fail("counts[", row_text(leading, faults.counts_row), "] is ", args.counts[faults.counts_row],
         ", expected 0 to ", n_items);
  if (faults.target_row < n_rows) {
    const int64_t row = faults.target_row;
    fail("target[", row_text(leading, row), "] is ", args.target[row], ", expected an index below ",
         args.counts ? args.counts[row] : n_items, ", or -1 for none");
  }
  if (faults.nan_row < n_rows)
    fail("scores[", row_text(leading, faults.nan_row),
         "] has a NaN, expected numbers (infinities included)");
  return {out, fault_tensor(scores, n_rows)};
}

CatalogueArgs catalogue_args(const Tensor& users, const Tensor& items, const Tensor& target,
                             const OptionalTensor& seen, const std::vector<int64_t>& kinds,
                             const std::vector<int64_t>& ks, int64_t ties) {
  check(users.dim() == 2 && items.dim() == 2 && users.size(1) == items.size(1) &&
            users.scalar_type() == items.scalar_type(),
        "users and items must be matrices of one width and dtype");
  CatalogueArgs args{};
  args.metric = metric_args(users.size(0), items.size(0), kinds, ks, ties);
  args.type = score_type(users, "users");
  args.users = rows_of(users, "users");
  args.items = rows_of(items, "items");
  args.dim = users.size(1);
  args.target = indices(target, users.size(0), "target");
  if (seen.has_value()) {
    check(seen->dim() == 2, "seen must be [n_users, n_seen]");
    args.n_seen = seen->size(1);
    args.seen = indices(*seen, users.size(0) * args.n_seen, "seen");
  }
  return args;
}

std::tuple<Tensor, Tensor> catalogue_metrics_cpu(const Tensor& users, const Tensor& items,
                                                 const Tensor& target, const OptionalTensor& seen,
                                                 std::vector<int64_t> kinds,
                                                 std::vector<int64_t> ks, int64_t ties,
                                                 int64_t output) {
  CatalogueArgs args = catalogue_args(users, items, target, seen, kinds, ks, ties);
  Tensor out = new_output(users, {users.size(0)}, output, args.metric);
  const Faults faults = catalogue_cpu(args, parallel);
  const int64_t n_rows = args.metric.n_rows, n_items = args.metric.n_items;
  if (faults.target_row < n_rows)
    fail("target[", faults.target_row, "] is ", args.target[faults.target_row],
         ", expected an index below ", n_items, ", or -1 for none");
  check(faults.counts_row == n_rows, "seen[", faults.counts_row,
        "] has an item out of range, expected indices below ", n_items);
  check(faults.nan_row == n_rows, "users[", faults.nan_row,
        "] gives a NaN score, expected finite vectors");
  return {out, fault_tensor(users, n_rows)};
}

int64_t cpu_level_op() { return static_cast<int64_t>(cpu_level()); }

#ifdef USE_CUDA
void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

// Scratch of the CUDA path: counts of rows, if they are kept, and sums of blocks of rows.
struct Scratch {
  Scratch(const Tensor& like, const MetricArgs& args, bool keeps_counts)
      : counts(torch::stable::new_zeros(like, {keeps_counts ? args.n_rows : 0, 2},
                                        ScalarType::Long)),
        partial(torch::stable::new_empty(
            like,
            {args.output == Output::kSums ? ranking_partials(args.n_rows) : 0, args.n_metrics + 1},
            ScalarType::Double)),
        faults(fault_tensor(like, args.n_rows)) {}

  Tensor counts, partial, faults;
};

int64_t ranking_cuda_error_op() { return ranking_cuda_error(); }

std::tuple<Tensor, Tensor> ranking_metrics_cuda(const Tensor& scores, const OptionalTensor& target,
                                                const OptionalTensor& relevance,
                                                const OptionalTensor& counts,
                                                const OptionalTensor& excluded,
                                                std::vector<int64_t> kinds, std::vector<int64_t> ks,
                                                int64_t ties, int64_t output) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  check(!relevance.has_value(),
        "the CUDA ranking op takes a target, not relevance; backend=\"reference\" does");
  RankingArgs args = ranking_args(scores, target, relevance, counts, excluded, kinds, ks, ties);
  Tensor out = new_output(scores, leading_sizes(scores), output, args.metric);
  Scratch scratch(scores, args.metric, ranking_keeps_counts(args.metric.n_items));
  const int error = ranking_cuda(
      args, scratch.counts.mutable_data_ptr<int64_t>(), scratch.partial.mutable_data_ptr<double>(),
      static_cast<Faults*>(scratch.faults.mutable_data_ptr()), current_stream(scores));
  check(error == 0, "ranking_metrics: CUDA launch failed with error ", error);
  return {out, scratch.faults};
}

std::tuple<Tensor, Tensor> catalogue_metrics_cuda(const Tensor& users, const Tensor& items,
                                                  const Tensor& target, const OptionalTensor& seen,
                                                  std::vector<int64_t> kinds,
                                                  std::vector<int64_t> ks, int64_t ties,
                                                  int64_t output) {
  const torch::stable::accelerator::DeviceGuard guard(users.get_device_index());
  CatalogueArgs args = catalogue_args(users, items, target, seen, kinds, ks, ties);
  Tensor out = new_output(users, {users.size(0)}, output, args.metric);
  Scratch scratch(users, args.metric, /*keeps_counts=*/true);
  const int error = catalogue_cuda(
      args, scratch.counts.mutable_data_ptr<int64_t>(), scratch.partial.mutable_data_ptr<double>(),
      static_cast<Faults*>(scratch.faults.mutable_data_ptr()), current_stream(users));
  check(error == 0, "catalogue_metrics: CUDA launch failed with error ", error);
  return {out, scratch.faults};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lcr_fast, m) {
  m.def(
      "ranking_metrics(Tensor scores, Tensor? target, Tensor? relevance, Tensor? counts,"
      " Tensor? excluded, int[] kinds, int[] ks, int ties, int output) -> (Tensor, Tensor)");
  m.def(
      "catalogue_metrics(Tensor users, Tensor items, Tensor target, Tensor? seen, int[] kinds,"
      " int[] ks, int ties, int output) -> (Tensor, Tensor)");
  m.def("cpu_level() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(lcr_fast, CPU, m) {
  m.impl("ranking_metrics", TORCH_BOX(&ranking_metrics_cpu));
  m.impl("catalogue_metrics", TORCH_BOX(&catalogue_metrics_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(lcr_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level_op));
}
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(lcr_fast, m) { m.def("ranking_cuda_error() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(lcr_fast, CompositeExplicitAutograd, m) {
  m.impl("ranking_cuda_error", TORCH_BOX(&ranking_cuda_error_op));
}
STABLE_TORCH_LIBRARY_IMPL(lcr_fast, CUDA, m) {
  m.impl("ranking_metrics", TORCH_BOX(&ranking_metrics_cuda));
  m.impl("catalogue_metrics", TORCH_BOX(&catalogue_metrics_cuda));
}
#endif

}  // namespace lcr_fast
