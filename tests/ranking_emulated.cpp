// Holds the CUDA kernels of ranking, run on a CPU by cuda_emulation/, against the C++ of a CPU.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/ranking.h"

namespace {

using namespace lcr_fast;

std::mt19937 generator(1);

int64_t draw(int64_t low, int64_t high) {  // both may come
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

void serial(int64_t n_tasks, const Task& task) {
  if (n_tasks > 0) task(0, n_tasks);
}

// Numbers of any type that every type holds: quarters between -8 and 8, or what is told.
class Numbers {
 public:
  Numbers(int64_t n, ScoreType type) : type_(type), bytes_(n * size() + 64) {
    for (int64_t i = 0; i < n; ++i) set(i, draw(-32, 32) / 4.0f);
  }

  void set(int64_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (type_ == ScoreType::kFloat32) store(i, x);
    if (type_ == ScoreType::kFloat64) store(i, static_cast<double>(x));
    if (type_ == ScoreType::kFloat16) store(i, static_cast<_Float16>(x));
    if (type_ == ScoreType::kBFloat16) store(i, static_cast<uint16_t>(bits >> 16));
  }

  const void* at(int64_t i) const { return bytes_.data() + i * size(); }

 private:
  int64_t size() const {
    return type_ == ScoreType::kFloat64 ? 8 : type_ == ScoreType::kFloat32 ? 4 : 2;
  }
  template <class T>
  void store(int64_t i, T x) {
    std::memcpy(bytes_.data() + i * sizeof(T), &x, sizeof x);
  }

  ScoreType type_;
  std::vector<unsigned char> bytes_;
};

struct Case {
  ScoreType type;
  int64_t n_rows, n_items;
  Ties ties;
  Output output;
  bool counts, excluded, faults, strides;
};

[[noreturn]] void complain(const Case& c, const char* what, int64_t place, double found,
                           double expected) {
  std::fprintf(stderr,
               "type %d, %lld x %lld, ties %d, output %d, counts %d, excluded %d, faults %d, "
               "strides %d: %s %lld is %.17g, expected %.17g\n",
               static_cast<int>(c.type), static_cast<long long>(c.n_rows),
               static_cast<long long>(c.n_items), static_cast<int>(c.ties),
               static_cast<int>(c.output), c.counts, c.excluded, c.faults, c.strides, what,
               static_cast<long long>(place), found, expected);
  std::exit(1);
}

MetricArgs metric_args(const Case& c) {
  MetricArgs args{};
  for (int64_t kind = 0; kind <= static_cast<int64_t>(MetricKind::kRank); ++kind)
    for (int64_t k : {0, 1, 10}) {
      if (k == 0 && kind == static_cast<int64_t>(MetricKind::kPrecision)) continue;
      args.metrics[args.n_metrics++] = {static_cast<MetricKind>(kind), k};
    }
  args.n_rows = c.n_rows;
  args.n_items = c.n_items;
  args.ties = c.ties;
  args.output = c.output;
  return args;
}

// Run the kernels and the CPU on arguments of one kind, and compare. `bad` rows must be NaN, and
// `repaired` are the arguments without them.
template <class Args, class Gpu, class Cpu>
void compare(const Case& c, Args args, Args repaired, const std::vector<bool>& bad, Gpu gpu,
             Cpu cpu) {
  const int64_t n_metrics = args.metric.n_metrics;
  const bool sums = c.output == Output::kSums, is_float = c.output == Output::kRows32;
  const int64_t n = sums ? n_metrics + 1 : c.n_rows * n_metrics;
  const auto read = [=](const std::vector<double>& out, int64_t i) {
    return is_float ? reinterpret_cast<const float*>(out.data())[i] : out[i];
  };
  // Nothing may rely on what memory held.
  std::vector<double> found(n, -7.0), expected(n, -7.0);
  std::vector<int64_t> scratch(2 * c.n_rows, 0);
  std::vector<double> partial(ranking_partials(c.n_rows) * (n_metrics + 1), -7.0);
  Faults faults{c.n_rows, c.n_rows, c.n_rows};
  args.metric.out = found.data();
  gpu(args, scratch.data(), partial.data(), &faults);
  repaired.metric.out = expected.data();
  cpu(repaired);
  bool any_bad = false;
  for (bool row : bad) any_bad |= row;
  for (int64_t i = 0; i < n; ++i) {
    const double x = read(found, i), y = read(expected, i);
    if (sums ? any_bad : bad[i / n_metrics]) {
      if (!std::isnan(x) && !(sums && i == n_metrics)) complain(c, "result", i, x, NAN);
    } else if (!(std::fabs(x - y) <= (is_float ? 1e-6 : 1e-10) * std::fabs(y))) {
      complain(c, "result", i, x, y);
    }
  }
  args.metric.out = expected.data();
  const Faults named = cpu(args);
  const int64_t rows[3][2] = {{faults.nan_row, named.nan_row},
                              {faults.target_row, named.target_row},
                              {faults.counts_row, named.counts_row}};
  for (int kind = 0; kind < 3; ++kind)
    if (rows[kind][0] != rows[kind][1])
      complain(c, "fault", kind, static_cast<double>(rows[kind][0]),
               static_cast<double>(rows[kind][1]));
}

void rank(const Case& c) {
  const int64_t step = c.strides ? 2 : 1, row_step = c.n_items * step + 3;
  const int64_t first = c.strides ? 0 : 1;  // no 16-byte border
  Numbers scores(c.n_rows * row_step + 1, c.type);
  std::vector<int64_t> target(c.n_rows), counts(c.n_rows);
  std::vector<uint8_t> excluded(c.n_rows * c.n_items);
  for (auto& e : excluded) e = draw(0, 3) == 0;
  std::vector<bool> bad(c.n_rows);
  for (int64_t row = 0; row < c.n_rows; ++row) {
    counts[row] = draw(0, c.n_items);
    const int64_t n = c.counts ? counts[row] : c.n_items;
    target[row] = draw(-1, n - 1);
  }
  std::vector<int64_t> good_target = target, good_counts = counts;
  for (int64_t row = 1; c.faults && row < c.n_rows; row += 4) {
    const int64_t n = c.counts ? counts[row] : c.n_items;
    const int64_t kind = draw(0, 2);
    if (kind == 0 && target[row] >= 0) {
      const int64_t at = draw(0, n - 1);
      excluded[row * c.n_items + at] = 0;
      scores.set(first + row * row_step + at * step, NAN);
      bad[row] = true;
    } else if (kind == 1) {
      target[row] = draw(0, 1) ? n : -2;
      bad[row] = true;
    } else if (c.counts) {
      counts[row] = draw(0, 1) ? c.n_items + 1 : -1;
      bad[row] = true;
    }
    if (bad[row]) good_target[row] = -1, good_counts[row] = 0;
  }
  RankingArgs args{};
  args.metric = metric_args(c);
  args.score_type = c.type;
  args.scores = {scores.at(first), step, 1, {c.n_rows}, {row_step}};
  args.target = target.data();
  if (c.counts) args.counts = counts.data();
  if (c.excluded) args.excluded = {excluded.data(), 1, 1, {c.n_rows}, {c.n_items}};
  RankingArgs repaired = args;
  repaired.target = good_target.data();
  if (c.counts) repaired.counts = good_counts.data();
  compare(
      c, args, repaired, bad,
      [](const RankingArgs& a, int64_t* scratch, double* partial, Faults* faults) {
        ranking_cuda(a, scratch, partial, faults, nullptr);
      },
      [](const RankingArgs& a) { return ranking_cpu(a, serial); });
}

void rank_catalogue(const Case& c, int64_t dim, int64_t n_seen) {
  const int64_t step = c.strides ? 2 : 1;
  Numbers users(c.n_rows * dim * step, c.type), items(c.n_items * dim * step, c.type);
  std::vector<int64_t> target(c.n_rows), seen(c.n_rows * n_seen);
  std::vector<bool> bad(c.n_rows);
  for (auto& t : target) t = draw(-1, c.n_items - 1);
  for (auto& s : seen) s = draw(-1, c.n_items - 1);
  std::vector<int64_t> good_target = target, good_seen = seen;
  for (int64_t row = 1; c.faults && row < c.n_rows; row += 5) {
    const int64_t kind = draw(0, 2);
    if (kind == 0 && target[row] >= 0) {
      users.set(row * dim * step, NAN);
      bad[row] = true;
    } else if (kind == 1) {
      target[row] = draw(0, 1) ? c.n_items : -2;
      bad[row] = true;
    } else if (n_seen > 0 && target[row] >= 0) {
      seen[row * n_seen + draw(0, n_seen - 1)] = c.n_items;
      bad[row] = true;
    }
    if (!bad[row]) continue;
    good_target[row] = -1;
    for (int64_t i = 0; i < n_seen; ++i) good_seen[row * n_seen + i] = -1;
  }
  CatalogueArgs args{};
  args.metric = metric_args(c);
  args.type = c.type;
  args.users = {users.at(0), step, 1, {c.n_rows}, {dim * step}};
  args.items = {items.at(0), step, 1, {c.n_items}, {dim * step}};
  args.dim = dim;
  args.target = target.data();
  if (n_seen > 0) args.seen = seen.data(), args.n_seen = n_seen;
  CatalogueArgs repaired = args;
  repaired.target = good_target.data();
  if (n_seen > 0) repaired.seen = good_seen.data();
  compare(
      c, args, repaired, bad,
      [](const CatalogueArgs& a, int64_t* scratch, double* partial, Faults* faults) {
        catalogue_cuda(a, scratch, partial, faults, nullptr);
      },
      [](const CatalogueArgs& a) { return catalogue_cpu(a, serial); });
}

}  // namespace

int main() {
  constexpr ScoreType kTypes[] = {ScoreType::kFloat32, ScoreType::kFloat16, ScoreType::kBFloat16,
                                  ScoreType::kFloat64};
  int64_t n = 0;
  const auto next = [&](int64_t n_rows, int64_t n_items) {
    ++n;
    return Case{kTypes[n % 4], n_rows,          n_items,          static_cast<Ties>(n % 3),
                static_cast<Output>(n / 3 % 3), draw(0, 1) == 0, draw(0, 2) == 0,
                draw(0, 1) == 0,                draw(0, 2) == 0};
  };
  // Around the numbers of items at which a row is counted by other teams, or by other loads.
  for (int64_t n_items : {1, 2, 3, 31, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 700, 2048})
    for (int64_t n_rows : {1, 31, 33, 70})
      for (int i = 0; i < 3; ++i) rank(next(n_rows, n_items));
  for (int64_t n_items : {2049, 5000})
    for (int64_t n_rows : {1, 10, 35})
      for (int i = 0; i < 5; ++i) rank(next(n_rows, n_items));
  for (int64_t n_items : {65'537, 140'000})
    for (int i = 0; i < 3; ++i) rank(next(3, n_items));
  rank(next(0, 10));
  rank(next(10, 0));
  for (int64_t n_items : {0, 1, 63, 64, 65, 200})
    for (int64_t n_rows : {1, 65})
      for (int64_t dim : {1, 16, 20})
        for (int64_t n_seen : {0, 40}) rank_catalogue(next(n_rows, n_items), dim, n_seen);
  std::puts("done");
}
