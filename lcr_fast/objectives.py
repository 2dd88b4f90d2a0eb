"""Phase-1 objectives: ranking losses and the target-aware contrastive loss (TCL).

They are in float32 at least, of halves and under ``torch.autocast`` too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lcr_fast.precision import high, without_autocast
from lcr_fast.profiling import ranged
from lcr_fast.reference import Streams
from lcr_fast.weights import REC, SEARCH


@ranged("loss")
def rank_loss(scores: Tensor, target: Tensor, kind: str = "bce") -> Tensor:
    """Rank the positive above the negatives: the mean over users, a scalar.

    ``scores`` [B, C], -inf where a candidate is padding; ``target`` int64 [B], the positive's
    column. With s+ the positive's score and s- the negatives':

        bce      mean over the valid candidates of  softplus(-s+), softplus(s-)     (default)
        softmax  -log softmax(s)[target]
        bpr      mean over the negatives of  softplus(s- - s+)

    Our reading: the paper's summary names a ranking loss only. Raises ValueError on another kind.
    """
    scores, column = high(scores), target.unsqueeze(-1)
    positive = scores.gather(-1, column)  # [B, 1]
    negative = scores.scatter(-1, column, -torch.inf)  # softplus(-inf) = 0 leaves the positive out
    n_negative = torch.isfinite(negative).sum(-1)
    if kind == "bce":
        loss = (F.softplus(-positive).squeeze(-1) + F.softplus(negative).sum(-1)) / (n_negative + 1)
    elif kind == "softmax":
        loss = scores.logsumexp(-1) - positive.squeeze(-1)
    elif kind == "bpr":
        loss = F.softplus(negative - positive).sum(-1) / n_negative.clamp(min=1)
    else:
        raise ValueError(f"kind must be bce, softmax or bpr, got {kind!r}")
    return loss.mean()


@ranged("loss")
def alignment(
    left: Tensor,  # [n, D]
    right: Tensor,  # [n, D]
    left_ids: Tensor,  # [n]
    right_ids: Tensor,  # [n]
) -> Tensor:
    """Bring the vectors of pairs together, against the other pairs' right sides: a scalar.

        mean over i of  -log softmax_j( sqrt(D) left_i^T right_j )[i]

    over the j = i and those with neither i's left nor its right id, which may be its partners too.
    The factor gives the products the scale of scores, where an encoded vector has norm sqrt(D).
    Our reading, after the same authors' UniSAR, which aligns queries with clicked items.
    """
    with without_autocast(left.device.type):
        logits = high(left) @ high(right).T * left.shape[-1] ** 0.5
    same = (left_ids.unsqueeze(1) == left_ids) | (right_ids.unsqueeze(1) == right_ids)
    same.fill_diagonal_(False)
    return -logits.masked_fill(same, -torch.inf).log_softmax(-1).diagonal().mean()


def distance(a: Tensor, b: Tensor, kind: str = "l2") -> Tensor:
    """Distance over the last axis: ``l2`` or ``cosine`` (1 - cosine)."""
    if kind == "l2":
        # The norm's gradient at 0 is 0, so equal vectors are safe.
        return torch.linalg.vector_norm(a - b, dim=-1)
    if kind == "cosine":
        return 1 - F.cosine_similarity(a, b, dim=-1)
    raise ValueError(f"kind must be l2 or cosine, got {kind!r}")


@ranged("loss")
def tcl(
    pooled: Tensor,  # [B, K, 2, 2, D]
    lengths: Streams,
    target: Tensor,  # [B, D] e_t
    *,
    margin: float = 0.1,
    kind: str = "l2",
    detach_negative: bool = False,
) -> Tensor:
    """Target-aware contrastive loss (paper, Eq. 9; the formula is our reading), a scalar.

        mean over k = 1..K and x in {s, r} with the other stream non-empty of
        [ D(e_t, q_x(h_x^(k))) - D(e_t, q_x(a_x^(k))) + m ]_+

    with q_x the target-aware aggregation at the target: the state after the cross-attention is
    to be nearer the target than the state before it. ``pooled`` holds the q_x, as
    :func:`lcr_fast.reference.pool_steps` defines them. ``detach_negative`` stops the gradient
    through the second distance. A stream without events counts as m, without gradient, where the
    other has some. 0 where nothing counts (K = 0, or no user has an event).
    """
    target, pooled = high(target), high(pooled)
    before, after = distance(target[:, None, None, None], pooled, kind).unbind(2)  # [B, K, 2]
    if detach_negative:
        before = before.detach()
    there = torch.stack((lengths[SEARCH] > 0, lengths[REC] > 0), -1).unsqueeze(1)  # [B, 1, 2]
    counts = there.flip(-1).expand_as(after)
    # Of an empty stream both distances are |e_t|, whose gradients a detached one would not cancel.
    hinge = F.relu((after - before).masked_fill(~there, 0.0) + margin) * counts
    return hinge.sum() / counts.sum().clamp(min=1)
