#include "scoring_tile.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "../cpu_level.h"

namespace lcr_fast {
namespace {

const ScoringKernels& scoring_kernels(bool pairs) {
#if defined(__x86_64__)
  const CpuLevel level = cpu_level();
  if (level >= CpuLevel::kAvx512Bf16 && pairs) return kScoringPairsAvx512Bf16;
  if (level >= CpuLevel::kAvx512) return pairs ? kScoringPairsAvx512 : kScoringAvx512;
  if (level >= CpuLevel::kAvx2) return pairs ? kScoringPairsAvx2 : kScoringAvx2;
#endif
  return pairs ? kScoringPairsBaseline : kScoringBaseline;
}

int64_t leading_dimension(int64_t n) {
  const int64_t lines = (n + 15) / 16;
  return 16 * (lines + (lines + 1) % 2);
}

void transpose_first(const ScoringArgs& args, float* out) {
  const int64_t inputs = args.inputs(), hidden = args.widths[0];
  scoring_kernels(false).transpose(args.weights[0], inputs, hidden, inputs, out, hidden);
}

}  // namespace

HeadLayout::HeadLayout(int64_t dim, bool reads_users, const std::vector<int64_t>& widths,
                       bool pairs) {
  size = 0;
  const auto take = [this](int64_t n) {
    constexpr int64_t kLine = 16;
    return std::exchange(size, size + (n + kLine - 1) / kLine * kLine);
  };
  const int64_t inner = pairs ? pair_count(dim) : dim, parts = reads_users ? 4 : 3;
  target_weight = take(2 * inner * dim);
  first_transposed = take(widths.empty() ? 0 : parts * inner * widths[0]);
  int64_t in = pairs ? dim : parts * dim;
  for (int64_t width : widths) {
    weights.push_back(take(width * (pairs ? pair_row(in) : in)));
    biases.push_back(take(width));
    in = width;
  }
}

void pack_head(const ScoringArgs& args, bool pairs, float* packed) {
  const HeadLayout at(args.dim, args.user != nullptr, args.widths, pairs);
  const ScoringKernels& k = scoring_kernels(pairs);
  const int64_t D = args.dim, inputs = args.inputs(), n_layers = args.widths.size();
  // The right factors [D, width] one below the other, from `parts` of them.
  const auto pack_right = [&](int64_t parts, int64_t width, const float* from, float* to) {
    const int64_t inner = pairs ? pair_count(D) : D;
    for (int64_t part = 0; part < parts; ++part) {
      float* out = to + part * inner * width;
      const float* packed = k.right(D, width, from + part * D * width, width, out);
      if (packed != out) std::copy_n(packed, D * width, out);
    }
  };
  pack_right(2, D, args.target_weight, packed + at.target_weight);
  if (n_layers == 0) return;
  const Floats transposed = new_floats(inputs * args.widths[0]);
  transpose_first(args, transposed.get());
  pack_right(inputs / D, args.widths[0], transposed.get(), packed + at.first_transposed);
  for (int64_t l = 0; l < n_layers; ++l) {
    const int64_t in = l == 0 ? inputs : args.widths[l - 1], width = args.widths[l];
    float* out = packed + at.weights[l];
    if (!pairs)
      std::copy_n(args.weights[l], width * in, out);
    else if (l == 0)
      k.left(width, D, args.weights[l] + 2 * D, in, out);
    else
      k.left(width, in, args.weights[l], in, out);
    std::copy_n(args.biases[l], width, packed + at.biases[l]);
  }
}

void use_packed_head(ScoringArgs& args, const float* packed) {
  const HeadLayout at(args.dim, args.user != nullptr, args.widths, args.pairs);
  args.target_weight = packed + at.target_weight;
  args.first_transposed = packed + at.first_transposed;
  for (size_t l = 0; l < args.widths.size(); ++l) {
    args.weights.push_back(packed + at.weights[l]);
    args.biases.push_back(packed + at.biases[l]);
  }
}

void first_layer_of_items(const ScoringArgs& args, bool pairs, const float* items, int64_t n,
                          float* out, const Parallel& parallel) {
  const ScoringKernels& k = scoring_kernels(pairs);
  const int64_t D = args.dim, H = args.widths[0];
  const Floats words = new_floats(pairs ? H * pair_row(D) : 0);
  const MatrixA weight = k.left(H, D, args.weights[0] + 2 * D, args.inputs(), words.get());
  parallel((n + kColumns - 1) / kColumns, [&](int64_t begin, int64_t end) {
    const Floats et = new_floats(D * kColumns), first = new_floats(H * kColumns);
    const float* rows[kColumns];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t from = tile * kColumns, width = std::min(kColumns, n - from);
      for (int64_t c = 0; c < width; ++c) rows[c] = items + (from + c) * D;
      k.right_of_rows(rows, width, D, et.get(), kColumns);
      k.gemm(H, width, D, weight, et.get(), kColumns, first.get(), kColumns, {});
      k.transpose(first.get(), kColumns, H, width, out + from * H, H);
    }
  });
}

ScoringNet::ScoringNet(const ScoringArgs& args, Fold fold, int64_t n_candidates)
    : a(args),
      k(scoring_kernels(args.pairs)),
      pairs(args.pairs),
      dim(args.dim),
      mlp(!args.widths.empty()),
      dot(!mlp || args.dot),
      hidden(mlp ? args.widths[0] : 0),
      inputs(args.inputs()),
      first_transposed(args.first_transposed),
      fold_(args.pairs ? Fold::kAll : fold),
      n_candidates_(n_candidates),
      inner_(pairs ? pair_count(dim) : dim),
      width_(pairs ? pair_row(dim) : dim) {
  bool some_keys = false, some_layer = false;
  for (int64_t b = 0; b < a.n_users; ++b) {
    some_keys |= folds_keys(b), all_fold_keys &= folds_keys(b);
    some_layer |= folds_layer(b), all_fold_layer &= folds_layer(b);
  }
  const auto take = [this](bool wanted, int64_t n) {
    return std::exchange(fold_floats_, fold_floats_ + (wanted ? n : 0));
  };
  for (int x : {kSearch, kRec}) states_[x] = take(pairs && dot, a.size[x] * width_);
  for (int x : {kSearch, kRec}) keys_[x] = take(some_keys, a.size[x] * width_);
  for (int x : {kSearch, kRec})
    layer_[x] = take(some_layer, (pairs ? pair_count(a.size[x]) : a.size[x]) * hidden);
  if (!mlp || first_transposed != nullptr) return;
  made_ = new_floats(inputs * hidden);
  transpose_first(args, made_.get());
  first_transposed = made_.get();
}

bool ScoringNet::folds_keys(int64_t b) const {
  const int64_t events = length(kSearch, b) + length(kRec, b);
  return fold_ == Fold::kAll ||
         (fold_ == Fold::kCheaper && a.n_trajectories * events < 2 * n_candidates_);
}

bool ScoringNet::folds_layer(int64_t b) const {
  const int64_t events = length(kSearch, b) + length(kRec, b);
  const int64_t folded = events * dim * hidden + n_candidates_ * events * hidden;
  const int64_t unfolded = n_candidates_ * events * dim + n_candidates_ * 2 * dim * hidden;
  return mlp && (fold_ == Fold::kAll || (fold_ == Fold::kCheaper && folded < unfolded));
}

MatrixA ScoringNet::history(int x, int64_t b, int64_t n, const float* folded) const {
  return {pairs ? folded + states_[x] : states(x, b, n), width_};
}

void ScoringNet::fold(int64_t b, int64_t n, float* folded) const {
  // Of pairs, what a product makes is then made words.
  float* floats = nullptr;
  Floats words;
  if (pairs) {
    const int64_t most = std::max(a.size[0], a.size[1]);
    floats = thread_scratch(most * std::max(dim, hidden));
    if (!dot) words = new_floats(most * width_);
  }
  for (int x : {kSearch, kRec}) {
    const int64_t rows = length(x, b);
    const MatrixA h =
        k.left(rows, dim, states(x, b, n), dim, dot ? folded + states_[x] : words.get());
    if (folds_keys(b)) {
      float* out = folded + keys_[x];
      float* made = pairs ? floats : out;
      k.gemm(rows, dim, dim, h, target_weight(x), dim, made, dim, {});
      k.left(rows, dim, made, dim, out);
    }
    if (folds_layer(b)) {
      float* out = folded + layer_[x];
      float* made = pairs ? floats : out;
      k.gemm(rows, hidden, dim, h, first_rows(place(x)), hidden, made, hidden, {});
      k.right(rows, hidden, made, hidden, out);
    }
  }
}

void ScoringNet::user_bias(int64_t b, float* out) const {
  std::copy_n(a.biases[0], hidden, out);
  if (a.user == nullptr) return;
  const MatrixA user =
      k.left(1, dim, a.user + b * dim, dim, pairs ? thread_scratch(width_) : nullptr);
  k.gemm(1, hidden, dim, user, first_rows(3 * dim), hidden, out, hidden, kAdd);
}

TileWork::TileWork(const ScoringNet& net, int64_t ld) : ld(ld) {
  const ScoringArgs& a = net.a;
  const int64_t pooled_rows = net.all_fold_layer ? 0 : 2 * net.dim;
  const int64_t product_rows = net.dot ? std::max(a.size[0], a.size[1]) : 0;
  std::vector<int64_t> widths = a.widths;
  if (!net.mlp) widths.push_back(1);
  const int64_t layer_rows = std::accumulate(widths.begin(), widths.end(), int64_t{0});
  const int64_t longest =
      std::max({a.size[0], a.size[1], *std::max_element(widths.begin(), widths.end())});
  const int64_t word_rows = net.pairs ? pair_count(longest) : 0;
  memory_ = new_floats(
      (a.size[0] + a.size[1] + pooled_rows + product_rows + word_rows + layer_rows) * ld);
  float* at = memory_.get();
  const auto take = [&at, ld](int64_t rows) { return std::exchange(at, at + rows * ld); };
  for (int x : {kSearch, kRec}) alpha[x] = take(a.size[x]);
  pooled = take(pooled_rows);
  products = take(product_rows);
  words = take(word_rows);
  for (int64_t width : widths) layers.push_back(take(width));
}

ColumnCut::ColumnCut(int64_t n_users, int64_t n_candidates) {
  users = std::max<int64_t>(1, kColumns / std::max<int64_t>(1, n_candidates));
  const int64_t tiles = (n_candidates + kColumns - 1) / kColumns;
  // Tiles of even sizes, in whole cache lines.
  columns = tiles <= 1 ? n_candidates : ((n_candidates + tiles - 1) / tiles + 15) / 16 * 16;
  n_tiles = users > 1 || tiles == 0 ? 1 : (n_candidates + columns - 1) / columns;
  n_groups = (n_users + users - 1) / users;
  ld = leading_dimension(users > 1 ? users * n_candidates : columns);
}

void prepare_items(const ScoringNet& net, const float* const* rows, int64_t n, int64_t ld,
                   float* et, float* const keys[2], float* first, const float* const* first_rows) {
  net.k.right_of_rows(rows, n, net.dim, et, ld);
  if (keys != nullptr)
    for (int x : {kSearch, kRec})
      net.k.gemm(net.dim, n, net.dim, {net.a.target_weight + x * net.dim * net.dim, net.dim, 1}, et,
                 ld, keys[x], ld, {});
  if (net.mlp && first_rows != nullptr)
    net.k.transpose_rows(first_rows, n, net.hidden, first, ld);
  else if (net.mlp)
    net.k.gemm(net.hidden, n, net.dim, net.item_weight(), et, ld, first, ld, {});
}

void score_tile(const ScoringNet& net, const Segment* segments, int64_t n_segments, int64_t n,
                int64_t trajectory, int64_t first_column, const TileItems& items,
                const CandidateArgs* candidates, TileWork& work) {
  const ScoringArgs& a = net.a;
  const ScoringKernels& k = net.k;
  const int64_t dim = net.dim, ld = work.ld;
  float* top = work.layers[0];
  float* dots = work.layers.back();  // the last layer adds to them
  const bool deep = a.widths.size() > 1;
  for (int64_t s = 0; s < n_segments; ++s) {
    const Segment& segment = segments[s];
    const int64_t at = segment.begin, size = segment.size;
    const bool folds_keys = net.folds_keys(segment.user);
    if (net.dot) std::fill_n(dots + at, size, 0.0f);
    // A single layer is the last too: its start replaces the zeros.
    if (net.mlp) k.add_bias(items.first + at, segment.bias, ld, net.hidden, size, top + at);
    for (int x : {kSearch, kRec}) {
      const int64_t rows = net.length(x, segment.user);
      float* alpha = work.alpha[x] + at;
      const MatrixA history = net.history(x, segment.user, trajectory, segment.folded);
      const MatrixA left = folds_keys ? net.keys(segment.folded, x) : history;
      const float* right = folds_keys ? items.transposed : items.keys[x];
      k.gemm(rows, size, dim, left, right + at, ld, alpha, ld, {});
      k.softmax(alpha, ld, rows, size);
      if (net.dot) {
        float* products = work.products + at;
        k.gemm(rows, size, dim, history, items.transposed + at, ld, products, ld, {});
        k.column_dots(alpha, products, ld, rows, size, dots + at, true);
      }
      if (net.folds_layer(segment.user))
        k.gemm(net.hidden, size, rows, net.layer(segment.folded, x),
               k.right(rows, size, alpha, ld, work.words), ld, top + at, ld,
               {.add = true, .relu = deep && x == kRec});
      else
        k.gemm(dim, size, rows, {history.data, 1, dim}, alpha, ld,
               work.pooled + net.place(x) * ld + at, ld, {});
    }
  }
  if (!net.mlp) return;
  for (int64_t s = 0; s < n_segments; ++s) {  // those side by side that do not fold the layer
    const int64_t first = s;
    while (s < n_segments && !net.folds_layer(segments[s].user)) ++s;
    if (s == first) continue;
    const int64_t at = segments[first].begin;
    k.gemm(net.hidden, segments[s - 1].begin + segments[s - 1].size - at, 2 * dim,
           {a.weights[0], net.inputs, 1}, work.pooled + at, ld, top + at, ld,
           {.add = true, .relu = deep});
  }
  const size_t last = a.widths.size() - 1;
  for (size_t l = 0; l < last; ++l) {
    float* x = work.layers[l];
    if (candidates != nullptr && candidates->dropout.threshold > 0)
      for (int64_t s = 0; s < n_segments; ++s)
        k.dropout(candidates->dropout, candidates->dropout_rows[segments[s].user],
                  kHeadSites + static_cast<int64_t>(l), first_column, x + segments[s].begin, ld,
                  a.widths[l], segments[s].size);
    k.gemm(a.widths[l + 1], n, a.widths[l], net.weight(l + 1),
           k.right(a.widths[l], n, x, ld, work.words), ld, work.layers[l + 1], ld,
           {.row_bias = a.biases[l + 1], .add = net.dot && l + 1 == last, .relu = l + 1 < last});
  }
}

void item_rows(const CandidateArgs& candidates, const float* table, int64_t width, int64_t b0,
               int64_t b1, int64_t c0, int64_t c1, std::vector<const float*>& rows) {
  rows.clear();
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t c = c0; c < c1; ++c)
      rows.push_back(table + candidates.ids[b * candidates.step + c] * width);
}

}  // namespace lcr_fast
