// Ranking metrics on CUDA: count, turn counts into metrics, add these up. Short rows are counted and
// turned into metrics by one kernel, counts of long rows and of the catalogue pass through memory.
// Nothing synchronises, and every number added by more than one thread is an integer or has a fixed
// order, so results repeat bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../ranking.h"

namespace lcr_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Rows whose metrics one block makes: a lane of its warps each.
constexpr int kRows = kWarp;
// Rows up to this length are counted by some threads of a block, longer ones by whole blocks.
constexpr int64_t kShortItems = 2048;
// Those of at most this many bytes are counted by kFew threads, else by a warp. Each has kAhead loads
// of 16 bytes on their way at once: a row's time is latency, and so are the two loads that tell its
// threshold.
constexpr int kFew = 8;
constexpr int kAhead = 4;
constexpr int64_t kFewBytes = kFew * kAhead * 16;
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
template <int kTeam, int kFirst, class T, class Threshold>
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
  Pack<T> ahead[kFirst];
#pragma unroll
  for (int j = 0; j < kFirst; ++j)
    if (thread + j * kTeam < packs.n) ahead[j] = packs.data[thread + j * kTeam];
  const auto threshold = threshold_of();
#pragma unroll
  for (int j = 0; j < kFirst; ++j)
    if (thread + j * kTeam < packs.n) tally(ahead[j], threshold, counts);
  int64_t p = thread + kFirst * kTeam;
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

__device__ void note(int64_t* first, int64_t row) {
  atomicMin(reinterpret_cast<long long*>(first), static_cast<long long>(row));
}

// What is counted of a row, or of a range of it, by a team of threads.
template <class T>
struct RowPart {
  Range<T> range;
  int64_t row;
  bool bad_count = false;
  int64_t target = -1;
  bool listed = false;  // the row has a target among its items
  KeyOf<T> threshold = 0;

  // `items` of the row from the first on, as far as they exist.
  __device__ RowPart(const RankingArgs& args, int64_t row, int64_t first, int64_t items) : row(row) {
    const int64_t n_items = args.metric.n_items;
    n_ = args.counts ? args.counts[row] : n_items;
    bad_count = n_ < 0 || n_ > n_items;
    range.scores = static_cast<const T*>(args.scores.data) + args.scores.offset(row);
    range.step = args.scores.item_step;
    range.excluded = nullptr;
    range.excluded_step = args.excluded.item_step;
    if (args.excluded.data != nullptr)
      range.excluded =
          static_cast<const uint8_t*>(args.excluded.data) + args.excluded.offset(row);
    range.begin = first;
    range.end = bad_count ? first : min(n_, first + items);
  }

  // Count what `thread` sees. The `leader` of the whole row adds what is known of its target.
  template <int kTeam, int kFirst>
  __device__ Counts count(const RankingArgs& args, int thread, bool leader) {
    Counts mine = count_range<kTeam, kFirst>(range, thread, [&] {
      target = args.target[row];
      listed = !bad_count && target >= 0 && target < n_;
      if (listed) threshold = to_key(range.scores[target * range.step]);
      return threshold;
    });
    if (!listed) return Counts{};
    if (leader) {
      mine.nan |= threshold != threshold;
      // An excluded target competes nevertheless.
      if (range.excluded != nullptr && range.excluded[target * range.excluded_step])
        ++mine.at_least;
    }
    return mine;
  }

  // Note a row without a place in any list; whether that is a fault.
  __device__ bool note_fault(Faults* faults) const {
    if (listed || (target == -1 && !bad_count)) return false;
    note(bad_count ? &faults->counts_row : &faults->target_row, row);
    return true;
  }

 private:
  int64_t n_;
};

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

// Make the metrics of the block's rows of their counts [kRows, 2], of which a negative one is of bad
// data. Warp w makes metric w, w + 8, ...; the number of rows, of which sums need the mean, is the
// last. Of sums, each block leaves its own in `partial` [n_blocks, n_metrics + 1].
__device__ void make_metrics(const MetricArgs& args, const int64_t* target, const int64_t* counts,
                             double* partial) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kRows + lane;
  const bool exists = row < args.n_rows;
  const int64_t greater = exists ? counts[2 * lane] : 0;
  const bool bad = greater < 0;
  const bool counted = exists && (bad || target[row] >= 0);
  Place place{0, 1};
  if (counted && !bad) place = place_of(args.ties, greater, counts[2 * lane + 1]);
  for (int m = threadIdx.x / kWarp; m <= args.n_metrics; m += kThreads / kWarp) {
    double value = 0;
    if (counted) {
      value = 1;
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
    if (lane == 0) partial[int64_t{blockIdx.x} * (args.n_metrics + 1) + m] = value;
  }
}

__global__ void __launch_bounds__(kThreads)
    metrics_kernel(MetricArgs args, const int64_t* target, const int64_t* counts, double* partial) {
  make_metrics(args, target, counts + int64_t{blockIdx.x} * kRows * 2, partial);
}

// One block a metric: add the partial sums, always in the same order.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* partial, int64_t n_blocks, int64_t width, double* out) {
  __shared__ double sums[kThreads];
  double sum = 0;
  for (int64_t b = threadIdx.x; b < n_blocks; b += kThreads) sum += partial[b * width + blockIdx.x];
  sums[threadIdx.x] = sum;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}

void launch_metrics(const MetricArgs& args, const int64_t* target, const int64_t* counts,
                    double* partial, cudaStream_t stream) {
  if (const int64_t n_blocks = ranking_partials(args.n_rows))
    metrics_kernel<<<static_cast<unsigned>(n_blocks), kThreads, 0, stream>>>(args, target, counts,
                                                                             partial);
}

int add_up(const MetricArgs& args, const double* partial, cudaStream_t stream) {
  if (args.output == Output::kSums)
    sum_kernel<<<static_cast<unsigned>(args.n_metrics + 1), kThreads, 0, stream>>>(
        partial, ranking_partials(args.n_rows), args.n_metrics + 1,
        static_cast<double*>(args.out));
  return cudaGetLastError();
}

// ---- short rows

// Add up a warp: by one instruction where there is one.
__device__ unsigned warp_sum(unsigned count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int offset = kWarp / 2; offset > 0; offset /= 2) count += __shfl_xor_sync(~0u, count, offset);
  return count;
#else
  return __reduce_add_sync(~0u, count);
#endif
}

// Add what the threads of a team counted, in one number: 12 bits of each count, and how many saw NaN.
template <int kTeam>
__device__ Counts team_sum(Counts counts) {
  static_assert(kShortItems + 1 < 1 << 12 && kTeam <= kWarp);
  unsigned all = counts.greater | counts.at_least << 12 | unsigned{counts.nan} << 24;
  if (kTeam == kWarp) {
    all = warp_sum(all);
  } else {
    for (int offset = kTeam / 2; offset > 0; offset /= 2) all += __shfl_xor_sync(~0u, all, offset);
  }
  return {all & 0xfff, all >> 12 & 0xfff, all >> 24 > 0};
}

// Count kRows rows, one by each team, and make their metrics.
template <class T, int kTeam>
__global__ void __launch_bounds__(kThreads)
    short_rows_kernel(RankingArgs args, double* partial, Faults* faults) {
  __shared__ int64_t counts[2 * kRows];
  const int64_t first = int64_t{blockIdx.x} * kRows, last = args.metric.n_rows - 1;
  const int thread = threadIdx.x % kTeam;
  for (int slot = threadIdx.x / kTeam; slot < kRows; slot += kThreads / kTeam) {
    // The teams of a warp add up together: one without a row counts the last again.
    RowPart<T> part(args, min(first + slot, last), 0, kShortItems);
    const bool leader = thread == 0;
    const Counts sum = team_sum<kTeam>(part.template count<kTeam, kAhead>(args, thread, leader));
    if (!leader) continue;
    const bool bad = part.note_fault(faults) || sum.nan;
    if (sum.nan) note(&faults->nan_row, part.row);
    counts[2 * slot] = bad ? kBad : sum.greater;
    counts[2 * slot + 1] = sum.at_least;
  }
  __syncthreads();
  make_metrics(args.metric, args.target, counts, partial);
}

// ---- long rows

__device__ Counts warp_sum(Counts counts) {
  counts.greater = warp_sum(counts.greater);
  counts.at_least = warp_sum(counts.at_least);
  counts.nan = __any_sync(~0u, counts.nan);
  return counts;
}

// Count a range of a row, a block each. A row with NaN may hold any counts beside its sign.
template <class T>
__global__ void __launch_bounds__(kThreads)
    count_kernel(RankingArgs args, int64_t* counts, Faults* faults) {
  RowPart<T> part(args, blockIdx.x, int64_t{blockIdx.y} * kBlockItems, kBlockItems);
  const bool leader = blockIdx.y == 0 && threadIdx.x == 0;
  const Counts mine = warp_sum(part.template count<kThreads, 1>(args, threadIdx.x, leader));
  if (threadIdx.x % kWarp != 0) return;
  auto* sums = reinterpret_cast<unsigned long long*>(counts + 2 * part.row);
  const bool bad = part.note_fault(faults) || mine.nan;
  if (mine.nan) note(&faults->nan_row, part.row);
  if (bad) atomicOr(sums, 1ull << 63);
  if (mine.greater) atomicAdd(sums, mine.greater);
  if (mine.at_least) atomicAdd(sums + 1, mine.at_least);
}

template <class T>
void launch_ranking(const RankingArgs& args, int64_t* counts, double* partial, Faults* faults,
                    cudaStream_t stream) {
  const int64_t n_rows = args.metric.n_rows, n_items = args.metric.n_items;
  if (ranking_keeps_counts(n_items)) {
    const dim3 grid(static_cast<unsigned>(n_rows),
                    static_cast<unsigned>((n_items + kBlockItems - 1) / kBlockItems));
    count_kernel<T><<<grid, kThreads, 0, stream>>>(args, counts, faults);
    launch_metrics(args.metric, args.target, counts, partial, stream);
    return;
  }
  const auto n_blocks = static_cast<unsigned>(ranking_partials(n_rows));
  if (n_items * static_cast<int64_t>(sizeof(T)) <= kFewBytes)
    short_rows_kernel<T, kFew><<<n_blocks, kThreads, 0, stream>>>(args, partial, faults);
  else
    short_rows_kernel<T, kWarp><<<n_blocks, kThreads, 0, stream>>>(args, partial, faults);
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
  if (user_tiles == 0) return;
  // Enough blocks to fill a large GPU a few times, each with as many tiles as that leaves. Without
  // an item there is one nevertheless, as any target is a fault then.
  const int64_t columns =
      std::clamp<int64_t>(4096 / user_tiles, 1, std::clamp<int64_t>(item_tiles, 1, 65535));
  const dim3 grid(static_cast<unsigned>(user_tiles), static_cast<unsigned>(columns));
  catalogue_kernel<T><<<grid, kThreads, 0, stream>>>(args, counts, faults);
  if (args.seen != nullptr && args.n_seen > 0) {
    constexpr int64_t kUsers = kThreads / kWarp;
    const auto n_blocks = static_cast<unsigned>((args.metric.n_rows + kUsers - 1) / kUsers);
    seen_kernel<T><<<n_blocks, kThreads, 0, stream>>>(args, counts, faults);
  }
}

}  // namespace

int64_t ranking_partials(int64_t n_rows) { return (n_rows + kRows - 1) / kRows; }

bool ranking_keeps_counts(int64_t n_items) { return n_items > kShortItems; }

int ranking_cuda_error() {
  cudaFuncAttributes attributes;
  const int error = cudaFuncGetAttributes(&attributes, sum_kernel);
  cudaGetLastError();  // no later launch shall find this one
  return error;
}

int ranking_cuda(const RankingArgs& args, int64_t* counts, double* partial, Faults* faults,
                 void* stream_pointer) {
  auto* stream = static_cast<cudaStream_t>(stream_pointer);
  if (args.metric.n_rows > 0) {
    switch (args.score_type) {
      case ScoreType::kFloat32:
        launch_ranking<float>(args, counts, partial, faults, stream);
        break;
      case ScoreType::kFloat64:
        launch_ranking<double>(args, counts, partial, faults, stream);
        break;
      case ScoreType::kFloat16:
        launch_ranking<__half>(args, counts, partial, faults, stream);
        break;
      case ScoreType::kBFloat16:
        launch_ranking<__nv_bfloat16>(args, counts, partial, faults, stream);
        break;
    }
  }
  return add_up(args.metric, partial, stream);
}

int catalogue_cuda(const CatalogueArgs& args, int64_t* counts, double* partial, Faults* faults,
                   void* stream_pointer) {
  auto* stream = static_cast<cudaStream_t>(stream_pointer);
  switch (args.type) {
    case ScoreType::kFloat32:
      launch_catalogue<float>(args, counts, faults, stream);
      break;
    case ScoreType::kFloat64:
      launch_catalogue<double>(args, counts, faults, stream);
      break;
    case ScoreType::kFloat16:
      launch_catalogue<__half>(args, counts, faults, stream);
      break;
    case ScoreType::kBFloat16:
      launch_catalogue<__nv_bfloat16>(args, counts, faults, stream);
      break;
  }
  launch_metrics(args.metric, args.target, counts, partial, stream);
  return add_up(args.metric, partial, stream);
}

}  // namespace lcr_fast
