"""What the fused ops count for in ``torch.utils.flop_counter.FlopCounterMode``.

    from lcr_fast.flops import register

    register()
    with FlopCounterMode() as counter:
        model(batch).sum().backward()

Without :func:`register`, before the counter is made, they count nothing: it imports torch's
counter, and with it Triton. As torch does, it counts matrix products alone, 2 a multiply-add, by
shape: padding is work, and a backward pass two products for each of the forward, whichever
gradients are wanted; what is computed again is no work. So the numbers are those of the reference.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lcr_fast.ops._op import Op
from lcr_fast.ops.adaptive import ADAPTIVE_REASONING
from lcr_fast.ops.ranking import CATALOGUE_METRICS
from lcr_fast.ops.reasoning import ENCODE, LATENT_REASONING
from lcr_fast.ops.request import REQUEST
from lcr_fast.ops.scoring import SCORE, SCORE_RANK, SCORE_TOPK
from lcr_fast.weights import EncoderWeights, ReasoningWeights


def _attention(queries: int, keys: int, d: int) -> int:
    """Four projections and the two products."""
    return 4 * (queries + keys) * d * d + 4 * queries * keys * d


def _encoders(lengths: Sequence[int], d: int, f: int, n_layers: int) -> int:
    return n_layers * sum(_attention(n, n, d) + 4 * n * d * f for n in lengths)


def _steps(lengths: Sequence[int], d: int, f: int, steps: int) -> int:
    s, r = lengths
    return steps * sum(
        _attention(x, x, d) + _attention(x, other, d) + 4 * x * d * f
        for x, other in ((s, r), (r, s))
    )


def _scores(
    lengths: Sequence[int], d: int, n_users: int, copies: int, candidates: int, n_items: int,
    widths: Sequence[int], with_user: bool,
) -> int:  # fmt: skip
    """Pool both streams and run the head; ``n_items`` item vectors are multiplied once each."""
    n = n_users * copies * candidates
    found = 4 * n_items * d * d + 4 * n * sum(lengths) * d
    if widths:
        found += 2 * d * widths[0] * (2 * n + n_items + n_users * with_user)
        found += 2 * n * sum(a * b for a, b in itertools.pairwise(widths))
    return found


# Of a call whose tensors are their shapes.


def _encode(call: Any) -> int:
    (B, n_search, d), n_rec = call.search, call.rec[1]
    n_layers, _, f, _ = call.weights[EncoderWeights._fields.index("ffn_in_weight")]
    return B * _encoders((n_search, n_rec), d, f, n_layers)


def _reason(call: Any) -> int:
    (B, n_search, d), n_rec = call.search, call.rec[1]
    f = call.weights[ReasoningWeights._fields.index("ffn_in_weight")][2]
    found = _steps((n_search, n_rec), d, f, call.steps)
    if len(getattr(call, "target_keys", ())) == 3:  # at which a^(k) and h^(k) are pooled
        found += 8 * call.steps * (n_search + n_rec) * d
    return B * getattr(call, "n_trajectories", 1) * found


def _score(call: Any) -> int:
    B, N, n_search, d = call.search
    shared, C = call.ids
    widths = [weight[0] for weight in call.mlp_weights]
    lengths = n_search, call.rec[2]
    return _scores(lengths, d, B, N, C, shared * C, widths, len(call.user) == 2)


def _catalogue(call: Any, passes: int) -> int:
    (B, n_search, d), n = call.search, call.items[0] - 1
    widths = [weight[0] for weight in call.mlp_weights]
    lengths = n_search, call.rec[1]
    return passes * _scores(lengths, d, B, 1, n, n, widths, len(call.user) == 2)


def _request(call: Any) -> int:
    (B, n_search), n_rec = call.search_queries, call.rec_items[1]
    d, lengths, C = call.items[1], (n_search, n_rec), call.candidates[1]
    return (
        B * _encoders(lengths, d, call.ffn, call.n_layers)
        + B * _steps(lengths, d, call.step_ffn, call.steps)
        + _scores(lengths, d, B, 1, C, B * C, call.widths, len(call.users) == 2)
    )


def _ranked(call: Any) -> int:
    return 2 * call.users[0] * call.items[0] * call.items[1]


_FORMULAS: dict[Op, Callable[[Any], int]] = {
    ENCODE: _encode,
    LATENT_REASONING: _reason,
    ADAPTIVE_REASONING: _reason,  # as if nobody left early
    SCORE: _score,
    SCORE_TOPK: functools.partial(_catalogue, passes=1),
    SCORE_RANK: functools.partial(_catalogue, passes=2),
    REQUEST: _request,
    CATALOGUE_METRICS: _ranked,
}


@functools.cache
def register() -> None:
    """Register every fused op's formula with torch's counter, once."""
    from torch.utils.flop_counter import register_flop_formula

    for op, formula in _FORMULAS.items():
        n = len(op.call._fields)

        def forward(*shapes: Any, out_shape: Any, op=op, n=n, formula=formula) -> int:
            return formula(op.call(*shapes[:n]))

        def backward(*shapes: Any, out_shape: Any, op=op, n=n, formula=formula) -> int:
            first = len(op.results)
            return 2 * formula(op.call(*shapes[first : first + n]))

        for backend in op.backends:
            for name in op.passes:
                target = getattr(torch.ops.lcr_fast, backend.prefix + name, None)
                if target is not None:
                    register_flop_formula(target)(backward if name.endswith("_bwd") else forward)
