// Transformer encoders and latent cross reasoning on CPU; torch-free.
//
// The definitions are in lcr_fast/reference. Only the valid rows of a user are read or computed;
// results behind them are 0. Arithmetic is float32, whatever the states are stored in, but for the
// products of a forward pass. These multiply pairs of bfloat16 where `pairs` asks for it, on every
// CPU, and on bfloat16 states where the CPU has an instruction for that.
#pragma once
#include <cstdint>

#include "float_type.h"
#include "noise.h"
#include "parallel.h"

namespace lcr_fast {

// One weight tensor as it is stored: [n_sets, 2, ...].
struct WeightArg {
  const void* data;
  FloatType type;
};

struct TransformerShape {
  int64_t dim;
  int64_t n_heads;
  int64_t ffn_dim;  // 0: no FFN
  int64_t n_sets;   // layers of an encoder, sets of step weights of reasoning
};

constexpr int kReasoningWeights = 14;

struct ReasoningArgs {
  TransformerShape shape;
  FloatType type;  // of every state
  int64_t n_users;
  int64_t n_trajectories;
  int64_t n_steps;
  int64_t length[2];
  const void* states[2];      // [B, L, D] search, recommendation
  const int64_t* lengths[2];  // [B] in 0..L
  const int64_t* rows;        // [B], read for noise and dropout only
  const void* keys;           // [B, 2, D], or null: nothing is pooled
  float noise_scale;          // 0: no noise
  uint64_t noise_seed;
  DropoutKey dropout;
  bool pairs;
};

struct ReasoningResults {
  void* states[2];  // [B, N, L, D]
  void* pooled;     // [B, N, K, 2, 2, D], or null
  void* saved[2];   // [K - 1, B, N, L, D] the inputs of the later steps, or null
};

void reasoning_forward(const ReasoningArgs& args, const WeightArg* weights,
                       const ReasoningResults& results, int64_t n_threads,
                       const Parallel& parallel);

// The same on float32 states and weights that were packed before, which spares each call that work:
// pack_reasoning() writes reasoning_floats() of them, for products of pairs or of floats.
int64_t reasoning_floats(const TransformerShape& shape);
void pack_reasoning(const TransformerShape& shape, bool pairs, const WeightArg* weights,
                    float* packed, const Parallel& parallel);
void reasoning_forward(const ReasoningArgs& args, const float* packed,
                       const ReasoningResults& results, int64_t n_threads,
                       const Parallel& parallel);

// A user leaves after the first k < K steps at which
//   bias[k] + weight . [m; |m - m'|; |m - 2 m' + m''|] >= 0
// where m [2 D] holds the means of both streams' states after k steps, m' and m'' those before.
struct ExitArgs {
  const float* weight;  // [2 D + 2]
  const float* bias;    // [K]
};

// As reasoning_forward without noise, trajectories and pooling. `taken` [B] are the steps of each
// user; the steps behind them are not computed.
void adaptive_forward(const ReasoningArgs& args, const WeightArg* weights, const ExitArgs& exits,
                      void* const* states, int64_t* taken, int64_t n_threads,
                      const Parallel& parallel);

struct ReasoningGradients {
  const void* dstates[2];  // [B, N, L, D]
  const void* dpooled;     // [B, N, K, 2, 2, D], or null
  const void* saved[2];    // [K - 1, B, N, L, D]
  void* dinput[2];         // [B, L, D]
  void* dkeys;             // [B, 2, D], or null
  void* dweights[kReasoningWeights];
};

// Gradients are summed per group of users, in an order that depends on the batch alone: the same
// bits for any number of threads.
void reasoning_backward(const ReasoningArgs& args, const WeightArg* weights,
                        const ReasoningGradients& gradients, const Parallel& parallel);

// The encoder of one stream.
constexpr int kEncoderWeights = 10;

struct EncoderArgs {
  TransformerShape shape;
  FloatType type;
  int64_t stream;
  int64_t n_users;
  int64_t length;
  const void* x;           // [B, L, D]
  const int64_t* lengths;  // [B] in 0..L
  const int64_t* rows;     // [B], read for dropout only
  DropoutKey dropout;
  bool pairs;
};

void encoder_forward(const EncoderArgs& args, const WeightArg* weights, void* out,
                     const Parallel& parallel);

// The same on weights of this stream that were packed before; see reasoning_floats().
int64_t encoder_floats(const TransformerShape& shape);
void pack_encoder(const TransformerShape& shape, int64_t stream, bool pairs,
                  const WeightArg* weights, float* packed, const Parallel& parallel);
void encoder_forward(const EncoderArgs& args, const float* packed, void* out,
                     const Parallel& parallel);

// `dweights` [n_layers, 2, ...], of which the other stream's are not touched.
void encoder_backward(const EncoderArgs& args, const WeightArg* weights, const void* dout, void* dx,
                      void* const* dweights, const Parallel& parallel);

}  // namespace lcr_fast
