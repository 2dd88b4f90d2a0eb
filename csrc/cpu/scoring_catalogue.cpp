// The best items of the whole catalogue, and the place of one: scores stream by and are not stored.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../scoring.h"
#include "scoring_tile.h"

namespace lcr_fast {
namespace {

constexpr int64_t kTilePanels = 9;  // panels of the catalogue that all users of a block meet
constexpr float kInfinity = std::numeric_limits<float>::infinity();

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
  const ScoringNet net(args, Fold::kAll);
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
        TileWork work(net, kColumns);
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
      [](const ScoringNet&, int64_t, const auto&) {},
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
      [&](const ScoringNet& net, int64_t n_users, const auto& segment) {
        parallel(n_users, [&](int64_t begin, int64_t end) {
          constexpr int64_t kLd = 16;
          TileWork work(net, kLd);
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
