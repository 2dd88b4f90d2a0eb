"""Work that a computation cannot avoid, by formula: FLOPs and bytes.

2 FLOP a multiply-add; matrix products and attention only. Counted for valid events, so padding is
no work. Lengths are numbers, or tensors of users' lengths, whose work is summed.

With both histories of length L and FFNs of width d this is 2 (12 L d^2 + 4 L^2 d) for the encoders
and 40 L d^2 + 16 L^2 d for a reasoning step.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Lengths = int | Tensor

# What an eager step moves per event and stream, in vectors of width d with d-wide FFNs, each
# operation reading its inputs and writing its outputs: self-attention 17, cross-attention 20,
# FFN 11. Attention counts as one operation that reads q, k, v and writes its result.
EAGER_VECTORS_A_STEP = 48


def _total(work: Lengths) -> float:
    return float(torch.as_tensor(work, dtype=torch.float64).sum())


def _attention(queries: Tensor, keys: Tensor, d: int) -> Tensor:
    """Four projections and the two products; nothing where one side is empty."""
    return (4 * (queries + keys) * d * d + 4 * queries * keys * d) * (queries * keys > 0)


def _lengths(*lengths: Lengths) -> list[Tensor]:
    return [torch.as_tensor(n, dtype=torch.float64) for n in lengths]


def encoder_flops(n_search: Lengths, n_rec: Lengths, d: int, f: int = 0, n_layers: int = 1):
    """Both encoders; ``f`` is the width of the FFNs, 0 for d."""
    streams = _lengths(n_search, n_rec)
    return _total(sum(n_layers * (_attention(n, n, d) + 4 * n * d * (f or d)) for n in streams))


def reasoning_flops(n_search: Lengths, n_rec: Lengths, d: int, steps: int, f: int = 0) -> float:
    """Run ``steps`` steps on both streams, forward."""
    s, r = _lengths(n_search, n_rec)
    step = sum(
        _attention(x, x, d) + _attention(x, other, d) + 4 * x * d * (f or d)
        for x, other in ((s, r), (r, s))
    )
    return steps * _total(step)


def training_flops(forward: float) -> float:
    """Forward and backward: two products for each of the forward; recomputation is no work."""
    return 3 * forward


def aggregation_flops(
    n_search: Lengths, n_rec: Lengths, n_candidates: int, d: int, repeated: bool = False
) -> float:
    """Pool both streams for every candidate.

    Factored, W meets the candidates or the history, whichever are fewer; ``repeated`` is the
    history copied for each candidate, so that W meets every copy.
    """
    work = 0.0
    for n in _lengths(n_search, n_rec):
        rows = n * n_candidates if repeated else n.clamp(max=n_candidates)
        work += _total(2 * rows * d * d + 4 * n_candidates * n * d)
    return work


def head_flops(n_candidates: int, widths: Sequence[int]) -> float:
    """Run the MLP with these layer widths, input and output included."""
    return n_candidates * sum(2.0 * a * b for a, b in itertools.pairwise(widths))


def reasoning_bytes(
    n_search: Lengths, n_rec: Lengths, d: int, itemsize: int, weight_bytes: int, n_states: int = 1
) -> float:
    """Read both streams and the weights once, write ``n_states`` final states, whatever K."""
    events = sum(map(_total, _lengths(n_search, n_rec)))
    return (1 + n_states) * events * d * itemsize + weight_bytes


def eager_reasoning_bytes(
    n_search: Lengths, n_rec: Lengths, d: int, itemsize: int, steps: int
) -> float:
    """Move every intermediate of every step to memory and back, attention matrices excepted."""
    events = sum(map(_total, _lengths(n_search, n_rec)))
    return steps * EAGER_VECTORS_A_STEP * events * d * itemsize
