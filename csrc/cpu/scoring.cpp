// Target-aware scoring, tile by tile of columns; the loops over numbers are in scoring_kernels.h.
//
// With G_x = H_x W1_x^T the first layer of the head is sum_x alpha_x G_x + (item and user part), so
// that a long list of candidates never meets the wide input of the MLP; likewise P_x = H_x W_x
// gives the attention's logits from the bare item vectors. Both are made once a user where that
// costs less.
#include "../scoring.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../cpu_level.h"
#include "scoring_kernels.h"

namespace lcr_fast {
namespace {

constexpr int kSearch = 0, kRec = 1;
// Columns of a tile: 7 vectors of AVX-512. An odd number of cache lines a row spreads over all
// sets of the first cache.
constexpr int64_t kColumns = 112;
constexpr int64_t kTilePanels = 9;        // panels of the catalogue that all users of a block meet
constexpr int64_t kFoldBytes = 16 << 20;  // folded histories kept at a time
constexpr uint32_t kHeadSites = (uint32_t{1} << 31) + (uint32_t{1} << 14);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const ScoringKernels& kernels() {
#if defined(__x86_64__)
  if (cpu_level() >= 2) return kScoringAvx512;
  if (cpu_level() == 1) return kScoringAvx2;
#endif
  return kScoringBaseline;
}

int64_t leading_dimension(int64_t n) {
  const int64_t lines = (n + 15) / 16;
  return 16 * (lines + (lines + 1) % 2);
}

using Buffer = std::vector<float>;

// One call's weights, and how its histories are folded.
struct Net {
  Net(const ScoringArgs& args, bool fold_keys, bool fold_layer)
      : a(args),
        k(kernels()),
        dim(args.dim),
        mlp(!args.widths.empty()),
        dot(!mlp || args.dot),
        hidden(mlp ? args.widths[0] : 0),
        inputs(args.inputs()),
        fold_keys(fold_keys),
        fold_layer(fold_layer && mlp) {
    if (!mlp) return;
    first_transposed.resize(inputs * hidden);
    k.transpose(args.weights[0], inputs, hidden, inputs, first_transposed.data(), hidden);
  }

  const float* states(int x, int64_t b, int64_t n) const {
    return a.states[x] + (b * a.n_trajectories + n) * a.size[x] * dim;
  }
  int64_t length(int x, int64_t b) const { return a.lengths[x][b]; }
  // Rows of W1^T that meet z_x: the recommendation stream comes first.
  int64_t place(int x) const { return x == kRec ? 0 : dim; }

  // Folded histories, per user and trajectory: P_s, P_r, then G_s, G_r.
  int64_t key_floats() const { return fold_keys ? (a.size[0] + a.size[1]) * dim : 0; }
  int64_t fold_floats() const {
    return key_floats() + (fold_layer ? (a.size[0] + a.size[1]) * hidden : 0);
  }
  const float* keys(const float* folded, int x) const {
    return folded + (x == kRec ? a.size[0] * dim : 0);
  }
  const float* layer(const float* folded, int x) const {
    return folded + key_floats() + (x == kRec ? a.size[0] * hidden : 0);
  }

  void fold(int64_t b, int64_t n, float* folded) const {
    for (int x : {kSearch, kRec}) {
      const Strided h{states(x, b, n), dim, 1};
      const int64_t rows = length(x, b);
      if (fold_keys)
        k.gemm(rows, dim, dim, h, a.target_weight + x * dim * dim, dim,
               const_cast<float*>(keys(folded, x)), dim, nullptr, false, false);
      if (fold_layer)
        k.gemm(rows, hidden, dim, h, first_transposed.data() + place(x) * hidden, hidden,
               const_cast<float*>(layer(folded, x)), hidden, nullptr, false, false);
    }
  }

  // What every candidate of a user gets in the first layer: b1 + W1_u e_u.
  void user_bias(int64_t b, float* out) const {
    std::copy_n(a.biases[0], hidden, out);
    if (a.user != nullptr)
      k.gemm(1, hidden, dim, {a.user + b * dim, 0, 1}, first_transposed.data() + 3 * dim * hidden,
             hidden, out, hidden, nullptr, true, false);
  }

  const ScoringArgs& a;
  const ScoringKernels& k;
  const int64_t dim;
  const bool mlp;
  const bool dot;
  const int64_t hidden;
  const int64_t inputs;
  const bool fold_keys, fold_layer;
  Buffer first_transposed;  // [inputs, hidden]
};

// The columns of a tile that belong to one user.
struct Segment {
  int64_t user;
  int64_t begin;
  int64_t size;
  const float* bias;    // [hidden] user part of the first layer
  const float* folded;  // of the trajectory at hand
};

// Room for the intermediates of one tile of `ld` columns.
struct Work {
  Work(const Net& net, int64_t ld) : ld(ld) {
    const ScoringArgs& a = net.a;
    for (int x : {kSearch, kRec}) alpha[x].resize(a.size[x] * ld);
    pooled.resize(2 * net.dim * ld);
    products.resize(net.dot ? std::max(a.size[0], a.size[1]) * ld : 0);
    for (int64_t width : a.widths) layers.emplace_back(width * ld);
    if (!net.mlp) layers.emplace_back(ld);
  }
  const float* scores() const { return layers.back().data(); }

  int64_t ld;
  Buffer alpha[2];             // [size, ld]
  Buffer pooled;               // [2 dim, ld] z_r, z_s
  Buffer products;             // [size, ld] H_x e, of the dot product
  std::vector<Buffer> layers;  // [width, ld] after ReLU and dropout
};

// What the items of a tile contribute, whoever the user is.
struct Items {
  const float* transposed;  // [dim, ld]
  const float* keys[2];     // [dim, ld] W_x e; unless keys are folded
  const float* first;       // [hidden, ld] W1_e e
};

void prepare_items(const Net& net, const float* const* rows, int64_t n, int64_t ld, float* et,
                   float* const keys[2], float* first) {
  for (int64_t d = 0; d < net.dim; d += 16) {
    const int64_t end = std::min(net.dim, d + 16);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t i = d; i < end; ++i) et[i * ld + c] = rows[c][i];
  }
  if (!net.fold_keys)
    for (int x : {kSearch, kRec})
      net.k.gemm(net.dim, n, net.dim, {net.a.target_weight + x * net.dim * net.dim, net.dim, 1}, et,
                 ld, keys[x], ld, nullptr, false, false);
  if (net.mlp)
    net.k.gemm(net.hidden, n, net.dim, {net.a.weights[0] + 2 * net.dim, net.inputs, 1}, et, ld,
               first, ld, nullptr, false, false);
}

// Scores of one trajectory for a tile of columns. All intermediates stay in `work`.
void score_tile(const Net& net, const Segment* segments, int64_t n_segments, int64_t n,
                int64_t trajectory, int64_t first_column, const Items& items,
                const CandidateArgs* candidates, Work& work) {
  const ScoringArgs& a = net.a;
  const ScoringKernels& k = net.k;
  const int64_t dim = net.dim, ld = work.ld;
  float* top = work.layers[0].data();
  float* dots = work.layers.back().data();  // the last layer adds to them
  for (int64_t s = 0; s < n_segments; ++s) {
    const Segment& segment = segments[s];
    const int64_t at = segment.begin, size = segment.size;
    if (net.dot) std::fill_n(dots + at, size, 0.0f);
    // A single layer is the last too: its start replaces the zeros.
    if (net.mlp) k.add_bias(items.first + at, segment.bias, ld, net.hidden, size, top + at);
    for (int x : {kSearch, kRec}) {
      const int64_t rows = net.length(x, segment.user);
      const float* h = net.states(x, segment.user, trajectory);
      float* alpha = work.alpha[x].data() + at;
      const float* left = net.fold_keys ? net.keys(segment.folded, x) : h;
      const float* right = net.fold_keys ? items.transposed : items.keys[x];
      k.gemm(rows, size, dim, {left, dim, 1}, right + at, ld, alpha, ld, nullptr, false, false);
      k.softmax(alpha, ld, rows, size);
      if (net.dot) {
        float* products = work.products.data() + at;
        k.gemm(rows, size, dim, {h, dim, 1}, items.transposed + at, ld, products, ld, nullptr,
               false, false);
        k.column_dots(alpha, products, ld, rows, size, dots + at, true);
      }
      if (net.fold_layer)
        k.gemm(net.hidden, size, rows, {net.layer(segment.folded, x), 1, net.hidden}, alpha, ld,
               top + at, ld, nullptr, true, false);
      else
        k.gemm(dim, size, rows, {h, 1, dim}, alpha, ld, work.pooled.data() + net.place(x) * ld + at,
               ld, nullptr, false, false);
    }
  }
  if (!net.mlp) return;
  if (!net.fold_layer)
    k.gemm(net.hidden, n, 2 * dim, {a.weights[0], net.inputs, 1}, work.pooled.data(), ld, top, ld,
           nullptr, true, false);
  const size_t last = a.widths.size() - 1;
  for (size_t l = 0; l < last; ++l) {
    float* x = work.layers[l].data();
    if (l == 0) k.relu(x, ld, net.hidden, n);
    if (candidates != nullptr && candidates->threshold > 0)
      for (int64_t s = 0; s < n_segments; ++s)
        k.dropout(x + segments[s].begin, ld, a.widths[l], segments[s].size, first_column,
                  kHeadSites + static_cast<uint32_t>(l),
                  static_cast<uint32_t>(candidates->dropout_rows[segments[s].user]),
                  candidates->seed, candidates->threshold);
    k.gemm(a.widths[l + 1], n, a.widths[l], {a.weights[l + 1], a.widths[l], 1}, x, ld,
           work.layers[l + 1].data(), ld, a.biases[l + 1], net.dot && l + 1 == last, l + 1 < last);
  }
}

// How the columns of a call are cut: several short lists in a tile, or a long one in several.
struct Cut {
  Cut(int64_t n_users, int64_t n_candidates) {
    users = std::max<int64_t>(1, kColumns / std::max<int64_t>(1, n_candidates));
    const int64_t tiles = (n_candidates + kColumns - 1) / kColumns;
    // Tiles of even sizes, in whole cache lines.
    columns = tiles <= 1 ? n_candidates : ((n_candidates + tiles - 1) / tiles + 15) / 16 * 16;
    n_tiles = users > 1 || tiles == 0 ? 1 : (n_candidates + columns - 1) / columns;
    n_groups = (n_users + users - 1) / users;
    ld = leading_dimension(users > 1 ? users * n_candidates : columns);
  }
  int64_t users;    // of a group
  int64_t columns;  // of one user in a tile
  int64_t n_tiles;
  int64_t n_groups;
  int64_t ld;
};

// Row pointers of the items in columns [c0, c1) of users [b0, b1).
void item_rows(const CandidateArgs& candidates, int64_t dim, int64_t b0, int64_t b1, int64_t c0,
               int64_t c1, std::vector<const float*>& rows) {
  rows.clear();
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t c = c0; c < c1; ++c)
      rows.push_back(candidates.items + candidates.ids[b * candidates.step + c] * dim);
}

}  // namespace

void score_cpu(const ScoringArgs& args, const CandidateArgs& candidates, float* scores,
               const Parallel& parallel) {
  const int64_t C = candidates.n_candidates, N = args.n_trajectories, D = args.dim;
  if (args.n_users == 0 || C == 0 || N == 0) return;
  const int64_t events = args.size[0] + args.size[1];
  const int64_t H = args.widths.empty() ? 0 : args.widths[0];
  // Multiplications with and without folding, by padded lengths: a user's bits must not depend on
  // the rest of the batch.
  const bool fold_keys = N * events < 2 * C;
  const bool fold_layer = events * D * H + C * events * H < C * events * D + C * 2 * D * H;
  const Net net(args, fold_keys, fold_layer);
  const Cut cut(args.n_users, C);
  const int64_t fold_floats = net.fold_floats();
  // Folded histories of a few groups at a time.
  const int64_t block =
      std::max<int64_t>(1, kFoldBytes / (4 * std::max<int64_t>(1, fold_floats * N * cut.users)));
  Buffer folded;
  for (int64_t g0 = 0; g0 < cut.n_groups; g0 += block) {
    const int64_t g1 = std::min(cut.n_groups, g0 + block);
    const int64_t u0 = g0 * cut.users, u1 = std::min(args.n_users, g1 * cut.users);
    if (fold_floats > 0) {
      folded.resize((u1 - u0) * N * fold_floats);
      parallel((u1 - u0) * N, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          net.fold(u0 + i / N, i % N, folded.data() + i * fold_floats);
      });
    }
    parallel((g1 - g0) * cut.n_tiles, [&](int64_t begin, int64_t end) {
      Work work(net, cut.ld);
      Buffer et(D * cut.ld), keys[2], first(net.hidden * cut.ld), bias(cut.users * net.hidden);
      for (Buffer& key : keys) key.resize(net.fold_keys ? 0 : D * cut.ld);
      float* const key_data[2] = {keys[0].data(), keys[1].data()};
      const Items items{et.data(), {key_data[0], key_data[1]}, first.data()};
      std::vector<const float*> rows;
      std::vector<Segment> segments;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b0 = (g0 + task / cut.n_tiles) * cut.users;
        const int64_t b1 = std::min(args.n_users, b0 + cut.users);
        const int64_t c0 = task % cut.n_tiles * cut.columns;
        const int64_t c1 = std::min(C, c0 + cut.columns);
        item_rows(candidates, D, b0, b1, c0, c1, rows);
        const auto n = static_cast<int64_t>(rows.size());
        prepare_items(net, rows.data(), n, cut.ld, et.data(), key_data, first.data());
        segments.clear();
        for (int64_t b = b0; b < b1; ++b) {
          float* own = bias.data() + (b - b0) * net.hidden;
          if (net.mlp) net.user_bias(b, own);
          segments.push_back({b, (b - b0) * (c1 - c0), c1 - c0, own, nullptr});
        }
        for (int64_t t = 0; t < N; ++t) {
          for (Segment& s : segments)
            if (fold_floats > 0) s.folded = &folded[((s.user - u0) * N + t) * fold_floats];
          score_tile(net, segments.data(), b1 - b0, n, t, c0, items, &candidates, work);
          for (const Segment& s : segments)
            std::copy_n(work.scores() + s.begin, s.size, scores + (s.user * N + t) * C + c0);
        }
      }
    });
  }
}

namespace {

// Sums of the weight gradients over the users of one slice.
struct WeightSums {
  explicit WeightSums(const ScoringArgs& args) {
    sizes.push_back(2 * args.dim * args.dim);
    int64_t in = args.inputs();
    for (int64_t width : args.widths) {
      sizes.push_back(width * in);
      in = width;
    }
    for (int64_t width : args.widths) biases.emplace_back(width);
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    sums.resize(total);
    float* at = sums.data();
    for (int64_t size : sizes) {
      parts.push_back(at);
      at += size;
    }
  }
  float* target_weight() { return parts[0]; }
  float* weight(size_t l) { return parts[1 + l]; }
  std::vector<int64_t> sizes;
  Buffer sums;
  std::vector<float*> parts;  // target weight, weights
  // The gradient of a bias is a bare sum over all candidates, where rounding shows.
  std::vector<std::vector<double>> biases;
};

// Enough to keep the threads busy; each has a copy of all weights' gradients, filled and added up.
constexpr int64_t kSlices = 16;

// Room for the gradients of one tile.
struct BackwardWork {
  BackwardWork(const Net& net, int64_t ld) : forward(net, ld) {
    const ScoringArgs& a = net.a;
    int64_t widest = 2 * net.dim;
    for (int64_t width : a.widths) {
      widest = std::max(widest, width);
      dlayers.emplace_back(width * ld);
    }
    swapped.resize(ld * widest);
    dpooled.resize(ld * 2 * net.dim);
    dpooled_swapped.resize(2 * net.dim * ld);
    items.resize(ld * net.dim);
    et.resize(net.dim * ld);
    first.resize(net.hidden * ld);
    dfirst.resize(net.hidden * ld);
    user_sum.resize(net.hidden);
    exact_sum.resize(net.hidden);
    for (int x : {kSearch, kRec}) {
      keys[x].resize(net.dim * ld);
      keys_swapped[x].resize(ld * net.dim);
      dkeys[x].resize(ld * net.dim);
      dalpha[x].resize(a.size[x] * ld);
    }
  }

  Work forward;
  std::vector<Buffer> dlayers;  // [width, ld]
  Buffer swapped;               // [ld, width] a layer, transposed
  Buffer dpooled;               // [n, 2 dim]
  Buffer dpooled_swapped;       // [2 dim, ld]
  Buffer items;                 // [n, dim]
  Buffer et;                    // [dim, ld]
  Buffer first;                 // [hidden, ld]
  Buffer dfirst;                // [hidden, ld] sum over trajectories
  Buffer user_sum;              // [hidden]
  std::vector<double> exact_sum;
  Buffer keys[2];          // [dim, ld]
  Buffer keys_swapped[2];  // [n, dim]
  Buffer dkeys[2];         // [n, dim]
  Buffer dalpha[2];        // [size, ld]
};

// Gradients of the hidden layers and of the pooled vectors, [n, 2 dim], from those of the scores,
// which stand in the last of w.dlayers. Leaves the pooled vectors, [n, 2 dim], in w.swapped.
void head_bwd(const Net& net, int64_t n, float kept, BackwardWork& w, WeightSums& sums) {
  const ScoringArgs& a = net.a;
  const ScoringKernels& k = net.k;
  const int64_t ld = w.forward.ld, width = 2 * net.dim;
  for (size_t l = a.widths.size() - 1; l > 0; --l) {
    const int64_t out = a.widths[l], in = a.widths[l - 1];
    const float* x = w.forward.layers[l - 1].data();
    float* d = w.dlayers[l].data();
    float* dx = w.dlayers[l - 1].data();
    k.transpose(x, ld, in, n, w.swapped.data(), in);
    k.gemm(out, in, n, {d, ld, 1}, w.swapped.data(), in, sums.weight(l), in, nullptr, true, false);
    k.row_sums(d, ld, out, n, sums.biases[l].data());
    k.gemm(in, n, out, {a.weights[l], 1, in}, d, ld, dx, ld, nullptr, false, false);
    k.relu_bwd(x, kept, ld, in, n, dx);
  }
  const float* d = w.dlayers[0].data();
  k.transpose(w.forward.pooled.data(), ld, width, n, w.swapped.data(), width);
  k.gemm(net.hidden, width, n, {d, ld, 1}, w.swapped.data(), width, sums.weight(0), net.inputs,
         nullptr, true, false);
  k.gemm(n, width, net.hidden, {d, 1, ld}, a.weights[0], net.inputs, w.dpooled.data(), width,
         nullptr, false, false);
}

// Add the gradients through the dot product: to w.dpooled, and to ditems [n, dim]. The pooled
// vectors [n, 2 dim] stand in w.swapped.
void dot_bwd(int64_t dim, const Segment& s, const float* dscores, BackwardWork& w, float* ditems) {
  for (int64_t c = s.begin; c < s.begin + s.size; ++c) {
    const float dy = dscores[c - s.begin];
    const float* z = &w.swapped[c * 2 * dim];
    float* dz = &w.dpooled[c * 2 * dim];
    for (int64_t d = 0; d < dim; ++d) {
      ditems[c * dim + d] += dy * (z[d] + z[dim + d]);
      dz[d] += dy * w.items[c * dim + d];
      dz[dim + d] += dy * w.items[c * dim + d];
    }
  }
}

// Gradients of states and keys of one trajectory, from w.dpooled.
void attention_bwd(const Net& net, const std::vector<Segment>& segments, int64_t n,
                   int64_t trajectory, const ScoringGradients& gradients, BackwardWork& w) {
  const ScoringArgs& a = net.a;
  const ScoringKernels& k = net.k;
  const int64_t ld = w.forward.ld, dim = net.dim, width = 2 * dim;
  k.transpose(w.dpooled.data(), width, n, width, w.dpooled_swapped.data(), ld);
  for (const Segment& s : segments) {
    for (int x : {kSearch, kRec}) {
      const int64_t rows = net.length(x, s.user);
      if (rows == 0) continue;
      const int64_t place = net.place(x);
      const float* h = net.states(x, s.user, trajectory);
      const float* alpha = w.forward.alpha[x].data() + s.begin;
      float* dalpha = w.dalpha[x].data() + s.begin;
      float* dh = gradients.states[x] + (s.user * a.n_trajectories + trajectory) * a.size[x] * dim;
      k.gemm(rows, s.size, dim, {h, dim, 1}, w.dpooled_swapped.data() + place * ld + s.begin, ld,
             dalpha, ld, nullptr, false, false);
      k.gemm(rows, dim, s.size, {alpha, ld, 1}, w.dpooled.data() + s.begin * width + place, width,
             dh, dim, nullptr, true, false);
      k.softmax_bwd(alpha, dalpha, ld, rows, s.size);
      k.gemm(rows, dim, s.size, {dalpha, ld, 1}, w.keys_swapped[x].data() + s.begin * dim, dim, dh,
             dim, nullptr, true, false);
      k.gemm(s.size, dim, rows, {dalpha, 1, ld}, h, dim, w.dkeys[x].data() + s.begin * dim, dim,
             nullptr, true, false);
    }
  }
}

}  // namespace

void score_bwd_cpu(const ScoringArgs& args, const CandidateArgs& candidates, const float* dscores,
                   const ScoringGradients& gradients, const Parallel& parallel) {
  const int64_t C = candidates.n_candidates, N = args.n_trajectories, D = args.dim;
  const Net net(args, false, false);
  const Cut cut(args.n_users, C);
  const int64_t n_slices = C == 0 ? 0 : std::min(kSlices, cut.n_groups);
  const float kept = 65536.0f / static_cast<float>(65536 - candidates.threshold);
  std::vector<WeightSums> slices;
  for (int64_t i = 0; i < std::max<int64_t>(1, n_slices); ++i) slices.emplace_back(args);

  parallel(n_slices, [&](int64_t slice_begin, int64_t slice_end) {
    const ScoringKernels& k = net.k;
    BackwardWork w(net, cut.ld);
    const int64_t ld = cut.ld;
    float* const key_data[2] = {w.keys[0].data(), w.keys[1].data()};
    const Items items{w.et.data(), {key_data[0], key_data[1]}, w.first.data()};
    Buffer bias(cut.users * net.hidden);
    std::vector<const float*> rows;
    std::vector<Segment> segments;
    for (int64_t slice = slice_begin; slice < slice_end; ++slice) {
      WeightSums& sums = slices[slice];
      const int64_t g1 = (slice + 1) * cut.n_groups / n_slices;
      for (int64_t g = slice * cut.n_groups / n_slices; g < g1; ++g) {
        const int64_t b0 = g * cut.users, b1 = std::min(args.n_users, b0 + cut.users);
        segments.clear();
        for (int64_t b = b0; b < b1; ++b) {
          float* own = bias.data() + (b - b0) * net.hidden;
          if (net.mlp) net.user_bias(b, own);
          if (gradients.user != nullptr) std::fill_n(gradients.user + b * D, D, 0.0f);
          segments.push_back({b, 0, 0, own, nullptr});
        }
        for (int64_t tile = 0; tile < cut.n_tiles; ++tile) {
          const int64_t c0 = tile * cut.columns, c1 = std::min(C, c0 + cut.columns);
          item_rows(candidates, D, b0, b1, c0, c1, rows);
          const auto n = static_cast<int64_t>(rows.size());
          prepare_items(net, rows.data(), n, ld, w.et.data(), key_data, w.first.data());
          for (int64_t c = 0; c < n; ++c) std::copy_n(rows[c], D, w.items.data() + c * D);
          for (int x : {kSearch, kRec}) {
            k.transpose(w.keys[x].data(), ld, D, n, w.keys_swapped[x].data(), D);
            std::fill_n(w.dkeys[x].data(), n * D, 0.0f);
          }
          for (Segment& s : segments) {
            s.begin = (s.user - b0) * (c1 - c0);
            s.size = c1 - c0;
          }
          float* ditems = gradients.items + (b0 * C + c0) * D;
          std::fill(w.dfirst.begin(), w.dfirst.end(), 0.0f);
          std::fill_n(ditems, n * D, 0.0f);
          for (int64_t t = 0; t < N; ++t) {
            score_tile(net, segments.data(), b1 - b0, n, t, c0, items, &candidates, w.forward);
            const auto upstream = [&](const Segment& s) {
              return dscores + (s.user * N + t) * C + c0;
            };
            if (net.mlp) {
              for (const Segment& s : segments)
                std::copy_n(upstream(s), s.size, w.dlayers.back().data() + s.begin);
              head_bwd(net, n, kept, w, sums);
              for (size_t i = 0; i < w.dfirst.size(); ++i) w.dfirst[i] += w.dlayers[0][i];
            } else {
              k.transpose(w.forward.pooled.data(), ld, 2 * D, n, w.swapped.data(), 2 * D);
              std::fill_n(w.dpooled.data(), n * 2 * D, 0.0f);
            }
            if (net.dot)
              for (const Segment& s : segments) dot_bwd(D, s, upstream(s), w, ditems);
            attention_bwd(net, segments, n, t, gradients, w);
          }
          for (int x : {kSearch, kRec}) {
            const float* dkeys = w.dkeys[x].data();
            k.gemm(n, D, D, {dkeys, D, 1}, args.target_weight + x * D * D, D, ditems, D, nullptr,
                   true, false);
            k.gemm(D, D, n, {dkeys, 1, D}, w.items.data(), D, sums.target_weight() + x * D * D, D,
                   nullptr, true, false);
          }
          if (!net.mlp) continue;
          const float* dfirst = w.dfirst.data();
          float* dweight = sums.weight(0);
          k.gemm(n, D, net.hidden, {dfirst, 1, ld}, args.weights[0] + 2 * D, net.inputs, ditems, D,
                 nullptr, true, false);
          k.gemm(net.hidden, D, n, {dfirst, ld, 1}, w.items.data(), D, dweight + 2 * D, net.inputs,
                 nullptr, true, false);
          for (const Segment& s : segments) {
            std::fill(w.exact_sum.begin(), w.exact_sum.end(), 0.0);
            k.row_sums(dfirst + s.begin, ld, net.hidden, s.size, w.exact_sum.data());
            for (int64_t h = 0; h < net.hidden; ++h) {
              sums.biases[0][h] += w.exact_sum[h];
              w.user_sum[h] = static_cast<float>(w.exact_sum[h]);
            }
            if (args.user == nullptr) continue;
            const float* sum = w.user_sum.data();
            k.gemm(1, D, net.hidden, {sum, 0, 1}, args.weights[0] + 3 * D, net.inputs,
                   gradients.user + s.user * D, D, nullptr, true, false);
            k.gemm(net.hidden, D, 1, {sum, 1, 0}, args.user + s.user * D, D, dweight + 3 * D,
                   net.inputs, nullptr, true, false);
          }
        }
      }
    }
  });

  const auto total = [&](size_t part, float* out) {
    const WeightSums& first = slices[0];
    std::copy_n(first.parts[part], first.sizes[part], out);
    for (size_t s = 1; s < slices.size(); ++s)
      for (int64_t i = 0; i < first.sizes[part]; ++i) out[i] += slices[s].parts[part][i];
  };
  total(0, gradients.target_weight);
  for (size_t l = 0; l < args.widths.size(); ++l) {
    total(1 + l, gradients.weights[l]);
    for (int64_t h = 0; h < args.widths[l]; ++h) {
      double sum = 0;
      for (const WeightSums& slice : slices) sum += slice.biases[l][h];
      gradients.biases[l][h] = static_cast<float>(sum);
    }
  }
}

namespace {

// Everything of a user that a pass over the catalogue needs.
struct Reader {
  std::vector<int64_t> hidden;  // items that do not count, in order
  size_t next = 0;              // the first of them that the pass has not met
  bool nan = false;
};

// Stream scores over the catalogue: begin(u0, u1) before a block of users, visit(user, first item,
// scores, n) for each tile, in order of items and for one user in one thread, with -inf for what is
// hidden, and finish(user, nan) at the end.
template <class Hide, class Begin, class Visit, class Finish>
void stream(const ScoringArgs& args, const ItemArgs& catalogue, const Parallel& parallel,
            const Hide& hide, const Begin& begin_users, const Visit& visit, const Finish& finish) {
  const int64_t D = args.dim;
  const Net net(args, true, true);
  constexpr int64_t kTile = kColumns * kTilePanels;
  const int64_t fold_floats = net.fold_floats(), H = net.hidden;
  const int64_t block =
      std::max<int64_t>(1, kFoldBytes / (4 * std::max<int64_t>(1, fold_floats + H + kTile)));
  const int64_t panel_floats = (D + H) * kColumns;
  const int64_t n_block = std::min(block, args.n_users);
  Buffer folded(n_block * fold_floats), bias(n_block * H), scores(n_block * kTile);
  Buffer panels(kTilePanels * panel_floats);
  std::vector<Reader> readers(n_block);
  for (int64_t u0 = 0; u0 < args.n_users; u0 += block) {
    const int64_t n_users = std::min(block, args.n_users - u0);
    const auto segment = [&](int64_t i, int64_t n) {
      return Segment{u0 + i, 0, n, bias.data() + i * H, folded.data() + i * fold_floats};
    };
    parallel(n_users, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        net.fold(u0 + i, 0, folded.data() + i * fold_floats);
        if (net.mlp) net.user_bias(u0 + i, bias.data() + i * H);
        Reader& reader = readers[i] = {};
        for (int64_t e = 0; e < catalogue.n_exclude; ++e) {
          const int64_t item = catalogue.exclude[(u0 + i) * catalogue.n_exclude + e];
          if (item >= 1 && item <= catalogue.n_items) reader.hidden.push_back(item);
        }
        hide(u0 + i, reader.hidden);
        std::sort(reader.hidden.begin(), reader.hidden.end());
      }
    });
    begin_users(net, n_users, segment);
    for (int64_t first = 1; first <= catalogue.n_items; first += kTile) {
      const int64_t n_tile = std::min(kTile, catalogue.n_items + 1 - first);
      const int64_t n_panels = (n_tile + kColumns - 1) / kColumns;
      const auto width = [&](int64_t p) { return std::min(kColumns, n_tile - p * kColumns); };
      parallel(n_panels, [&](int64_t begin, int64_t end) {
        const float* rows[kColumns];
        for (int64_t p = begin; p < end; ++p) {
          for (int64_t c = 0; c < width(p); ++c)
            rows[c] = catalogue.items + (first + p * kColumns + c) * D;
          float* panel = panels.data() + p * panel_floats;
          prepare_items(net, rows, width(p), kColumns, panel, nullptr, panel + D * kColumns);
        }
      });
      // A user's panels follow each other, so that its folded history stays in the cache.
      parallel(n_users * n_panels, [&](int64_t begin, int64_t end) {
        Work work(net, kColumns);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = task / n_panels, p = task % n_panels;
          const float* panel = panels.data() + p * panel_floats;
          const Segment own = segment(i, width(p));
          score_tile(net, &own, 1, width(p), 0, 0, {panel, {}, panel + D * kColumns}, nullptr,
                     work);
          std::copy_n(work.scores(), width(p), scores.data() + i * kTile + p * kColumns);
        }
      });
      parallel(n_users, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          float* row = scores.data() + i * kTile;
          Reader& reader = readers[i];
          int nan = 0;
          for (int64_t c = 0; c < n_tile; ++c) nan |= row[c] != row[c];
          reader.nan |= nan != 0;
          for (; reader.next < reader.hidden.size(); ++reader.next) {
            const int64_t column = reader.hidden[reader.next] - first;
            if (column >= n_tile) break;
            row[column] = -kInfinity;
          }
          visit(u0 + i, first, row, n_tile);
        }
      });
    }
    for (int64_t i = 0; i < n_users; ++i) finish(u0 + i, readers[i].nan);
  }
}

struct Scored {
  float score;
  int64_t id;
  bool operator<(const Scored& other) const {  // the better one first
    return score != other.score ? score > other.score : id < other.id;
  }
};

// The k best of what was pushed in order of ids.
class Best {
 public:
  explicit Best(int64_t k) : k_(k) {}

  void push(float score, int64_t id) {
    // An equal score with a higher id comes later, so it loses against k kept ones.
    if (!(score > threshold_)) return;
    kept_.push_back({score, id});
    if (static_cast<int64_t>(kept_.size()) >= 2 * k_ + 64) shrink();
  }
  const std::vector<Scored>& sorted() {
    std::sort(kept_.begin(), kept_.end());
    if (static_cast<int64_t>(kept_.size()) > k_) kept_.resize(k_);
    return kept_;
  }

 private:
  void shrink() {
    std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.end());
    threshold_ = kept_[k_ - 1].score;
    kept_.resize(k_);
  }

  int64_t k_;
  float threshold_ = -kInfinity;
  std::vector<Scored> kept_;
};

}  // namespace

void score_topk_cpu(const ScoringArgs& args, const ItemArgs& items, int64_t k, int64_t* ids,
                    float* scores, const Parallel& parallel) {
  std::vector<Best> best;
  for (int64_t b = 0; b < args.n_users; ++b) best.emplace_back(k);
  stream(
      args, items, parallel, [](int64_t, std::vector<int64_t>&) {},
      [](const Net&, int64_t, const auto&) {},
      [&](int64_t user, int64_t first, const float* row, int64_t n) {
        for (int64_t c = 0; c < n; ++c) best[user].push(row[c], first + c);
      },
      [&](int64_t user, bool nan) {
        std::fill_n(ids + user * k, k, 0);
        std::fill_n(scores + user * k, k, nan ? std::nanf("") : -kInfinity);
        if (!nan) {
          int64_t place = user * k;
          for (const Scored& item : best[user].sorted()) {
            ids[place] = item.id;
            scores[place++] = item.score;
          }
        }
        best[user] = Best(k);
      });
}

void score_rank_cpu(const ScoringArgs& args, const ItemArgs& items, const int64_t* target,
                    const float* bonus, int64_t* rank, const Parallel& parallel) {
  std::vector<float> goal(args.n_users);
  std::fill_n(rank, args.n_users, 1);
  stream(
      args, items, parallel,
      // The target never competes with itself.
      [&](int64_t user, std::vector<int64_t>& hidden) {
        if (target[user] > 0) hidden.push_back(target[user]);
      },
      [&](const Net& net, int64_t n_users, const auto& segment) {
        parallel(n_users, [&](int64_t begin, int64_t end) {
          constexpr int64_t kLd = 16;
          Work work(net, kLd);
          Buffer et(net.dim * kLd), first(net.hidden * kLd);
          for (int64_t i = begin; i < end; ++i) {
            const Segment own = segment(i, 1);
            const float* row = items.items + target[own.user] * net.dim;
            prepare_items(net, &row, 1, kLd, et.data(), nullptr, first.data());
            score_tile(net, &own, 1, 1, 0, 0, {et.data(), {}, first.data()}, nullptr, work);
            goal[own.user] = work.scores()[0] + bonus[own.user];
          }
        });
      },
      [&](int64_t user, int64_t, const float* row, int64_t n) {
        const float wanted = goal[user];
        int64_t ahead = 0;
        for (int64_t c = 0; c < n; ++c) ahead += row[c] >= wanted && row[c] > -kInfinity;
        rank[user] += ahead;
      },
      [&](int64_t user, bool nan) {
        if (nan || (target[user] > 0 && goal[user] != goal[user])) rank[user] = -1;
      });
}

}  // namespace lcr_fast
