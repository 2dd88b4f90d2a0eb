// Scores of candidates.
#include "../scoring.h"

#include <algorithm>
#include <vector>

#include "scoring_tile.h"

namespace lcr_fast {

void score_cpu(const ScoringArgs& args, const CandidateArgs& candidates, float* scores,
               const Parallel& parallel) {
  const int64_t C = candidates.n_candidates, N = args.n_trajectories, D = args.dim;
  if (args.n_users == 0 || C == 0 || N == 0) return;
  const int64_t H = args.widths.empty() ? 0 : args.widths[0];
  const ScoringNet net(args, Fold::kCheaper, C);
  const ColumnCut cut(args.n_users, C);
  const int64_t fold_floats = net.fold_floats();
  // Folded histories of a few groups at a time.
  const int64_t block =
      std::max<int64_t>(1, kFoldBytes / (4 * std::max<int64_t>(1, fold_floats * N * cut.users)));
  const int64_t most_users = std::min(args.n_users, block * cut.users);
  const Floats folded = new_floats(most_users * N * fold_floats);
  for (int64_t g0 = 0; g0 < cut.n_groups; g0 += block) {
    const int64_t g1 = std::min(cut.n_groups, g0 + block);
    const int64_t u0 = g0 * cut.users, u1 = std::min(args.n_users, g1 * cut.users);
    if (fold_floats > 0) {
      parallel((u1 - u0) * N, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          net.fold(u0 + i / N, i % N, folded.get() + i * fold_floats);
      });
    }
    parallel((g1 - g0) * cut.n_tiles, [&](int64_t begin, int64_t end) {
      TileWork work(net, cut.ld);
      const int64_t key_rows = net.all_fold_keys ? 0 : D;
      const Floats et = new_floats((D + 2 * key_rows + net.hidden) * cut.ld);
      float* const keys[2] = {et.get() + D * cut.ld, et.get() + (D + key_rows) * cut.ld};
      float* const first = et.get() + (D + 2 * key_rows) * cut.ld;
      const TileItems items{et.get(), {keys[0], keys[1]}, first};
      const Floats bias = new_floats(cut.users * net.hidden);
      std::vector<const float*> rows, first_rows;
      std::vector<Segment> segments;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b0 = (g0 + task / cut.n_tiles) * cut.users;
        const int64_t b1 = std::min(args.n_users, b0 + cut.users);
        const int64_t c0 = task % cut.n_tiles * cut.columns;
        const int64_t c1 = std::min(C, c0 + cut.columns);
        item_rows(candidates, candidates.items, D, b0, b1, c0, c1, rows);
        if (candidates.first != nullptr)
          item_rows(candidates, candidates.first, H, b0, b1, c0, c1, first_rows);
        const auto n = static_cast<int64_t>(rows.size());
        bool folded_keys = true;
        for (int64_t b = b0; b < b1; ++b) folded_keys &= net.folds_keys(b);
        prepare_items(net, rows.data(), n, cut.ld, et.get(), folded_keys ? nullptr : keys, first,
                      candidates.first == nullptr ? nullptr : first_rows.data());
        segments.clear();
        for (int64_t b = b0; b < b1; ++b) {
          float* own = bias.get() + (b - b0) * net.hidden;
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

}  // namespace lcr_fast
