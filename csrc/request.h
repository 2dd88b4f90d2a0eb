// From ids to scores in one call, float32; torch-free.
//
// What LCRSER.forward does op by op: embed, encode, reason, score, add the bonus of seen items. The
// same bits, but for one thing: in widths that are no multiple of 64, torch adds the vectors of
// four or more terms or clicks in another order. Of a history only the valid events are read.
#pragma once
#include <cstdint>

#include "reasoning.h"
#include "scoring.h"

namespace lcr_fast {

struct RequestArgs {
  int64_t n_users;
  int64_t dim;
  int64_t length[2];          // padded: search, recommendation
  const int64_t* lengths[2];  // [B] in 0..length[x]
  int64_t n_terms;
  int64_t n_clicks;       // of a search in memory
  int64_t n_read_clicks;  // the first of them, at most n_clicks
  int64_t n_candidates;
  bool by_terms;              // a query is the mean of its terms
  const int64_t* user;        // [B], read where there are vectors of users
  const int64_t* rec_items;   // [B, L_r]
  const int64_t* queries;     // [B, L_s], rows of the table unless by_terms
  const int64_t* terms;       // [B, L_s, T], rows of the table if by_terms
  const int64_t* clicks;      // [B, L_s, M]
  const int64_t* candidates;  // [B, C]

  const float* items;  // rows of vectors, row 0 zero
  const float* query_table;
  const float* users;        // or null
  const float* position[2];  // [length[x], dim] at least
  const float* seen_bonus;   // [2], or null

  TransformerShape encoder;
  const WeightArg* encoder_weights;
  TransformerShape reasoning;
  const WeightArg* reasoning_weights;
  int64_t n_steps;
  float readout;            // share of h^(K) in what is scored
  const ScoringArgs* head;  // its weights
};

// scores [B, C]; -inf for candidate 0. One user takes one thread, or two, a stream each.
void score_request(const RequestArgs& args, float* scores, int64_t n_threads,
                   const Parallel& parallel);

}  // namespace lcr_fast
