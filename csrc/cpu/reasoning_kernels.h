// Encoders and latent cross reasoning of one user, forward and backward, once per instruction set.
//
// Each reasoning_<level>.cpp defines LCR_TARGET and LCR_BYTES (see simd.h), includes this file and
// exports one table of functions; each pairs_<level>.cpp defines LCR_PAIRS too (see operands.h).
#pragma once
#include "../noise.h"
#include "../reasoning.h"
#include "convert.h"
#include "weights.h"

namespace lcr_fast {

// Packed weights of a backward pass and the block of gradients that it adds to.
struct BackwardWeights {
  const float* forward;
  const float* backward;
  float* gradients;
};

// `scratch` is a cache-aligned buffer of as many floats as the function before it says. An item is
// user * n_trajectories + trajectory.
struct ReasoningKernels {
  void (*pack_forward)(const BlockSpec&, const float* const* weights, int64_t index, float* out);
  void (*pack_backward)(const BlockSpec&, const float* const* weights, int64_t index, float* out);

  int64_t (*forward_scratch)(const ReasoningArgs&);
  // One stream's part of an item: parts 2 k and 2 k + 1 are step k up to the cross-attention and
  // from there on. Both streams must have done a part before the next one starts.
  void (*forward_part)(const ReasoningArgs&, const float* packed, const ReasoningResults&,
                       int64_t item, int64_t part, int stream, float* scratch);
  // Of an item that may leave: scratch of forward_part and of these.
  int64_t (*exit_scratch)(const ReasoningArgs&);
  // Does the item leave after k steps? To be asked of k = 0, 1, ... in turn, before part 2 k.
  bool (*leaves)(const ReasoningArgs&, const ExitArgs&, int64_t item, int64_t k, float* scratch);
  // Write the states of an item that leaves.
  void (*leave)(const ReasoningArgs&, void* const* states, int64_t item, float* scratch);
  int64_t (*backward_scratch)(const ReasoningArgs&);
  void (*backward)(const ReasoningArgs&, const BackwardWeights&, const ReasoningGradients&,
                   int64_t user, float* scratch);

  int64_t (*encoder_scratch)(const EncoderArgs&);
  void (*encoder_forward)(const EncoderArgs&, const float* packed, void* out, int64_t user,
                          float* scratch);
  int64_t (*encoder_backward_scratch)(const EncoderArgs&);
  void (*encoder_backward)(const EncoderArgs&, const BackwardWeights&, const void* dout, void* dx,
                           int64_t user, float* scratch);
};

extern const ReasoningKernels kReasoningBaseline;
extern const ReasoningKernels kReasoningAvx2;
extern const ReasoningKernels kReasoningAvx512;
extern const ReasoningKernels kReasoningPairsBaseline;
extern const ReasoningKernels kReasoningPairsAvx2;
extern const ReasoningKernels kReasoningPairsAvx512;
extern const ReasoningKernels kReasoningPairsAvx512Bf16;

inline BlockSpec spec_of(const TransformerShape& shape, int n_attentions) {
  return block_spec(shape.dim, shape.ffn_dim, n_attentions);
}

}  // namespace lcr_fast

#ifdef LCR_TARGET

#include "transformer.h"

namespace lcr_fast {
namespace {

// Numbers of the linears and norms in a block.
constexpr int kSelf = 0, kCross = 4, kStepFfn = 8, kEncoderFfn = 4;

LCR_TARGET void read_rows(const void* from, FloatType type, int64_t offset, int64_t m,
                          const Dims& dims, float* to) {
  for (int64_t i = 0; i < m; ++i)
    read_floats(from, type, offset + i * dims.dim, dims.dim, to + i * dims.stride);
}

// Rows m .. length - 1 become 0.
LCR_TARGET void write_rows(void* to, FloatType type, int64_t offset, int64_t m, int64_t length,
                           const Dims& dims, const float* from) {
  for (int64_t i = 0; i < m; ++i)
    write_floats(to, type, offset + i * dims.dim, dims.dim, from + i * dims.stride);
  zero_floats(to, type, offset + m * dims.dim, (length - m) * dims.dim);
}

// to [m, stride] += from
LCR_TARGET void add_rows(int64_t m, const Dims& dims, const float* from, float* to) {
  for (int64_t j = 0; j < m * dims.stride; j += kLanes)
    store(to + j, load(to + j) + load(from + j));
}

// One vector of width D from element `offset`, with zeros up to the stride.
LCR_TARGET void read_vector(const void* from, FloatType type, int64_t offset, const Dims& dims,
                            float* to) {
  std::memset(to, 0, sizeof(float) * dims.stride);
  read_floats(from, type, offset, dims.dim, to);
}

NormTape norm_tape(Arena& arena, const Dims& dims, int64_t m, bool keep, bool dropout) {
  NormTape tape;
  if (keep) {
    tape.normal = arena.take(m * dims.stride);
    tape.scale = arena.take(m);
  }
  if (dropout) tape.mask = arena.take(m * dims.stride);
  return tape;
}

// All weight blocks of one pass: block(set, stream) of reasoning, block(layer) of an encoder.
class Blocks {
 public:
  Blocks(const TransformerShape& shape, int n_attentions, const BackwardWeights& weights)
      : spec_(spec_of(shape, n_attentions)),
        forward_at_(forward_layout(spec_)),
        backward_at_(backward_layout(spec_)),
        gradient_at_(gradient_layout(spec_)),
        weights_(weights) {}

  Block block(int64_t index) const {
    Block block{&spec_, weights_.forward + index * forward_at_.size, &forward_at_};
    if (weights_.backward != nullptr) {
      block.backward = weights_.backward + index * backward_at_.size;
      block.backward_at = &backward_at_;
      block.gradient = weights_.gradients + index * gradient_at_.size;
      block.gradient_at = &gradient_at_;
    }
    return block;
  }

 private:
  BlockSpec spec_;
  BlockLayout forward_at_, backward_at_, gradient_at_;
  BackwardWeights weights_;
};

// -- self-attention, the same in encoder and reasoning --------------------------------------------

struct SelfLayer {
  float* x;    // [m, stride] input
  float* out;  // [m, stride] LN(x + MSA(x)); may be x
  float* update;
  Attention attention;
  NormTape norm;
};

LCR_TARGET void self_attend(const Dims& dims, const Block& block, int64_t m, const SelfLayer& s) {
  const Attention& a = s.attention;
  const MatrixA x = operand(m, dims.dim, s.x, dims.stride, a.operands);
  linear(block, kSelf + kQuery, m, x, a.q, dims.stride);
  linear(block, kSelf + kKey, m, x, a.k, dims.stride);
  linear(block, kSelf + kValue, m, x, a.v, dims.stride);
  attend(dims, m, m, a);
  project_heads(dims, block, kSelf + kOut, m, a, s.update);
  add_norm(dims, block, 0, m, s.x, s.update, s.out, s.norm);
}

// Scratch of backward; `length` is the longer one.
struct GradientBuffers {
  GradientBuffers(Arena& arena, const Dims& dims, int64_t length)
      : heads(arena.take(length * dims.stride)),
        q(arena.take(length * dims.stride)),
        k(arena.take(length * dims.stride)),
        v(arena.take(length * dims.stride)),
        hidden(arena.take(length * dims.ffn_stride)),
        prob(arena.take(length * key_row(length))) {}

  float *heads, *q, *k, *v, *hidden, *prob;
};

// From g, the gradient of the layer's output, that of its input, in place; `du` is scratch.
LCR_TARGET void self_attend_bwd(const Dims& dims, const Block& block, int64_t m, const SelfLayer& s,
                                const GradientBuffers& d, float* g, float* du) {
  const Attention& a = s.attention;
  add_norm_bwd(dims, block, 0, m, g, du, s.norm);
  linear_bwd(block, kSelf + kOut, m, du, dims.stride, a.heads, dims.stride, d.heads, false);
  attend_bwd(dims, m, m, a, d.heads, d.q, d.k, d.v, d.prob);
  linear_bwd(block, kSelf + kQuery, m, d.q, dims.stride, s.x, dims.stride, g, true);
  linear_bwd(block, kSelf + kKey, m, d.k, dims.stride, s.x, dims.stride, g, true);
  linear_bwd(block, kSelf + kValue, m, d.v, dims.stride, s.x, dims.stride, g, true);
}

// -- target-aware pooling -------------------------------------------------------------------------

// alpha = softmax(states . key) over the m >= 1 rows; z = sum of alpha times rows. Up to the next
// multiple of kLanes columns, states, key and dz hold 0.
LCR_TARGET void pool_rows(const Dims& dims, int64_t m, const float* states, const float* key,
                          float* alpha, float* z) {
  for (int64_t i = 0; i < m; ++i) {
    Vec dot = {};
    for (int64_t j = 0; j < dims.dim; j += kLanes)
      dot = fma(load(states + i * dims.stride + j), load(key + j), dot);
    alpha[i] = sum_lanes(dot);
  }
  softmax_rows(alpha, key_row(m), 1, m, 1.0f);
  gemm(1, dims.dim, m, {alpha, key_row(m)}, row_major(states, dims.stride), z, dims.stride);
}

// Add to dstates and dkey what dz brings. `slope` is scratch [m].
LCR_TARGET void pool_rows_bwd(const Dims& dims, int64_t m, const float* states, const float* key,
                              const float* dz, float* alpha, float* slope, float* z, float* dstates,
                              float* dkey) {
  pool_rows(dims, m, states, key, alpha, z);
  float mean = 0.0f;
  for (int64_t i = 0; i < m; ++i) {
    Vec dot = {};
    for (int64_t j = 0; j < dims.dim; j += kLanes)
      dot = fma(load(states + i * dims.stride + j), load(dz + j), dot);
    slope[i] = sum_lanes(dot);
    mean += alpha[i] * slope[i];
  }
  for (int64_t i = 0; i < m; ++i) {
    const float s = alpha[i] * (slope[i] - mean);
    for (int64_t j = 0; j < dims.dim; j += kLanes) {
      float* d = dstates + i * dims.stride + j;
      store(d, fma(load(key + j), splat(s), fma(load(dz + j), splat(alpha[i]), load(d))));
      store(dkey + j, fma(load(states + i * dims.stride + j), splat(s), load(dkey + j)));
    }
  }
}

// -- reasoning ------------------------------------------------------------------------------------

// One stream of an item. In a forward pass a, c and out are h: each sublayer works in place.
struct Stream {
  Stream(Arena& arena, const Dims& dims, const ReasoningArgs& args, int x, int64_t user, bool keep);

  int64_t m;  // valid rows
  float *h, *a, *c, *out;
  float *update, *hidden, *operands;
  float *key, *alpha, *pooled;  // of target-aware pooling
  Attention self, cross;        // cross: the other stream writes k and v
  NormTape norm[3];
};

LCR_TARGET Stream::Stream(Arena& arena, const Dims& dims, const ReasoningArgs& args, int x,
                          int64_t user, bool keep) {
  const int64_t length = args.length[x];
  const auto states = [&arena, &dims, length] { return arena.take(length * dims.stride); };
  m = args.lengths[x] != nullptr && user >= 0 ? args.lengths[x][user] : 0;
  h = states();
  a = keep ? states() : h;
  c = keep ? states() : h;
  out = keep && dims.ffn > 0 ? states() : c;
  update = states();
  hidden = arena.take(length * dims.ffn_stride);
  const int64_t other = args.length[1 - x];
  operands = take_operands(arena, dims, length, length > other ? length : other);
  key = arena.take(dims.stride);
  alpha = arena.take(key_row(length));
  pooled = arena.take(dims.stride);
  self = Attention(arena, dims, length, length, keep, operands);
  cross = Attention(arena, dims, length, other, keep, operands);
  for (NormTape& tape : norm)
    tape = norm_tape(arena, dims, length, keep, args.dropout.threshold > 0);
}

// An item with its weights: one step of reasoning in two parts a stream.
class Reasoning {
 public:
  // Without scratch, counts only.
  Reasoning(const ReasoningArgs& args, const BackwardWeights& weights, int64_t item, bool keep,
            Arena& arena)
      : args_(args),
        dims_(args.shape),
        blocks_(args.shape, 2, weights),
        item_(item),
        user_(item < 0 ? -1 : item / args.n_trajectories),
        streams_{Stream(arena, dims_, args, 0, user_, keep),
                 Stream(arena, dims_, args, 1, user_, keep)} {}

  const Dims& dims() const { return dims_; }
  Stream& stream(int x) { return streams_[x]; }
  Block block(int64_t k, int x) const {
    return blocks_.block(2 * (args_.shape.n_sets == 1 ? 0 : k) + x);
  }

  // h^(0) of the trajectory.
  LCR_TARGET void read_input(int x) {
    Stream& s = streams_[x];
    read_rows(args_.states[x], args_.type, user_ * args_.length[x] * dims_.dim, s.m, dims_, s.h);
    if (args_.noise_scale == 0.0f) return;
    normal_noise_rows(args_.noise_seed, args_.rows[user_], item_ % args_.n_trajectories, x, s.m,
                      dims_.dim, s.update, dims_.stride);
    for (int64_t j = 0; j < s.m * dims_.stride; j += kLanes)
      store(s.h + j, fma(load(s.update + j), splat(args_.noise_scale), load(s.h + j)));
  }

  void read_key(int x) {
    if (args_.keys == nullptr) return;
    read_vector(args_.keys, args_.type, (2 * user_ + x) * dims_.dim, dims_, streams_[x].key);
  }

  // a = LN1(h + MSA(h)), and the keys and values that the other stream reads of it.
  LCR_TARGET void before_cross(int64_t k, int x) {
    Stream &s = streams_[x], &other = streams_[1 - x];
    if (s.m == 0) return;
    draw_masks(k, x);
    self_attend(dims_, block(k, x), s.m, {s.h, s.a, s.update, s.self, s.norm[0]});
    if (other.m == 0) return;
    const Block reader = block(k, 1 - x);
    const MatrixA a = operand(s.m, dims_.dim, s.a, dims_.stride, s.operands);
    linear(reader, kCross + kKey, s.m, a, other.cross.k, dims_.stride);
    linear(reader, kCross + kValue, s.m, a, other.cross.v, dims_.stride);
  }

  // c = LN2(a + g MCA(a, other a)); out = LN3(c + FFN(c)).
  LCR_TARGET void from_cross(int64_t k, int x) {
    Stream &s = streams_[x], &other = streams_[1 - x];
    if (s.m == 0) return;
    const Block w = block(k, x);
    if (other.m > 0) {
      const MatrixA a = operand(s.m, dims_.dim, s.a, dims_.stride, s.operands);
      linear(w, kCross + kQuery, s.m, a, s.cross.q, dims_.stride);
      attend(dims_, s.m, other.m, s.cross);
      project_heads(dims_, w, kCross + kOut, s.m, s.cross, s.update);
    }
    add_norm(dims_, w, 1, s.m, s.a, other.m > 0 ? s.update : nullptr, s.c, s.norm[1]);
    if (dims_.ffn > 0)
      feed_forward(dims_, w, kStepFfn, 2, s.m, s.c, s.hidden, s.update, s.operands, s.out,
                   s.norm[2]);
  }

  // Offset of pooled[item, k, which, x].
  int64_t pooled_at(int64_t k, int which, int x) const {
    return (((item_ * args_.n_steps + k) * 2 + which) * 2 + x) * dims_.dim;
  }

  LCR_TARGET void write_pooled(void* pooled, int64_t k, int which, int x, const float* states) {
    if (args_.keys == nullptr) return;
    Stream& s = streams_[x];
    if (s.m == 0) {
      zero_floats(pooled, args_.type, pooled_at(k, which, x), dims_.dim);
      return;
    }
    pool_rows(dims_, s.m, states, s.key, s.alpha, s.pooled);
    write_floats(pooled, args_.type, pooled_at(k, which, x), dims_.dim, s.pooled);
  }

 private:
  void draw_masks(int64_t k, int x) {
    if (args_.dropout.threshold == 0) return;
    for (int i = 0; i < (dims_.ffn > 0 ? 3 : 2); ++i)
      dropout_mask_rows(args_.dropout, args_.rows[user_],
                        kReasoningSites + x * kStreamSites + 3 * k + i, streams_[x].m, dims_.dim,
                        streams_[x].norm[i].mask, dims_.stride);
  }

  const ReasoningArgs& args_;
  Dims dims_;
  Blocks blocks_;
  int64_t item_, user_;
  Stream streams_[2];
};

int64_t forward_scratch(const ReasoningArgs& args) {
  Arena arena(nullptr);
  Reasoning(args, {}, -1, false, arena);
  return arena.size();
}

LCR_TARGET void forward_part(const ReasoningArgs& args, const float* packed,
                             const ReasoningResults& results, int64_t item, int64_t part, int x,
                             float* scratch) {
  Arena arena(scratch);
  Reasoning reasoning(args, {packed, nullptr, nullptr}, item, false, arena);
  const Dims& dims = reasoning.dims();
  Stream& s = reasoning.stream(x);
  const int64_t k = part / 2, size = args.length[x] * dims.dim;
  if (part == 0) {
    reasoning.read_input(x);
    reasoning.read_key(x);
  }
  if (part % 2 == 0) {
    reasoning.before_cross(k, x);
    reasoning.write_pooled(results.pooled, k, 0, x, s.a);
    return;
  }
  reasoning.from_cross(k, x);
  reasoning.write_pooled(results.pooled, k, 1, x, s.out);
  if (k == args.n_steps - 1) {
    write_rows(results.states[x], args.type, item * size, s.m, args.length[x], dims, s.out);
  } else if (results.saved[x] != nullptr) {
    const int64_t n_items = args.n_users * args.n_trajectories;
    write_rows(results.saved[x], args.type, (k * n_items + item) * size, s.m, args.length[x], dims,
               s.out);
  }
}

// -- leaving early --------------------------------------------------------------------------------

// The mean states after the last three steps, behind an item's other scratch.
struct ExitMeans {
  ExitMeans(Arena& arena, const Dims& dims) {
    for (float*& mean : means) mean = arena.take(2 * dims.stride);
  }

  // Both streams' means after k steps.
  float* at(int64_t k) { return means[k % 3]; }

  float* means[3];
};

int64_t exit_scratch(const ReasoningArgs& args) {
  Arena arena(nullptr);
  const Reasoning reasoning(args, {}, -1, false, arena);
  ExitMeans(arena, Dims(args.shape));
  return arena.size();
}

LCR_TARGET bool leaves(const ReasoningArgs& args, const ExitArgs& exits, int64_t item, int64_t k,
                       float* scratch) {
  Arena arena(scratch);
  Reasoning reasoning(args, {}, item, false, arena);
  const Dims& dims = reasoning.dims();
  ExitMeans means(arena, dims);
  const int64_t D = dims.dim, tail = (D - 1) / kLanes * kLanes;
  float total = exits.bias[k];
  Vec change = {}, curvature = {};
  for (int x = 0; x < 2; ++x) {
    if (k == 0) reasoning.read_input(x);
    const Stream& s = reasoning.stream(x);
    const float* weight = exits.weight + x * D;
    const Vec share = splat(s.m > 0 ? 1.0f / static_cast<float>(s.m) : 0.0f);
    Vec dot = {};
    for (int64_t j = 0; j < D; j += kLanes) {
      const int64_t n = j < tail ? kLanes : D - tail;
      Vec sum = {};
      for (int64_t i = 0; i < s.m; ++i) sum += load(s.h + i * dims.stride + j);
      const Vec mean = select(first_lanes(n), sum * share, Vec{});
      const int64_t place = x * dims.stride + j;
      store(means.at(k) + place, mean);
      dot = fma(mean, load_first(weight + j, n), dot);
      if (k == 0) continue;
      const Vec last = load(means.at(k - 1) + place), moved = mean - last;
      change = fma(moved, moved, change);
      if (k == 1) continue;
      const Vec turned = moved - (last - load(means.at(k - 2) + place));
      curvature = fma(turned, turned, curvature);
    }
    total += sum_lanes(dot);
  }
  total += exits.weight[2 * D] * __builtin_sqrtf(sum_lanes(change));
  total += exits.weight[2 * D + 1] * __builtin_sqrtf(sum_lanes(curvature));
  return total >= 0.0f;
}

LCR_TARGET void leave(const ReasoningArgs& args, void* const* states, int64_t item,
                      float* scratch) {
  Arena arena(scratch);
  Reasoning reasoning(args, {}, item, false, arena);
  const Dims& dims = reasoning.dims();
  for (int x = 0; x < 2; ++x) {
    const int64_t length = args.length[x];
    write_rows(states[x], args.type, item * length * dims.dim, reasoning.stream(x).m, length, dims,
               reasoning.stream(x).h);
  }
}

// -- backward of reasoning ------------------------------------------------------------------------

// What a user's backward pass holds beside an item's activations.
struct UserGradients {
  UserGradients(Arena& arena, const Dims& dims, const int64_t* length)
      : buffers(arena, dims, length[0] > length[1] ? length[0] : length[1]) {
    for (int x = 0; x < 2; ++x) {
      states[x] = arena.take(length[x] * dims.stride);
      updates[x] = arena.take(length[x] * dims.stride);
      input[x] = arena.take(length[x] * dims.stride);
      keys[x] = arena.take(dims.stride);
      slope[x] = arena.take(length[x]);
    }
    dz = arena.take(dims.stride);
  }

  GradientBuffers buffers;
  float* states[2];   // of the states, walking back through the steps
  float* updates[2];  // of what a sublayer added
  float* input[2];    // of h^(0), summed over the trajectories
  float* keys[2];     // of the target keys, likewise
  float* slope[2];
  float* dz;
};

class ReasoningBackward {
 public:
  ReasoningBackward(const ReasoningArgs& args, const ReasoningGradients& gradients, int64_t item,
                    Reasoning& reasoning, UserGradients& d)
      : args_(args), gradients_(gradients), item_(item), reasoning_(reasoning), d_(d) {}

  LCR_TARGET void run() {
    const Dims& dims = reasoning_.dims();
    for (int x = 0; x < 2; ++x) {
      const int64_t offset = item_ * args_.length[x] * dims.dim;
      read_rows(gradients_.dstates[x], args_.type, offset, reasoning_.stream(x).m, dims,
                d_.states[x]);
      reasoning_.read_key(x);
    }
    for (int64_t k = args_.n_steps - 1; k >= 0; --k) step(k);
    for (int x = 0; x < 2; ++x) add_rows(reasoning_.stream(x).m, dims, d_.states[x], d_.input[x]);
  }

 private:
  LCR_TARGET void step(int64_t k) {
    for (int x = 0; x < 2; ++x) read_state(k, x);
    for (int x = 0; x < 2; ++x) reasoning_.before_cross(k, x);
    for (int x = 0; x < 2; ++x) reasoning_.from_cross(k, x);
    for (int x = 0; x < 2; ++x) after_attention(k, x);
    // Adds to both streams' gradients of a, which must both be there.
    for (int x = 0; x < 2; ++x) cross_attention(k, x);
    for (int x = 0; x < 2; ++x) self_attention(k, x);
  }

  LCR_TARGET void read_state(int64_t k, int x) {
    if (k == 0) {
      reasoning_.read_input(x);
      return;
    }
    const Dims& dims = reasoning_.dims();
    const int64_t n_items = args_.n_users * args_.n_trajectories;
    const int64_t offset = ((k - 1) * n_items + item_) * args_.length[x] * dims.dim;
    read_rows(gradients_.saved[x], args_.type, offset, reasoning_.stream(x).m, dims,
              reasoning_.stream(x).h);
  }

  LCR_TARGET void pooling(int64_t k, int which, int x, const float* states) {
    if (args_.keys == nullptr || gradients_.dpooled == nullptr) return;
    const Stream& s = reasoning_.stream(x);
    read_vector(gradients_.dpooled, args_.type, reasoning_.pooled_at(k, which, x),
                reasoning_.dims(), d_.dz);
    pool_rows_bwd(reasoning_.dims(), s.m, states, s.key, d_.dz, s.alpha, d_.slope[x], s.pooled,
                  d_.states[x], d_.keys[x]);
  }

  // From the gradient of h_x^(k+1): FFN and LN2, up to that of a_x as a residual.
  LCR_TARGET void after_attention(int64_t k, int x) {
    const Dims& dims = reasoning_.dims();
    const Stream& s = reasoning_.stream(x);
    if (s.m == 0) return;
    const Block w = reasoning_.block(k, x);
    pooling(k, 1, x, s.out);
    if (dims.ffn > 0)
      feed_forward_bwd(dims, w, kStepFfn, 2, s.m, s.c, s.hidden, d_.states[x], d_.updates[x],
                       d_.buffers.hidden, s.norm[2]);
    const bool attended = reasoning_.stream(1 - x).m > 0;
    add_norm_bwd(dims, w, 1, s.m, d_.states[x], attended ? d_.updates[x] : nullptr, s.norm[1]);
  }

  LCR_TARGET void cross_attention(int64_t k, int x) {
    const Dims& dims = reasoning_.dims();
    const Stream &s = reasoning_.stream(x), &other = reasoning_.stream(1 - x);
    if (s.m == 0 || other.m == 0) return;
    const Block w = reasoning_.block(k, x);
    const GradientBuffers& d = d_.buffers;
    const int64_t row = dims.stride;
    linear_bwd(w, kCross + kOut, s.m, d_.updates[x], row, s.cross.heads, row, d.heads, false);
    attend_bwd(dims, s.m, other.m, s.cross, d.heads, d.q, d.k, d.v, d.prob);
    linear_bwd(w, kCross + kQuery, s.m, d.q, row, s.a, row, d_.states[x], true);
    linear_bwd(w, kCross + kKey, other.m, d.k, row, other.a, row, d_.states[1 - x], true);
    linear_bwd(w, kCross + kValue, other.m, d.v, row, other.a, row, d_.states[1 - x], true);
  }

  LCR_TARGET void self_attention(int64_t k, int x) {
    const Stream& s = reasoning_.stream(x);
    if (s.m == 0) return;
    pooling(k, 0, x, s.a);
    self_attend_bwd(reasoning_.dims(), reasoning_.block(k, x), s.m,
                    {s.h, s.a, s.update, s.self, s.norm[0]}, d_.buffers, d_.states[x],
                    d_.updates[x]);
  }

  const ReasoningArgs& args_;
  const ReasoningGradients& gradients_;
  int64_t item_;
  Reasoning& reasoning_;
  UserGradients& d_;
};

int64_t backward_scratch(const ReasoningArgs& args) {
  Arena arena(nullptr);
  Reasoning reasoning(args, {}, -1, true, arena);
  UserGradients(arena, reasoning.dims(), args.length);
  return arena.size();
}

LCR_TARGET void backward(const ReasoningArgs& args, const BackwardWeights& weights,
                         const ReasoningGradients& gradients, int64_t user, float* scratch) {
  const Dims dims(args.shape);
  Arena shared(scratch);
  UserGradients d(shared, dims, args.length);
  for (int x = 0; x < 2; ++x) {
    std::memset(d.input[x], 0, sizeof(float) * args.length[x] * dims.stride);
    std::memset(d.keys[x], 0, sizeof(float) * dims.stride);
  }
  for (int64_t n = 0; n < args.n_trajectories; ++n) {
    Arena arena = shared;  // each trajectory uses the rest anew
    const int64_t item = user * args.n_trajectories + n;
    Reasoning reasoning(args, weights, item, true, arena);
    ReasoningBackward(args, gradients, item, reasoning, d).run();
  }
  for (int x = 0; x < 2; ++x) {
    const int64_t length = args.length[x];
    write_rows(gradients.dinput[x], args.type, user * length * dims.dim, args.lengths[x][user],
               length, dims, d.input[x]);
    if (gradients.dkeys != nullptr)
      write_floats(gradients.dkeys, args.type, (2 * user + x) * dims.dim, dims.dim, d.keys[x]);
  }
}

// -- encoder --------------------------------------------------------------------------------------

// The states of a forward pass, and scratch that every layer uses again.
struct EncoderBuffers {
  EncoderBuffers(Arena& arena, const Dims& dims, const EncoderArgs& args)
      : h(arena.take(args.length * dims.stride)),
        update(arena.take(args.length * dims.stride)),
        hidden(arena.take(args.length * dims.ffn_stride)),
        operands(take_operands(arena, dims, args.length, args.length)) {}

  float *h, *update, *hidden, *operands;
};

// One layer; in a forward pass a and out are h.
struct EncoderLayer {
  EncoderLayer(Arena& arena, const Dims& dims, const EncoderArgs& args,
               const EncoderBuffers& shared, float* h, bool keep)
      : h(h),
        a(keep ? arena.take(args.length * dims.stride) : h),
        out(keep && dims.ffn > 0 ? arena.take(args.length * dims.stride) : a),
        update(shared.update),
        hidden(keep ? arena.take(args.length * dims.ffn_stride) : shared.hidden),
        self(arena, dims, args.length, args.length, keep, shared.operands) {
    for (NormTape& tape : norm)
      tape = norm_tape(arena, dims, args.length, keep, args.dropout.threshold > 0);
  }

  float *h, *a, *out;
  float *update, *hidden;
  Attention self;
  NormTape norm[2];
};

LCR_TARGET void encode_layer(const EncoderArgs& args, const Dims& dims, const Block& w, int64_t i,
                             int64_t user, const EncoderLayer& layer) {
  const int64_t m = args.lengths[user];
  if (args.dropout.threshold > 0)
    for (int part = 0; part < 2; ++part)
      dropout_mask_rows(args.dropout, args.rows[user],
                        kEncoderSites + args.stream * kStreamSites + 2 * i + part, m, dims.dim,
                        layer.norm[part].mask, dims.stride);
  self_attend(dims, w, m, {layer.h, layer.a, layer.update, layer.self, layer.norm[0]});
  feed_forward(dims, w, kEncoderFfn, 1, m, layer.a, layer.hidden, layer.update, layer.self.operands,
               layer.out, layer.norm[1]);
}

int64_t encoder_scratch(const EncoderArgs& args) {
  const Dims dims(args.shape);
  Arena arena(nullptr);
  EncoderBuffers b(arena, dims, args);
  EncoderLayer(arena, dims, args, b, b.h, false);
  return arena.size();
}

LCR_TARGET void encoder_forward(const EncoderArgs& args, const float* packed, void* out,
                                int64_t user, float* scratch) {
  const Dims dims(args.shape);
  const Blocks blocks(args.shape, 1, {packed, nullptr, nullptr});
  Arena arena(scratch);
  EncoderBuffers b(arena, dims, args);
  const EncoderLayer layer(arena, dims, args, b, b.h, false);
  const int64_t m = args.lengths[user], offset = user * args.length * dims.dim;
  read_rows(args.x, args.type, offset, m, dims, b.h);
  for (int64_t i = 0; m > 0 && i < args.shape.n_sets; ++i)
    encode_layer(args, dims, blocks.block(i), i, user, layer);
  write_rows(out, args.type, offset, m, args.length, dims, b.h);
}

// What the layers of a backward pass share.
struct EncoderTape {
  EncoderTape(Arena& arena, const Dims& dims, const EncoderArgs& args)
      : buffers(arena, dims, args),
        d(arena, dims, args.length),
        g(arena.take(args.length * dims.stride)),
        du(arena.take(args.length * dims.stride)) {}

  EncoderBuffers buffers;
  GradientBuffers d;
  float *g, *du;
};

int64_t encoder_backward_scratch(const EncoderArgs& args) {
  const Dims dims(args.shape);
  Arena arena(nullptr);
  EncoderTape tape(arena, dims, args);
  for (int64_t i = 0; i < args.shape.n_sets; ++i)
    EncoderLayer(arena, dims, args, tape.buffers, tape.buffers.h, true);
  return arena.size();
}

// Compute layers i .. from `h` on, and on the way back their gradients.
LCR_TARGET void encode_layers_bwd(const EncoderArgs& args, const Dims& dims, const Blocks& blocks,
                                  const EncoderTape& tape, Arena& arena, int64_t i, float* h,
                                  int64_t user) {
  if (i == args.shape.n_sets) return;
  const int64_t m = args.lengths[user];
  const Block w = blocks.block(i);
  const EncoderLayer layer(arena, dims, args, tape.buffers, h, true);
  encode_layer(args, dims, w, i, user, layer);
  encode_layers_bwd(args, dims, blocks, tape, arena, i + 1, layer.out, user);
  feed_forward_bwd(dims, w, kEncoderFfn, 1, m, layer.a, layer.hidden, tape.g, tape.du,
                   tape.d.hidden, layer.norm[1]);
  self_attend_bwd(dims, w, m, {layer.h, layer.a, layer.update, layer.self, layer.norm[0]}, tape.d,
                  tape.g, tape.du);
}

LCR_TARGET void encoder_backward(const EncoderArgs& args, const BackwardWeights& weights,
                                 const void* dout, void* dx, int64_t user, float* scratch) {
  const Dims dims(args.shape);
  const Blocks blocks(args.shape, 1, weights);
  Arena arena(scratch);
  const EncoderTape tape(arena, dims, args);
  const int64_t m = args.lengths[user], offset = user * args.length * dims.dim;
  read_rows(args.x, args.type, offset, m, dims, tape.buffers.h);
  read_rows(dout, args.type, offset, m, dims, tape.g);
  if (m > 0) encode_layers_bwd(args, dims, blocks, tape, arena, 0, tape.buffers.h, user);
  write_rows(dx, args.type, offset, m, args.length, dims, tape.g);
}

constexpr ReasoningKernels kReasoningTable = {
    pack_forward,    pack_backward,    forward_scratch,
    forward_part,    exit_scratch,     leaves,
    leave,           backward_scratch, backward,
    encoder_scratch, encoder_forward,  encoder_backward_scratch,
    encoder_backward};

}  // namespace
}  // namespace lcr_fast

#endif  // LCR_TARGET
