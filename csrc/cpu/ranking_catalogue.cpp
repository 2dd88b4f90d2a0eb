// Places of targets among all items: products of users and items, tile by tile, counted as they are
// made and never stored.
#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#include "../ranking.h"
#include "convert.h"
#include "ranking_counts.h"

namespace lcr_fast {
namespace {

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
      return kType == ScoreType::kBFloat16 ? bfloat16_to_float(x) : float16_to_float(x);
    else
      return x;
  }
};

template <class T>
DotsFn<T> dots_function() {
  if constexpr (sizeof(T) == 8)
    return ranking_kernels().dots_float64;
  else
    return ranking_kernels().dots_float32;
}

template <class T>
CountFn<T, T> count_function() {
  if constexpr (sizeof(T) == 8)
    return ranking_kernels().float64.count;
  else
    return ranking_kernels().float32.count;
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
      dots(users.data() + first * dim, packed.data(), kPanel, dim, scores.data());
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
        dots(users.data() + first * dim, packed.data(), width, dim, scores.data());
        int64_t counts[2] = {0, 0};
        count(scores.data() + (user - first) * width, nullptr, n_seen, threshold[user], mode,
              counts);
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
        dots(users.data() + tile * kUsers * dim, packed.data(), width, dim, scores.data());
        for (int64_t user = tile * kUsers; user < std::min(n_users, (tile + 1) * kUsers); ++user) {
          if (absent(user)) continue;
          int64_t counts[2] = {0, 0};
          const T* row = scores.data() + (user - tile * kUsers) * width;
          if (count(row, nullptr, n, threshold[user], mode, counts)) faults.nan.note(user);
          if (counts[0]) totals[2 * user].fetch_add(counts[0], std::memory_order_relaxed);
          if (counts[1]) totals[2 * user + 1].fetch_add(counts[1], std::memory_order_relaxed);
        }
      }
    }
  });

  const MetricScorer scorer(args.metric);
  MetricSink sink(args.metric);
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
