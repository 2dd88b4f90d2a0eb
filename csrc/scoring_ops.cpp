// Schemas and dispatch of the CPU scoring ops, on the LibTorch stable ABI only.

#include <algorithm>
#include <tuple>
#include <vector>

#include "op_arguments.h"

namespace lcr_fast {

const float* floats(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous() && has_sizes(t, shape), name,
        " must be contiguous float32 of a fitting shape");
  return t.const_data_ptr<float>();
}

const int64_t* integers(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  check(t.scalar_type() == ScalarType::Long && t.is_contiguous() && has_sizes(t, shape), name,
        " must be contiguous int64 of a fitting shape");
  return t.const_data_ptr<int64_t>();
}

const int64_t* ids_below(const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
                         int64_t limit) {
  const int64_t* ids = integers(t, name, shape);
  for (int64_t i = 0; i < t.numel(); ++i)
    check(ids[i] >= 0 && ids[i] < limit, name, " must be in 0..", limit - 1, ", got ", ids[i]);
  return ids;
}

void set_head(ScoringArgs& args, const Tensor& target_weight, const Tensors& mlp_weights,
              const Tensors& mlp_biases, bool dot) {
  args.dot = dot;
  const int64_t D = args.dim;
  args.target_weight = floats(target_weight, "target_weight", {2, D, D});
  check(mlp_weights.size() == mlp_biases.size(), "each layer needs a weight and a bias, got ",
        mlp_weights.size(), " and ", mlp_biases.size());
  for (const Tensor& weight : mlp_weights)
    check(weight.dim() == 2, "mlp_weights must be matrices [out, in]");
  int64_t in = args.inputs();
  for (size_t l = 0; l < mlp_weights.size(); ++l) {
    const int64_t out = mlp_weights[l].size(0);
    args.weights.push_back(floats(mlp_weights[l], "mlp_weights", {out, in}));
    args.biases.push_back(floats(mlp_biases[l], "mlp_biases", {out}));
    args.widths.push_back(in = out);
  }
  check(mlp_weights.empty() || in == 1, "the MLP must end in one score");
}

namespace {

// States [B, N, L, D].
ScoringArgs scoring_args(const Tensor& search, const Tensor& rec, const Tensor& search_lengths,
                         const Tensor& rec_lengths, const Tensor& user, const Tensor& target_weight,
                         const Tensors& mlp_weights, const Tensors& mlp_biases, bool dot) {
  check(search.dim() == 4 && rec.dim() == 4, "states must be [B, N, L, D]");
  ScoringArgs args{};
  args.n_users = search.size(0);
  args.n_trajectories = search.size(1);
  args.dim = search.size(3);
  args.size[0] = search.size(2);
  args.size[1] = rec.size(2);
  const int64_t B = args.n_users, N = args.n_trajectories, D = args.dim;
  args.states[0] = floats(search, "search", {B, N, args.size[0], D});
  args.states[1] = floats(rec, "rec", {B, N, args.size[1], D});
  args.lengths[0] = ids_below(search_lengths, "search_lengths", {B}, args.size[0] + 1);
  args.lengths[1] = ids_below(rec_lengths, "rec_lengths", {B}, args.size[1] + 1);
  // Its width tells, because a user vector of no users has no elements either.
  if (!mlp_weights.empty() && mlp_weights[0].dim() == 2 && mlp_weights[0].size(1) == 4 * D) {
    // An empty tensor may have no storage, and null would mean that there is no user vector.
    static const float kNothing = 0;
    const float* vectors = floats(user, "user", {B, D});
    args.user = vectors == nullptr ? &kNothing : vectors;
  }
  set_head(args, target_weight, mlp_weights, mlp_biases, dot);
  return args;
}

CandidateArgs candidate_args(const ScoringArgs& args, const Tensor& items, const Tensor& ids,
                             const Tensor& dropout_rows, int64_t dropout_threshold,
                             const Tensor& dropout_seed) {
  check(items.dim() == 2 && ids.dim() == 2, "items must be [T, D] and ids [B or 1, C]");
  check(dropout_threshold == 0 || args.n_trajectories == 1, "dropout needs one trajectory");
  CandidateArgs c{};
  const int64_t rows = ids.size(0);
  check(rows == 1 || rows == args.n_users, "ids must be [B or 1, C]");
  c.n_candidates = ids.size(1);
  c.items = floats(items, "items", {items.size(0), args.dim});
  c.ids = ids_below(ids, "ids", {rows, c.n_candidates}, items.size(0));
  c.step = rows == args.n_users ? c.n_candidates : 0;
  c.dropout = dropout_key(dropout_threshold, dropout_seed);
  if (dropout_threshold > 0)
    c.dropout_rows = integers(dropout_rows, "dropout_rows", {args.n_users});
  return c;
}

Tensor score_fwd(const Tensor& search, const Tensor& rec, const Tensor& search_lengths,
                 const Tensor& rec_lengths, const Tensor& items, const Tensor& ids,
                 const Tensor& user, const Tensor& target_weight, Tensors mlp_weights,
                 Tensors mlp_biases, const Tensor& dropout_rows, int64_t dropout_threshold,
                 const Tensor& dropout_seed, bool dot) {
  const ScoringArgs args = scoring_args(search, rec, search_lengths, rec_lengths, user,
                                        target_weight, mlp_weights, mlp_biases, dot);
  const CandidateArgs candidates =
      candidate_args(args, items, ids, dropout_rows, dropout_threshold, dropout_seed);
  Tensor scores = torch::stable::new_empty(
      search, {args.n_users, args.n_trajectories, candidates.n_candidates});
  score_cpu(args, candidates, scores.mutable_data_ptr<float>(), parallel);
  return scores;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors, Tensors> score_bwd(
    const Tensor& dscores, const Tensor& search, const Tensor& rec, const Tensor& search_lengths,
    const Tensor& rec_lengths, const Tensor& items, const Tensor& ids, const Tensor& user,
    const Tensor& target_weight, Tensors mlp_weights, Tensors mlp_biases,
    const Tensor& dropout_rows, int64_t dropout_threshold, const Tensor& dropout_seed, bool dot) {
  const ScoringArgs args = scoring_args(search, rec, search_lengths, rec_lengths, user,
                                        target_weight, mlp_weights, mlp_biases, dot);
  const CandidateArgs candidates =
      candidate_args(args, items, ids, dropout_rows, dropout_threshold, dropout_seed);
  const int64_t C = candidates.n_candidates;
  const float* upstream = floats(dscores, "dscores", {args.n_users, args.n_trajectories, C});
  Tensor dsearch = zeros_like(search), drec = zeros_like(rec), duser = zeros_like(user);
  Tensor ditems = torch::stable::new_empty(search, {args.n_users, C, args.dim});
  Tensor dtarget_weight = zeros_like(target_weight);
  Tensors dweights, dbiases;
  ScoringGradients gradients{};
  gradients.states[0] = dsearch.mutable_data_ptr<float>();
  gradients.states[1] = drec.mutable_data_ptr<float>();
  gradients.items = ditems.mutable_data_ptr<float>();
  gradients.user = args.user == nullptr ? nullptr : duser.mutable_data_ptr<float>();
  gradients.target_weight = dtarget_weight.mutable_data_ptr<float>();
  for (size_t l = 0; l < mlp_weights.size(); ++l) {
    dweights.push_back(zeros_like(mlp_weights[l]));
    dbiases.push_back(zeros_like(mlp_biases[l]));
    gradients.weights.push_back(dweights[l].mutable_data_ptr<float>());
    gradients.biases.push_back(dbiases[l].mutable_data_ptr<float>());
  }
  score_bwd_cpu(args, candidates, upstream, gradients, parallel);
  return {dsearch, drec, ditems, duser, dtarget_weight, dweights, dbiases};
}

// States [B, L, D] as those of one trajectory.
ScoringArgs catalogue_args(const Tensor& search, const Tensor& rec, const Tensor& search_lengths,
                           const Tensor& rec_lengths, const Tensor& user,
                           const Tensor& target_weight, const Tensors& mlp_weights,
                           const Tensors& mlp_biases, bool dot) {
  check(search.dim() == 3 && rec.dim() == 3 && search.is_contiguous() && rec.is_contiguous(),
        "states must be contiguous [B, L, D]");
  return scoring_args(torch::stable::unsqueeze(search, 1), torch::stable::unsqueeze(rec, 1),
                      search_lengths, rec_lengths, user, target_weight, mlp_weights, mlp_biases,
                      dot);
}

ItemArgs item_args(const ScoringArgs& args, const Tensor& items, const Tensor& exclude) {
  check(items.dim() == 2 && items.size(0) >= 1 && exclude.dim() == 2,
        "items must be [I + 1, D] and exclude [B, X]");
  const int64_t n_exclude = exclude.size(1);
  return {floats(items, "items", {items.size(0), args.dim}), items.size(0) - 1,
          integers(exclude, "exclude", {args.n_users, n_exclude}), n_exclude};
}

std::tuple<Tensor, Tensor> score_topk(const Tensor& search, const Tensor& rec,
                                      const Tensor& search_lengths, const Tensor& rec_lengths,
                                      const Tensor& items, const Tensor& user,
                                      const Tensor& target_weight, Tensors mlp_weights,
                                      Tensors mlp_biases, int64_t k, const Tensor& exclude,
                                      bool dot) {
  check(k >= 1, "k must be at least 1, got ", k);
  const ScoringArgs args = catalogue_args(search, rec, search_lengths, rec_lengths, user,
                                          target_weight, mlp_weights, mlp_biases, dot);
  const ItemArgs catalogue = item_args(args, items, exclude);
  Tensor ids = torch::stable::new_empty(search, {args.n_users, k}, ScalarType::Long);
  Tensor scores = torch::stable::new_empty(search, {args.n_users, k});
  score_topk_cpu(args, catalogue, k, ids.mutable_data_ptr<int64_t>(),
                 scores.mutable_data_ptr<float>(), parallel);
  return {ids, scores};
}

Tensor score_rank(const Tensor& search, const Tensor& rec, const Tensor& search_lengths,
                  const Tensor& rec_lengths, const Tensor& items, const Tensor& user,
                  const Tensor& target_weight, Tensors mlp_weights, Tensors mlp_biases,
                  const Tensor& target, const Tensor& bonus, const Tensor& exclude, bool dot) {
  const ScoringArgs args = catalogue_args(search, rec, search_lengths, rec_lengths, user,
                                          target_weight, mlp_weights, mlp_biases, dot);
  const ItemArgs catalogue = item_args(args, items, exclude);
  const int64_t* wanted = ids_below(target, "target", {args.n_users}, items.size(0));
  Tensor rank = torch::stable::new_empty(search, {args.n_users}, ScalarType::Long);
  score_rank_cpu(args, catalogue, wanted, floats(bonus, "bonus", {args.n_users}),
                 rank.mutable_data_ptr<int64_t>(), parallel);
  return rank;
}

}  // namespace

#define LCR_STREAMS "Tensor search, Tensor rec, Tensor search_lengths, Tensor rec_lengths"
#define LCR_WEIGHTS "Tensor user, Tensor target_weight, Tensor[] mlp_weights, Tensor[] mlp_biases"
#define LCR_CANDIDATES                                   \
  LCR_STREAMS ", Tensor items, Tensor ids, " LCR_WEIGHTS \
              ", Tensor dropout_rows, int dropout_threshold, Tensor dropout_seed, bool dot"

STABLE_TORCH_LIBRARY_FRAGMENT(lcr_fast, m) {
  m.def("cpu_score_fwd(" LCR_CANDIDATES ") -> Tensor");
  m.def("cpu_score_bwd(Tensor dscores, " LCR_CANDIDATES
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[])");
  m.def("cpu_score_topk(" LCR_STREAMS ", Tensor items, " LCR_WEIGHTS
        ", int k, Tensor exclude, bool dot) -> (Tensor, Tensor)");
  m.def("cpu_score_rank(" LCR_STREAMS ", Tensor items, " LCR_WEIGHTS
        ", Tensor target, Tensor bonus, Tensor exclude, bool dot) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(lcr_fast, CPU, m) {
  m.impl("cpu_score_fwd", TORCH_BOX(&score_fwd));
  m.impl("cpu_score_bwd", TORCH_BOX(&score_bwd));
  m.impl("cpu_score_topk", TORCH_BOX(&score_topk));
  m.impl("cpu_score_rank", TORCH_BOX(&score_rank));
}

}  // namespace lcr_fast
