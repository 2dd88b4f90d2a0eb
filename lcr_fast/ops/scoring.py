"""Target-aware scoring: candidates of a user, or the whole catalogue in tiles.

:func:`score` scores given candidates; :func:`score_topk` and :func:`score_rank` stream over every
item and keep k of them, or count, so that scores of B users and I items never exist at once. (For
scores that are plain dot products, :mod:`lcr_fast.ops.ranking` has ``catalogue_rank``.)

Implementations are the reference; ``triton`` on CUDA tensors (and on CPU tensors under Triton's
interpreter, if asked for); ``cpp`` on CPU tensors, in float32, which halves are converted to. Their
limits are in :func:`scoring_backends`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lcr_fast import reference
from lcr_fast.noise import dropout_threshold
from lcr_fast.ops._dispatch import choose_backend, extension_obstacle
from lcr_fast.ops._extension import has_kernel
from lcr_fast.ops._triton import triton_obstacle
from lcr_fast.ops.noise import HEAD_SITES, Dropout
from lcr_fast.weights import ScoringWeights

# -- who serves -----------------------------------------------------------------------------------

# Looked up once: torch.compile cannot trace the question.
_HAS_CPP = has_kernel("cpu_score_fwd", "cpu")

# No fused aggregation is registered; explicit requests for one say so.
AGGREGATE_BACKENDS: dict[str, str | None] = {"reference": None}


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
    if case.device != "cpu":
        return "it needs CPU tensors"
    if (error := extension_obstacle()) is not None:
        return error
    if not _HAS_CPP:
        return "the C++ extension was built without it"
    return f"it computes float32, not {case.dtype}" if case.dtype == torch.float64 else None


def scoring_backends(case: ScoringCase) -> dict[str, str | None]:
    """List the implementations of scoring, each with None or what prevents it."""
    if case.device == "cpu":  # the interpreter is for tests: never chosen by itself
        return {
            "cpp": _cpp_obstacle(case), "reference": None, "triton": _triton_obstacle(case),
        }  # fmt: skip
    return {"triton": _triton_obstacle(case), "reference": None, "cpp": _cpp_obstacle(case)}


# -- registered ops -------------------------------------------------------------------------------

_STREAMS = "Tensor search, Tensor rec, Tensor search_lengths, Tensor rec_lengths"
_WEIGHTS = "Tensor user, Tensor target_weight, Tensor[] mlp_weights, Tensor[] mlp_biases"
_ARGUMENTS = (
    f"{_STREAMS}, Tensor items, Tensor ids, {_WEIGHTS}, "
    "Tensor dropout_rows, int dropout_threshold, int dropout_seed, bool dot"
)
_SCHEMAS = {
    "score_fwd": f"({_ARGUMENTS}) -> Tensor",
    "score_bwd": f"(Tensor dscores, {_ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[])",
    "score_topk": f"({_STREAMS}, Tensor items, {_WEIGHTS}, int k, Tensor exclude, "
    "bool dot) -> (Tensor, Tensor)",
    "score_rank": f"({_STREAMS}, Tensor items, {_WEIGHTS}, Tensor target, Tensor bonus, "
    "Tensor exclude, bool dot) -> Tensor",
}


def _score_fwd_fake(search, rec, search_lengths, rec_lengths, items, ids, *_):
    return search.new_empty(*search.shape[:2], ids.shape[1])


def _score_bwd_fake(
    dscores, search, rec, search_lengths, rec_lengths, items, ids, user, target_weight,
    mlp_weights, mlp_biases, *_,
):  # fmt: skip
    B, _, _, D = search.shape
    return (
        torch.empty_like(search),
        torch.empty_like(rec),
        items.new_empty(B, ids.shape[1], D),
        torch.empty_like(user),
        torch.empty_like(target_weight),
        [torch.empty_like(w) for w in mlp_weights],
        [torch.empty_like(b) for b in mlp_biases],
    )


def _score_topk_fake(
    search, rec, search_lengths, rec_lengths, items, user, target_weight, mlp_weights, mlp_biases,
    k, exclude, dot,
):  # fmt: skip
    shape = (search.shape[0], k)
    return search.new_empty(shape, dtype=torch.int64), search.new_empty(shape)


def _score_rank_fake(
    search, rec, search_lengths, rec_lengths, items, user, target_weight, mlp_weights, mlp_biases,
    target, bonus, exclude, dot,
):  # fmt: skip
    return torch.empty_like(target)


def _triton_launcher(name: str):
    def launch(*args):
        from lcr_fast.kernels import scoring as kernels

        return getattr(kernels, name)(*args)

    return launch


# Schemas are known before Triton is: importing this package must not import it.
_LIBRARY = torch.library.Library("lcr_fast", "FRAGMENT")
_FAKES: dict[str, Callable[..., Any]] = {
    "score_fwd": _score_fwd_fake,
    "score_bwd": _score_bwd_fake,
    "score_topk": _score_topk_fake,
    "score_rank": _score_rank_fake,
}
for _name in _SCHEMAS:
    _LIBRARY.define(f"triton_{_name}{_SCHEMAS[_name]}")
    for _device in ("CUDA", "CPU"):  # CPU: the interpreter
        _LIBRARY.impl(f"triton_{_name}", _triton_launcher(_name), _device)
    for _prefix in ("triton", "cpu"):
        if _prefix == "triton" or _HAS_CPP:
            torch.library.register_fake(f"lcr_fast::{_prefix}_{_name}", _FAKES[_name])


def _op(backend: str, name: str):
    prefix = {"triton": "triton", "cpp": "cpu"}[backend]
    return getattr(torch.ops.lcr_fast, f"{prefix}_{name}")


class _Scalars(NamedTuple):
    """The key of the head's dropout and the head's flag, in the order of the schema."""

    dropout_threshold: int
    dropout_seed: int
    dot: bool


class _Score(torch.autograd.Function):
    """Saves its inputs only; backward computes every intermediate again."""

    @staticmethod
    def forward(
        ctx, backend, scalars, n_layers, gathers,
        search, rec, search_lengths, rec_lengths, rows, items, ids, user, target_weight, *mlp,
    ):  # fmt: skip
        inputs = (search, rec, search_lengths, rec_lengths, items, ids, user, target_weight)
        scores = _op(backend, "score_fwd")(
            *inputs, list(mlp[:n_layers]), list(mlp[n_layers:]), rows, *scalars
        )
        ctx.backend, ctx.scalars, ctx.n_layers, ctx.gathers = backend, scalars, n_layers, gathers
        ctx.save_for_backward(rows, *inputs, *mlp)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, dscores):
        rows, *tensors = ctx.saved_tensors
        inputs, mlp = tensors[:8], tensors[8:]
        items, ids = inputs[4:6]
        dsearch, drec, dcandidates, duser, dtarget_weight, dweights, dbiases = _op(
            ctx.backend, "score_bwd"
        )(
            dscores.contiguous(), *inputs, list(mlp[: ctx.n_layers]), list(mlp[ctx.n_layers :]),
            rows, *ctx.scalars,
        )  # fmt: skip
        if not ctx.needs_input_grad[9]:
            ditems = None
        elif ctx.gathers:
            # Sorts the ids or splits the rows: no atomics, on any device.
            ditems = torch.ops.aten.embedding_dense_backward(
                dcandidates, ids.expand(dcandidates.shape[:2]), items.shape[0], -1, False
            )
        else:
            shared = ids.shape[0] == 1
            ditems = (dcandidates.sum(0) if shared else dcandidates).reshape(items.shape)
        return (
            None, None, None, None, dsearch, drec, None, None, None, ditems, None, duser,
            dtarget_weight, *dweights, *dbiases,
        )  # fmt: skip


# -- public functions -----------------------------------------------------------------------------


def aggregate(
    states: Tensor,
    lengths: Tensor,
    candidates: Tensor,
    target_weight: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Pool one stream for every candidate: see :func:`lcr_fast.reference.aggregate`."""
    choose_backend("aggregate", backend, AGGREGATE_BACKENDS)
    return reference.aggregate(states, lengths, candidates, target_weight)


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
        if lengths.shape != (B,) or lengths.is_floating_point():
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


def _choose(
    op: str, backend: str, search: Tensor, rec: Tensor, user: Tensor | None, weights: ScoringWeights
) -> str:
    device, mlp = search.device.type, weights.mlp_weights
    case = ScoringCase(
        device, search.dtype, search.shape[-1],
        tuple(w.shape[0] for w in mlp[:-1]) if mlp else None,
    )  # fmt: skip
    # float64 is for exactness, not for speed.
    expected = {"cpu": "cpp", "cuda": "triton"}.get(device)
    expected = None if search.dtype == torch.float64 else expected
    return choose_backend(op, backend, scoring_backends(case), expected)


class _Inputs(NamedTuple):
    """What the fused ops share, contiguous, in the types that they compute in."""

    search: Tensor
    rec: Tensor
    search_lengths: Tensor
    rec_lengths: Tensor
    items: Tensor
    user: Tensor
    target_weight: Tensor
    mlp_weights: tuple[Tensor, ...]
    mlp_biases: tuple[Tensor, ...]


def _prepare(
    chosen: str, search: Tensor, rec: Tensor, search_lengths: Tensor, rec_lengths: Tensor,
    items: Tensor, user: Tensor | None, weights: ScoringWeights,
) -> _Inputs:  # fmt: skip
    def ready(x: Tensor) -> Tensor:
        return (x.float() if chosen == "cpp" else x).contiguous()

    # The dot head has no use for a user vector.
    user = search.new_empty(0) if user is None or not weights.mlp_weights else user
    return _Inputs(
        ready(search), ready(rec), search_lengths.long().contiguous(),
        rec_lengths.long().contiguous(), ready(items), ready(user), ready(weights.target_weight),
        tuple(map(ready, weights.mlp_weights)), tuple(map(ready, weights.mlp_biases)),
    )  # fmt: skip


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
        fits = candidates.ndim == 3 and shape[0] in (1, search.shape[0])
        expected = f"[{search.shape[0]} or 1, C, {search.shape[-1]}]"
    else:
        fits = candidates.ndim == 2
        expected = f"a table [T, {search.shape[-1]}] with ids"
        if ids.ndim != 2 or ids.shape[0] not in (1, search.shape[0]) or ids.dtype != torch.int64:
            raise ValueError(
                f"ids must be int64 [{search.shape[0]} or 1, C], got {ids.dtype} {list(ids.shape)}"
            )
    if not fits:
        raise ValueError(f"candidates must be {expected}, got {list(candidates.shape)}")
    _check(search, rec, search_lengths, rec_lengths, candidates, user, weights)
    if dropout is not None:
        dropout.check(search)
    chosen = _choose("score", backend, search, rec, user, weights)
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
    inputs = _prepare(chosen, search, rec, search_lengths, rec_lengths, candidates, user, weights)
    states, (items, user, target_weight) = inputs[:4], inputs[4:7]
    mlp = (*inputs.mlp_weights, *inputs.mlp_biases)
    rows, key = ids.new_empty(0), (0, 0)
    if dropout is not None:
        rows, key = dropout.rows.contiguous(), (dropout_threshold(dropout.rate), dropout.seed)
    scalars = _Scalars(*key, weights.dot)
    ids = ids.contiguous()
    differentiable = (*states[:2], items, user, target_weight, *mlp)
    if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
        scores = _Score.apply(
            chosen, scalars, len(inputs.mlp_weights), gathers, *states, rows, items, ids, user,
            target_weight, *mlp,
        )  # fmt: skip
    else:
        scores = _op(chosen, "score_fwd")(
            *states, items, ids, user, target_weight, list(inputs.mlp_weights),
            list(inputs.mlp_biases), rows, *scalars,
        )  # fmt: skip
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
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    exclude = _check_catalogue(search, items, exclude)
    _check(search, rec, search_lengths, rec_lengths, items, user, weights)
    chosen = _choose("score_topk", backend, search, rec, user, weights)
    if chosen == "reference":
        ids, scores = reference.score_topk(
            search, rec, search_lengths, rec_lengths, items, user, weights, k, exclude
        )
    else:
        inputs = _prepare(chosen, search, rec, search_lengths, rec_lengths, items, user, weights)
        ids, scores = _op(chosen, "score_topk")(
            *inputs[:7], list(inputs.mlp_weights), list(inputs.mlp_biases), k, exclude,
            weights.dot,
        )  # fmt: skip
    _raise_nan(scores.isnan().any(-1))
    return ids, scores.to(search.dtype)


@torch.no_grad()
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
    chosen = _choose("score_rank", backend, search, rec, user, weights)
    if chosen == "reference":
        rank = reference.score_rank(
            search, rec, search_lengths, rec_lengths, items, user, weights, target, bonus, exclude
        )
    else:
        inputs = _prepare(chosen, search, rec, search_lengths, rec_lengths, items, user, weights)
        rank = _op(chosen, "score_rank")(
            *inputs[:7], list(inputs.mlp_weights), list(inputs.mlp_biases), target.contiguous(),
            bonus.float().contiguous(), exclude, weights.dot,
        )  # fmt: skip
    _raise_nan(rank < 0)
    return rank.masked_fill(target == 0, 0)
