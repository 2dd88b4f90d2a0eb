// Checks that several operators share, from tensors to the arguments of the torch-free kernels.
#pragma once
#include <vector>

#include "noise.h"
#include "reasoning.h"
#include "scoring.h"
#include "torch_api.h"

namespace lcr_fast {

// The data of a contiguous tensor of this shape.
const float* floats(const Tensor& t, const char* name, std::initializer_list<int64_t> shape);
const int64_t* integers(const Tensor& t, const char* name, std::initializer_list<int64_t> shape);
// And all of them in 0..limit - 1.
const int64_t* ids_below(const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
                         int64_t limit);

// The number in an int64 tensor without axes, which is the key of something drawn.
uint64_t seed_of(const Tensor& t, const char* name);
// What dropout is drawn by. Without dropout there may be no seed.
DropoutKey dropout_key(int64_t threshold, const Tensor& seed);

// The shape that the weights of lcr_fast/weights.py give, and where they are; `n_attentions` a set.
TransformerShape weights_shape(const Tensors& weights, size_t n_attentions, int64_t n_heads,
                               ScalarType dtype, std::vector<WeightArg>& args);

// The weights of the head, checked against the width and the vectors of users that `args` has.
void set_head(ScoringArgs& args, const Tensor& target_weight, const Tensors& mlp_weights,
              const Tensors& mlp_biases, bool dot);

}  // namespace lcr_fast
