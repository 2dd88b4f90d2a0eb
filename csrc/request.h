// From ids to scores in one call; torch-free.
//
// What LCRSER.forward does op by op: embed, encode, reason, score, add the bonus of seen items. The
// same bits, but for one thing: in widths that are no multiple of 64, torch adds the vectors of
// four or more terms or clicks in another order. Of a history only the valid events are read.
//
// Vectors and what lies between products are float32. The products are of float32 or, where `pairs`
// asks for it, of pairs of bfloat16 that are added in float32.
#pragma once
#include <cstdint>
#include <vector>

#include "reasoning.h"
#include "scoring.h"

namespace lcr_fast {

// The widths of a model's layers.
struct RequestLayers {
  TransformerShape encoder;
  TransformerShape reasoning;   // n_sets 0: none
  bool reads_users;             // the head's MLP
  std::vector<int64_t> widths;  // of the MLP's layers; the last is 1
  bool pairs;
};

// Where the weights of those layers stand, packed once for many requests; offsets in floats.
struct RequestLayout {
  explicit RequestLayout(const RequestLayers& layers);

  int64_t encoder[2];
  int64_t reasoning;
  int64_t head;  // see HeadLayout
  int64_t size;
};

// Write RequestLayout.size floats. The weights of `head` are copied.
void pack_request(const RequestLayers& layers, const WeightArg* encoder, const WeightArg* reasoning,
                  const ScoringArgs& head, float* packed);

struct RequestArgs {
  int64_t n_users;
  int64_t length[2];          // padded: search, recommendation
  const int64_t* lengths[2];  // [B] in 0..length[x]
  int64_t n_terms;
  int64_t n_clicks;       // of a search in memory
  int64_t n_read_clicks;  // the first of them, at most n_clicks
  int64_t n_candidates;
  bool by_terms;              // a query is the mean of its terms
  const int64_t* user;        // [B], read where the head reads users
  const int64_t* rec_items;   // [B, L_r]
  const int64_t* queries;     // [B, L_s], rows of query_table unless by_terms, and of query_text
  const int64_t* terms;       // [B, L_s, T], rows of the table if by_terms
  const int64_t* clicks;      // [B, L_s, M]
  const int64_t* candidates;  // [B, C]

  const float* items;  // rows of vectors, row 0 zero
  const float* query_table;
  const float* query_text;   // what a query's own text adds to the mean of its terms, or null
  const float* item_layer;   // rows by first_layer_of_items(), or null
  const float* users;        // where the head reads them
  const float* position[2];  // [length[x], dim] at least
  const float* seen_bonus;   // [2], or null

  RequestLayers layers;
  const float* packed;  // by pack_request
  int64_t n_steps;
  float readout;  // share of h^(K) in what is scored
  bool dot;       // see ScoringArgs
};

// scores [B, C]; -inf for candidate 0. One user takes one thread, or two, a stream each.
void score_request(const RequestArgs& args, float* scores, int64_t n_threads,
                   const Parallel& parallel);

}  // namespace lcr_fast
