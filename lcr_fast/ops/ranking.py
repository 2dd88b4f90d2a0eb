"""Top-k ranking metrics, rewards and full-catalogue ranks, without sorting.

The C++ and CUDA paths read a row once, counting the candidates that beat the target and those that
equal it; place and metrics follow from the two counts.

| tensors | ``auto`` runs |
|---|---|
| CPU, extension built | C++ (AVX-512, AVX2 or baseline, chosen at run time) |
| CUDA, extension built for CUDA and this GPU, ``target`` | CUDA C++ |
| anything else, ``relevance`` on CUDA included | the reference |

``LCR_FAST_CPU=baseline|avx2|avx512|avx512bf16``, read at the first call, forces an instruction set.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lcr_fast import reference
from lcr_fast.dynamo import constant
from lcr_fast.metrics import RANKING_KINDS, TIES, parse_metric
from lcr_fast.ops._extension import extension_error
from lcr_fast.ops._op import Backend, Op
from lcr_fast.ops._ranking_faults import (
    check_choice,
    check_device,
    expand,
    find_faults,
    first_of,
    indices,
    raise_first,
)
from lcr_fast.ops._triton import has_gpu

DEFAULT_METRICS = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")
CPU_LEVELS = ("baseline", "avx2", "avx512", "avx512bf16")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_GRADES = (torch.bool, torch.int32, torch.int64, torch.float32, torch.float64)
_REDUCTIONS = ("none", "mean", "sum")
# Enum Output of csrc/ranking.h.
_ROWS32, _ROWS64, _SUMS = range(3)


class RankingCase(NamedTuple):
    """All that decides which implementations can serve a call."""

    device: str  # cpu, cuda
    graded: bool = False  # by relevance, not by target


class _Ranking(NamedTuple):
    """The arguments of the registered op, in the order of its schema."""

    scores: Tensor
    target: Tensor | None
    relevance: Tensor | None
    counts: Tensor | None
    excluded: Tensor | None
    kinds: list[int]
    ks: list[int]
    ties: int
    output: int


class _Catalogue(NamedTuple):
    """The arguments of the registered op, in the order of its schema."""

    users: Tensor
    items: Tensor
    target: Tensor
    seen: Tensor | None
    kinds: list[int]
    ks: list[int]
    ties: int
    output: int


def _fake(like: Tensor, leading: Sequence[int], n_metrics: int, output: int) -> tuple[Tensor, ...]:
    shape = (n_metrics + 1,) if output == _SUMS else (*leading, n_metrics)
    dtype = torch.float32 if output == _ROWS32 else torch.float64
    return like.new_empty(shape, dtype=dtype), like.new_empty((3,), dtype=torch.int64)


def _obstacle(case: RankingCase) -> str | None:
    if case.graded and case.device == "cuda":
        return "it ranks by target, not by relevance, on CUDA tensors"
    return _gpu_obstacle() if case.device == "cuda" else None


@functools.cache
def _error_of(index: int) -> int:
    """Ask CUDA for a kernel on a GPU."""
    with torch.cuda.device(index):
        return torch.ops.lcr_fast.ranking_cuda_error()


@constant
def _gpu_obstacle() -> str | None:
    """Say why the current GPU cannot run what was built, or None."""
    if not has_gpu():
        return None  # asked of a machine without a GPU
    index = torch.cuda.current_device()
    if not (error := _error_of(index)):
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"the C++ extension has no code for GPU {index}, of compute capability {major}.{minor} "
        f"(CUDA error {error}): build it with that in TORCH_CUDA_ARCH_LIST"
    )


_BACKENDS = [Backend("cpp", "", ("cpu", "cuda"), _obstacle)]
RANKING_METRICS = Op(
    "ranking_metrics",
    _Ranking,
    ("values", "faults"),
    lambda call: _fake(call.scores, call.scores.shape[:-1], len(call.kinds), call.output),
    _BACKENDS,
)
CATALOGUE_METRICS = Op(
    "catalogue_metrics",
    _Catalogue,
    ("values", "faults"),
    lambda call: _fake(call.users, call.users.shape[:1], len(call.kinds), call.output),
    _BACKENDS,
)


def cpu_level() -> str:
    """Return the instruction set that the C++ path uses, one of ``CPU_LEVELS``."""
    if extension_error() is not None:
        raise RuntimeError(f"lcr_fast._C is not available ({extension_error()})")
    return CPU_LEVELS[torch.ops.lcr_fast.cpu_level()]


def ranking_metrics(
    scores: Tensor,
    target: Tensor | None = None,
    *,
    relevance: Tensor | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    counts: Tensor | None = None,
    excluded: Tensor | None = None,
    ties: str = "pessimistic",
    reduce: str = "none",
    validate: bool = False,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Rank every row of ``scores`` [..., C] and return its metrics, one entry per name.

    Args:
        scores: float32, float16, bfloat16 or float64, of any strides. ±inf rank as numbers.
        target: integers broadcastable to [...], the one relevant candidate of each row, or -1.
        relevance: instead of ``target``, grades broadcastable to [..., C], bool, int32, int64,
            float32 or float64; a grade above 0 is relevant, any other is not.
        metrics: names among ``hr@k``, ``ndcg@k``, ``ndcg_exp@k``, ``mrr@k``, ``recall@k``,
            ``precision@k``, ``map@k``, over the whole list ``mrr``, ``map``, ``ndcg`` and
            ``ndcg_exp``, and ``rank``.
        counts: integers broadcastable to [...]; only the first ``counts`` candidates of a row
            exist. None means all.
        excluded: bool, broadcastable to [..., C]; True takes a candidate out of the list. A
            relevant candidate always competes, so that a seen item can be the target.
        ties: the order of candidates with equal scores: ``pessimistic`` puts relevant ones last
            (and lower grades before higher ones), ``optimistic`` first; ``average`` is the
            expectation over every order, for metrics and not only for ranks.
        reduce: ``none`` for rows [...] in float32; ``mean`` or ``sum`` over the rows that have a
            relevant candidate, float64 scalars; ``sum`` adds the number of those rows as ``rows``.
            The mean over no row is NaN.
        validate: on CUDA, synchronise to raise on bad data, as the CPU always does.
        backend: ``auto``, ``reference`` or ``cpp`` (which is CUDA C++ on CUDA tensors).

    With places counted from 1, d(i) = 1/log2(i + 1), R relevant candidates of grades g and ideal
    order g*: hr@k = [a relevant place ≤ k]; mrr@k = 1/(first relevant place) if that is ≤ k;
    recall@k = hits/R; precision@k = hits/k, also where k > C; map@k = Σ precision at each hit / R;
    ndcg@k = Σ_{i≤k} g_i d(i) / Σ_{i≤k} g*_i d(i), ndcg_exp with 2^g - 1; rank = first relevant
    place. These are the definitions of trec_eval. With one target ndcg@k = d(rank) within k.

    A row without a relevant candidate (target -1, no grade above 0, C = 0) contributes nothing: its
    scores are not read, its values, rank included, are 0, and means leave it out.

    The result has no gradient, and on the CPU its bits do not depend on the number of threads.

    Raises:
        ValueError: a wrong shape, dtype, name or combination of arguments.
        RuntimeError: a NaN among the candidates, a target outside [-1, count) or a count outside
            [0, C], naming the row. On CUDA without ``validate``, and compiled on the reference
            path, such a row becomes NaN instead, and so do its sums.

    """
    check_choice("reduce", reduce, _REDUCTIONS)
    names = _metric_names(metrics)
    values = _rank(
        scores,
        target,
        relevance,
        counts,
        excluded,
        names=names,
        ties=ties,
        output=_ROWS32 if reduce == "none" else _SUMS,
        validate=validate,
        backend=backend,
    )
    return _named(names, values, reduce)


def target_rank(
    scores: Tensor,
    target: Tensor,
    *,
    counts: Tensor | None = None,
    excluded: Tensor | None = None,
    ties: str = "pessimistic",
    validate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return the place [...] of ``target`` in its row of ``scores`` [..., C], counted from 1.

    int64, or float64 under ``average``: the mean over the places that the target may take. 0 where
    the target is -1. The arguments are those of :func:`ranking_metrics`; a bad row that does not
    raise is -1, or NaN under ``average``.
    """
    rank = _rank(
        scores,
        target,
        None,
        counts,
        excluded,
        names=("rank",),
        ties=ties,
        output=_ROWS64,
        validate=validate,
        backend=backend,
    )
    return _rank_dtype(rank.squeeze(-1), ties)


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """Return (r - mean) / (std + 1e-4) over the last axis of ``rewards`` [..., N].

    The std is the unbiased one; without ``scale`` nothing is divided by it (Dr. GRPO, arXiv
    2503.20783). A group of one, or of equal rewards, gives exact zeros, which rounding of the mean
    would not. float32 at least, without gradient.
    """
    rewards = rewards.detach()
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    N = rewards.shape[-1]
    if N < 2:
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(-1, keepdim=True)  # (..., N)
    if scale:
        std = (centred.square().sum(-1, keepdim=True) / (N - 1)).sqrt()  # (..., 1)
        centred = centred / (std + 1e-4)
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    return torch.where(equal, torch.zeros_like(rewards), centred)


def catalogue_metrics(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    seen: Tensor | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    ties: str = "pessimistic",
    reduce: str = "none",
    validate: bool = False,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Rank ``target`` [B] among all ``items`` [I, d] by dot product with ``users`` [B, d].

    ``seen`` [B, S] holds the items of each user that do not compete; negative entries are padding,
    repeats are harmless, and the target competes even where it is seen. To leave out a padding item
    0, pass ``items[1:]``, ``target - 1`` and ``seen - 1``.

    The [B, I] scores are never stored: they are computed in blocks and counted on the spot, in
    float32 (float64 for float64 vectors), each summed over d in one order, so that items with equal
    vectors tie exactly. The reference path does store them. A NaN score is an error even where
    the item is seen. The other arguments, the result and what raises are those of
    :func:`ranking_metrics`.
    """
    check_choice("reduce", reduce, _REDUCTIONS)
    names = _metric_names(metrics)
    values = _rank_catalogue(
        users,
        items,
        target,
        seen,
        names=names,
        ties=ties,
        output=_ROWS32 if reduce == "none" else _SUMS,
        validate=validate,
        backend=backend,
    )
    return _named(names, values, reduce)


def catalogue_rank(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    seen: Tensor | None = None,
    ties: str = "pessimistic",
    validate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return the place [B] of ``target`` among all items, as :func:`target_rank` does.

    The arguments are those of :func:`catalogue_metrics`.
    """
    rank = _rank_catalogue(
        users,
        items,
        target,
        seen,
        names=("rank",),
        ties=ties,
        output=_ROWS64,
        validate=validate,
        backend=backend,
    )
    return _rank_dtype(rank.squeeze(-1), ties)


def _require_tensors(**given: object) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def _rank(
    scores: Tensor,
    target: Tensor | None,
    relevance: Tensor | None,
    counts: Tensor | None,
    excluded: Tensor | None,
    *,
    names: tuple[str, ...],
    ties: str,
    output: int,
    validate: bool,
    backend: str,
) -> Tensor:
    """Return rows [..., M] of the named metrics, or sums [M + 1], as the op does."""
    check_choice("ties", ties, TIES)
    _require_tensors(
        scores=scores, target=target, relevance=relevance, counts=counts, excluded=excluded
    )
    if scores.dim() == 0 or scores.dtype not in _FLOATS:
        raise ValueError(
            f"scores must be [..., C] in float32, float16, bfloat16 or float64, got "
            f"{list(scores.shape)} in {scores.dtype}"
        )
    if (target is None) == (relevance is None):
        raise ValueError("give either target or relevance, not both or neither")
    if relevance is not None and relevance.dtype not in _GRADES:
        raise ValueError(
            f"relevance must be bool, int32, int64, float32 or float64, got {relevance.dtype}"
        )
    if excluded is not None and excluded.dtype != torch.bool:
        raise ValueError(f"excluded must be bool, got {excluded.dtype}")
    scores = scores.detach()
    leading = scores.shape[:-1]
    if target is not None:
        target = indices("target", target, leading, scores.device)
    if counts is not None:
        counts = indices("counts", counts, leading, scores.device)
    if relevance is not None:
        relevance = expand("relevance", relevance, scores.shape, scores.device)
    if excluded is not None:
        excluded = expand("excluded", excluded, scores.shape, scores.device)
    kinds, ks = _codes(names)
    case = RankingCase(scores.device.type, relevance is not None)
    chosen = RANKING_METRICS.choose(backend, case)
    if chosen != "reference":
        call = _Ranking(
            scores, target, relevance, counts, excluded, kinds, ks, TIES.index(ties), output
        )
        values, faults = RANKING_METRICS(chosen, call)
        if validate and scores.is_cuda:
            raise_first("scores", faults.tolist(), leading, target, counts, scores.shape[-1])
        return values
    rows = reference.ranking_metrics(
        scores,
        target,
        relevance=relevance,
        metrics=(*names, "rank"),
        counts=counts,
        excluded=excluded,
        ties=ties,
    )
    if not torch.compiler.is_compiling() and (validate or not scores.is_cuda):
        faults = find_faults(rows["rank"], target, counts, scores.shape[-1])
        raise_first("scores", faults, leading, target, counts, scores.shape[-1])
    return _pack(rows, names, output)


def _rank_catalogue(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    seen: Tensor | None,
    *,
    names: tuple[str, ...],
    ties: str,
    output: int,
    validate: bool,
    backend: str,
) -> Tensor:
    check_choice("ties", ties, TIES)
    _require_tensors(users=users, items=items, target=target, seen=seen)
    if (
        users.dim() != 2
        or items.dim() != 2
        or users.shape[1] != items.shape[1]
        or users.dtype != items.dtype
        or users.dtype not in _FLOATS
    ):
        raise ValueError(
            "users [B, d] and items [I, d] must share d and a dtype among float32, float16, "
            f"bfloat16 and float64, got {list(users.shape)} in {users.dtype} and "
            f"{list(items.shape)} in {items.dtype}"
        )
    users, items = users.detach(), items.detach()
    check_device("items", items, users.device)
    leading, n_items = users.shape[:1], items.shape[0]
    target = indices("target", target, leading, users.device)
    if seen is not None:
        if seen.dim() != 2:
            raise ValueError(f"seen must be [B, S], got {list(seen.shape)}")
        seen = indices("seen", seen, (users.shape[0], seen.shape[1]), users.device)
    kinds, ks = _codes(names)
    chosen = CATALOGUE_METRICS.choose(backend, RankingCase(users.device.type))
    if chosen != "reference":
        call = _Catalogue(users, items, target, seen, kinds, ks, TIES.index(ties), output)
        values, faults = CATALOGUE_METRICS(chosen, call)
        if validate and users.is_cuda:
            raise_first("users", faults.tolist(), leading, target, None, n_items)
        return values
    rows = reference.catalogue_metrics(
        users, items, target, metrics=(*names, "rank"), seen=seen, ties=ties
    )
    if not torch.compiler.is_compiling() and (validate or not users.is_cuda):
        faults = find_faults(rows["rank"], target, None, n_items)
        if seen is not None:
            faults[2] = first_of((seen >= n_items).any(-1) & (target >= 0))
        raise_first("users", faults, leading, target, None, n_items)
    return _pack(rows, names, output)


def _codes(names: tuple[str, ...]) -> tuple[list[int], list[int]]:
    parsed = [parse_metric(name) for name in names]
    return [RANKING_KINDS.index(kind) for kind, _ in parsed], [k for _, k in parsed]


def _named(names: tuple[str, ...], values: Tensor, reduce: str) -> dict[str, Tensor]:
    if reduce == "none":
        return dict(zip(names, values.unbind(-1), strict=True))
    if reduce == "sum":
        return dict(zip((*names, "rows"), values.unbind(-1), strict=True))
    means = values[:-1] / values[-1]  # at once: on a GPU a division is a launch
    return dict(zip(names, means.unbind(-1), strict=True))


def _pack(rows: dict[str, Tensor], names: tuple[str, ...], output: int) -> Tensor:
    """Arrange the rows of the reference as the op returns them."""
    rank = rows["rank"]
    values = [rows[name] for name in names]
    if output == _SUMS:
        return torch.stack([value.sum() for value in (*values, (rank != 0).double())])
    stacked = torch.stack(values, -1) if values else rank.new_empty((*rank.shape, 0))
    return stacked.float() if output == _ROWS32 else stacked


def _rank_dtype(rank: Tensor, ties: str) -> Tensor:
    return rank if ties == "average" else rank.nan_to_num(nan=-1.0).long()


def _metric_names(metrics: Sequence[str]) -> tuple[str, ...]:
    if isinstance(metrics, str):  # whose letters would be taken for names
        raise ValueError(f"metrics must be a sequence of names, ({metrics!r},), got a text")
    return tuple(metrics)
