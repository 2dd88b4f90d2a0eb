// One request from ids to scores: the stages in their order, and what lies between them.
#include "../request.h"

#include <algorithm>
#include <bitset>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "scratch.h"

namespace lcr_fast {
namespace {

constexpr int kSearch = 0, kRec = 1;
constexpr int64_t kCascade = 16;  // rows that torch's sum adds before it starts a new partial sum
constexpr int64_t kColumns = 16;  // of a sum at a time
constexpr int64_t kAhead = 4;     // events whose vectors are on their way
constexpr int64_t kCandidates = 128;  // likewise, of a user

void alone(int64_t n_tasks, const Task& task) { task(0, n_tasks); }

// `width` columns of mean_of(); a constant width stays in registers.
template <class Width>
void mean_columns(const float* table, const int64_t* ids, int64_t n, int64_t dim, Width width,
                  float divisor, float* out) {
  float sum[kColumns] = {}, partial[kColumns] = {};
  const int64_t whole = n / kCascade * kCascade;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = table + ids[i] * dim;
    for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
    if (i < whole && (i + 1) % kCascade == 0)
      for (int64_t d = 0; d < width; ++d) partial[d] += std::exchange(sum[d], 0.0f);
  }
  for (int64_t d = 0; d < width; ++d) out[d] = (sum[d] + partial[d]) / divisor;
}

// The mean of the vectors of ids other than 0, added in torch's order.
void mean_of(const float* table, const int64_t* ids, int64_t n, int64_t dim, float* out) {
  const auto count = n - std::count(ids, ids + n, 0);
  const auto divisor = static_cast<float>(std::max<int64_t>(count, 1));
  int64_t d = 0;
  for (; d + kColumns <= dim; d += kColumns)
    mean_columns(table + d, ids, n, dim, std::integral_constant<int64_t, kColumns>(), divisor,
                 out + d);
  if (d < dim) mean_columns(table + d, ids, n, dim, dim - d, divisor, out + d);
}

// Ask for rows of a table, which stand anywhere: so they come together, and while others are read.
void prefetch(const float* table, const int64_t* ids, int64_t n, int64_t dim) {
  constexpr int64_t kLine = 16;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(table + ids[i] * dim + d);
}

// Ask for what event `l` of both streams reads, where there is such an event.
void prefetch_event(const RequestArgs& a, int64_t b, int64_t l) {
  const int64_t dim = a.layers.encoder.dim;
  if (l < a.lengths[kSearch][b]) {
    const int64_t event = b * a.length[kSearch] + l;
    if (a.by_terms)
      prefetch(a.query_table, a.terms + event * a.n_terms, a.n_terms, dim);
    else
      prefetch(a.query_table, a.queries + event, 1, dim);
    if (a.query_text != nullptr) prefetch(a.query_text, a.queries + event, 1, dim);
    prefetch(a.items, a.clicks + event * a.n_clicks, a.n_read_clicks, dim);
  }
  if (l < a.lengths[kRec][b]) prefetch(a.items, a.rec_items + b * a.length[kRec] + l, 1, dim);
}

// The vector of search `l` of a user; `clicked` has room for one.
void embed_search(const RequestArgs& a, int64_t b, int64_t l, float* clicked, float* out) {
  const int64_t dim = a.layers.encoder.dim, event = b * a.length[kSearch] + l;
  if (a.by_terms)
    mean_of(a.query_table, a.terms + event * a.n_terms, a.n_terms, dim, out);
  else
    std::copy_n(a.query_table + a.queries[event] * dim, dim, out);
  if (a.query_text != nullptr) {
    const float* text = a.query_text + a.queries[event] * dim;
    for (int64_t d = 0; d < dim; ++d) out[d] += text[d];
  }
  mean_of(a.items, a.clicks + event * a.n_clicks, a.n_read_clicks, dim, clicked);
  const float* position = a.position[kSearch] + l * dim;
  for (int64_t d = 0; d < dim; ++d) out[d] = out[d] + clicked[d] + position[d];
}

void embed_item(const RequestArgs& a, int64_t b, int64_t l, float* out) {
  const int64_t dim = a.layers.encoder.dim;
  const float* item = a.items + a.rec_items[b * a.length[kRec] + l] * dim;
  const float* position = a.position[kRec] + l * dim;
  for (int64_t d = 0; d < dim; ++d) out[d] = item[d] + position[d];
}

// The vectors of both streams of one user, valid events only.
void embed(const RequestArgs& a, int64_t b, float* search, float* rec) {
  const int64_t dim = a.layers.encoder.dim;
  const int64_t length[2] = {a.lengths[kSearch][b], a.lengths[kRec][b]};
  const Floats clicked = new_floats(dim);
  for (int64_t l = 0; l < kAhead; ++l) prefetch_event(a, b, l);
  for (int64_t l = 0; l < std::max(length[kSearch], length[kRec]); ++l) {
    prefetch_event(a, b, l + kAhead);
    if (l < length[kSearch]) embed_search(a, b, l, clicked.get(), search + l * dim);
    if (l < length[kRec]) embed_item(a, b, l, rec + l * dim);
  }
  // The head will read them, after the encoders.
  const int64_t* candidates = a.candidates + b * a.n_candidates;
  const int64_t n = std::min(a.n_candidates, kCandidates);
  prefetch(a.items, candidates, n, dim);
  if (a.item_layer != nullptr) prefetch(a.item_layer, candidates, n, a.layers.widths[0]);
}

// What the head reads: torch.lerp(h0, h, share), into h.
void read_states(const float* h0, float share, int64_t n, float* h) {
  const bool near = std::abs(share) < 0.5f;
  const float weight = near ? share : share - 1.0f;
  for (int64_t i = 0; i < n; ++i) h[i] = std::fma(weight, h[i] - h0[i], near ? h0[i] : h[i]);
}

// Items that a user has met. Most candidates are none of them, and few of those need a search.
class SeenItems {
 public:
  void add(const int64_t* ids, int64_t n) {
    ids_.insert(ids_.end(), ids, ids + n);
    for (int64_t i = 0; i < n; ++i) marks_.set(ids[i] % kMarks);
  }
  bool contains(int64_t id) const {
    return marks_.test(id % kMarks) && std::find(ids_.begin(), ids_.end(), id) != ids_.end();
  }

 private:
  static constexpr int64_t kMarks = 1 << 14;  // of ids modulo that

  std::vector<int64_t> ids_;
  std::bitset<kMarks> marks_;
};

// The bonus of candidates that stand among a user's clicks and events; -inf for padding.
void finish_scores(const RequestArgs& a, int64_t b, float* scores) {
  const int64_t* candidates = a.candidates + b * a.n_candidates;
  if (a.seen_bonus != nullptr) {
    SeenItems seen[2];
    for (int64_t l = 0; l < a.lengths[kSearch][b]; ++l)
      seen[kSearch].add(a.clicks + (b * a.length[kSearch] + l) * a.n_clicks, a.n_read_clicks);
    seen[kRec].add(a.rec_items + b * a.length[kRec], a.lengths[kRec][b]);
    for (int64_t c = 0; c < a.n_candidates; ++c) {
      float bonus = 0.0f;
      for (int x : {kSearch, kRec})
        if (seen[x].contains(candidates[c])) bonus += a.seen_bonus[x];
      scores[c] += bonus;
    }
  }
  for (int64_t c = 0; c < a.n_candidates; ++c)
    if (candidates[c] == 0) scores[c] = -std::numeric_limits<float>::infinity();
}

}  // namespace

RequestLayout::RequestLayout(const RequestLayers& layers) {
  encoder[kSearch] = 0;
  encoder[kRec] = encoder_floats(layers.encoder);
  reasoning = 2 * encoder[kRec];
  head = reasoning + (layers.reasoning.n_sets > 0 ? reasoning_floats(layers.reasoning) : 0);
  const int64_t dim = layers.encoder.dim;
  size = head + HeadLayout(dim, layers.reads_users, layers.widths, layers.pairs).size;
}

void pack_request(const RequestLayers& layers, const WeightArg* encoder, const WeightArg* reasoning,
                  const ScoringArgs& head, float* packed) {
  const RequestLayout at(layers);
  std::fill_n(packed, at.size, 0.0f);
  for (int x : {kSearch, kRec})
    pack_encoder(layers.encoder, x, layers.pairs, encoder, packed + at.encoder[x], alone);
  if (layers.reasoning.n_sets > 0)
    pack_reasoning(layers.reasoning, layers.pairs, reasoning, packed + at.reasoning, alone);
  pack_head(head, layers.pairs, packed + at.head);
}

void score_request(const RequestArgs& a, float* scores, int64_t n_threads,
                   const Parallel& parallel) {
  const int64_t B = a.n_users, dim = a.layers.encoder.dim;
  const RequestLayout at(a.layers);
  const int64_t size[2] = {B * a.length[kSearch] * dim, B * a.length[kRec] * dim};
  Floats embedded[2], encoded[2], reasoned[2];
  for (int x : {kSearch, kRec}) {
    embedded[x] = new_floats(size[x]);
    encoded[x] = new_floats(size[x]);
  }
  parallel(B, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      embed(a, b, embedded[kSearch].get() + b * a.length[kSearch] * dim,
            embedded[kRec].get() + b * a.length[kRec] * dim);
  });
  for (int x : {kSearch, kRec}) {
    const EncoderArgs args{a.layers.encoder,  FloatType::kFloat32, x,       B,  a.length[x],
                           embedded[x].get(), a.lengths[x],        nullptr, {}, a.layers.pairs};
    encoder_forward(args, a.packed + at.encoder[x], encoded[x].get(), parallel);
  }
  ScoringArgs head{};
  head.n_users = B;
  head.n_trajectories = 1;
  head.dim = dim;
  head.widths = a.layers.widths;
  head.dot = a.dot;
  head.pairs = a.layers.pairs;
  for (int x : {kSearch, kRec}) {
    head.states[x] = encoded[x].get();
    head.lengths[x] = a.lengths[x];
    head.size[x] = a.length[x];
  }
  if (a.n_steps > 0) {
    ReasoningArgs args{};
    args.shape = a.layers.reasoning;
    args.n_users = B;
    args.n_trajectories = 1;
    args.n_steps = a.n_steps;
    args.pairs = a.layers.pairs;
    ReasoningResults results{};
    for (int x : {kSearch, kRec}) {
      reasoned[x] = new_floats(size[x]);
      args.length[x] = a.length[x];
      args.states[x] = encoded[x].get();
      args.lengths[x] = a.lengths[x];
      results.states[x] = reasoned[x].get();
    }
    reasoning_forward(args, a.packed + at.reasoning, results, n_threads, parallel);
    for (int x : {kSearch, kRec}) {
      if (a.readout != 1.0f) read_states(encoded[x].get(), a.readout, size[x], reasoned[x].get());
      head.states[x] = reasoned[x].get();
    }
  }
  Floats users;
  if (a.layers.reads_users) {
    users = new_floats(B * dim);
    for (int64_t b = 0; b < B; ++b)
      std::copy_n(a.users + a.user[b] * dim, dim, users.get() + b * dim);
    head.user = users.get();
  }
  use_packed_head(head, a.packed + at.head);
  const CandidateArgs candidates{a.items, a.candidates, a.n_candidates, a.n_candidates,
                                 {},      nullptr,      a.item_layer};
  score_cpu(head, candidates, scores, parallel);
  parallel(B, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) finish_scores(a, b, scores + b * a.n_candidates);
  });
}

}  // namespace lcr_fast
