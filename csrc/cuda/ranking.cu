// Ranking metrics on CUDA: count, then turn counts into metrics, then add up. Nothing synchronises,
// and every number added by more than one thread is an integer or has a fixed order, so results
// repeat bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../ranking.h"

namespace lcr_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Rows up to this length are counted by one warp, longer ones by whole blocks.
constexpr int64_t kWarpItems = 2048;
// Items of a long row that one block counts: enough to hide the cost of starting it.
constexpr int64_t kBlockItems = 65536;
constexpr int64_t kBad = -1;  // in the counts of a row with bad data

// Scores as keys of the same order; a key is NaN where it is not equal to itself.
__device__ float to_key(float x) { return x; }
__device__ double to_key(double x) { return x; }
__device__ float to_key(__half x) { return __half2float(x); }
__device__ float to_key(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
using KeyOf = decltype(to_key(T{}));

struct Counts {
  unsigned greater = 0;
  unsigned at_least = 0;
  bool nan = false;
};

template <class T>
__device__ void tally(T score, KeyOf<T> threshold, Counts& counts) {
  const auto key = to_key(score);
  counts.greater += key > threshold;
  counts.at_least += key >= threshold;
  counts.nan |= key != key;
}

template <class T>
struct alignas(16) Pack {
  T items[16 / sizeof(T)];
};

// A range of one row, read by a team of threads.
template <class T>
struct Range {
  const T* scores;
  int64_t step;
  const uint8_t* excluded;
  int64_t excluded_step;
  int64_t begin;
  int64_t end;
};

// Adjacent scores of a range: single items up to a 16-byte border, packs, single items.
template <class T>
struct Packs {
  static constexpr int kSize = 16 / sizeof(T);

  __device__ explicit Packs(const Range<T>& range) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(range.scores + range.begin);
    first =
        min(range.end, range.begin + static_cast<int64_t>((16 - address % 16) % 16 / sizeof(T)));
    data = reinterpret_cast<const Pack<T>*>(range.scores + first);
    n = (range.end - first) / kSize;
  }

  const Pack<T>* data;
  int64_t first;  // the item at which they begin
  int64_t n;
};

template <class T>
__device__ void tally(const Pack<T>& pack, KeyOf<T> threshold, Counts& counts) {
#pragma unroll
  for (int k = 0; k < Packs<T>::kSize; ++k) tally(pack.items[k], threshold, counts);
}

// Count what `thread` of kTeam sees; `threshold_of()` is called after the first loads are on their
// way, because it waits for two loads of its own.
template <int kTeam, class T, class Threshold>
__device__ Counts count_range(const Range<T>& range, int thread, Threshold threshold_of) {
  Counts counts;
  if (range.step != 1 || range.excluded != nullptr) {
    const auto threshold = threshold_of();
    for (int64_t i = range.begin + thread; i < range.end; i += kTeam)
      if (range.excluded == nullptr || !range.excluded[i * range.excluded_step])
        tally(range.scores[i * range.step], threshold, counts);
    return counts;
  }
  const Packs<T> packs(range);
  Pack<T> ahead;
  if (thread < packs.n) ahead = packs.data[thread];
  const auto threshold = threshold_of();
  if (thread < packs.n) tally(ahead, threshold, counts);
  int64_t p = thread + kTeam;
  if (kTeam > kWarp) {
    // Long rows: four loads in flight.
    for (; p + 3 * kTeam < packs.n; p += 4 * kTeam) {
      Pack<T> loaded[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) loaded[j] = packs.data[p + j * kTeam];
#pragma unroll
      for (int j = 0; j < 4; ++j) tally(loaded[j], threshold, counts);
    }
  }
  for (; p < packs.n; p += kTeam) tally(packs.data[p], threshold, counts);
  if (range.begin + thread < packs.first)
    tally(range.scores[range.begin + thread], threshold, counts);
  const int64_t last = packs.first + packs.n * Packs<T>::kSize + thread;
  if (last < range.end) tally(range.scores[last], threshold, counts);
  return counts;
}

__device__ Counts warp_sum(Counts counts) {
  counts.greater = __reduce_add_sync(~0u, counts.greater);
  counts.at_least = __reduce_add_sync(~0u, counts.at_least);
  counts.nan = __any_sync(~0u, counts.nan);
  return counts;
}

__device__ void note(int64_t* first, int64_t row) {
  atomicMin(reinterpret_cast<long long*>(first), static_cast<long long>(row));
}

// Count one row, or a range of one: a warp (kBlockRow false) or a block a range.
template <class T, bool kBlockRow>
__global__ void __launch_bounds__(kThreads)
    count_kernel(RankingArgs args, int64_t* counts, Faults* faults) {
  constexpr int kTeam = kBlockRow ? kThreads : kWarp;
  const int thread = threadIdx.x % kTeam;
  const int64_t row =
      int64_t{blockIdx.x} * (kThreads / kTeam) + (kBlockRow ? 0 : threadIdx.x / kTeam);
  if (row >= args.metric.n_rows) return;

  const int64_t n_items = args.metric.n_items;
  const int64_t n = args.counts ? args.counts[row] : n_items;
  const bool bad_count = n < 0 || n > n_items;
  const bool first = blockIdx.y == 0 && thread == 0;
  Range<T> range;
  range.scores = static_cast<const T*>(args.scores.data) + args.scores.offset(row);
  range.step = args.scores.item_step;
  range.excluded = nullptr;
  range.excluded_step = args.excluded.item_step;
  if (args.excluded.data != nullptr)
    range.excluded = static_cast<const uint8_t*>(args.excluded.data) + args.excluded.offset(row);
  range.begin = kBlockRow ? int64_t{blockIdx.y} * kBlockItems : 0;
  range.end = bad_count ? range.begin : kBlockRow ? min(n, range.begin + kBlockItems) : n;

  int64_t target = -1;
  bool listed = false;
  KeyOf<T> threshold = 0;
  Counts mine = count_range<kTeam>(range, thread, [&] {
    target = args.target[row];
    listed = !bad_count && target >= 0 && target < n;
    if (listed) threshold = to_key(range.scores[target * range.step]);
    return threshold;
  });
  if (!listed) {
    if (!first || (target == -1 && !bad_count)) return;
    note(bad_count ? &faults->counts_row : &faults->target_row, row);
    counts[2 * row] = kBad;
    return;
  }
  // An excluded target competes nevertheless.
  if (first) {
    mine.nan |= threshold != threshold;
    if (range.excluded != nullptr && range.excluded[target * range.excluded_step]) ++mine.at_least;
  }
  mine = warp_sum(mine);
  if (threadIdx.x % kWarp != 0) return;
  if (mine.nan) note(&faults->nan_row, row);
  // A NaN row may hold any counts: the metrics kernel reads its flag instead.
  auto* sums = reinterpret_cast<unsigned long long*>(counts + 2 * row);
  if (mine.nan) atomicOr(sums, 1ull << 63);
  if (kBlockRow) {
    if (mine.greater) atomicAdd(sums, mine.greater);
    if (mine.at_least) atomicAdd(sums + 1, mine.at_least);
  } else if (!mine.nan) {
    sums[0] = mine.greater;
    sums[1] = mine.at_least;
  }
}

// ---- counts to metrics

struct Place {
  int64_t above;
  int64_t tied;
};

__device__ Place place_of(Ties ties, int64_t greater, int64_t at_least) {
  if (ties == Ties::kPessimistic) return {at_least - 1, 1};
  if (ties == Ties::kOptimistic) return {greater, 1};
  return {greater, at_least - greater};
}

__device__ double metric_value(Metric metric, Place place) {
  const auto tied = static_cast<double>(place.tied);
  int64_t reach = place.tied;
  if (metric.k > 0) reach = max(int64_t{0}, min(place.tied, metric.k - place.above));
  double sum = 0;
  switch (metric.kind) {
    case MetricKind::kHr:
    case MetricKind::kRecall:
      return reach / tied;
    case MetricKind::kPrecision:
      return reach / tied / metric.k;
    case MetricKind::kMrr:
    case MetricKind::kMap:
      for (int64_t i = 1; i <= reach; ++i) sum += 1.0 / (place.above + i);
      return sum / tied;
    case MetricKind::kNdcg:
    case MetricKind::kNdcgExp:
      for (int64_t i = 1; i <= reach; ++i) sum += 1.0 / log2(place.above + i + 1.0);
      return sum / tied;
    case MetricKind::kRank:
      return place.above + (tied + 1) / 2;
  }
  return 0;
}

// One thread a row. For sums, each block leaves its own in `partial` [n_blocks, n_metrics + 1].
__global__ void __launch_bounds__(kThreads)
    metrics_kernel(MetricArgs args, const int64_t* target, const int64_t* counts, double* partial) {
  __shared__ double sums[kThreads / kWarp];
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool exists = row < args.n_rows;
  const int64_t greater = exists ? counts[2 * row] : 0;
  const int64_t at_least = exists ? counts[2 * row + 1] : 0;
  const bool bad = greater < 0;
  const bool counted = exists && (bad || target[row] >= 0);
  const Place place = place_of(args.ties, greater, at_least);
  for (int m = 0; m <= args.n_metrics; ++m) {
    double value = 0;
    if (counted) {
      value = 1;  // the number of rows, after the metrics
      if (m < args.n_metrics) value = bad ? nan("") : metric_value(args.metrics[m], place);
    }
    if (args.output != Output::kSums) {
      if (!exists || m == args.n_metrics) continue;
      if (args.output == Output::kRows32)
        static_cast<float*>(args.out)[row * args.n_metrics + m] = static_cast<float>(value);
      else
        static_cast<double*>(args.out)[row * args.n_metrics + m] = value;
      continue;
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      value += __shfl_down_sync(~0u, value, offset);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
      double sum = 0;
      for (double part : sums) sum += part;
      partial[int64_t{blockIdx.x} * (args.n_metrics + 1) + m] = sum;
    }
    __syncthreads();
  }
}

// One block a metric: add the partial sums, always in the same order.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* partial, int64_t n_blocks, int64_t width, double* out) {
  __shared__ double sums[kThreads];
  double sum = 0;
  for (int64_t b = threadIdx.x; b < n_blocks; b += kThreads) sum += partial[b * width + blockIdx.x];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}

int finish(const MetricArgs& args, const int64_t* target, const int64_t* counts, double* partial,
           cudaStream_t stream) {
  const int64_t n_blocks = ranking_partials(args.n_rows);
  if (n_blocks > 0)
    metrics_kernel<<<static_cast<unsigned>(n_blocks), kThreads, 0, stream>>>(args, target, counts,
                                                                             partial);
  if (args.output == Output::kSums)
    sum_kernel<<<static_cast<unsigned>(args.n_metrics + 1), kThreads, 0, stream>>>(
        partial, n_blocks, args.n_metrics + 1, static_cast<double*>(args.out));
  return cudaGetLastError();
}

template <class T>
void launch_count(const RankingArgs& args, int64_t* counts, Faults* faults, cudaStream_t stream) {
  const int64_t n_rows = args.metric.n_rows, n_items = args.metric.n_items;
  if (n_items <= kWarpItems) {
    constexpr int64_t kRows = kThreads / kWarp;
    count_kernel<T, false>
        <<<static_cast<unsigned>((n_rows + kRows - 1) / kRows), kThreads, 0, stream>>>(args, counts,
                                                                                       faults);
  } else {
    const dim3 grid(static_cast<unsigned>(n_rows),
                    static_cast<unsigned>((n_items + kBlockItems - 1) / kBlockItems));
    count_kernel<T, true><<<grid, kThreads, 0, stream>>>(args, counts, faults);
  }
}

// ---- full catalogue

constexpr int kTile = 64;   // users and items of a tile
constexpr int kDepth = 16;  // coordinates staged at a time
constexpr int kPer = 4;     // users and items of a thread: 16 x 16 threads a block

// The dot product that the tiles compute: in order of the coordinates, one fused step each, so
// that equal vectors give equal bits wherever they stand.
template <class T>
__device__ KeyOf<T> dot(const T* user, int64_t user_step, const T* item, int64_t item_step,
                        int64_t dim) {
  KeyOf<T> sum = 0;
  for (int64_t d = 0; d < dim; ++d)
    sum = fma(to_key(user[d * user_step]), to_key(item[d * item_step]), sum);
  return sum;
}

template <class T>
__device__ const T* vector_at(const Rows& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.step[0];
}

// A block takes kTile users and walks over the item tiles blockIdx.y, blockIdx.y + gridDim.y, ...
template <class T>
__global__ void __launch_bounds__(kThreads)
    catalogue_kernel(CatalogueArgs args, int64_t* counts, Faults* faults) {
  using Key = KeyOf<T>;
  __shared__ Key users[kDepth][kTile + 1];
  __shared__ Key items[kDepth][kTile + 1];
  __shared__ Key threshold[kTile];
  __shared__ int64_t target[kTile];

  const int64_t n_users = args.metric.n_rows, n_items = args.metric.n_items;
  const int64_t first_user = int64_t{blockIdx.x} * kTile;
  if (threadIdx.x < kTile) {
    const int64_t user = first_user + threadIdx.x;
    int64_t wanted = user < n_users ? args.target[user] : -1;
    if (wanted < -1 || wanted >= n_items) {
      if (blockIdx.y == 0) {
        note(&faults->target_row, user);
        atomicOr(reinterpret_cast<unsigned long long*>(counts + 2 * user), 1ull << 63);
      }
      wanted = -1;
    }
    target[threadIdx.x] = wanted;
    if (wanted >= 0)
      threshold[threadIdx.x] =
          dot(vector_at<T>(args.users, user), args.users.item_step,
              vector_at<T>(args.items, wanted), args.items.item_step, args.dim);
  }
  __syncthreads();

  const int user0 = threadIdx.x / (kTile / kPer) * kPer, item0 = threadIdx.x % (kTile / kPer);
  Counts mine[kPer];
  for (int64_t tile = blockIdx.y; tile * kTile < n_items; tile += gridDim.y) {
    Key sum[kPer][kPer] = {};
    for (int64_t depth = 0; depth < args.dim; depth += kDepth) {
      for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
        const int d = i % kDepth, slot = i / kDepth;
        const int64_t user = first_user + slot, item = tile * kTile + slot;
        const bool inside = depth + d < args.dim;
        users[d][slot] =
            inside && user < n_users
                ? to_key(vector_at<T>(args.users, user)[(depth + d) * args.users.item_step])
                : Key(0);
        items[d][slot] =
            inside && item < n_items
                ? to_key(vector_at<T>(args.items, item)[(depth + d) * args.items.item_step])
                : Key(0);
      }
      __syncthreads();
      const int n = static_cast<int>(min(int64_t{kDepth}, args.dim - depth));
      for (int d = 0; d < n; ++d) {
        Key u[kPer], v[kPer];
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          u[j] = users[d][user0 + j];
          v[j] = items[d][item0 + j * (kTile / kPer)];
        }
#pragma unroll
        for (int a = 0; a < kPer; ++a)
#pragma unroll
          for (int b = 0; b < kPer; ++b) sum[a][b] = fma(u[a], v[b], sum[a][b]);
      }
      __syncthreads();
    }
#pragma unroll
    for (int a = 0; a < kPer; ++a) {
      if (target[user0 + a] < 0) continue;
#pragma unroll
      for (int b = 0; b < kPer; ++b)
        if (tile * kTile + item0 + b * (kTile / kPer) < n_items)
          tally(sum[a][b], threshold[user0 + a], mine[a]);
    }
  }
#pragma unroll
  for (int a = 0; a < kPer; ++a) {
    const int64_t user = first_user + user0 + a;
    if (target[user0 + a] < 0) continue;
    auto* sums = reinterpret_cast<unsigned long long*>(counts + 2 * user);
    if (mine[a].nan) {
      note(&faults->nan_row, user);
      atomicOr(sums, 1ull << 63);
    }
    if (mine[a].greater) atomicAdd(sums, mine[a].greater);
    if (mine[a].at_least) atomicAdd(sums + 1, mine[a].at_least);
  }
}

// One warp a user: take the seen items out of the counts, each once.
template <class T>
__global__ void __launch_bounds__(kThreads)
    seen_kernel(CatalogueArgs args, int64_t* counts, Faults* faults) {
  const int64_t user = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (user >= args.metric.n_rows) return;
  const int64_t target = args.target[user], n_items = args.metric.n_items;
  if (target < 0 || target >= n_items) return;
  const T* vector = vector_at<T>(args.users, user);
  const int64_t step = args.users.item_step;
  const auto threshold =
      dot(vector, step, vector_at<T>(args.items, target), args.items.item_step, args.dim);
  const int64_t* seen = args.seen + user * args.n_seen;
  Counts mine;
  for (int64_t i = threadIdx.x % kWarp; i < args.n_seen; i += kWarp) {
    const int64_t item = seen[i];
    if (item < 0 || item == target) continue;
    if (item >= n_items) {
      note(&faults->counts_row, user);
      atomicOr(reinterpret_cast<unsigned long long*>(counts + 2 * user), 1ull << 63);
      continue;
    }
    bool repeated = false;
    for (int64_t j = 0; j < i && !repeated; ++j) repeated = seen[j] == item;
    if (repeated) continue;
    tally(dot(vector, step, vector_at<T>(args.items, item), args.items.item_step, args.dim),
          threshold, mine);
  }
  mine = warp_sum(mine);
  if (threadIdx.x % kWarp != 0) return;
  auto* sums = reinterpret_cast<unsigned long long*>(counts + 2 * user);
  atomicAdd(sums, -static_cast<unsigned long long>(mine.greater));
  atomicAdd(sums + 1, -static_cast<unsigned long long>(mine.at_least));
}

template <class T>
void launch_catalogue(const CatalogueArgs& args, int64_t* counts, Faults* faults,
                      cudaStream_t stream) {
  const int64_t user_tiles = (args.metric.n_rows + kTile - 1) / kTile;
  const int64_t item_tiles = (args.metric.n_items + kTile - 1) / kTile;
  if (user_tiles == 0 || item_tiles == 0) return;
  // Enough blocks to fill a large GPU a few times, each with as many tiles as that leaves.
  const int64_t columns =
      std::clamp<int64_t>(4096 / user_tiles, 1, std::min<int64_t>(item_tiles, 65535));
  const dim3 grid(static_cast<unsigned>(user_tiles), static_cast<unsigned>(columns));
  catalogue_kernel<T><<<grid, kThreads, 0, stream>>>(args, counts, faults);
  if (args.seen != nullptr && args.n_seen > 0) {
    constexpr int64_t kRows = kThreads / kWarp;
    seen_kernel<T>
        <<<static_cast<unsigned>((args.metric.n_rows + kRows - 1) / kRows), kThreads, 0, stream>>>(
            args, counts, faults);
  }
}

}  // namespace

int64_t ranking_partials(int64_t n_rows) { return (n_rows + kThreads - 1) / kThreads; }

int ranking_cuda(const RankingArgs& args, int64_t* scratch, double* partial, Faults* faults,
                 void* stream_pointer) {
  auto* stream = static_cast<cudaStream_t>(stream_pointer);
  if (args.metric.n_rows > 0) {
    switch (args.score_type) {
      case ScoreType::kFloat32:
        launch_count<float>(args, scratch, faults, stream);
        break;
      case ScoreType::kFloat64:
        launch_count<double>(args, scratch, faults, stream);
        break;
      case ScoreType::kFloat16:
        launch_count<__half>(args, scratch, faults, stream);
        break;
      case ScoreType::kBFloat16:
        launch_count<__nv_bfloat16>(args, scratch, faults, stream);
        break;
    }
  }
  return finish(args.metric, args.target, scratch, partial, stream);
}

int catalogue_cuda(const CatalogueArgs& args, int64_t* scratch, double* partial, Faults* faults,
                   void* stream_pointer) {
  auto* stream = static_cast<cudaStream_t>(stream_pointer);
  switch (args.type) {
    case ScoreType::kFloat32:
      launch_catalogue<float>(args, scratch, faults, stream);
      break;
    case ScoreType::kFloat64:
      launch_catalogue<double>(args, scratch, faults, stream);
      break;
    case ScoreType::kFloat16:
      launch_catalogue<__half>(args, scratch, faults, stream);
      break;
    case ScoreType::kBFloat16:
      launch_catalogue<__nv_bfloat16>(args, scratch, faults, stream);
      break;
  }
  return finish(args.metric, args.target, scratch, partial, stream);
}

}  // namespace lcr_fast
