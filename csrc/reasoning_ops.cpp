// Schemas, checks and dispatch of the CPU reasoning ops, on the LibTorch stable ABI only.

#include <initializer_list>
#include <tuple>
#include <vector>

#include "op_arguments.h"

namespace lcr_fast {
namespace {

FloatType float_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::Half:
      return FloatType::kFloat16;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    default:
      fail(name, " must be float32, float16 or bfloat16");
  }
}

}  // namespace

TransformerShape weights_shape(const Tensors& weights, size_t n_attentions, int64_t n_heads,
                               ScalarType dtype, std::vector<WeightArg>& args) {
  const size_t ffn = 4 * n_attentions, norm = ffn + 4;
  check(weights.size() == norm + 2, "expected ", norm + 2, " weights, got ", weights.size());
  const Tensor& qkv = weights[0];
  check(qkv.dim() == 4 && weights[ffn].dim() == 4,
        "weights of linear layers must be [P, 2, out, in]");
  const TransformerShape shape{qkv.size(3), n_heads, weights[ffn].size(2), qkv.size(0)};
  const int64_t P = shape.n_sets, D = shape.dim, F = shape.ffn_dim;
  check(D > 0 && n_heads > 0 && D % n_heads == 0, "n_heads must divide the width ", D, ", got ",
        n_heads);
  bool fit = true;
  for (size_t i = 0; i < ffn; i += 4)
    fit = fit && has_sizes(weights[i], {P, 2, 3 * D, D}) &&
          has_sizes(weights[i + 1], {P, 2, 3 * D}) && has_sizes(weights[i + 2], {P, 2, D, D}) &&
          has_sizes(weights[i + 3], {P, 2, D});
  const auto n_norms = static_cast<int64_t>(n_attentions) + 1;
  fit = fit && has_sizes(weights[ffn], {P, 2, F, D}) && has_sizes(weights[ffn + 1], {P, 2, F}) &&
        has_sizes(weights[ffn + 2], {P, 2, D, F}) && has_sizes(weights[ffn + 3], {P, 2, D}) &&
        has_sizes(weights[norm], {P, 2, n_norms, D}) &&
        has_sizes(weights[norm + 1], {P, 2, n_norms, D});
  check(fit, "the weights must have the sizes of lcr_fast.weights for width ", D, " and FFN width ",
        F);
  for (const Tensor& w : weights) {
    check(w.is_contiguous() && (w.scalar_type() == ScalarType::Float || w.scalar_type() == dtype),
          "weights must be contiguous, in float32 or the states' dtype");
    args.push_back({w.const_data_ptr(), float_type(w, "weights")});
  }
  return shape;
}

namespace {

using Sizes = std::initializer_list<int64_t>;

// The data of a contiguous tensor of these sizes and the states' dtype.
const void* states_data(const Tensor& t, const char* name, ScalarType dtype, Sizes sizes) {
  check(has_sizes(t, sizes) && t.scalar_type() == dtype && t.is_contiguous(), name,
        " must be contiguous, of the states' dtype and of the size that the other "
        "arguments give it");
  return t.const_data_ptr();
}

const void* optional_data(const Tensor& t, const char* name, ScalarType dtype, Sizes sizes) {
  return t.numel() == 0 ? nullptr : states_data(t, name, dtype, sizes);
}

// Lengths as int64, each in 0..length.
std::vector<int64_t> lengths_of(const Tensor& t, const char* name, int64_t n_users,
                                int64_t length) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  check(
      has_sizes(t, {n_users}) && t.is_contiguous() && (wide || t.scalar_type() == ScalarType::Int),
      name, " must be contiguous int64 or int32, one a user");
  std::vector<int64_t> lengths(n_users);
  for (int64_t b = 0; b < n_users; ++b) {
    lengths[b] = wide ? t.const_data_ptr<int64_t>()[b] : t.const_data_ptr<int32_t>()[b];
    check(lengths[b] >= 0 && lengths[b] <= length, name, "[", b, "] is ", lengths[b],
          ", expected 0 to ", length);
  }
  return lengths;
}

const int64_t* rows_of(const Tensor& t, int64_t n_users, bool read) {
  if (!read) return nullptr;
  check(has_sizes(t, {n_users}) && t.scalar_type() == ScalarType::Long && t.is_contiguous(),
        "rows must be contiguous int64, one a user");
  return t.const_data_ptr<int64_t>();
}

// The arguments that both passes of reasoning share, checked, with what they point to.
struct ReasoningCall {
  ReasoningCall(const Tensor& search, const Tensor& rec, const Tensor& search_lengths,
                const Tensor& rec_lengths, const Tensor& rows, const Tensor& target_keys,
                const Tensors& weight_tensors, int64_t steps, int64_t n_heads,
                int64_t n_trajectories, double noise_scale, const Tensor& noise_seed,
                int64_t dropout_threshold, const Tensor& dropout_seed)
      : dtype(search.scalar_type()) {
    args.type = float_type(search, "search");
    args.shape = weights_shape(weight_tensors, 2, n_heads, dtype, weights);
    check(search.dim() == 3 && rec.dim() == 3, "search and rec must be [B, L, D]");
    const int64_t B = search.size(0), D = args.shape.dim;
    args.n_users = B;
    args.length[0] = search.size(1);
    args.length[1] = rec.size(1);
    args.states[0] = states_data(search, "search", dtype, {B, args.length[0], D});
    args.states[1] = states_data(rec, "rec", dtype, {B, args.length[1], D});
    lengths[0] = lengths_of(search_lengths, "search_lengths", B, args.length[0]);
    lengths[1] = lengths_of(rec_lengths, "rec_lengths", B, args.length[1]);
    for (int x = 0; x < 2; ++x) args.lengths[x] = lengths[x].data();
    check(steps >= 1 && (args.shape.n_sets == 1 || args.shape.n_sets >= steps),
          "steps must be at least 1, and at most the sets of weights, got ", steps);
    args.n_steps = steps;
    check(n_trajectories >= 1, "n_trajectories must be at least 1, got ", n_trajectories);
    check(n_trajectories == 1 || dropout_threshold == 0, "dropout needs n_trajectories = 1, got ",
          n_trajectories);
    args.n_trajectories = n_trajectories;
    args.noise_scale = static_cast<float>(noise_scale);
    args.noise_seed = noise_scale != 0.0 ? seed_of(noise_seed, "noise_seed") : 0;
    args.dropout = dropout_key(dropout_threshold, dropout_seed);
    args.rows = rows_of(rows, B, noise_scale != 0.0 || dropout_threshold > 0);
    pooled = target_keys.dim() == 3;
    args.keys = optional_data(target_keys, "target_keys", dtype, {B, 2, D});
  }

  ScalarType dtype;
  std::vector<WeightArg> weights;
  std::vector<int64_t> lengths[2];
  bool pooled;  // of no users, too
  ReasoningArgs args{};
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_latent_reasoning_fwd(
    const Tensor& search, const Tensor& rec, const Tensor& search_lengths,
    const Tensor& rec_lengths, const Tensor& rows, const Tensor& target_keys, Tensors weights,
    int64_t steps, int64_t n_heads, int64_t n_trajectories, double noise_scale,
    const Tensor& noise_seed, int64_t dropout_threshold, const Tensor& dropout_seed, bool save) {
  const ReasoningCall call(search, rec, search_lengths, rec_lengths, rows, target_keys, weights,
                           steps, n_heads, n_trajectories, noise_scale, noise_seed,
                           dropout_threshold, dropout_seed);
  const ReasoningArgs& args = call.args;
  const int64_t B = args.n_users, N = n_trajectories, D = args.shape.dim;
  const int64_t n_saved = save ? steps - 1 : 0;
  ReasoningResults results{};
  const auto create = [&](std::vector<int64_t> sizes, void*& data) {
    Tensor t = torch::stable::new_empty(search, sizes, call.dtype);
    data = t.numel() == 0 ? nullptr : t.mutable_data_ptr();
    return t;
  };
  Tensor out_search = create({B, N, args.length[0], D}, results.states[0]);
  Tensor out_rec = create({B, N, args.length[1], D}, results.states[1]);
  std::vector<int64_t> pooled_sizes{B, N, steps, 2, 2, D};
  if (!call.pooled) pooled_sizes = {0};
  Tensor pooled = create(pooled_sizes, results.pooled);
  Tensor saved_search = create({n_saved, B, N, args.length[0], D}, results.saved[0]);
  Tensor saved_rec = create({n_saved, B, N, args.length[1], D}, results.saved[1]);
  // One user takes one thread: two would meet after each half of a step, and wait there for whoever
  // else the system lets run. `cpu_request` can be asked for two.
  reasoning_forward(args, call.weights.data(), results, 1, parallel);
  return {out_search, out_rec, pooled, saved_search, saved_rec};
}

std::tuple<Tensor, Tensor, Tensor> cpu_adaptive_reasoning(
    const Tensor& search, const Tensor& rec, const Tensor& search_lengths,
    const Tensor& rec_lengths, Tensors weights, const Tensor& exit_weight, const Tensor& exit_bias,
    int64_t steps, int64_t n_heads) {
  const Tensor none = torch::stable::new_empty(search, {0}, search.scalar_type());
  const ReasoningCall call(search, rec, search_lengths, rec_lengths, none, none, weights, steps,
                           n_heads, 1, 0.0, none, 0, none);
  const ReasoningArgs& args = call.args;
  const auto floats = [](const Tensor& t, const char* name, int64_t size) {
    check(has_sizes(t, {size}) && t.scalar_type() == ScalarType::Float && t.is_contiguous(), name,
          " must be contiguous float32 [", size, "]");
    return t.const_data_ptr<float>();
  };
  const ExitArgs exits{floats(exit_weight, "exit_weight", 2 * args.shape.dim + 2),
                       floats(exit_bias, "exit_bias", steps)};
  Tensor out_search = torch::stable::empty_like(search), out_rec = torch::stable::empty_like(rec);
  Tensor taken = torch::stable::new_empty(search, {args.n_users}, ScalarType::Long);
  void* const states[2] = {out_search.mutable_data_ptr(), out_rec.mutable_data_ptr()};
  adaptive_forward(args, call.weights.data(), exits, states, taken.mutable_data_ptr<int64_t>(),
                   torch::stable::get_num_threads(), parallel);
  return {out_search, out_rec, taken};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> cpu_latent_reasoning_bwd(
    const Tensor& dsearch_out, const Tensor& drec_out, const Tensor& dpooled, const Tensor& search,
    const Tensor& rec, const Tensor& search_lengths, const Tensor& rec_lengths, const Tensor& rows,
    const Tensor& target_keys, Tensors weights, int64_t steps, int64_t n_heads,
    int64_t n_trajectories, double noise_scale, const Tensor& noise_seed, int64_t dropout_threshold,
    const Tensor& dropout_seed, const Tensor& saved_search, const Tensor& saved_rec) {
  const ReasoningCall call(search, rec, search_lengths, rec_lengths, rows, target_keys, weights,
                           steps, n_heads, n_trajectories, noise_scale, noise_seed,
                           dropout_threshold, dropout_seed);
  const ReasoningArgs& args = call.args;
  const int64_t B = args.n_users, N = n_trajectories, D = args.shape.dim;
  const int64_t n_search = args.length[0], n_rec = args.length[1];
  ReasoningGradients g{};
  g.dstates[0] = states_data(dsearch_out, "dsearch_out", call.dtype, {B, N, n_search, D});
  g.dstates[1] = states_data(drec_out, "drec_out", call.dtype, {B, N, n_rec, D});
  g.dpooled = optional_data(dpooled, "dpooled", call.dtype, {B, N, steps, 2, 2, D});
  g.saved[0] =
      states_data(saved_search, "saved_search", call.dtype, {steps - 1, B, N, n_search, D});
  g.saved[1] = states_data(saved_rec, "saved_rec", call.dtype, {steps - 1, B, N, n_rec, D});
  Tensor dsearch = torch::stable::empty_like(search), drec = torch::stable::empty_like(rec);
  Tensor dkeys = torch::stable::empty_like(target_keys);
  g.dinput[0] = dsearch.mutable_data_ptr();
  g.dinput[1] = drec.mutable_data_ptr();
  g.dkeys = args.keys == nullptr ? nullptr : dkeys.mutable_data_ptr();
  Tensors dweights;
  for (size_t i = 0; i < weights.size(); ++i) {
    // Sets of weights beyond the steps, and a norm without an FFN, have no part in the result.
    dweights.push_back(zeros_like(weights[i]));
    g.dweights[i] = dweights[i].mutable_data_ptr();
  }
  reasoning_backward(args, call.weights.data(), g, parallel);
  return {dsearch, drec, dkeys, dweights};
}

// -- encoder --------------------------------------------------------------------------------------

// The arguments that both passes of the encoders share, checked, with what they point to.
struct EncoderCall {
  EncoderCall(const Tensor& search, const Tensor& rec, const Tensor& search_lengths,
              const Tensor& rec_lengths, const Tensor& rows, const Tensors& weight_tensors,
              int64_t n_heads, int64_t dropout_threshold, const Tensor& dropout_seed)
      : dtype(search.scalar_type()) {
    EncoderArgs common{};
    common.type = float_type(search, "search");
    common.shape = weights_shape(weight_tensors, 1, n_heads, dtype, weights);
    check(common.shape.ffn_dim > 0, "the encoder's FFN must have a width");
    check(search.dim() == 3 && rec.dim() == 3, "search and rec must be [B, L, D]");
    common.n_users = search.size(0);
    common.dropout = dropout_key(dropout_threshold, dropout_seed);
    common.rows = rows_of(rows, common.n_users, dropout_threshold > 0);
    set(0, "search", search, "search_lengths", search_lengths, common);
    set(1, "rec", rec, "rec_lengths", rec_lengths, common);
  }

  ScalarType dtype;
  std::vector<WeightArg> weights;
  std::vector<int64_t> lengths[2];
  EncoderArgs args[2];

 private:
  void set(int stream, const char* name, const Tensor& x, const char* lengths_name,
           const Tensor& x_lengths, EncoderArgs of_stream) {
    of_stream.stream = stream;
    of_stream.length = x.size(1);
    of_stream.x =
        states_data(x, name, dtype, {of_stream.n_users, of_stream.length, of_stream.shape.dim});
    lengths[stream] = lengths_of(x_lengths, lengths_name, of_stream.n_users, of_stream.length);
    of_stream.lengths = lengths[stream].data();
    args[stream] = of_stream;
  }
};

std::tuple<Tensor, Tensor> cpu_encode_fwd(const Tensor& search, const Tensor& rec,
                                          const Tensor& search_lengths, const Tensor& rec_lengths,
                                          const Tensor& rows, Tensors weights, int64_t n_heads,
                                          int64_t dropout_threshold, const Tensor& dropout_seed) {
  const EncoderCall call(search, rec, search_lengths, rec_lengths, rows, weights, n_heads,
                         dropout_threshold, dropout_seed);
  Tensor out_search = torch::stable::empty_like(search), out_rec = torch::stable::empty_like(rec);
  void* const out[2] = {out_search.mutable_data_ptr(), out_rec.mutable_data_ptr()};
  for (int x = 0; x < 2; ++x)
    encoder_forward(call.args[x], call.weights.data(), out[x], parallel);
  return {out_search, out_rec};
}

std::tuple<Tensor, Tensor, Tensors> cpu_encode_bwd(
    const Tensor& dsearch_out, const Tensor& drec_out, const Tensor& search, const Tensor& rec,
    const Tensor& search_lengths, const Tensor& rec_lengths, const Tensor& rows, Tensors weights,
    int64_t n_heads, int64_t dropout_threshold, const Tensor& dropout_seed) {
  const EncoderCall call(search, rec, search_lengths, rec_lengths, rows, weights, n_heads,
                         dropout_threshold, dropout_seed);
  const int64_t B = call.args[0].n_users, D = call.args[0].shape.dim;
  const void* const dout[2] = {
      states_data(dsearch_out, "dsearch_out", call.dtype, {B, call.args[0].length, D}),
      states_data(drec_out, "drec_out", call.dtype, {B, call.args[1].length, D})};
  Tensor dsearch = torch::stable::empty_like(search), drec = torch::stable::empty_like(rec);
  void* const dx[2] = {dsearch.mutable_data_ptr(), drec.mutable_data_ptr()};
  Tensors dweights;
  void* data[kEncoderWeights];
  for (size_t i = 0; i < weights.size(); ++i) {
    dweights.push_back(torch::stable::empty_like(weights[i]));
    data[i] = dweights[i].mutable_data_ptr();
  }
  for (int x = 0; x < 2; ++x)  // each writes its own half of every weight's gradient
    encoder_backward(call.args[x], call.weights.data(), dout[x], dx[x], data, parallel);
  return {dsearch, drec, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lcr_fast, m) {
  m.def(
      "cpu_latent_reasoning_fwd(Tensor search, Tensor rec, Tensor search_lengths,"
      " Tensor rec_lengths, Tensor rows, Tensor target_keys, Tensor[] weights, int steps,"
      " int n_heads, int n_trajectories, float noise_scale, Tensor noise_seed,"
      " int dropout_threshold, Tensor dropout_seed, bool save)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_latent_reasoning_bwd(Tensor dsearch_out, Tensor drec_out, Tensor dpooled,"
      " Tensor search, Tensor rec, Tensor search_lengths, Tensor rec_lengths, Tensor rows,"
      " Tensor target_keys, Tensor[] weights, int steps, int n_heads, int n_trajectories,"
      " float noise_scale, Tensor noise_seed, int dropout_threshold, Tensor dropout_seed,"
      " Tensor saved_search, Tensor saved_rec) -> (Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "cpu_adaptive_reasoning(Tensor search, Tensor rec, Tensor search_lengths,"
      " Tensor rec_lengths, Tensor[] weights, Tensor exit_weight, Tensor exit_bias, int steps,"
      " int n_heads) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_encode_fwd(Tensor search, Tensor rec, Tensor search_lengths, Tensor rec_lengths,"
      " Tensor rows, Tensor[] weights, int n_heads, int dropout_threshold, Tensor dropout_seed)"
      " -> (Tensor, Tensor)");
  m.def(
      "cpu_encode_bwd(Tensor dsearch_out, Tensor drec_out, Tensor search, Tensor rec,"
      " Tensor search_lengths, Tensor rec_lengths, Tensor rows, Tensor[] weights, int n_heads,"
      " int dropout_threshold, Tensor dropout_seed) -> (Tensor, Tensor, Tensor[])");
}
STABLE_TORCH_LIBRARY_IMPL(lcr_fast, CPU, m) {
  m.impl("cpu_latent_reasoning_fwd", TORCH_BOX(&cpu_latent_reasoning_fwd));
  m.impl("cpu_latent_reasoning_bwd", TORCH_BOX(&cpu_latent_reasoning_bwd));
  m.impl("cpu_adaptive_reasoning", TORCH_BOX(&cpu_adaptive_reasoning));
  m.impl("cpu_encode_fwd", TORCH_BOX(&cpu_encode_fwd));
  m.impl("cpu_encode_bwd", TORCH_BOX(&cpu_encode_bwd));
}

}  // namespace lcr_fast
