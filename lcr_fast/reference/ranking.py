"""Ranking metrics by sorting the lists."""

import torch
from torch import Tensor

from lcr_fast.metrics import parse_metric


def ranking_metrics(
    scores: Tensor,
    target: Tensor | None,
    *,
    relevance: Tensor | None,
    metrics: tuple[str, ...],
    counts: Tensor | None,
    excluded: Tensor | None,
    ties: str,
) -> dict[str, Tensor]:
    """Ranking metrics of every row of ``scores`` [..., C], in float64, by sorting the lists.

    The contract is that of :func:`lcr_fast.ranking_metrics`, except that ``target`` and ``counts``
    have exactly the leading shape, ``relevance`` and ``excluded`` that of ``scores``, and that a
    row with a NaN candidate, a target out of range or an impossible count becomes NaN.

    A list with ties has many orders. Under ``average`` every metric is its expectation over them,
    with the closed forms of McSherry and Najork (ECIR 2008): in a group of n tied items, p of them
    relevant, after a others, each place holds a relevant item with probability p / n.
    """
    C = scores.shape[-1]
    zero = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)  # (..., C)
    index = torch.arange(C, device=scores.device)  # (C,)
    n_candidates = torch.full(scores.shape[:-1], C, device=scores.device)  # (...)
    bad = torch.zeros_like(n_candidates, dtype=torch.bool)  # (...)
    if counts is not None:
        bad = bad | (counts < 0) | (counts > C)
        n_candidates = counts
    inside = index < n_candidates.unsqueeze(-1)  # (..., C)
    if target is not None:
        bad = bad | (target < -1) | (target >= n_candidates)
        grade = (index == target.unsqueeze(-1)).double()
    else:
        assert relevance is not None
        grade = relevance.double()
    grade = torch.where(inside & (grade > 0), grade, zero)
    candidate = inside if excluded is None else inside & ~excluded | (grade > 0)
    has_relevant = (grade > 0).any(-1)  # (...)
    bad = bad | has_relevant & (scores.isnan() & candidate).any(-1)

    # Candidates first, best score first, tied items by the rule: stable sorts, last key first.
    order = grade.argsort(dim=-1, descending=ties == "optimistic", stable=True)
    for key in (scores, candidate.byte()):
        order = order.gather(
            -1, key.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
        )
    score, grade, candidate = (t.gather(-1, order) for t in (scores, grade, candidate))
    relevant = (grade > 0).double()
    place = (index + 1).double().expand_as(zero)

    if ties == "average":
        new = (score[..., 1:] != score[..., :-1]) | (candidate[..., 1:] != candidate[..., :-1])
        new = torch.cat([torch.ones_like(candidate[..., :1]), new], -1)
        group = new.long().cumsum(-1) - 1
        above = torch.where(new, place - 1, zero).cummax(-1).values if C else zero

        def over_group(values: Tensor) -> Tensor:
            return zero.scatter_add(-1, group, values).gather(-1, group)
    else:
        above = place - 1

        def over_group(values: Tensor) -> Tensor:
            return values

    n, p = over_group(zero + 1), over_group(relevant)  # (..., C), of the group at each place
    chance = p / n
    inner = place - above - 1
    relevant_above = torch.nn.functional.pad(relevant.cumsum(-1), (1, 0)).gather(-1, above.long())
    precision = chance * (relevant_above + 1 + inner * (p - 1) / (n - 1).clamp(min=1)) / place
    stays_empty = torch.where(p > 0, (n - p - inner).clamp(min=0) / (n - inner), zero + 1)
    empty = torch.nn.functional.pad(stays_empty.cumprod(-1), (1, 0), value=1.0)
    first = empty[..., :-1] - empty[..., 1:]  # the chance that the first relevant item is here
    n_relevant = relevant.sum(-1)  # (...)
    ideal = grade.sort(-1, descending=True).values

    def gain(grade: Tensor, kind: str) -> Tensor:
        return torch.exp2(grade) - 1 if kind == "ndcg_exp" else grade

    values = {}
    for name in metrics:
        kind, k = parse_metric(name)
        within = (place <= (k or C)).double()
        discount = within / torch.log2(place + 1)
        if kind == "hr":
            value = (first * within).sum(-1)
        elif kind == "mrr":
            value = (first / place * within).sum(-1)
        elif kind == "rank":
            # The first of p among n shuffled items stands, on average, at (n + 1) / (p + 1). One
            # term is not 0, so no order of the sum can change a bit.
            leads = relevant * (relevant.cumsum(-1) == 1)
            value = (leads * (above + (n + 1) / (p + 1))).sum(-1)
        elif kind == "precision":
            value = (chance * within).sum(-1) / k
        elif kind == "recall":
            value = (chance * within).sum(-1) / n_relevant
        elif kind == "map":
            value = (precision * within).sum(-1) / n_relevant
        else:
            gains = over_group(gain(grade, kind)) / n
            value = (gains * discount).sum(-1) / (gain(ideal, kind) * discount).sum(-1)
        value = torch.where(has_relevant, value, torch.zeros_like(value))
        values[name] = torch.where(bad, torch.full_like(value, torch.nan), value)
    return values


def catalogue_metrics(
    users: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    metrics: tuple[str, ...],
    seen: Tensor | None,
    ties: str,
) -> dict[str, Tensor]:
    """Metrics of ``target`` [B] among all ``items`` [I, d] scored by ``users`` [B, d], in float64.

    Stores all scores [B, I]. The sum over d is in order, not a matrix product: that may sum equal
    vectors in different orders, depending on where they stand, and so break ties.
    """
    acc = torch.promote_types(users.dtype, torch.float32)
    scores = torch.zeros(len(users), len(items), dtype=acc, device=users.device)  # (B, I)
    for user, item in zip(users.to(acc).unbind(-1), items.to(acc).unbind(-1), strict=True):
        scores = scores + user.unsqueeze(-1) * item
    excluded = None
    if seen is not None:
        n_items = items.shape[0]
        seen = torch.where(seen < 0, n_items, seen)  # one more column collects the padding
        excluded = torch.zeros(len(users), n_items + 1, dtype=torch.bool, device=users.device)
        excluded = excluded.scatter(-1, seen.clamp(max=n_items), True)[:, :n_items]
        excluded = excluded & ~scores.isnan()  # a NaN is an error wherever it stands
    return ranking_metrics(
        scores,
        target,
        relevance=None,
        metrics=metrics,
        counts=None,
        excluded=excluded,
        ties=ties,
    )
