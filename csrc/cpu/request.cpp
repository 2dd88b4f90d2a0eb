// One request from ids to scores: the stages in their order, and what lies between them.
#include "../request.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace lcr_fast {
namespace {

constexpr int kSearch = 0, kRec = 1;
constexpr int64_t kCascade = 16;  // rows that torch's sum adds before it starts a new partial sum

using Buffer = std::vector<float>;

// The mean of the vectors of ids other than 0, added in torch's order. `partial` has room for dim.
void mean_of(const float* table, const int64_t* ids, int64_t n, int64_t dim, float* out,
             float* partial) {
  std::fill_n(out, dim, 0.0f);
  std::fill_n(partial, dim, 0.0f);
  const int64_t whole = n / kCascade * kCascade;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = table + ids[i] * dim;
    count += ids[i] > 0;
    for (int64_t d = 0; d < dim; ++d) out[d] += row[d];
    if (i < whole && (i + 1) % kCascade == 0)
      for (int64_t d = 0; d < dim; ++d) {
        partial[d] += out[d];
        out[d] = 0.0f;
      }
  }
  const auto divisor = static_cast<float>(std::max<int64_t>(count, 1));
  for (int64_t d = 0; d < dim; ++d) out[d] = (out[d] + partial[d]) / divisor;
}

// The vectors of both streams of one user, valid events only.
void embed(const RequestArgs& a, int64_t b, float* search, float* rec) {
  const int64_t dim = a.dim;
  Buffer room(2 * dim);
  float *const clicked = room.data(), *const partial = clicked + dim;
  for (int64_t l = 0; l < a.lengths[kSearch][b]; ++l) {
    const int64_t event = b * a.length[kSearch] + l;
    float* out = search + l * dim;
    if (a.by_terms)
      mean_of(a.query_table, a.terms + event * a.n_terms, a.n_terms, dim, out, partial);
    else
      std::copy_n(a.query_table + a.queries[event] * dim, dim, out);
    mean_of(a.items, a.clicks + event * a.n_clicks, a.n_read_clicks, dim, clicked, partial);
    const float* position = a.position[kSearch] + l * dim;
    for (int64_t d = 0; d < dim; ++d) out[d] = out[d] + clicked[d] + position[d];
  }
  for (int64_t l = 0; l < a.lengths[kRec][b]; ++l) {
    const float* item = a.items + a.rec_items[b * a.length[kRec] + l] * dim;
    const float* position = a.position[kRec] + l * dim;
    for (int64_t d = 0; d < dim; ++d) rec[l * dim + d] = item[d] + position[d];
  }
}

// What the head reads: torch.lerp(h0, h, share), into h.
void read_states(const float* h0, float share, int64_t n, float* h) {
  const bool near = std::abs(share) < 0.5f;
  const float weight = near ? share : share - 1.0f;
  for (int64_t i = 0; i < n; ++i) h[i] = std::fma(weight, h[i] - h0[i], near ? h0[i] : h[i]);
}

// The bonus of candidates that stand among a user's clicks and events; -inf for padding.
void finish_scores(const RequestArgs& a, int64_t b, float* scores) {
  const int64_t* candidates = a.candidates + b * a.n_candidates;
  if (a.seen_bonus != nullptr) {
    std::vector<int64_t> seen[2];
    const int64_t n_searches = a.lengths[kSearch][b], n_events = a.lengths[kRec][b];
    for (int64_t l = 0; l < n_searches; ++l) {
      const int64_t* clicks = a.clicks + (b * a.length[kSearch] + l) * a.n_clicks;
      seen[kSearch].insert(seen[kSearch].end(), clicks, clicks + a.n_read_clicks);
    }
    const int64_t* events = a.rec_items + b * a.length[kRec];
    seen[kRec].assign(events, events + n_events);
    for (auto& ids : seen) std::sort(ids.begin(), ids.end());
    for (int64_t c = 0; c < a.n_candidates; ++c) {
      float bonus = 0.0f;
      for (int x : {kSearch, kRec})
        if (std::binary_search(seen[x].begin(), seen[x].end(), candidates[c]))
          bonus += a.seen_bonus[x];
      scores[c] += bonus;
    }
  }
  for (int64_t c = 0; c < a.n_candidates; ++c)
    if (candidates[c] == 0) scores[c] = -std::numeric_limits<float>::infinity();
}

}  // namespace

void score_request(const RequestArgs& a, float* scores, int64_t n_threads,
                   const Parallel& parallel) {
  const int64_t B = a.n_users;
  const int64_t size[2] = {B * a.length[kSearch] * a.dim, B * a.length[kRec] * a.dim};
  Buffer embedded[2], encoded[2], reasoned[2];
  for (int x : {kSearch, kRec}) {
    embedded[x].resize(size[x]);
    encoded[x].resize(size[x]);
  }
  parallel(B, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      embed(a, b, embedded[kSearch].data() + b * a.length[kSearch] * a.dim,
            embedded[kRec].data() + b * a.length[kRec] * a.dim);
  });
  for (int x : {kSearch, kRec}) {
    const EncoderArgs args{a.encoder,          FloatType::kFloat32, x,       B, a.length[x],
                           embedded[x].data(), a.lengths[x],        nullptr, {}};
    encoder_forward(args, a.encoder_weights, encoded[x].data(), parallel);
  }
  ScoringArgs head = *a.head;
  for (int x : {kSearch, kRec}) {
    head.states[x] = encoded[x].data();
    head.lengths[x] = a.lengths[x];
    head.size[x] = a.length[x];
  }
  if (a.n_steps > 0) {
    ReasoningArgs args{};
    args.shape = a.reasoning;
    args.n_users = B;
    args.n_trajectories = 1;
    args.n_steps = a.n_steps;
    ReasoningResults results{};
    for (int x : {kSearch, kRec}) {
      reasoned[x].resize(size[x]);
      args.length[x] = a.length[x];
      args.states[x] = encoded[x].data();
      args.lengths[x] = a.lengths[x];
      results.states[x] = reasoned[x].data();
    }
    reasoning_forward(args, a.reasoning_weights, results, n_threads, parallel);
    for (int x : {kSearch, kRec}) {
      if (a.readout != 1.0f) read_states(encoded[x].data(), a.readout, size[x], reasoned[x].data());
      head.states[x] = reasoned[x].data();
    }
  }
  Buffer users;
  if (head.user != nullptr) {
    users.resize(B * a.dim);
    for (int64_t b = 0; b < B; ++b)
      std::copy_n(a.users + a.user[b] * a.dim, a.dim, users.data() + b * a.dim);
    head.user = users.data();
  }
  const CandidateArgs candidates{a.items,        a.candidates, a.n_candidates,
                                 a.n_candidates, {},           nullptr};
  score_cpu(head, candidates, scores, parallel);
  parallel(B, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) finish_scores(a, b, scores + b * a.n_candidates);
  });
}

}  // namespace lcr_fast
