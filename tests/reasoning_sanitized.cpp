// Runs encoders and reasoning on buffers of exactly their size, for the sanitizers to watch.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "../csrc/cpu_level.h"
#include "../csrc/reasoning.h"

namespace {

using lcr_fast::EncoderArgs;
using lcr_fast::FloatType;
using lcr_fast::ReasoningArgs;
using lcr_fast::Task;
using lcr_fast::TransformerShape;
using lcr_fast::WeightArg;

void serial(int64_t n_tasks, const Task& task) {
  if (n_tasks > 0) task(0, n_tasks);
}

// `n` stored numbers near 0, or zeros.
class Numbers {
 public:
  Numbers(int64_t n, FloatType type, bool random)
      : data_(static_cast<size_t>(n) * (type == FloatType::kFloat32 ? 4 : 2)) {
    if (!random) return;
    static uint32_t state = 1;
    // Half numbers, or the upper and the lower half of a float: 0x3cxx and 0xbcxx.
    for (size_t i = 1; i < data_.size(); i += 2) {
      state = state * 1664525 + 1013904223;
      data_[i - 1] = static_cast<unsigned char>(state >> 16);
      data_[i] = static_cast<unsigned char>(0x3c | (state >> 31 << 7));
    }
  }
  void* data() { return data_.data(); }

 private:
  std::vector<unsigned char> data_;
};

// Weights and room for their gradients.
struct Weights {
  Weights(const TransformerShape& s, int64_t n_attentions, FloatType type) {
    const int64_t blocks = 2 * s.n_sets, D = s.dim, F = s.ffn_dim;
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < n_attentions; ++i)
      for (int64_t n : {3 * D * D, 3 * D, D * D, D}) sizes.push_back(blocks * n);
    for (int64_t n : {F * D, F, D * F, D, (n_attentions + 1) * D, (n_attentions + 1) * D})
      sizes.push_back(blocks * n);
    for (int64_t n : sizes) {
      values.emplace_back(n, type, true);
      gradients.emplace_back(n, type, false);
    }
    for (size_t i = 0; i < sizes.size(); ++i) {
      args.push_back({values[i].data(), type});
      dweights.push_back(gradients[i].data());
    }
  }

  std::vector<Numbers> values, gradients;
  std::vector<WeightArg> args;
  std::vector<void*> dweights;
};

void reason(const TransformerShape& shape, FloatType type, bool pairs, int64_t n_users,
            int64_t n_trajectories, uint32_t threshold, bool pooled) {
  const int64_t B = n_users, N = n_trajectories, D = shape.dim;
  const int64_t K = shape.n_sets == 1 ? 2 : shape.n_sets;
  ReasoningArgs args{};
  args.shape = shape;
  args.type = type;
  args.pairs = pairs;
  args.n_users = B;
  args.n_trajectories = N;
  args.n_steps = K;
  args.noise_scale = threshold == 0 ? 0.5f : 0.0f;
  args.dropout = {threshold, 9};
  const std::vector<int64_t> rows(B, 77);
  args.rows = rows.data();
  Weights weights(shape, 2, type);
  lcr_fast::ReasoningResults results{};
  lcr_fast::ReasoningGradients gradients{};
  std::vector<std::vector<int64_t>> lengths;
  std::vector<Numbers> numbers;
  numbers.reserve(16);
  const auto make = [&](int64_t n, bool random) {
    return numbers.emplace_back(n, type, random).data();
  };
  for (int x = 0; x < 2; ++x) {
    const int64_t L = args.length[x] = x == 0 ? 19 : 50;
    lengths.emplace_back();
    for (int64_t b = 0; b < B; ++b)
      lengths[x].push_back(b == 0 ? L : b == 1 + x ? 0 : (7 * b + x) % (L + 1));
    args.states[x] = make(B * L * D, true);
    results.states[x] = make(B * N * L * D, false);
    results.saved[x] = make((K - 1) * B * N * L * D, false);
    gradients.dstates[x] = make(B * N * L * D, true);
    gradients.saved[x] = results.saved[x];
    gradients.dinput[x] = make(B * L * D, false);
  }
  for (int x = 0; x < 2; ++x) args.lengths[x] = lengths[x].data();
  if (pooled) {
    args.keys = make(B * 2 * D, true);
    results.pooled = make(B * N * K * 4 * D, false);
    gradients.dpooled = make(B * N * K * 4 * D, true);
    gradients.dkeys = make(B * 2 * D, false);
  }
  for (size_t i = 0; i < weights.dweights.size(); ++i) gradients.dweights[i] = weights.dweights[i];
  for (int64_t n_threads : {1, 2})  // a single item is split in another way on two threads
    lcr_fast::reasoning_forward(args, weights.args.data(), results, n_threads, serial);
  lcr_fast::reasoning_backward(args, weights.args.data(), gradients, serial);
}

void encode(const TransformerShape& shape, FloatType type, bool pairs, int64_t stream,
            uint32_t threshold) {
  const int64_t B = 3, L = 21, D = shape.dim;
  const std::vector<int64_t> lengths{L, 0, 5}, rows(B, 77);
  Numbers x(B * L * D, type, true), dout(B * L * D, type, true);
  Numbers out(B * L * D, type, false), dx(B * L * D, type, false);
  Weights weights(shape, 1, type);
  EncoderArgs args{};
  args.shape = shape;
  args.type = type;
  args.pairs = pairs;
  args.stream = stream;
  args.n_users = B;
  args.length = L;
  args.x = x.data();
  args.lengths = lengths.data();
  args.rows = rows.data();
  args.dropout = {threshold, 9};
  lcr_fast::encoder_forward(args, weights.args.data(), out.data(), serial);
  lcr_fast::encoder_backward(args, weights.args.data(), dout.data(), dx.data(),
                             weights.dweights.data(), serial);
}

}  // namespace

// Returns 2 where this CPU lacks the level that LCR_FAST_CPU names.
int main() {
  try {
    lcr_fast::cpu_level();
  } catch (const std::runtime_error&) {
    return 2;
  }
  // From small to large: scratch is kept, so that only where it grows is it of the exact size.
  const TransformerShape shapes[] = {{6, 3, 1, 2}, {20, 5, 9, 1}, {33, 1, 0, 2}, {64, 2, 64, 1}};
  struct Kind {
    FloatType type;
    bool pairs;
  };
  for (const TransformerShape& shape : shapes)
    for (auto [type, pairs] : {Kind{FloatType::kFloat32, false}, {FloatType::kFloat16, false},
                               {FloatType::kBFloat16, false}, {FloatType::kFloat32, true}}) {
      // The last level has bfloat16 of its own, and all else in common with the one below.
      const bool own = pairs || type == FloatType::kBFloat16;
      if (lcr_fast::cpu_level() == lcr_fast::CpuLevel::kAvx512Bf16 && !own) continue;
      reason(shape, type, pairs, 3, 1, 6554, true);
      reason(shape, type, pairs, 2, 2, 0, false);
      reason(shape, type, pairs, 1, 1, 0, true);
      reason(shape, type, pairs, 0, 1, 0, false);
      if (shape.ffn_dim == 0) continue;
      encode(shape, type, pairs, 0, 6554);
      encode(shape, type, pairs, 1, 0);
    }
  std::puts("done");
}
