// Schema, checks and dispatch of a whole request on the CPU, on the LibTorch stable ABI only.
#include <algorithm>
#include <vector>

#include "op_arguments.h"
#include "request.h"

namespace lcr_fast {
namespace {

// The rows of a table of vectors [rows, dim].
const float* table(const Tensor& t, const char* name, int64_t dim) {
  check(t.dim() == 2, name, " must be [rows, dim]");
  return floats(t, name, {t.size(0), dim});
}

// The first position vectors, enough for `length` events.
const float* positions(const Tensor& t, const char* name, int64_t dim, int64_t length) {
  const float* data = table(t, name, dim);
  check(length <= t.size(0), name, " has ", t.size(0), " rows, and a history ", length, " events");
  return data;
}

// On this thread.
void alone(int64_t n_tasks, const Task& task) {
  if (n_tasks > 0) task(0, n_tasks);
}

// What the head's MLP reads is told by its first layer.
bool reads_users(const Tensors& mlp_weights, int64_t dim) {
  return !mlp_weights.empty() && mlp_weights[0].dim() == 2 && mlp_weights[0].size(1) == 4 * dim;
}

Tensor request_weights(Tensors encoder, Tensors reasoning, const Tensor& target_weight,
                       Tensors mlp_weights, Tensors mlp_biases, int64_t n_heads, bool pairs) {
  check(target_weight.dim() == 3, "target_weight must be [2, D, D]");
  RequestLayers layers{};
  std::vector<WeightArg> encoder_args, reasoning_args;
  layers.encoder = weights_shape(encoder, 1, n_heads, ScalarType::Float, encoder_args);
  const int64_t D = layers.encoder.dim;
  check(layers.encoder.ffn_dim > 0, "the encoder must have an FFN");
  if (!reasoning.empty())
    layers.reasoning = weights_shape(reasoning, 2, n_heads, ScalarType::Float, reasoning_args);
  check(reasoning.empty() || layers.reasoning.dim == D, "the reasoning must be of width ", D);
  ScoringArgs head{};
  head.dim = D;
  layers.reads_users = reads_users(mlp_weights, D);
  static const float kNobody = 0;
  if (layers.reads_users) head.user = &kNobody;  // for the width alone
  set_head(head, target_weight, mlp_weights, mlp_biases, true);
  layers.widths = head.widths;
  layers.pairs = pairs;
  Tensor packed = torch::stable::new_empty(target_weight, {RequestLayout(layers).size});
  pack_request(layers, encoder_args.data(), reasoning_args.data(), head,
               packed.mutable_data_ptr<float>());
  return packed;
}

Tensor request_items(const Tensor& items, const Tensor& weight, bool pairs) {
  check(items.dim() == 2 && weight.dim() == 2, "items must be [rows, dim] and weight [out, in]");
  ScoringArgs head{};
  const int64_t n = items.size(0), H = weight.size(0);
  head.dim = items.size(1);
  head.widths = {H};
  static const float kNobody = 0;
  if (weight.size(1) == 4 * head.dim) head.user = &kNobody;  // for the width alone
  head.weights = {floats(weight, "weight", {H, head.inputs()})};
  Tensor out = torch::stable::new_empty(items, {n, H});
  first_layer_of_items(head, pairs, floats(items, "items", {n, head.dim}), n,
                       out.mutable_data_ptr<float>(), parallel);
  return out;
}

Tensor request(Tensor user, Tensor rec_items, Tensor rec_lengths, Tensor search_queries,
               Tensor search_terms, Tensor search_clicks, Tensor search_lengths, Tensor candidates,
               const Tensor& items, const Tensor& item_layer, const Tensor& queries,
               const Tensor& query_text, const Tensor& users, const Tensor& search_position,
               const Tensor& rec_position, const Tensor& seen_bonus, const Tensor& weights,
               std::vector<int64_t> widths, int64_t n_layers, int64_t ffn, int64_t n_sets,
               int64_t step_ffn, int64_t steps, int64_t n_heads, int64_t max_clicks, double readout,
               bool terms, bool dot, bool pairs, int64_t n_threads) {
  // Here, because a compiled program passes on what strides its caller's tensors have.
  for (Tensor* ids : {&user, &rec_items, &rec_lengths, &search_queries, &search_terms,
                      &search_clicks, &search_lengths, &candidates})
    if (!ids->is_contiguous()) *ids = torch::stable::contiguous(*ids);
  check(rec_items.dim() == 2 && search_terms.dim() == 3 && search_clicks.dim() == 3 &&
            candidates.dim() == 2 && items.dim() == 2,
        "a batch has the dimensions of lcr_fast.Batch, and items are [rows, dim]");
  check(steps >= 0 && max_clicks >= 0 && n_threads >= 1,
        "steps and max_clicks must not be negative and n_threads be positive, got ", steps, ", ",
        max_clicks, " and ", n_threads);
  const int64_t B = rec_items.size(0), D = items.size(1);
  const int64_t n_search = search_terms.size(1), n_rec = rec_items.size(1);
  RequestArgs a{};
  a.n_users = B;
  a.length[0] = n_search;
  a.length[1] = n_rec;
  a.lengths[0] = ids_below(search_lengths, "search_lengths", {B}, n_search + 1);
  a.lengths[1] = ids_below(rec_lengths, "rec_lengths", {B}, n_rec + 1);
  a.n_terms = search_terms.size(2);
  a.n_clicks = search_clicks.size(2);
  a.n_read_clicks = std::min(a.n_clicks, max_clicks);
  a.n_candidates = candidates.size(1);
  a.items = table(items, "items", D);
  a.query_table = table(queries, "queries", D);
  a.position[0] = positions(search_position, "search_position", D, n_search);
  a.position[1] = positions(rec_position, "rec_position", D, n_rec);
  a.rec_items = ids_below(rec_items, "rec_items", {B, n_rec}, items.size(0));
  a.clicks = ids_below(search_clicks, "search_clicks", {B, n_search, a.n_clicks}, items.size(0));
  a.candidates = ids_below(candidates, "candidates", {B, a.n_candidates}, items.size(0));
  a.by_terms = terms;
  if (terms)
    a.terms = ids_below(search_terms, "search_terms", {B, n_search, a.n_terms}, queries.size(0));
  const bool has_text = query_text.dim() == 2;
  if (has_text) a.query_text = table(query_text, "query_text", D);
  if (!terms || has_text) {
    check(!has_text || terms, "query_text is added to means of terms alone");
    const int64_t rows = has_text ? query_text.size(0) : queries.size(0);
    a.queries = ids_below(search_queries, "search_queries", {B, n_search}, rows);
  }
  if (seen_bonus.numel() > 0) a.seen_bonus = floats(seen_bonus, "seen_bonus", {2});
  check(D > 0 && n_heads > 0 && D % n_heads == 0, "n_heads must divide the width ", D, ", got ",
        n_heads);
  bool fit = n_layers >= 0 && ffn > 0 && step_ffn >= 0 && n_sets >= 0;
  fit = fit && (steps == 0 || n_sets == 1 || n_sets >= steps);
  for (int64_t width : widths) fit = fit && width > 0;
  check(fit, "no layers for ", steps, " steps: n_layers ", n_layers, ", ffn ", ffn, ", n_sets ",
        n_sets, ", step_ffn ", step_ffn);
  check(widths.empty() || widths.back() == 1, "the MLP must end in one score");
  a.layers.encoder = {D, n_heads, ffn, n_layers};
  a.layers.reasoning = {D, n_heads, step_ffn, n_sets};
  a.layers.widths = std::move(widths);
  a.layers.pairs = pairs;
  if (item_layer.numel() > 0) {
    check(!a.layers.widths.empty(), "without an MLP there is no item_layer");
    a.item_layer = floats(item_layer, "item_layer", {items.size(0), a.layers.widths[0]});
  }
  a.layers.reads_users = users.dim() == 2;
  if (a.layers.reads_users) {
    a.users = table(users, "users", D);
    a.user = ids_below(user, "user", {B}, users.size(0));
  }
  a.packed = floats(weights, "weights", {RequestLayout(a.layers).size});
  a.n_steps = steps;
  a.readout = static_cast<float>(readout);
  a.dot = dot;
  Tensor scores = torch::stable::new_empty(items, {B, a.n_candidates});
  if (n_threads == 1)
    score_request(a, scores.mutable_data_ptr<float>(), n_threads, alone);
  else
    score_request(a, scores.mutable_data_ptr<float>(), n_threads, parallel);
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lcr_fast, m) {
  m.def(
      "cpu_request_weights(Tensor[] encoder, Tensor[] reasoning, Tensor target_weight,"
      " Tensor[] mlp_weights, Tensor[] mlp_biases, int n_heads, bool pairs) -> Tensor");
  m.def("cpu_request_items(Tensor items, Tensor weight, bool pairs) -> Tensor");
  m.def(
      "cpu_request(Tensor user, Tensor rec_items, Tensor rec_lengths, Tensor search_queries,"
      " Tensor search_terms, Tensor search_clicks, Tensor search_lengths, Tensor candidates,"
      " Tensor items, Tensor item_layer, Tensor queries, Tensor query_text, Tensor users,"
      " Tensor search_position, Tensor rec_position, Tensor seen_bonus, Tensor weights,"
      " int[] widths, int n_layers, int ffn, int n_sets, int step_ffn, int steps, int n_heads,"
      " int max_clicks, float readout, bool terms, bool dot, bool pairs, int n_threads) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(lcr_fast, CPU, m) {
  m.impl("cpu_request_weights", TORCH_BOX(&request_weights));
  m.impl("cpu_request_items", TORCH_BOX(&request_items));
  m.impl("cpu_request", TORCH_BOX(&request));
}

}  // namespace lcr_fast
