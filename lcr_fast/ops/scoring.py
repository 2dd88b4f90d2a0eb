"""Target-aware aggregation and the head."""

from torch import Tensor

from lcr_fast import reference
from lcr_fast.ops._dispatch import choose_backend
from lcr_fast.ops.noise import HEAD_SITES, Dropout
from lcr_fast.weights import ScoringWeights

# No fused implementation is registered yet; explicit requests for one say so.
AVAILABLE: dict[str, str | None] = {"reference": None}


def aggregate(
    states: Tensor,
    lengths: Tensor,
    candidates: Tensor,
    target_weight: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Pool one stream for every candidate: see :func:`lcr_fast.reference.aggregate`."""
    choose_backend("aggregate", backend, AVAILABLE)
    return reference.aggregate(states, lengths, candidates, target_weight)


def score(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    candidates: Tensor,
    user: Tensor | None,
    weights: ScoringWeights,
    *,
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Score candidates [..., C]: see :func:`lcr_fast.reference.score`.

    Raises ValueError on a candidate width that is not the states', and where ``backend`` cannot
    serve the call.
    """
    dim = search.shape[-1]
    if candidates.shape[-1] != dim:
        raise ValueError(f"candidates must be [..., C, {dim}], got {list(candidates.shape)}")
    choose_backend("score", backend, AVAILABLE)
    masks: tuple[Tensor, ...] = ()
    if dropout is not None:
        dropout.check(search)
        n_candidates = candidates.shape[-2]
        masks = tuple(
            dropout.draw(HEAD_SITES + i, 1, n_candidates, w.shape[0])[0]
            for i, w in enumerate(weights.mlp_weights[:-1])
        )
    return reference.score(
        search, rec, search_lengths, rec_lengths, candidates, user, weights, masks=masks
    )
