"""Target-aware scoring: candidates of a user, or the whole catalogue in tiles.

:func:`score` scores given candidates; :func:`score_topk` and :func:`score_rank` stream over every
item and keep k of them, or count, so that scores of B users and I items never exist at once. (For
scores that are plain dot products, :mod:`lcr_fast.ops.ranking` has ``catalogue_rank``.)

Implementations are the reference; ``triton`` on CUDA tensors (and on CPU tensors under Triton's
interpreter, if asked for); ``cpp`` on CPU tensors, in float32, which halves are converted to. What
limits them is asked of ``SCORE.obstacles``.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcr_fast import reference
from lcr_fast.ops._op import INTEGERS, Backend, Op, kernel
from lcr_fast.ops._triton import triton_obstacle
from lcr_fast.ops.noise import HEAD_SITES, Dropout, dropout_key
from lcr_fast.precision import autocasts
from lcr_fast.weights import ScoringWeights

_MOST_K = 2**31 - 1

# -- who serves -----------------------------------------------------------------------------------


class ScoringCase(NamedTuple):
    """All that decides which implementations can serve a call."""

    device: str  # cpu, cuda
    dtype: torch.dtype
    dim: int
    hidden: tuple[int, ...] | None  # widths of the MLP's hidden layers; None for the dot head


def _triton_obstacle(case: ScoringCase) -> str | None:
    if (reason := triton_obstacle(case.device)) is not None:
        return reason
    from lcr_fast.kernels import scoring as kernels

    if case.hidden == ():
        return "it has no head of a single linear layer"
    return kernels.obstacle(dim=case.dim, dtype=case.dtype, hidden=case.hidden or ())


def _cpp_obstacle(case: ScoringCase) -> str | None:
    return f"it computes float32, not {case.dtype}" if case.dtype == torch.float64 else None


def _backends(*launchers: str) -> list[Backend]:
    """List the backends of an op; the names are those of its launchers in kernels.scoring."""
    kernels = [kernel("scoring", name) for name in launchers]
    return [
        Backend("triton", "triton_", ("cuda",), _triton_obstacle, kernels),
        Backend("cpp", "cpu_", ("cpu",), _cpp_obstacle),
    ]


# -- the ops --------------------------------------------------------------------------------------


class _Score(NamedTuple):
    """The arguments of the registered passes; absent tensors are empty."""

    search: Tensor  # [B, N, L_s, D]
    rec: Tensor  # [B, N, L_r, D]
    search_lengths: Tensor  # int64 [B]
    rec_lengths: Tensor  # int64 [B]
    items: Tensor  # [T, D]
    ids: Tensor  # int64 [B, C] or [1, C], rows of items
    user: Tensor  # [B, D]
    target_weight: Tensor
    mlp_weights: tuple[Tensor, ...]
    mlp_biases: tuple[Tensor, ...]
    dropout_rows: Tensor  # int64 [B]
    dropout_threshold: int
    dropout_seed: Tensor  # int64 []
    dot: bool


class _TopK(NamedTuple):
    """The arguments of the registered pass; absent tensors are empty."""

    search: Tensor  # [B, L_s, D]
    rec: Tensor  # [B, L_r, D]
    search_lengths: Tensor  # int64 [B]
    rec_lengths: Tensor  # int64 [B]
    items: Tensor  # [I + 1, D]
    user: Tensor  # [B, D]
    target_weight: Tensor
    mlp_weights: tuple[Tensor, ...]
    mlp_biases: tuple[Tensor, ...]
    k: int
    exclude: Tensor  # int64 [B, X]
    dot: bool


class _Rank(NamedTuple):
    """The arguments of the registered pass; absent tensors are empty."""

    search: Tensor  # [B, L_s, D]
    rec: Tensor  # [B, L_r, D]
    search_lengths: Tensor  # int64 [B]
    rec_lengths: Tensor  # int64 [B]
    items: Tensor  # [I + 1, D]
    user: Tensor  # [B, D]
    target_weight: Tensor
    mlp_weights: tuple[Tensor, ...]
    mlp_biases: tuple[Tensor, ...]
    target: Tensor  # int64 [B]
    bonus: Tensor  # float32 [B]
    exclude: Tensor  # int64 [B, X]
    dot: bool


def _fake_scores(call: _Score) -> Tensor:
    return call.search.new_empty(*call.search.shape[:2], call.ids.shape[1])


def _fake_topk(call: _TopK) -> tuple[Tensor, Tensor]:
    shape = (call.search.shape[0], call.k)
    return call.search.new_empty(shape, dtype=torch.int64), call.search.new_empty(shape)


def _fake_candidates(call: _Score) -> Tensor:
    """Shape the gradient of the candidates: of the items it is made by :func:`score`."""
    return call.items.new_empty(call.search.shape[0], call.ids.shape[1], call.items.shape[1])


SCORE = Op(
    "score",
    _Score,
    ("scores",),
    _fake_scores,
    _backends("score_fwd", "score_bwd"),
    gradients=("search", "rec", "items", "user", "target_weight", "mlp_weights", "mlp_biases"),
    fake_gradients={"items": _fake_candidates},
)
SCORE_TOPK = Op("score_topk", _TopK, ("ids", "scores"), _fake_topk, _backends("score_topk"))
SCORE_RANK = Op(
    "score_rank",
    _Rank,
    ("rank",),
    lambda call: torch.empty_like(call.target),
    _backends("score_rank"),
)


# -- public functions -----------------------------------------------------------------------------


def _check(
    search: Tensor, rec: Tensor, search_lengths: Tensor, rec_lengths: Tensor, items: Tensor,
    user: Tensor | None, weights: ScoringWeights,
) -> None:  # fmt: skip
    dim = search.shape[-1]
    if (
        search.ndim not in (3, 4)
        or not search.is_floating_point()
        or search.dtype != rec.dtype
        or (*search.shape[:-2], dim) != (*rec.shape[:-2], rec.shape[-1])
    ):
        raise ValueError(
            "search and rec must be floating point [B, L, D] or [B, N, L, D] and agree in all but "
            f"L, got {search.dtype} {list(search.shape)} and {rec.dtype} {list(rec.shape)}"
        )
    B = search.shape[0]
    for name, lengths in (("search", search_lengths), ("rec", rec_lengths)):
        if lengths.shape != (B,) or lengths.dtype not in INTEGERS:
            raise ValueError(
                f"{name}_lengths must be integers [{B}], got {lengths.dtype} {list(lengths.shape)}"
            )
    if items.shape[-1] != dim:
        raise ValueError(f"candidates must be item vectors of width {dim}, got {list(items.shape)}")
    if user is not None and user.shape != (B, dim):
        raise ValueError(f"user must be [{B}, {dim}], got {list(user.shape)}")
    if weights.target_weight.shape != (2, dim, dim):
        raise ValueError(
            f"target_weight must be [2, {dim}, {dim}], got {list(weights.target_weight.shape)}"
        )
    n_weights, n_biases = len(weights.mlp_weights), len(weights.mlp_biases)
    if n_weights != n_biases:
        raise ValueError(
            "mlp_weights and mlp_biases must have one entry a layer, got "
            f"{n_weights} and {n_biases}"
        )
    width = dim * (3 if user is None else 4)
    for weight, bias in zip(weights.mlp_weights, weights.mlp_biases, strict=True):
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"a layer of the MLP must be [H, {width}] with bias [H], got "
                f"{list(weight.shape)} and {list(bias.shape)}"
            )
        width = weight.shape[0]
    if weights.mlp_weights and width != 1:
        raise ValueError(f"the MLP must end in one score, got {width}")


def _choose(op: Op, backend: str, search: Tensor, weights: ScoringWeights) -> str:
    mlp = weights.mlp_weights
    hidden = tuple(w.shape[0] for w in mlp[:-1]) if mlp else None
    case = ScoringCase(search.device.type, search.dtype, search.shape[-1], hidden)
    # float64 is for exactness, not for speed.
    return op.choose(backend, case, notice=search.dtype != torch.float64)


def _shared(
    chosen: str, search: Tensor, rec: Tensor, search_lengths: Tensor, rec_lengths: Tensor,
    items: Tensor, user: Tensor | None, weights: ScoringWeights,
) -> dict[str, Any]:  # fmt: skip
    """Prepare what the fused ops share: contiguous, in the types that they compute in."""

    def ready(x: Tensor) -> Tensor:
        return (x.float() if chosen == "cpp" else x).contiguous()

    # The dot head has no use for a user vector.
    user = search.new_empty(0) if user is None or not weights.mlp_weights else user
    return {
        "search": ready(search),
        "rec": ready(rec),
        "search_lengths": search_lengths.long().contiguous(),
        "rec_lengths": rec_lengths.long().contiguous(),
        "items": ready(items),
        "user": ready(user),
        "target_weight": ready(weights.target_weight),
        "mlp_weights": tuple(map(ready, weights.mlp_weights)),
        "mlp_biases": tuple(map(ready, weights.mlp_biases)),
        "dot": weights.dot,
    }


def _gradient_of_table(call: _Score, dcandidates: Tensor) -> Tensor:
    """Add up by id. Sorts the ids or splits the rows: no atomics, on any device."""
    ids = call.ids.expand(dcandidates.shape[:2])
    return torch.ops.aten.embedding_dense_backward(dcandidates, ids, len(call.items), -1, False)


def _gradient_of_vectors(call: _Score, dcandidates: Tensor) -> Tensor:
    shared = call.ids.shape[0] == 1
    return (dcandidates.sum(0) if shared else dcandidates).reshape(call.items.shape)


@autocasts
def score(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    candidates: Tensor,
    user: Tensor | None,
    weights: ScoringWeights,
    *,
    ids: Tensor | None = None,
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Score candidates from both streams: see :func:`lcr_fast.reference.score`.

    Args:
        search: final states [B, L_s, D], or those of N trajectories, [B, N, L_s, D].
        rec: the same, [B, (N,) L_r, D].
        search_lengths: integers [B].
        rec_lengths: integers [B].
        candidates: item vectors [B, C, D], or [1, C, D] shared by all users; with ``ids`` the item
            table [T, D] that they are rows of.
        user: user vectors [B, D], or None.
        weights: of any number of layers; without a layer, or where ``dot`` adds it to the layers'
            result, the score is (z_r + z_s)^T e.
        ids: int64 [B, C] or [1, C]. The gradient of the table is a tensor of its size, and two
            runs give the same bits.
        dropout: acts on the hidden layers, with states [B, L, D] only.
        backend: ``auto``, ``reference``, ``triton`` or ``cpp``.

    Returns [B, C], or [B, N, C], in the states' dtype. Nothing of size B x C x H is kept for the
    backward of a fused backend. Raises ValueError on other shapes or dtypes, and where the backend
    cannot serve the call; ``cpp`` raises RuntimeError on an id or a length out of range.

    """
    if ids is None:
        shape = candidates.shape
        fits = candidates.ndim == 3 and shape[0] in (search.shape[0], 1)
        expected = f"[{search.shape[0]} or 1, C, {search.shape[-1]}]"
    else:
        fits = candidates.ndim == 2
        expected = f"a table [T, {search.shape[-1]}] with ids"
        if ids.ndim != 2 or ids.shape[0] not in (search.shape[0], 1) or ids.dtype != torch.int64:
            raise ValueError(
                f"ids must be int64 [{search.shape[0]} or 1, C], got {ids.dtype} {list(ids.shape)}"
            )
    if not fits:
        raise ValueError(f"candidates must be {expected}, got {list(candidates.shape)}")
    _check(search, rec, search_lengths, rec_lengths, candidates, user, weights)
    if dropout is not None:
        dropout.check(search)
    chosen = _choose(SCORE, backend, search, weights)
    if chosen == "reference":
        return _reference_score(
            search, rec, search_lengths, rec_lengths,
            candidates if ids is None else torch.nn.functional.embedding(ids, candidates),
            user, weights, dropout,
        )  # fmt: skip
    rolled = search.ndim == 4
    if not rolled:
        search, rec = search.unsqueeze(1), rec.unsqueeze(1)
    gathers = ids is not None
    if ids is None:
        n = candidates.shape[0] * candidates.shape[1]
        ids = torch.arange(n, device=search.device).view(candidates.shape[:2])
        candidates = candidates.flatten(0, 1)
    rows, threshold, seed = dropout_key(dropout, ids)
    call = _Score(
        **_shared(chosen, search, rec, search_lengths, rec_lengths, candidates, user, weights),
        ids=ids.contiguous(),
        dropout_rows=rows,
        dropout_threshold=threshold,
        dropout_seed=seed,
    )
    finish = {"items": _gradient_of_table if gathers else _gradient_of_vectors}
    scores = SCORE(chosen, call, finish)
    return (scores if rolled else scores.squeeze(1)).to(search.dtype)


def _reference_score(
    search: Tensor, rec: Tensor, search_lengths: Tensor, rec_lengths: Tensor, candidates: Tensor,
    user: Tensor | None, weights: ScoringWeights, dropout: Dropout | None,
) -> Tensor:  # fmt: skip
    masks: tuple[Tensor, ...] = ()
    if dropout is not None:
        masks = tuple(
            dropout.draw(HEAD_SITES + i, 1, candidates.shape[1], w.shape[0])[0]
            for i, w in enumerate(weights.mlp_weights[:-1])
        )

    def align(x: Tensor) -> Tensor:
        return x.unsqueeze(1) if search.ndim == 4 else x

    return reference.score(
        search, rec, align(search_lengths), align(rec_lengths), align(candidates),
        None if user is None else align(user), weights, masks=masks,
    )  # fmt: skip


def check_k(k: int) -> None:
    """Raise ValueError for a length of lists that there is not."""
    if not isinstance(k, int | torch.SymInt | np.integer):
        raise ValueError(f"k must be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k > _MOST_K:
        raise ValueError(f"k must be at most {_MOST_K}, got {k}")


def _check_catalogue(search: Tensor, items: Tensor, exclude: Tensor | None) -> Tensor:
    """Return ``exclude`` as int64 [B, X]."""
    B = search.shape[0]
    if search.ndim != 3 or items.ndim != 2 or not len(items):
        raise ValueError(
            "the catalogue needs states [B, L, D] and items [I + 1, D], got "
            f"{list(search.shape)} and {list(items.shape)}"
        )
    if exclude is None:
        return torch.zeros((B, 0), dtype=torch.int64, device=search.device)
    if exclude.ndim != 2 or exclude.shape[0] != B or exclude.dtype != torch.int64:
        raise ValueError(
            f"exclude must be int64 [{B}, X], got {exclude.dtype} {list(exclude.shape)}"
        )
    return exclude.contiguous()


def _raise_nan(bad: Tensor) -> None:
    """Name the first user with a NaN score. Compiled code cannot, and keeps the marked results."""
    if not torch.compiler.is_compiling() and bad.any():
        raise ValueError(
            f"user {int(bad.nonzero()[0])} of the batch has a NaN score: the model's states, items "
            "or weights hold NaN, or infinities that cancel"
        )


@torch.no_grad()
@autocasts
def score_topk(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    user: Tensor | None,
    weights: ScoringWeights,
    k: int,
    *,
    exclude: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Find the k best items of the catalogue for every user, the best first.

    ``items`` [I + 1, D] is the item table, whose row 0 is padding and never scored; states are
    [B, L, D], ``user`` and ``weights`` as for :func:`score`. ``exclude`` int64 [B, X] lists items
    that do not count; ids outside 1..I in it, padding for one, are harmless. Of equal scores the
    lower id comes first; a score of -inf is no item.

    Returns ids int64 [B, k] and scores [B, k]; a user with fewer than k items ends in id 0 with
    score -inf. Exact, without gradient; memory O(B k) beside a tile. Raises ValueError on k < 1,
    other shapes, a NaN score (NaN scores in that user's row when compiled), or where the backend
    cannot serve the call.
    """
    check_k(k)
    exclude = _check_catalogue(search, items, exclude)
    _check(search, rec, search_lengths, rec_lengths, items, user, weights)
    chosen = _choose(SCORE_TOPK, backend, search, weights)
    if chosen == "reference":
        ids, scores = reference.score_topk(
            search, rec, search_lengths, rec_lengths, items, user, weights, k, exclude
        )
    else:
        shared = _shared(chosen, search, rec, search_lengths, rec_lengths, items, user, weights)
        ids, scores = SCORE_TOPK(chosen, _TopK(**shared, k=k, exclude=exclude))
    _raise_nan(scores.isnan().any(-1))
    return ids, scores.to(search.dtype)


@torch.no_grad()
@autocasts
def score_rank(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    user: Tensor | None,
    weights: ScoringWeights,
    target: Tensor,
    *,
    bonus: Tensor | None = None,
    exclude: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Find the place of each user's target among all items of the catalogue, from 1: int64 [B].

    ``target`` int64 [B] holds ids; 0 is no target and gets place 0. Items that score as high as the
    target come before it; the target competes even where ``exclude`` names it. Its score is the
    very number that the pass over the catalogue gives it, plus ``bonus`` [B] where there is one.
    The other arguments, and what raises, are those of :func:`score_topk`; a target outside 0..I is
    a ValueError on the CPU. Compiled, a NaN gives place -1.
    """
    exclude = _check_catalogue(search, items, exclude)
    _check(search, rec, search_lengths, rec_lengths, items, user, weights)
    if target.shape != search.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target must be int64 [{search.shape[0]}], got {target.dtype} {list(target.shape)}"
        )
    if bonus is None:
        bonus = torch.zeros_like(target, dtype=torch.float32)
    elif bonus.shape != target.shape or not bonus.is_floating_point():
        raise ValueError(
            f"bonus must be floats [{search.shape[0]}], got {bonus.dtype} {list(bonus.shape)}"
        )
    if not target.is_cuda and not torch.compiler.is_compiling():
        outside = (target < 0) | (target >= len(items))
        if outside.any():
            raise ValueError(
                f"target must be ids in 0..{len(items) - 1}, got {int(target[outside][0])}"
            )
    chosen = _choose(SCORE_RANK, backend, search, weights)
    if chosen == "reference":
        rank = reference.score_rank(
            search, rec, search_lengths, rec_lengths, items, user, weights, target, bonus, exclude
        )
    else:
        call = _Rank(
            **_shared(chosen, search, rec, search_lengths, rec_lengths, items, user, weights),
            target=target.contiguous(),
            bonus=bonus.float().contiguous(),
            exclude=exclude,
        )
        rank = SCORE_RANK(chosen, call)
    _raise_nan(rank < 0)
    return rank.masked_fill(target == 0, 0)
