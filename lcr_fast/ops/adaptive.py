"""Latent cross reasoning with as many steps for each user as it needs, for inference.

On CPU tensors ``cpp`` runs a user's steps and looks in one loop, so that a user who leaves costs
nothing more. Elsewhere the steps are taken one at a time for those who stay, by whatever serves
:func:`~lcr_fast.ops.latent_reasoning`: a launch and a wait for the device each, which pays where
the users who leave save more than that. Nobody's decision depends on the batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcr_fast.ops._op import Backend, Op
from lcr_fast.ops.reasoning import (
    case_of,
    check_reasoning,
    cpp_obstacle,
    latent_reasoning,
)
from lcr_fast.precision import autocasts
from lcr_fast.reference import Exits, Steps, exit_features, exit_scores
from lcr_fast.reference.transformer import zero_padding
from lcr_fast.weights import ReasoningWeights


class _Adaptive(NamedTuple):
    """The arguments of the registered op, in the order of its schema."""

    search: Tensor  # [B, L_s, D]
    rec: Tensor  # [B, L_r, D]
    search_lengths: Tensor  # [B]
    rec_lengths: Tensor  # [B]
    weights: tuple[Tensor, ...]
    exit_weight: Tensor  # float32 [2D + 2]
    exit_bias: Tensor  # float32 [K]
    steps: int
    n_heads: int


ADAPTIVE_REASONING = Op(
    "adaptive_reasoning",
    _Adaptive,
    ("search_out", "rec_out", "taken"),
    lambda call: (
        torch.empty_like(call.search),
        torch.empty_like(call.rec),
        call.search.new_empty(len(call.search), dtype=torch.int64),
    ),
    [Backend("cpp", "cpu_", ("cpu",), cpp_obstacle)],
)


class Adapted(NamedTuple):
    """What is made of both streams, and by how many steps."""

    search: Tensor  # [B, L_s, D]
    rec: Tensor  # [B, L_r, D]
    taken: Tensor  # int64 [B]


@torch.no_grad()
@autocasts
def adaptive_reasoning(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    weights: ReasoningWeights,
    steps: Steps,
    exits: Exits,
    *,
    backend: str = "auto",
) -> Adapted:
    """Run at most K steps for each user: those after which ``exits`` lets it leave.

    A user leaves after the first k = 0, 1, ... steps whose score of
    :func:`lcr_fast.reference.exit_scores` is at least 0. Arguments as for
    :func:`~lcr_fast.ops.latent_reasoning`, states [B, L, D]; without noise, dropout and gradients.
    ``backend`` asks for an implementation of the steps.

    Raises ValueError on other shapes or dtypes, and where ``backend`` cannot serve the call.
    """
    check_reasoning(search, rec, search_lengths, rec_lengths, weights, steps)
    dim, K = search.shape[-1], steps.n_steps
    if search.ndim != 3:
        raise ValueError(f"search and rec must be [B, L, {dim}], got {list(search.shape)}")
    exits.check(dim, K)
    case = case_of(search, rec, weights, steps)
    # Who serves the steps alone takes them one at a time.
    whole = backend in ("auto", *ADAPTIVE_REASONING.implementations)
    if not (K and whole) or ADAPTIVE_REASONING.choose(backend, case) == "reference":
        return _stepwise(search, rec, search_lengths, rec_lengths, weights, steps, exits, backend)
    call = _Adaptive(
        search.contiguous(), rec.contiguous(), search_lengths.long().contiguous(),
        rec_lengths.long().contiguous(), tuple(w.contiguous() for w in weights),
        exits.weight.float().contiguous(), exits.bias.float().contiguous(), K, steps.n_heads,
    )  # fmt: skip
    return Adapted(*ADAPTIVE_REASONING("cpp", call))


def _stepwise(
    search: Tensor, rec: Tensor, search_lengths: Tensor, rec_lengths: Tensor,
    weights: ReasoningWeights, steps: Steps, exits: Exits, backend: str,
) -> Adapted:  # fmt: skip
    """Take one step after the other with the users who stay, and put aside who leaves."""
    search, rec = zero_padding(search, search_lengths), zero_padding(rec, rec_lengths)
    out_search, out_rec = search.clone(), rec.clone()
    taken = torch.full_like(search_lengths, steps.n_steps, dtype=torch.int64)
    here = torch.arange(len(search), device=search.device)
    states = [(search, rec)]  # the last three of those who stay
    for k in range(steps.n_steps):
        lengths = search_lengths[here], rec_lengths[here]
        features = exit_features(states, *lengths)[..., -1:, :]
        leaves = exit_scores(features, Exits(exits.weight, exits.bias[k : k + 1]))[..., 0] >= 0
        gone, stays = here[leaves], ~leaves
        taken[gone] = k
        out_search[gone], out_rec[gone] = (h[leaves] for h in states[-1])
        here = here[stays]
        states = [(s[stays], r[stays]) for s, r in states[-2:]]
        if not len(here):
            break
        reasoned = latent_reasoning(
            *states[-1],
            search_lengths[here],
            rec_lengths[here],
            weights.step(k),
            steps.step(k),
            backend=backend,
        )
        states.append(reasoned.streams)
    out_search[here], out_rec[here] = states[-1]
    return Adapted(out_search, out_rec, taken)
