// Sublayers of a post-norm Transformer on the valid rows of one user, and their backward.
//
// Matrices of width D (states, queries, keys, values, heads) have rows `stride` floats apart,
// hidden activations `ffn_stride`; both are multiples of 16. What stands in the columns between
// width and stride does not matter. "add" in a name means that the result is added.
#pragma once
#include "../reasoning.h"
#include "operands.h"
#include "rows.h"
#include "weights.h"

namespace lcr_fast {
namespace {

// Memory of one task, handed out in pieces of whole cache lines. Without a base it only counts.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(int64_t n) {
    const int64_t at = used_;
    used_ += round_up(n, kAlign);
    return base_ == nullptr ? nullptr : base_ + at;
  }
  // With what vector loads may read behind the last row.
  int64_t size() const { return used_ + kPanel; }

 private:
  float* base_;
  int64_t used_ = 0;
};

struct Dims {
  explicit Dims(const TransformerShape& shape)
      : dim(shape.dim),
        stride(round_up(shape.dim, kAlign)),
        n_heads(shape.n_heads),
        head_dim(shape.dim / shape.n_heads),
        ffn(shape.ffn_dim),
        ffn_stride(round_up(shape.ffn_dim, kAlign)) {}

  int64_t dim, stride, n_heads, head_dim, ffn, ffn_stride;
};

// The weights of one set and stream.
struct Block {
  const BlockSpec* spec;
  const float* forward;  // see forward_layout
  const BlockLayout* at;
  const float* backward = nullptr;  // see backward_layout; this and the rest in backward only
  const BlockLayout* backward_at = nullptr;
  float* gradient = nullptr;  // see gradient_layout
  const BlockLayout* gradient_at = nullptr;
};

// out [m, n_out] = x W^T + b for linear `i`.
LCR_TARGET void linear(const Block& block, int i, int64_t m, const MatrixA& x, float* out,
                       int64_t out_row, bool relu = false) {
  const LinearSpec& spec = block.spec->linears[i];
  Epilogue epilogue;
  epilogue.bias = block.forward + block.at->bias[i];
  epilogue.relu = relu;
  const MatrixB weight = packed(block.forward + block.at->weight[i], inner_size(spec.in));
  product(m, spec.out, spec.in, x, weight, out, out_row, epilogue);
}

// From dout the gradients of W and b, added to the block's, and that of x: set, or added to dx.
// The product over the rows of this call is summed before it is added, so that a long sum is one
// of partial sums.
[[maybe_unused]] LCR_TARGET void linear_bwd(const Block& block, int i, int64_t m, const float* dout,
                                            int64_t dout_row, const float* x, int64_t x_row,
                                            float* dx, bool add) {
  const LinearSpec& spec = block.spec->linears[i];
  Epilogue epilogue;
  epilogue.add = true;
  gemm(spec.out, spec.in, m, transposed(dout, dout_row), row_major(x, x_row),
       block.gradient + block.gradient_at->weight[i], spec.in, epilogue);
  float* dbias = block.gradient + block.gradient_at->bias[i];
  for (int64_t j = 0; j < spec.out; j += kLanes) {
    const int64_t width = spec.out - j < kLanes ? spec.out - j : kLanes;
    Vec sum = {};
    for (int64_t r = 0; r < m; ++r) sum += load_first(dout + r * dout_row + j, width);
    store(dbias + j, load(dbias + j) + sum);
  }
  epilogue.add = add;
  gemm(m, spec.in, spec.out, {dout, dout_row},
       packed(block.backward + block.backward_at->weight[i], spec.out), dx, x_row, epilogue);
}

// The activations of one attention. In a forward pass the heads share `prob`, which then holds
// kQueryBlock rows, so that it stays in the cache; backward keeps all of it.
struct Attention {
  Attention() = default;
  Attention(Arena& arena, const Dims& dims, int64_t n_queries, int64_t n_keys, bool keep,
            float* operands);

  float* q;           // [n_queries, stride]
  float* k;           // [n_keys, stride]
  float* v;           // [n_keys, stride]
  float* heads;       // [n_queries, stride] the heads' results, side by side
  float* prob;        // [n_heads, n_queries, n_keys] rows key_row(n_keys) apart, or shared
  int64_t prob_head;  // floats between heads, 0: shared
  float* turned;      // [head_dim, n_keys] scratch, rows key_row(n_keys) apart
  float* values;      // scratch of row_operand(), or empty
  float* operands;    // see take_operands()
};

constexpr int64_t kQueryBlock = 48;

constexpr int64_t key_row(int64_t n_keys) { return round_up(n_keys, kAlign); }

// Scratch of operand() for the rows of one stream, which every product uses anew.
inline float* take_operands(Arena& arena, const Dims& dims, int64_t length, int64_t n_keys) {
  const int64_t linears = length * operand_row(dims.ffn > dims.dim ? dims.ffn : dims.dim);
  const int64_t heads = (length < kQueryBlock ? length : kQueryBlock) * operand_row(n_keys);
  return arena.take(linears > heads ? linears : heads);
}

inline Attention::Attention(Arena& arena, const Dims& dims, int64_t n_queries, int64_t n_keys,
                            bool keep, float* operands)
    : operands(operands) {
  q = arena.take(n_queries * dims.stride);
  k = arena.take(n_keys * dims.stride);
  v = arena.take(n_keys * dims.stride);
  heads = arena.take(n_queries * dims.stride);
  const int64_t rows = keep || n_queries < kQueryBlock ? n_queries : kQueryBlock;
  prob_head = keep ? rows * key_row(n_keys) : 0;
  prob = arena.take(keep ? dims.n_heads * prob_head : rows * key_row(n_keys));
  turned = arena.take(dims.head_dim * key_row(n_keys));
  values = arena.take(operand_row(n_keys) * round_up(dims.head_dim, kAlign));
}

LCR_TARGET float head_scale(const Dims& dims) {
  return 1.0f / __builtin_sqrtf(static_cast<float>(dims.head_dim));
}

// heads = softmax(Q K^T / sqrt(D / H)) V, head by head; n_keys >= 1.
LCR_TARGET void attend(const Dims& dims, int64_t n_queries, int64_t n_keys, const Attention& a) {
  const int64_t row = key_row(n_keys), stride = dims.stride, width = dims.head_dim;
  for (int64_t head = 0; head < dims.n_heads; ++head) {
    const int64_t column = head * width;
    const MatrixB keys = turned_operand(n_keys, width, a.k + column, stride, a.turned, row);
    const MatrixB values =
        row_operand(n_keys, width, a.v + column, stride, a.values, round_up(width, kAlign));
    for (int64_t first = 0; first < n_queries; first += kQueryBlock) {
      const int64_t rows = n_queries - first < kQueryBlock ? n_queries - first : kQueryBlock;
      float* prob = a.prob + head * a.prob_head + (a.prob_head > 0 ? first * row : 0);
      const int64_t at = first * stride + column;
      product(rows, n_keys, width, operand(rows, width, a.q + at, stride, a.operands), keys, prob,
              row);
      softmax_rows(prob, row, rows, n_keys, head_scale(dims));
      product(rows, width, n_keys, operand(rows, n_keys, prob, row, a.operands), values,
              a.heads + at, stride);
    }
  }
}

// update [m, stride] = heads W^T + b for linear `i`.
LCR_TARGET void project_heads(const Dims& dims, const Block& block, int i, int64_t m,
                              const Attention& a, float* update) {
  linear(block, i, m, operand(m, dims.dim, a.heads, dims.stride, a.operands), update, dims.stride);
}

// Backward of attend: from dheads the gradients of q, k and v, set. `dprob` is scratch
// [n_queries, n_keys], rows key_row(n_keys) apart.
[[maybe_unused]] LCR_TARGET void attend_bwd(const Dims& dims, int64_t n_queries, int64_t n_keys,
                                            const Attention& a, const float* dheads, float* dq,
                                            float* dk, float* dv, float* dprob) {
  const int64_t row = key_row(n_keys), stride = dims.stride, width = dims.head_dim;
  for (int64_t head = 0; head < dims.n_heads; ++head) {
    const int64_t column = head * width;
    const float* prob = a.prob + head * a.prob_head;
    gemm(n_keys, width, n_queries, transposed(prob, row), row_major(dheads + column, stride),
         dv + column, stride);
    transpose(a.v + column, stride, n_keys, width, a.turned, row);
    gemm(n_queries, n_keys, width, {dheads + column, stride}, row_major(a.turned, row), dprob, row);
    softmax_rows_bwd(prob, dprob, row, n_queries, n_keys, head_scale(dims));
    gemm(n_queries, width, n_keys, {dprob, row}, row_major(a.k + column, stride), dq + column,
         stride);
    gemm(n_keys, width, n_queries, transposed(dprob, row), row_major(a.q + column, stride),
         dk + column, stride);
  }
}

// What backward needs of a LayerNorm; null in a forward pass.
struct NormTape {
  float* normal = nullptr;  // [m, stride]
  float* scale = nullptr;   // [m]
  float* mask = nullptr;    // [m, stride] of dropout, or null (in any pass)
};

// out = LN_i(x + update * mask); update may be null, out may be x.
LCR_TARGET void add_norm(const Dims& dims, const Block& block, int i, int64_t m, const float* x,
                         const float* update, float* out, const NormTape& tape) {
  NormRows args;
  args.x = x;
  args.update = update;
  args.mask = tape.mask;
  args.weight = block.forward + block.at->norm_weight[i];
  args.bias = block.forward + block.at->norm_bias[i];
  args.out = out;
  args.normal = tape.normal;
  args.scale = tape.scale;
  args.row = dims.stride;
  add_norm_rows(args, m, dims.dim);
}

// From dy, in place, the gradient of x; and, where the norm had an update, that of it.
[[maybe_unused]] LCR_TARGET void add_norm_bwd(const Dims& dims, const Block& block, int i,
                                              int64_t m, float* dy, float* dupdate,
                                              const NormTape& tape) {
  norm_rows_bwd(dy, tape.normal, tape.scale, block.forward + block.at->norm_weight[i], dims.stride,
                m, dims.dim, dy, block.gradient + block.gradient_at->norm_weight[i],
                block.gradient + block.gradient_at->norm_bias[i]);
  if (dupdate == nullptr) return;
  for (int64_t j = 0; j < m * dims.stride; j += kLanes) {
    const Vec g = load(dy + j);
    store(dupdate + j, tape.mask != nullptr ? g * load(tape.mask + j) : g);
  }
}

// out = LN_norm(x + FFN(x)), the FFN's linears from number `first` on. `update` and `operands` are
// scratch.
LCR_TARGET void feed_forward(const Dims& dims, const Block& block, int first, int norm, int64_t m,
                             const float* x, float* hidden, float* update, float* operands,
                             float* out, const NormTape& tape) {
  linear(block, first, m, operand(m, dims.dim, x, dims.stride, operands), hidden, dims.ffn_stride,
         true);
  linear(block, first + 1, m, operand(m, dims.ffn, hidden, dims.ffn_stride, operands), update,
         dims.stride);
  add_norm(dims, block, norm, m, x, update, out, tape);
}

// From dout, in place, the gradient of x. `dupdate` and `dhidden` are scratch.
[[maybe_unused]] LCR_TARGET void feed_forward_bwd(const Dims& dims, const Block& block, int first,
                                                  int norm, int64_t m, const float* x,
                                                  const float* hidden, float* dout, float* dupdate,
                                                  float* dhidden, const NormTape& tape) {
  add_norm_bwd(dims, block, norm, m, dout, dupdate, tape);
  linear_bwd(block, first + 1, m, dupdate, dims.stride, hidden, dims.ffn_stride, dhidden, false);
  for (int64_t j = 0; j < m * dims.ffn_stride; j += kLanes)
    store(dhidden + j, select(load(hidden + j) <= 0.0f, Vec{}, load(dhidden + j)));  // NaN passes
  linear_bwd(block, first, m, dhidden, dims.ffn_stride, x, dims.stride, dout, true);
}

// Pack the weights of one set and stream, number `index` in their tensors.
[[maybe_unused]] LCR_TARGET void pack_forward(const BlockSpec& spec, const float* const* weights,
                                              int64_t index, float* out) {
  const BlockLayout at = forward_layout(spec);
  for (int i = 0; i < spec.n_linears; ++i) {
    const LinearSpec& l = spec.linears[i];
    const int64_t row = index * l.rows + l.first_row;
    pack_operand(weights[l.weight] + row * l.in, l.in, l.out, out + at.weight[i]);
    std::memcpy(out + at.bias[i], weights[l.bias] + row, sizeof(float) * l.out);
  }
  for (int i = 0; i < spec.n_norms; ++i) {
    const int64_t from = (index * spec.n_norms + i) * spec.dim;
    for (int64_t j = 0; j < round_up(spec.dim, kAlign); ++j) {
      out[at.norm_weight[i] + j] = j < spec.dim ? weights[spec.norm_weight][from + j] : 0.0f;
      out[at.norm_bias[i] + j] = j < spec.dim ? weights[spec.norm_weight + 1][from + j] : 0.0f;
    }
  }
}

[[maybe_unused]] LCR_TARGET void pack_backward(const BlockSpec& spec, const float* const* weights,
                                               int64_t index, float* out) {
  const BlockLayout at = backward_layout(spec);
  for (int i = 0; i < spec.n_linears; ++i) {
    const LinearSpec& l = spec.linears[i];
    pack(weights[l.weight] + (index * l.rows + l.first_row) * l.in, l.in, 1, l.out, l.in,
         out + at.weight[i]);
  }
}

}  // namespace
}  // namespace lcr_fast
