// One tile of columns (candidates), the unit of work of every scoring op; the loops over numbers
// are in scoring_kernels.h.
//
// With G_x = H_x W1_x^T the first layer of the head is sum_x alpha_x G_x + (item and user part), so
// that a long list of candidates never meets the wide input of the MLP; likewise P_x = H_x W_x
// gives the attention's logits from the bare item vectors. Both are made once a user where that
// costs less; always where products are of pairs, whose factors are then made words once a user.
#pragma once
#include <cstdint>
#include <vector>

#include "../scoring.h"
#include "scoring_kernels.h"
#include "scratch.h"

namespace lcr_fast {

constexpr int kSearch = 0, kRec = 1;
// Columns of a tile: 7 vectors of AVX-512. An odd number of cache lines a row spreads over all
// sets of the first cache.
constexpr int64_t kColumns = 112;
constexpr int64_t kFoldBytes = 16 << 20;  // folded histories kept at a time
constexpr Epilogue kAdd{.add = true};

using Buffer = std::vector<float>;

// Whose histories are folded: kCheaper, those of users for whom it is less work. That goes by the
// number of candidates and by a user's own lengths, not by the longest of the batch: its bits must
// not depend on the others' histories.
enum class Fold { kNone, kAll, kCheaper };

// One call's weights, and how its histories are folded.
struct ScoringNet {
  ScoringNet(const ScoringArgs& args, Fold fold, int64_t n_candidates = 0);

  const float* states(int x, int64_t b, int64_t n) const {
    return a.states[x] + (b * a.n_trajectories + n) * a.size[x] * dim;
  }
  int64_t length(int x, int64_t b) const { return a.lengths[x][b]; }
  bool folds_keys(int64_t b) const;
  bool folds_layer(int64_t b) const;
  // Rows of W1^T that meet z_x: the recommendation stream comes first.
  int64_t place(int x) const { return x == kRec ? 0 : dim; }
  // The right factors W_x [dim, dim] and, of rows place .. place + dim of W1^T, [dim, hidden].
  const float* target_weight(int x) const { return a.target_weight + x * inner_ * dim; }
  const float* first_rows(int64_t place) const {
    return first_transposed + place / dim * inner_ * hidden;
  }

  // Left factors: H_x [size, dim], P_x [size, dim] and G_x^T [hidden, size] of a folded history,
  // and the part W1_e [hidden, dim] of the first layer that meets the item.
  MatrixA history(int x, int64_t b, int64_t n, const float* folded) const;
  MatrixA keys(const float* folded, int x) const { return {folded + keys_[x], width_}; }
  MatrixA layer(const float* folded, int x) const { return {folded + layer_[x], 1, hidden}; }
  MatrixA item_weight() const {
    return pairs ? MatrixA{a.weights[0], width_} : MatrixA{a.weights[0] + 2 * dim, inputs};
  }
  // Layer l > 0.
  MatrixA weight(size_t l) const {
    return {a.weights[l], pairs ? pair_row(a.widths[l - 1]) : a.widths[l - 1]};
  }

  int64_t fold_floats() const { return fold_floats_; }
  // The folded history of one user and trajectory.
  void fold(int64_t b, int64_t n, float* folded) const;
  // What every candidate of a user gets in the first layer: b1 + W1_u e_u.
  void user_bias(int64_t b, float* out) const;

  const ScoringArgs& a;
  const ScoringKernels& k;
  const bool pairs;
  const int64_t dim;
  const bool mlp;
  const bool dot;
  const int64_t hidden;
  const int64_t inputs;
  bool all_fold_keys = true, all_fold_layer = true;  // all users
  const float* first_transposed;                     // [inputs, hidden]

 private:
  const Fold fold_;
  const int64_t n_candidates_;
  const int64_t inner_, width_;  // rows of a right factor [dim, ..], floats in a row of a left one
  int64_t states_[2], keys_[2], layer_[2];  // in a folded history
  int64_t fold_floats_ = 0;
  Floats made_;  // first_transposed where the call did not bring it
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
struct TileWork {
  TileWork(const ScoringNet& net, int64_t ld);
  const float* scores() const { return layers.back(); }

  int64_t ld;
  float* alpha[2];             // [size, ld]
  float* pooled;               // [2 dim, ld] z_r, z_s; unless all fold the layer
  float* products;             // [size, ld] H_x e, of the dot product
  float* words;                // of a right factor of pairs
  std::vector<float*> layers;  // [width, ld] after ReLU and dropout

 private:
  Floats memory_;
};

// What the items of a tile contribute, whoever the user is.
struct TileItems {
  const float* transposed;  // [dim, ld], a right factor
  const float* keys[2];     // [dim, ld] W_x e; for users who do not fold keys
  const float* first;       // [hidden, ld] W1_e e
};

// Fill `et` [dim, ld], `keys` [dim, ld] unless it is null, and `first` [hidden, ld], which
// `first_rows` are the columns of, unless it is null.
void prepare_items(const ScoringNet& net, const float* const* rows, int64_t n, int64_t ld,
                   float* et, float* const keys[2], float* first,
                   const float* const* first_rows = nullptr);

// Scores of one trajectory for a tile of columns. All intermediates stay in `work`.
void score_tile(const ScoringNet& net, const Segment* segments, int64_t n_segments, int64_t n,
                int64_t trajectory, int64_t first_column, const TileItems& items,
                const CandidateArgs* candidates, TileWork& work);

// How the columns of a call are cut: several short lists in a tile, or a long one in several.
struct ColumnCut {
  ColumnCut(int64_t n_users, int64_t n_candidates);

  int64_t users;    // of a group
  int64_t columns;  // of one user in a tile
  int64_t n_tiles;
  int64_t n_groups;
  int64_t ld;
};

// Pointers to the rows, in a table of `width` columns, of the items in columns [c0, c1) of users
// [b0, b1).
void item_rows(const CandidateArgs& candidates, const float* table, int64_t width, int64_t b0,
               int64_t b1, int64_t c0, int64_t c1, std::vector<const float*>& rows);

}  // namespace lcr_fast
