// Requests, of floats and of pairs, on memory whose every end the sanitizers watch.
#include <cstdio>
#include <random>
#include <stdexcept>
#include <vector>

#include "../csrc/cpu_level.h"
#include "../csrc/request.h"

namespace {

using lcr_fast::FloatType;
using lcr_fast::RequestLayers;
using lcr_fast::Task;
using lcr_fast::WeightArg;

std::mt19937 engine(1);

void serial(int64_t n_tasks, const Task& task) { task(0, n_tasks); }

std::vector<float> numbers(int64_t n) {
  std::normal_distribution<float> normal(0.0f, 0.3f);
  std::vector<float> out(n);
  for (float& x : out) x = normal(engine);
  return out;
}

std::vector<int64_t> ids(int64_t n, int64_t limit) {
  std::uniform_int_distribution<int64_t> uniform(0, limit - 1);
  std::vector<int64_t> out(n);
  for (int64_t& id : out) id = uniform(engine);
  return out;
}

// The weights of one block's sets, see lcr_fast/weights.py.
struct Weights {
  Weights(const lcr_fast::TransformerShape& s, int n_attentions) {
    const int64_t P = 2 * s.n_sets, D = s.dim, F = s.ffn_dim;
    for (int i = 0; i < n_attentions; ++i)
      for (int64_t n : {3 * D * D, 3 * D, D * D, D}) add(P * n);
    for (int64_t n : {F * D, F, D * F, D, (n_attentions + 1) * D, (n_attentions + 1) * D})
      add(P * n);
    for (const auto& v : values) args.push_back({v.data(), FloatType::kFloat32});
  }
  void add(int64_t n) { values.push_back(numbers(n)); }

  std::vector<std::vector<float>> values;
  std::vector<WeightArg> args;
};

void request(int64_t dim, int64_t n_heads, int64_t ffn, std::vector<int64_t> widths, bool users,
             bool pairs, bool keep, int64_t B, int64_t C) {
  constexpr int64_t kItems = 37, kTerms = 11, kSearches = 5, kEvents = 19, kClicks = 3;
  RequestLayers layers{{dim, n_heads, ffn, 1}, {dim, n_heads, ffn, 1}, users, widths, pairs};
  const Weights encoder(layers.encoder, 1), reasoning(layers.reasoning, 2);
  lcr_fast::ScoringArgs head{};
  const std::vector<float> target = numbers(2 * dim * dim), table = numbers(kItems * dim);
  std::vector<std::vector<float>> weights, biases;
  head.dim = dim;
  if (users) head.user = table.data();
  head.target_weight = target.data();
  head.widths = widths;
  int64_t in = head.inputs();
  for (int64_t width : widths) {
    weights.push_back(numbers(width * in));
    biases.push_back(numbers(width));
    in = width;
  }
  for (size_t l = 0; l < widths.size(); ++l) {
    head.weights.push_back(weights[l].data());
    head.biases.push_back(biases[l].data());
  }
  std::vector<float> packed(lcr_fast::RequestLayout(layers).size);
  lcr_fast::pack_request(layers, encoder.args.data(), reasoning.args.data(), head, packed.data());
  std::vector<float> kept(widths.empty() ? 0 : kItems * widths[0]);
  if (!kept.empty())
    lcr_fast::first_layer_of_items(head, pairs, table.data(), kItems, kept.data(), serial);
  const std::vector<float> queries = numbers(kTerms * dim), position = numbers(kEvents * dim);
  const std::vector<float> bonus{0.5f, 0.25f};
  const auto user = ids(B, kItems), events = ids(B * kEvents, kItems);
  const auto terms = ids(B * kSearches * 2, kTerms), clicks = ids(B * kSearches * kClicks, kItems);
  const auto candidates = ids(B * C, kItems);
  std::vector<int64_t> lengths[2] = {ids(B, kSearches + 1), ids(B, kEvents + 1)};
  for (int x = 0; x < 2; ++x)
    if (B > 0) lengths[x][0] = x == 0 ? kSearches : kEvents;
  lcr_fast::RequestArgs args{};
  args.n_users = B;
  args.length[0] = kSearches;
  args.length[1] = kEvents;
  for (int x = 0; x < 2; ++x) {
    args.lengths[x] = lengths[x].data();
    args.position[x] = position.data();
  }
  args.n_terms = 2;
  args.n_clicks = kClicks;
  args.n_read_clicks = kClicks - 1;
  args.n_candidates = C;
  args.by_terms = true;
  args.user = user.data();
  args.rec_items = events.data();
  args.terms = terms.data();
  args.clicks = clicks.data();
  args.candidates = candidates.data();
  args.items = table.data();
  args.query_table = queries.data();
  if (keep && !kept.empty()) args.item_layer = kept.data();
  args.users = table.data();
  args.seen_bonus = bonus.data();
  args.layers = layers;
  args.packed = packed.data();
  args.n_steps = 2;
  args.readout = 0.75f;
  args.dot = true;
  std::vector<float> scores(B * C);
  for (int64_t n_threads : {1, 2}) lcr_fast::score_request(args, scores.data(), n_threads, serial);
}

}  // namespace

// Returns 2 where this CPU lacks the level that LCR_FAST_CPU names.
int main() {
  try {
    lcr_fast::cpu_level();
  } catch (const std::runtime_error&) {
    return 2;
  }
  for (bool pairs : {false, true})
    for (bool keep : {false, true}) {
      request(6, 3, 1, {5, 1}, false, pairs, keep, 3, 7);
      request(33, 1, 35, {1}, true, pairs, keep, 2, 130);
      request(20, 5, 9, {}, false, pairs, keep, 2, 3);
      request(64, 2, 64, {200, 80, 1}, false, pairs, keep, 5, 100);
      request(64, 2, 64, {17, 1}, true, pairs, keep, 0, 3);
    }
  std::puts("done");
}
