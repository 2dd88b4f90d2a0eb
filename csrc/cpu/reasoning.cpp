// Encoders and reasoning over a batch: packing, threads, and the order of gradient sums. The
// arithmetic is in reasoning_kernels.h.
#include "../reasoning.h"

#include <algorithm>

#include "../cpu_level.h"
#include "convert.h"
#include "reasoning_kernels.h"
#include "scratch.h"

namespace lcr_fast {
namespace {

// The kernels of a call whose states have this type.
const ReasoningKernels& kernels_of(FloatType type, bool pairs) {
#if defined(__x86_64__)
  const CpuLevel level = cpu_level();
  if (level >= CpuLevel::kAvx512Bf16 && (pairs || type == FloatType::kBFloat16))
    return kReasoningPairsAvx512Bf16;
  if (level >= CpuLevel::kAvx512) return pairs ? kReasoningPairsAvx512 : kReasoningAvx512;
  if (level >= CpuLevel::kAvx2) return pairs ? kReasoningPairsAvx2 : kReasoningAvx2;
#endif
  return pairs ? kReasoningPairsBaseline : kReasoningBaseline;
}

static_assert(kReasoningWeights <= kMaxWeights && kEncoderWeights <= kMaxWeights);

// Weights in float32, converted where they are stored in halves.
class FloatWeights {
 public:
  FloatWeights(const BlockSpec& spec, int64_t n_sets, const WeightArg* weights) {
    for (int i = 0; i < spec.n_linears; ++i) {
      const LinearSpec& l = spec.linears[i];
      set(l.weight, weights, 2 * n_sets * l.rows * l.in);
      set(l.bias, weights, 2 * n_sets * l.rows);
    }
    for (int i : {spec.norm_weight, spec.norm_weight + 1})
      set(i, weights, 2 * n_sets * spec.n_norms * spec.dim);
  }

  const float* const* get() const { return pointers_; }

 private:
  void set(int i, const WeightArg* weights, int64_t n) {
    if (pointers_[i] != nullptr) return;
    if (weights[i].type == FloatType::kFloat32) {
      pointers_[i] = static_cast<const float*>(weights[i].data);
      return;
    }
    copies_[i] = new_floats(n);
    read_floats(weights[i].data, weights[i].type, 0, n, copies_[i].get());
    pointers_[i] = copies_[i].get();
  }

  const float* pointers_[kMaxWeights] = {};
  Floats copies_[kMaxWeights];
};

// Which weight blocks an op uses: both streams of every set, or one stream.
struct BlockRange {
  int64_t n_blocks;
  int64_t first;
  int64_t step;

  int64_t index(int64_t block) const { return first + step * block; }
};

BlockRange reasoning_blocks(const TransformerShape& shape) { return {2 * shape.n_sets, 0, 1}; }
BlockRange encoder_blocks(const TransformerShape& shape, int64_t stream) {
  return {shape.n_sets, stream, 2};
}

// Pack the weights of a range of blocks: one behind the other in `forward` and, where it is not
// null, in `backward`.
void pack_blocks(const BlockSpec& spec, const BlockRange& range, int64_t n_sets,
                 const WeightArg* weights, const ReasoningKernels& kernels, float* forward,
                 float* backward, const Parallel& parallel) {
  const FloatWeights floats(spec, n_sets, weights);
  const int64_t size = forward_layout(spec).size, backward_size = backward_layout(spec).size;
  parallel(range.n_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.pack_forward(spec, floats.get(), range.index(i), forward + i * size);
      if (backward != nullptr)
        kernels.pack_backward(spec, floats.get(), range.index(i), backward + i * backward_size);
    }
  });
}

Floats packed_blocks(const TransformerShape& shape, int n_attentions, const BlockRange& range,
                     const WeightArg* weights, const ReasoningKernels& kernels,
                     const Parallel& parallel) {
  const BlockSpec spec = spec_of(shape, n_attentions);
  Floats packed = new_floats(range.n_blocks * forward_layout(spec).size);
  pack_blocks(spec, range, shape.n_sets, weights, kernels, packed.get(), nullptr, parallel);
  return packed;
}

// The weights of a backward pass and the gradients of each group of users.
//
// A group's users add to one block of gradients, one after another; the groups are then summed in
// order. Groups depend on the number of users alone, so the bits do not depend on the threads.
class GradientSums {
 public:
  GradientSums(const BlockSpec& spec, const BlockRange& range, int64_t n_sets,
               const WeightArg* weights, int64_t n_users, const ReasoningKernels& kernels,
               const Parallel& parallel)
      : spec_(spec),
        range_(range),
        at_(gradient_layout(spec)),
        weights_(weights),
        n_groups_(std::clamp<int64_t>((n_users + kGroup - 1) / kGroup, 1, kMaxGroups)),
        n_users_(n_users),
        forward_(new_floats(range.n_blocks * forward_layout(spec).size)),
        backward_(new_floats(range.n_blocks * backward_layout(spec).size)),
        sums_(new_floats(n_groups_ * size())) {
    pack_blocks(spec, range, n_sets, weights, kernels, forward_.get(), backward_.get(), parallel);
  }

  // Run `user(weights, b)` for every user, groups in parallel.
  template <class User>
  void run(const Parallel& parallel, const User& user) {
    parallel(n_groups_, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        float* sums = sums_.get() + group * size();
        std::fill_n(sums, size(), 0.0f);
        const BackwardWeights weights{forward_.get(), backward_.get(), sums};
        const int64_t last = (group + 1) * n_users_ / n_groups_;
        for (int64_t b = group * n_users_ / n_groups_; b < last; ++b) user(weights, b);
      }
    });
  }

  // Sum the groups and store the gradients of the weights that the blocks cover.
  void write(void* const* dweights, const Parallel& parallel) {
    constexpr int64_t kChunk = 4096;
    parallel((size() + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(size(), end * kChunk);
      for (int64_t group = 1; group < n_groups_; ++group)
        for (int64_t i = begin * kChunk; i < last; ++i) sums_[i] += sums_[group * size() + i];
    });
    for (int64_t i = 0; i < range_.n_blocks; ++i) write_block(i, dweights);
  }

 private:
  static constexpr int64_t kGroup = 4;  // users, so that summing the groups costs little
  static constexpr int64_t kMaxGroups = 32;

  int64_t size() const { return range_.n_blocks * at_.size; }

  void write_block(int64_t block, void* const* dweights) const {
    const float* sums = sums_.get() + block * at_.size;
    const int64_t index = range_.index(block);
    const auto put = [&](int tensor, int64_t offset, int64_t n, int64_t from) {
      write_floats(dweights[tensor], weights_[tensor].type, offset, n, sums + from);
    };
    for (int i = 0; i < spec_.n_linears; ++i) {
      const LinearSpec& l = spec_.linears[i];
      const int64_t row = index * l.rows + l.first_row;
      put(l.weight, row * l.in, l.out * l.in, at_.weight[i]);
      put(l.bias, row, l.out, at_.bias[i]);
    }
    for (int i = 0; i < spec_.n_norms; ++i) {
      const int64_t offset = (index * spec_.n_norms + i) * spec_.dim;
      put(spec_.norm_weight, offset, spec_.dim, at_.norm_weight[i]);
      put(spec_.norm_weight + 1, offset, spec_.dim, at_.norm_bias[i]);
    }
  }

  BlockSpec spec_;
  BlockRange range_;
  BlockLayout at_;
  const WeightArg* weights_;
  int64_t n_groups_, n_users_;
  Floats forward_, backward_, sums_;
};

}  // namespace

// -- reasoning ------------------------------------------------------------------------------------

int64_t reasoning_floats(const TransformerShape& shape) {
  return reasoning_blocks(shape).n_blocks * forward_layout(spec_of(shape, 2)).size;
}

void pack_reasoning(const TransformerShape& shape, bool pairs, const WeightArg* weights,
                    float* packed, const Parallel& parallel) {
  pack_blocks(spec_of(shape, 2), reasoning_blocks(shape), shape.n_sets, weights,
              kernels_of(FloatType::kFloat32, pairs), packed, nullptr, parallel);
}

void reasoning_forward(const ReasoningArgs& args, const WeightArg* weights,
                       const ReasoningResults& results, int64_t n_threads,
                       const Parallel& parallel) {
  const Floats packed = packed_blocks(args.shape, 2, reasoning_blocks(args.shape), weights,
                                      kernels_of(args.type, args.pairs), parallel);
  reasoning_forward(args, packed.get(), results, n_threads, parallel);
}

void reasoning_forward(const ReasoningArgs& args, const float* packed,
                       const ReasoningResults& results, int64_t n_threads,
                       const Parallel& parallel) {
  const ReasoningKernels& kernels = kernels_of(args.type, args.pairs);
  const int64_t n_items = args.n_users * args.n_trajectories, n_parts = 2 * args.n_steps;
  const int64_t size = kernels.forward_scratch(args);
  if (n_items > 1 || n_threads == 1) {
    parallel(n_items, [&](int64_t begin, int64_t end) {
      float* scratch = thread_scratch(size);
      for (int64_t item = begin; item < end; ++item)
        for (int64_t part = 0; part < n_parts; ++part)
          for (int x = 0; x < 2; ++x)
            kernels.forward_part(args, packed, results, item, part, x, scratch);
    });
    return;
  }
  // A single item on several threads: one stream each.
  float* scratch = thread_scratch(size);
  for (int64_t part = 0; n_items > 0 && part < n_parts; ++part)
    parallel(2, [&](int64_t begin, int64_t end) {
      for (int64_t x = begin; x < end; ++x)
        kernels.forward_part(args, packed, results, 0, part, static_cast<int>(x), scratch);
    });
}

void adaptive_forward(const ReasoningArgs& args, const WeightArg* weights, const ExitArgs& exits,
                      void* const* states, int64_t* taken, int64_t n_threads,
                      const Parallel& parallel) {
  const ReasoningKernels& kernels = kernels_of(args.type, args.pairs);
  const Floats made =
      packed_blocks(args.shape, 2, reasoning_blocks(args.shape), weights, kernels, parallel);
  const float* packed = made.get();
  const ReasoningResults results{{states[0], states[1]}, nullptr, {nullptr, nullptr}};
  const int64_t size = kernels.exit_scratch(args);
  const Parallel in_turn = [](int64_t n, const Task& task) { task(0, n); };
  const auto reason = [&](int64_t item, float* scratch, const Parallel& streams) {
    int64_t k = 0;
    for (; k < args.n_steps; ++k) {
      if (kernels.leaves(args, exits, item, k, scratch)) {
        kernels.leave(args, states, item, scratch);
        break;
      }
      for (int64_t part = 2 * k; part < 2 * k + 2; ++part)
        streams(2, [&](int64_t begin, int64_t end) {
          for (int64_t x = begin; x < end; ++x)
            kernels.forward_part(args, packed, results, item, part, static_cast<int>(x), scratch);
        });
    }
    taken[item] = k;
  };
  if (args.n_users == 1 && n_threads > 1) return reason(0, thread_scratch(size), parallel);
  parallel(args.n_users, [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(size);
    for (int64_t item = begin; item < end; ++item) reason(item, scratch, in_turn);
  });
}

void reasoning_backward(const ReasoningArgs& args, const WeightArg* weights,
                        const ReasoningGradients& gradients, const Parallel& parallel) {
  const TransformerShape& shape = args.shape;
  const ReasoningKernels& kernels = kernels_of(args.type, args.pairs);
  GradientSums sums(spec_of(shape, 2), reasoning_blocks(shape), shape.n_sets, weights, args.n_users,
                    kernels, parallel);
  const int64_t size = kernels.backward_scratch(args);
  sums.run(parallel, [&](const BackwardWeights& w, int64_t user) {
    kernels.backward(args, w, gradients, user, thread_scratch(size));
  });
  sums.write(gradients.dweights, parallel);
}

// -- encoder --------------------------------------------------------------------------------------

int64_t encoder_floats(const TransformerShape& shape) {
  return shape.n_sets * forward_layout(spec_of(shape, 1)).size;
}

void pack_encoder(const TransformerShape& shape, int64_t stream, bool pairs,
                  const WeightArg* weights, float* packed, const Parallel& parallel) {
  pack_blocks(spec_of(shape, 1), encoder_blocks(shape, stream), shape.n_sets, weights,
              kernels_of(FloatType::kFloat32, pairs), packed, nullptr, parallel);
}

void encoder_forward(const EncoderArgs& args, const WeightArg* weights, void* out,
                     const Parallel& parallel) {
  const Floats packed = packed_blocks(args.shape, 1, encoder_blocks(args.shape, args.stream),
                                      weights, kernels_of(args.type, args.pairs), parallel);
  encoder_forward(args, packed.get(), out, parallel);
}

void encoder_forward(const EncoderArgs& args, const float* packed, void* out,
                     const Parallel& parallel) {
  const ReasoningKernels& kernels = kernels_of(args.type, args.pairs);
  const int64_t size = kernels.encoder_scratch(args);
  parallel(args.n_users, [&](int64_t begin, int64_t end) {
    for (int64_t user = begin; user < end; ++user)
      kernels.encoder_forward(args, packed, out, user, thread_scratch(size));
  });
}

void encoder_backward(const EncoderArgs& args, const WeightArg* weights, const void* dout, void* dx,
                      void* const* dweights, const Parallel& parallel) {
  const TransformerShape& shape = args.shape;
  const ReasoningKernels& kernels = kernels_of(args.type, args.pairs);
  GradientSums sums(spec_of(shape, 1), encoder_blocks(shape, args.stream), shape.n_sets, weights,
                    args.n_users, kernels, parallel);
  const int64_t size = kernels.encoder_backward_scratch(args);
  sums.run(parallel, [&](const BackwardWeights& w, int64_t user) {
    kernels.encoder_backward(args, w, dout, dx, user, thread_scratch(size));
  });
  sums.write(dweights, parallel);
}

}  // namespace lcr_fast
