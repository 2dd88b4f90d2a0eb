// Where the weights of one set and stream stand: in the tensors of lcr_fast/weights.py, in the
// packed copy that the kernels read, and in a block of gradients. The same for an encoder layer
// (one attention) and a reasoning step (self- and cross-attention).
#pragma once
#include <cstdint>

namespace lcr_fast {

constexpr int kMaxLinears = 10;
constexpr int kMaxNorms = 3;
constexpr int kMaxWeights = 14;

// The linears of attention i are 4 i + one of these; the FFN's two follow the attentions'.
enum AttentionLinear { kQuery, kKey, kValue, kOut };

// Rows first_row .. first_row + out - 1 of a weight [n_sets, 2, rows, in] and its bias.
struct LinearSpec {
  int weight;
  int bias;
  int64_t rows;
  int64_t first_row;
  int64_t out;
  int64_t in;
};

struct BlockSpec {
  LinearSpec linears[kMaxLinears];
  int n_linears;
  int n_norms;
  int norm_weight;  // the tensor [n_sets, 2, n_norms, dim]; the bias is the next one
  int64_t dim;
};

// Width `dim`; `ffn` 0 means no FFN.
inline BlockSpec block_spec(int64_t dim, int64_t ffn, int n_attentions) {
  BlockSpec spec{};
  for (int attention = 0; attention < n_attentions; ++attention) {
    const int tensor = 4 * attention;
    for (int part = kQuery; part <= kValue; ++part)
      spec.linears[spec.n_linears++] = {tensor, tensor + 1, 3 * dim, part * dim, dim, dim};
    spec.linears[spec.n_linears++] = {tensor + 2, tensor + 3, dim, 0, dim, dim};
  }
  const int tensor = 4 * n_attentions;
  if (ffn > 0) {
    spec.linears[spec.n_linears++] = {tensor, tensor + 1, ffn, 0, ffn, dim};
    spec.linears[spec.n_linears++] = {tensor + 2, tensor + 3, dim, 0, dim, ffn};
  }
  spec.n_norms = n_attentions + 1;
  spec.norm_weight = tensor + 4;
  spec.dim = dim;
  return spec;
}

// Offsets in floats, each a multiple of 16; vectors are padded with zeros to such a length.
struct BlockLayout {
  int64_t weight[kMaxLinears];
  int64_t bias[kMaxLinears];
  int64_t norm_weight[kMaxNorms];
  int64_t norm_bias[kMaxNorms];
  int64_t size;
};

inline BlockLayout block_layout(const BlockSpec& spec, int64_t (*weight_size)(const LinearSpec&)) {
  BlockLayout layout{};
  const auto take = [&layout](int64_t n) {
    const int64_t at = layout.size;
    layout.size += (n + 15) / 16 * 16;
    return at;
  };
  for (int i = 0; i < spec.n_linears; ++i) {
    layout.weight[i] = take(weight_size(spec.linears[i]));
    layout.bias[i] = take(spec.linears[i].out);
  }
  for (int i = 0; i < spec.n_norms; ++i) {
    layout.norm_weight[i] = take(spec.dim);
    layout.norm_bias[i] = take(spec.dim);
  }
  return layout;
}

// Weights packed in panels of 32 columns (gemm.h): of W^T for the forward pass, of W for the
// gradient of its input.
inline BlockLayout forward_layout(const BlockSpec& spec) {
  return block_layout(spec,
                      [](const LinearSpec& l) -> int64_t { return (l.out + 31) / 32 * 32 * l.in; });
}
inline BlockLayout backward_layout(const BlockSpec& spec) {
  return block_layout(spec,
                      [](const LinearSpec& l) -> int64_t { return (l.in + 31) / 32 * 32 * l.out; });
}
inline BlockLayout gradient_layout(const BlockSpec& spec) {
  return block_layout(spec, [](const LinearSpec& l) -> int64_t { return l.in * l.out; });
}

}  // namespace lcr_fast
