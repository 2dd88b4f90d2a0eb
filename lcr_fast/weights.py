"""The packed weights that every backend reads.

Both streams' weights stand in one tensor, on an axis of size 2: index 0 is the search stream, 1 the
recommendation stream. Linear weights are [out, in], as in torch.nn.Linear. D width, F hidden width
of the FFN, P sets of step weights (1 if the K steps share theirs, else K).
"""

from typing import NamedTuple

from torch import Tensor

SEARCH, REC = 0, 1


class EncoderWeights(NamedTuple):
    """Post-norm Transformer layers, one stack a stream. A leading axis counts the layers."""

    qkv_weight: Tensor  # [n_layers, 2, 3D, D] rows: queries, keys, values
    qkv_bias: Tensor  # [n_layers, 2, 3D]
    out_weight: Tensor  # [n_layers, 2, D, D]
    out_bias: Tensor  # [n_layers, 2, D]
    ffn_in_weight: Tensor  # [n_layers, 2, F, D]
    ffn_in_bias: Tensor  # [n_layers, 2, F]
    ffn_out_weight: Tensor  # [n_layers, 2, D, F]
    ffn_out_bias: Tensor  # [n_layers, 2, D]
    norm_weight: Tensor  # [n_layers, 2, 2, D] after attention, after FFN
    norm_bias: Tensor  # [n_layers, 2, 2, D]


class ReasoningWeights(NamedTuple):
    """One latent cross reasoning step, for each of P steps and both streams.

    ``cross_*`` at stream x holds the query projection of x and the key and value projections
    that x applies to the memory of the other stream. Without a step FFN, F is 0 and the third
    norm is not used.
    """

    self_qkv_weight: Tensor  # [P, 2, 3D, D]
    self_qkv_bias: Tensor  # [P, 2, 3D]
    self_out_weight: Tensor  # [P, 2, D, D]
    self_out_bias: Tensor  # [P, 2, D]
    cross_qkv_weight: Tensor  # [P, 2, 3D, D]
    cross_qkv_bias: Tensor  # [P, 2, 3D]
    cross_out_weight: Tensor  # [P, 2, D, D]
    cross_out_bias: Tensor  # [P, 2, D]
    ffn_in_weight: Tensor  # [P, 2, F, D]
    ffn_in_bias: Tensor  # [P, 2, F]
    ffn_out_weight: Tensor  # [P, 2, D, F]
    ffn_out_bias: Tensor  # [P, 2, D]
    norm_weight: Tensor  # [P, 2, 3, D] LN1, LN2, LN3
    norm_bias: Tensor  # [P, 2, 3, D]

    def step(self, k: int) -> "ReasoningWeights":
        """Give the set of step k alone, from 0: [1, 2, ...] each."""
        p = min(k, len(self.norm_bias) - 1)
        return ReasoningWeights(*(w[p : p + 1] for w in self))


class ScoringWeights(NamedTuple):
    """Target-aware aggregation and head. With ``score="dot"`` the MLP lists are empty."""

    target_weight: Tensor  # [2, D, D] W_s, W_r
    mlp_weights: tuple[Tensor, ...]  # [H1, 3D (+ D with a user vector)], [H2, H1], [1, H2]
    mlp_biases: tuple[Tensor, ...]  # [H1], [H2], [1]
    dot: bool = False  # add (z_r + z_s)^T e to the MLP; without an MLP it is the score
