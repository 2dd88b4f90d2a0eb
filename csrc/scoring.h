// Target-aware scoring on the CPU, float32; torch-free.
//
// The contract is in lcr_fast/ops/scoring.py, the oracle in lcr_fast/reference. Columns
// (candidates) are the lanes everywhere: a history's part is a product with a few dozen columns.
// The products of score_cpu() may be of pairs of bfloat16, on weights that were packed for them.
#pragma once
#include <cstdint>
#include <vector>

#include "noise.h"
#include "parallel.h"

namespace lcr_fast {

// States, users and weights. Index 0 is the search stream, 1 the recommendation stream.
struct ScoringArgs {
  const float* states[2];     // [n_users, n_trajectories, size[x], dim]
  const int64_t* lengths[2];  // [n_users]
  int64_t size[2];            // padded lengths
  int64_t n_users;
  int64_t n_trajectories;
  int64_t dim;
  const float* user;                  // [n_users, dim], or null
  const float* target_weight;         // [2, dim, dim]
  std::vector<const float*> weights;  // layer l: [widths[l], widths[l - 1]]; none: the dot head
  std::vector<const float*> biases;
  std::vector<int64_t> widths;    // the last is 1
  bool dot;                       // add (z_r + z_s)^T e to the MLP; without an MLP it is the score
  const float* first_transposed;  // [inputs, widths[0]], or null: each call makes it
  bool pairs;                     // weights, not biases, are what pack_head() wrote for pairs

  int64_t inputs() const { return dim * (user == nullptr ? 3 : 4); }  // of the first layer
};

// Where the head's weights stand in a copy for many calls; offsets in floats.
struct HeadLayout {
  HeadLayout(int64_t dim, bool reads_users, const std::vector<int64_t>& widths, bool pairs);

  int64_t target_weight;
  int64_t first_transposed;
  std::vector<int64_t> weights, biases;
  int64_t size;
};

// Write the weights of `args`, which are floats, as HeadLayout says. Of pairs, the first layer's
// `weights` are those that meet the item alone.
void pack_head(const ScoringArgs& args, bool pairs, float* packed);
// Point the weights of `args`, whose other fields are set, to that copy.
void use_packed_head(ScoringArgs& args, const float* packed);

// What the first layer makes of items [n, dim], as score_cpu() does: out [n, widths[0]]. Of `args`
// the width, the users and the first weight are read, which is of floats.
void first_layer_of_items(const ScoringArgs& args, bool pairs, const float* items, int64_t n,
                          float* out, const Parallel& parallel);

// Candidates of each user: rows of an item table.
struct CandidateArgs {
  const float* items;  // [n, dim]
  const int64_t* ids;  // [n_users, n_candidates], or [1, n_candidates] where step is 0
  int64_t step;        // n_candidates or 0
  int64_t n_candidates;
  DropoutKey dropout;           // of the head
  const int64_t* dropout_rows;  // [n_users]; read where there is dropout
  const float* first;           // [n, widths[0]] by first_layer_of_items(), or null
};

// scores [n_users, n_trajectories, n_candidates]
void score_cpu(const ScoringArgs& args, const CandidateArgs& candidates, float* scores,
               const Parallel& parallel);

struct ScoringGradients {
  float* states[2];  // like the states, zero on entry
  float* items;      // [n_users, n_candidates, dim]
  float* user;       // [n_users, dim], or null
  float* target_weight;
  std::vector<float*> weights;
  std::vector<float*> biases;
};

// Gradients of the inputs from those of the scores. The users are cut into slices whose weight
// gradients are added in order; their number does not depend on the threads, so the bits do not.
void score_bwd_cpu(const ScoringArgs& args, const CandidateArgs& candidates, const float* dscores,
                   const ScoringGradients& gradients, const Parallel& parallel);

// The whole catalogue: items [n_items + 1, dim] whose row 0 is padding, and what to leave out.
struct ItemArgs {
  const float* items;
  int64_t n_items;
  const int64_t* exclude;  // [n_users, n_exclude]
  int64_t n_exclude;
};

// The k best: ids and scores [n_users, k], ending in 0 and -inf; NaN scores for a user with one.
void score_topk_cpu(const ScoringArgs& args, const ItemArgs& items, int64_t k, int64_t* ids,
                    float* scores, const Parallel& parallel);
// The place of target [n_users] (0: none), ties before it: rank [n_users]; -1 for a NaN score.
// bonus [n_users] is added to the target's score alone.
void score_rank_cpu(const ScoringArgs& args, const ItemArgs& items, const int64_t* target,
                    const float* bonus, int64_t* rank, const Parallel& parallel);

}  // namespace lcr_fast
