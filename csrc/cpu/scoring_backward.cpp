// Gradients of scores: each tile is scored anew, then walked back.
#include <algorithm>
#include <vector>

#include "../scoring.h"
#include "scoring_tile.h"

namespace lcr_fast {
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
  BackwardWork(const ScoringNet& net, int64_t ld) : forward(net, ld) {
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

  TileWork forward;
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
void head_bwd(const ScoringNet& net, int64_t n, float kept, BackwardWork& w, WeightSums& sums) {
  const ScoringArgs& a = net.a;
  const ScoringKernels& k = net.k;
  const int64_t ld = w.forward.ld, width = 2 * net.dim;
  for (size_t l = a.widths.size() - 1; l > 0; --l) {
    const int64_t out = a.widths[l], in = a.widths[l - 1];
    const float* x = w.forward.layers[l - 1];
    float* d = w.dlayers[l].data();
    float* dx = w.dlayers[l - 1].data();
    k.transpose(x, ld, in, n, w.swapped.data(), in);
    k.gemm(out, in, n, {d, ld, 1}, w.swapped.data(), in, sums.weight(l), in, kAdd);
    k.row_sums(d, ld, out, n, sums.biases[l].data());
    k.gemm(in, n, out, {a.weights[l], 1, in}, d, ld, dx, ld, {});
    k.relu_bwd(x, kept, ld, in, n, dx);
  }
  const float* d = w.dlayers[0].data();
  k.transpose(w.forward.pooled, ld, width, n, w.swapped.data(), width);
  k.gemm(net.hidden, width, n, {d, ld, 1}, w.swapped.data(), width, sums.weight(0), net.inputs,
         kAdd);
  k.gemm(n, width, net.hidden, {d, 1, ld}, a.weights[0], net.inputs, w.dpooled.data(), width, {});
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
void attention_bwd(const ScoringNet& net, const std::vector<Segment>& segments, int64_t n,
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
      const float* alpha = w.forward.alpha[x] + s.begin;
      float* dalpha = w.dalpha[x].data() + s.begin;
      float* dh = gradients.states[x] + (s.user * a.n_trajectories + trajectory) * a.size[x] * dim;
      k.gemm(rows, s.size, dim, {h, dim, 1}, w.dpooled_swapped.data() + place * ld + s.begin, ld,
             dalpha, ld, {});
      k.gemm(rows, dim, s.size, {alpha, ld, 1}, w.dpooled.data() + s.begin * width + place, width,
             dh, dim, kAdd);
      k.softmax_bwd(alpha, dalpha, ld, rows, s.size);
      k.gemm(rows, dim, s.size, {dalpha, ld, 1}, w.keys_swapped[x].data() + s.begin * dim, dim, dh,
             dim, kAdd);
      k.gemm(s.size, dim, rows, {dalpha, 1, ld}, h, dim, w.dkeys[x].data() + s.begin * dim, dim,
             kAdd);
    }
  }
}

}  // namespace

void score_bwd_cpu(const ScoringArgs& args, const CandidateArgs& candidates, const float* dscores,
                   const ScoringGradients& gradients, const Parallel& parallel) {
  const int64_t C = candidates.n_candidates, N = args.n_trajectories, D = args.dim;
  const ScoringNet net(args, Fold::kNone);
  const ColumnCut cut(args.n_users, C);
  const int64_t n_slices = C == 0 ? 0 : std::min(kSlices, cut.n_groups);
  const float kept = keep_scale(candidates.dropout.threshold);
  std::vector<WeightSums> slices;
  for (int64_t i = 0; i < std::max<int64_t>(1, n_slices); ++i) slices.emplace_back(args);

  parallel(n_slices, [&](int64_t slice_begin, int64_t slice_end) {
    const ScoringKernels& k = net.k;
    BackwardWork w(net, cut.ld);
    const int64_t ld = cut.ld;
    float* const key_data[2] = {w.keys[0].data(), w.keys[1].data()};
    const TileItems items{w.et.data(), {key_data[0], key_data[1]}, w.first.data()};
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
          item_rows(candidates, candidates.items, D, b0, b1, c0, c1, rows);
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
              k.transpose(w.forward.pooled, ld, 2 * D, n, w.swapped.data(), 2 * D);
              std::fill_n(w.dpooled.data(), n * 2 * D, 0.0f);
            }
            if (net.dot)
              for (const Segment& s : segments) dot_bwd(D, s, upstream(s), w, ditems);
            attention_bwd(net, segments, n, t, gradients, w);
          }
          for (int x : {kSearch, kRec}) {
            const float* dkeys = w.dkeys[x].data();
            k.gemm(n, D, D, {dkeys, D, 1}, args.target_weight + x * D * D, D, ditems, D, kAdd);
            k.gemm(D, D, n, {dkeys, 1, D}, w.items.data(), D, sums.target_weight() + x * D * D, D,
                   kAdd);
          }
          if (!net.mlp) continue;
          const float* dfirst = w.dfirst.data();
          float* dweight = sums.weight(0);
          k.gemm(n, D, net.hidden, {dfirst, 1, ld}, args.weights[0] + 2 * D, net.inputs, ditems, D,
                 kAdd);
          k.gemm(net.hidden, D, n, {dfirst, ld, 1}, w.items.data(), D, dweight + 2 * D, net.inputs,
                 kAdd);
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
                   gradients.user + s.user * D, D, kAdd);
            k.gemm(net.hidden, D, 1, {sum, 1, 0}, args.user + s.user * D, D, dweight + 3 * D,
                   net.inputs, kAdd);
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

}  // namespace lcr_fast
