#include "scoring_tile.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "../cpu_level.h"

namespace lcr_fast {
namespace {

const ScoringKernels& scoring_kernels() {
#if defined(__x86_64__)
  if (cpu_level() >= CpuLevel::kAvx512) return kScoringAvx512;
  if (cpu_level() >= CpuLevel::kAvx2) return kScoringAvx2;
#endif
  return kScoringBaseline;
}

int64_t leading_dimension(int64_t n) {
  const int64_t lines = (n + 15) / 16;
  return 16 * (lines + (lines + 1) % 2);
}

}  // namespace

void transpose_first(const ScoringArgs& args, float* out) {
  const int64_t inputs = args.inputs(), hidden = args.widths[0];
  scoring_kernels().transpose(args.weights[0], inputs, hidden, inputs, out, hidden);
}

ScoringNet::ScoringNet(const ScoringArgs& args, bool fold_keys, bool fold_layer)
    : a(args),
      k(scoring_kernels()),
      dim(args.dim),
      mlp(!args.widths.empty()),
      dot(!mlp || args.dot),
      hidden(mlp ? args.widths[0] : 0),
      inputs(args.inputs()),
      fold_keys(fold_keys),
      fold_layer(fold_layer && mlp),
      first_transposed(args.first_transposed) {
  if (!mlp || first_transposed != nullptr) return;
  made_ = new_floats(inputs * hidden);
  transpose_first(args, made_.get());
  first_transposed = made_.get();
}

void ScoringNet::fold(int64_t b, int64_t n, float* folded) const {
  for (int x : {kSearch, kRec}) {
    const MatrixA h{states(x, b, n), dim};
    const int64_t rows = length(x, b);
    if (fold_keys)
      k.gemm(rows, dim, dim, h, a.target_weight + x * dim * dim, dim,
             const_cast<float*>(keys(folded, x)), dim, {});
    if (fold_layer)
      k.gemm(rows, hidden, dim, h, first_transposed + place(x) * hidden, hidden,
             const_cast<float*>(layer(folded, x)), hidden, {});
  }
}

void ScoringNet::user_bias(int64_t b, float* out) const {
  std::copy_n(a.biases[0], hidden, out);
  if (a.user != nullptr)
    k.gemm(1, hidden, dim, {a.user + b * dim, 0, 1}, first_transposed + 3 * dim * hidden, hidden,
           out, hidden, kAdd);
}

TileWork::TileWork(const ScoringNet& net, int64_t ld) : ld(ld) {
  const ScoringArgs& a = net.a;
  const int64_t pooled_rows = net.fold_layer ? 0 : 2 * net.dim;
  const int64_t product_rows = net.dot ? std::max(a.size[0], a.size[1]) : 0;
  std::vector<int64_t> widths = a.widths;
  if (!net.mlp) widths.push_back(1);
  const int64_t layer_rows = std::accumulate(widths.begin(), widths.end(), int64_t{0});
  memory_ = new_floats((a.size[0] + a.size[1] + pooled_rows + product_rows + layer_rows) * ld);
  float* at = memory_.get();
  const auto take = [&at, ld](int64_t rows) { return std::exchange(at, at + rows * ld); };
  for (int x : {kSearch, kRec}) alpha[x] = take(a.size[x]);
  pooled = take(pooled_rows);
  products = take(product_rows);
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
                   float* et, float* const keys[2], float* first) {
  net.k.transpose_rows(rows, n, net.dim, et, ld);
  if (!net.fold_keys)
    for (int x : {kSearch, kRec})
      net.k.gemm(net.dim, n, net.dim, {net.a.target_weight + x * net.dim * net.dim, net.dim, 1}, et,
                 ld, keys[x], ld, {});
  if (net.mlp)
    net.k.gemm(net.hidden, n, net.dim, {net.a.weights[0] + 2 * net.dim, net.inputs, 1}, et, ld,
               first, ld, {});
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
    if (net.dot) std::fill_n(dots + at, size, 0.0f);
    // A single layer is the last too: its start replaces the zeros.
    if (net.mlp) k.add_bias(items.first + at, segment.bias, ld, net.hidden, size, top + at);
    for (int x : {kSearch, kRec}) {
      const int64_t rows = net.length(x, segment.user);
      const float* h = net.states(x, segment.user, trajectory);
      float* alpha = work.alpha[x] + at;
      const float* left = net.fold_keys ? net.keys(segment.folded, x) : h;
      const float* right = net.fold_keys ? items.transposed : items.keys[x];
      k.gemm(rows, size, dim, {left, dim, 1}, right + at, ld, alpha, ld, {});
      k.softmax(alpha, ld, rows, size);
      if (net.dot) {
        float* products = work.products + at;
        k.gemm(rows, size, dim, {h, dim, 1}, items.transposed + at, ld, products, ld, {});
        k.column_dots(alpha, products, ld, rows, size, dots + at, true);
      }
      if (net.fold_layer)
        k.gemm(net.hidden, size, rows, {net.layer(segment.folded, x), 1, net.hidden}, alpha, ld,
               top + at, ld, {.add = true, .relu = deep && x == kRec});
      else
        k.gemm(dim, size, rows, {h, 1, dim}, alpha, ld, work.pooled + net.place(x) * ld + at, ld,
               {});
    }
  }
  if (!net.mlp) return;
  if (!net.fold_layer)
    k.gemm(net.hidden, n, 2 * dim, {a.weights[0], net.inputs, 1}, work.pooled, ld, top, ld,
           {.add = true, .relu = deep});
  const size_t last = a.widths.size() - 1;
  for (size_t l = 0; l < last; ++l) {
    float* x = work.layers[l];
    if (candidates != nullptr && candidates->dropout.threshold > 0)
      for (int64_t s = 0; s < n_segments; ++s)
        k.dropout(candidates->dropout, candidates->dropout_rows[segments[s].user],
                  kHeadSites + static_cast<int64_t>(l), first_column, x + segments[s].begin, ld,
                  a.widths[l], segments[s].size);
    k.gemm(a.widths[l + 1], n, a.widths[l], {a.weights[l + 1], a.widths[l], 1}, x, ld,
           work.layers[l + 1], ld,
           {.row_bias = a.biases[l + 1], .add = net.dot && l + 1 == last, .relu = l + 1 < last});
  }
}

void item_rows(const CandidateArgs& candidates, int64_t dim, int64_t b0, int64_t b1, int64_t c0,
               int64_t c1, std::vector<const float*>& rows) {
  rows.clear();
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t c = c0; c < c1; ++c)
      rows.push_back(candidates.items + candidates.ids[b * candidates.step + c] * dim);
}

}  // namespace lcr_fast
