"""A whole request from ids to scores as one op: what LCRSER.forward does op by op.

It spares a request of few users the way through Python and the dispatcher between the stages.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcr_fast.ops._op import Backend, Op


class RequestCase(NamedTuple):
    """All that decides which implementations can serve a call."""

    device: str
    dtype: torch.dtype
    update: str
    cross_memory: str
    step_embedding: bool


class Request(NamedTuple):
    """The arguments of the registered op, in the order of its schema; absent tensors are empty.

    The first are those of a :class:`~lcr_fast.Batch`; vectors and weights are float32.
    """

    user: Tensor
    rec_items: Tensor
    rec_lengths: Tensor
    search_queries: Tensor
    search_terms: Tensor
    search_clicks: Tensor
    search_lengths: Tensor
    candidates: Tensor
    items: Tensor  # [I + 1, D]
    item_layer: Tensor  # [I + 1, H1]: item_layer()
    queries: Tensor  # [rows, D], of terms or of queries
    query_text: Tensor  # [Q + 1, D], added to the mean of a query's terms
    users: Tensor  # [U + 1, D]
    search_position: Tensor  # [L_s or more, D]
    rec_position: Tensor  # [L_r or more, D]
    seen_bonus: Tensor  # [2]
    weights: Tensor  # of all layers: pack_weights()
    widths: list[int]  # of the layers of the head's MLP
    n_layers: int  # of the encoder
    ffn: int
    n_sets: int  # of step weights
    step_ffn: int  # 0: none
    steps: int
    n_heads: int
    max_clicks: int
    readout: float
    terms: bool  # a query is the mean of its terms' vectors
    dot: bool
    pairs: bool  # products multiply pairs of bfloat16, as the weights were packed
    n_threads: int


def pack_weights(
    encoder: tuple[Tensor, ...],
    reasoning: tuple[Tensor, ...],
    target_weight: Tensor,
    mlp_weights: tuple[Tensor, ...],
    mlp_biases: tuple[Tensor, ...],
    n_heads: int,
    pairs: bool,
) -> Tensor:
    """Copy the weights of all layers as requests read them, the same bits on every CPU.

    They are float32, or pairs of bfloat16 in the place of a float. ``reasoning`` is empty where no
    request takes a step. RuntimeError on sizes that do not fit.
    """
    return torch.ops.lcr_fast.cpu_request_weights(
        encoder, reasoning, target_weight, mlp_weights, mlp_biases, n_heads, pairs
    )


def item_layer(items: Tensor, weight: Tensor, pairs: bool) -> Tensor:
    """Multiply every item with its part of the MLP's first weight [H1, in]: float32 [I + 1, H1].

    A request that is given them multiplies no candidate, and has the same bits.
    """
    return torch.ops.lcr_fast.cpu_request_items(items, weight, pairs)


def _obstacle(case: RequestCase) -> str | None:
    if case.dtype != torch.float32:
        return f"it computes float32, not {case.dtype}"
    if case.update != "jacobi":
        return f"it has no update={case.update!r}"
    if case.cross_memory != "post_msa":
        return f"it has no cross_memory={case.cross_memory!r}"
    return "it has no step embedding" if case.step_embedding else None


REQUEST = Op(
    "request",
    Request,
    ("scores",),
    lambda call: call.items.new_empty(call.candidates.shape),
    [Backend("cpp", "cpu_", ("cpu",), _obstacle)],
)
