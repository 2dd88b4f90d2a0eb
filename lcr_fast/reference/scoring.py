"""Target-aware aggregation and the head, for given candidates and over the whole catalogue."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lcr_fast.reference.transformer import Streams, accumulator, key_bias, zero_padding
from lcr_fast.weights import ScoringWeights

_CATALOGUE_BLOCK = 1024  # items scored at once, which bounds the memory


def aggregate(
    states: Tensor,  # [..., L, D]
    lengths: Tensor,  # [...]
    candidates: Tensor,  # [..., C, D] item vectors
    target_weight: Tensor,  # [D, D] W_x
) -> tuple[Tensor, Tensor]:
    """Target-aware aggregation (paper) of one stream for every candidate.

        alpha_ij = softmax_j( h_j^T W e_i );   z(i) = sum_j alpha_ij h_j     (0 without an event)

    Computed as (E W^T) H^T, so a history is never repeated per candidate.
    Returns z [..., C, D] and alpha [..., C, L].
    """
    acc = accumulator(states)
    h = zero_padding(states.to(acc), lengths)
    keys = F.linear(candidates.to(acc), target_weight.to(acc))  # [..., C, D] W e_i
    logits = keys @ h.transpose(-1, -2) + key_bias(lengths, h.shape[-2], acc)
    alpha = logits.softmax(-1)  # [..., C, L]
    return (alpha @ h).to(states.dtype), alpha.to(states.dtype)


def score(
    search: Tensor,  # [..., L_s, D] h_s^(K)
    rec: Tensor,  # [..., L_r, D] h_r^(K)
    search_lengths: Tensor,  # [...]
    rec_lengths: Tensor,  # [...]
    candidates: Tensor,  # [..., C, D] item vectors
    user: Tensor | None,  # [..., D] user vector
    weights: ScoringWeights,
    *,
    masks: tuple[Tensor, ...] = (),  # [..., C, H1], [..., C, H2]
) -> Tensor:
    """Score every candidate from both streams.

        y(i) = MLP( z_r(i); z_s(i); e_i; e_u )       ReLU, dropout after each hidden layer
        y(i) = (z_r(i) + z_s(i))^T e_i               if the weights hold no MLP
        y(i) = MLP(...) + (z_r(i) + z_s(i))^T e_i    if they hold one and ``dot`` (our reading)

    Returns [..., C] in the states' dtype.
    """
    acc = accumulator(search)
    w_s, w_r = weights.target_weight
    z_s, _ = aggregate(search.to(acc), search_lengths, candidates, w_s)  # [..., C, D]
    z_r, _ = aggregate(rec.to(acc), rec_lengths, candidates, w_r)  # [..., C, D]
    items = candidates.to(acc)
    dot = ((z_r + z_s) * items).sum(-1) if weights.dot or not weights.mlp_weights else None
    if not weights.mlp_weights:
        assert dot is not None
        return dot.to(search.dtype)
    layers = [
        (w.to(acc), b.to(acc)) for w, b in zip(weights.mlp_weights, weights.mlp_biases, strict=True)
    ]
    w_in, b_in = layers[0]
    n_pair, n_item = 2 * items.shape[-1], 3 * items.shape[-1]
    # Trajectories share the item's part of the first layer, candidates share the user's.
    shared = F.linear(items, w_in[:, n_pair:n_item], b_in)  # [..., C, H1]
    if user is not None:
        shared = shared + F.linear(user.to(acc), w_in[:, n_item:]).unsqueeze(-2)
    x = F.linear(torch.cat((z_r, z_s), -1), w_in[:, :n_pair]) + shared  # [..., C, H1]
    for i, (w, b) in enumerate(layers[1:]):
        x = F.relu(x) if not masks else F.relu(x) * masks[i]
        x = F.linear(x, w, b)
    y = x.squeeze(-1)
    return (y if dot is None else y + dot).to(search.dtype)


def seen_bonus(
    candidates: Tensor,  # [B or 1, C] ids, 0 is padding
    seen: Streams,  # clicked ids [B, n_s] and ids of events [B, n_r], padded with 0
    bonus: Tensor,  # [2]
) -> Tensor:
    """Add up what candidates gain by standing in the histories (our reading): [B, C].

        bonus_s [i was clicked] + bonus_r [i is an event]

    The steps know the item of an event by the likeness of vectors alone, which is little where an
    item has few training events. What padding gains means nothing: its score is -inf anyway.
    """
    total = bonus.new_zeros(())
    for gain, items in zip(bonus, seen, strict=True):
        # One more column, of padding: no list is empty.
        ordered = F.pad(items, (1, 0)).sort(1).values
        wanted = candidates.expand(items.shape[0], -1).contiguous()
        place = torch.searchsorted(ordered, wanted).clamp(max=ordered.shape[1] - 1)
        total = total + gain * (ordered.gather(1, place) == wanted)
    return total


def _catalogue_scores(
    search: Tensor, rec: Tensor, search_lengths: Tensor, rec_lengths: Tensor, items: Tensor,
    user: Tensor | None, weights: ScoringWeights,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Score all items but row 0 block by block: (ids [c], scores [B, c]), in order of id."""
    for first in range(1, len(items), _CATALOGUE_BLOCK):
        block = items[first : first + _CATALOGUE_BLOCK]
        ids = torch.arange(first, first + len(block), device=items.device)
        yield (
            ids,
            score(
                search, rec, search_lengths, rec_lengths, block.unsqueeze(0).to(search.dtype), user,
                weights,
            ),
        )  # fmt: skip


def listed(ids: Tensor, exclude: Tensor) -> Tensor:
    """Mark which of the ids [c] each user excludes: [B, X] -> bool [B, c]."""
    column = exclude - ids[0]
    outside = (column < 0) | (column >= len(ids))
    # A spare last column takes what lies outside this block.
    marks = torch.zeros(exclude.shape[0], len(ids) + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter(1, column.masked_fill(outside, len(ids)), True)[:, :-1]


def score_topk(
    search: Tensor,  # [B, L_s, D]
    rec: Tensor,  # [B, L_r, D]
    search_lengths: Tensor,  # [B]
    rec_lengths: Tensor,  # [B]
    items: Tensor,  # [I + 1, D], row 0 is padding
    user: Tensor | None,  # [B, D]
    weights: ScoringWeights,
    k: int,
    exclude: Tensor,  # [B, X] ids; those outside 1..I are nothing
) -> tuple[Tensor, Tensor]:
    """Find the k best items of the catalogue for every user: ids [B, k] and scores [B, k].

    The best first, of equal scores the lower id; excluded items and scores of -inf do not count.
    What is missing is id 0 with score -inf. A user with a NaN score gets NaN scores.
    """
    B = search.shape[0]
    top_ids = torch.zeros(B, k, dtype=torch.int64, device=search.device)
    top = torch.full((B, k), -torch.inf, dtype=search.dtype, device=search.device)
    bad = torch.zeros(B, 1, dtype=torch.bool, device=search.device)
    for ids, scores in _catalogue_scores(
        search, rec, search_lengths, rec_lengths, items, user, weights
    ):
        bad = bad | scores.isnan().any(1, keepdim=True)
        scores = scores.masked_fill(listed(ids, exclude), -torch.inf)
        # Stable: earlier columns, which hold lower ids, win ties.
        merged, order = torch.cat((top, scores), 1).sort(dim=1, descending=True, stable=True)
        pool = torch.cat((top_ids, ids.expand(B, -1)), 1)
        top, top_ids = merged[:, :k], pool.gather(1, order[:, :k])
    return top_ids.masked_fill(top == -torch.inf, 0), top.masked_fill(bad, torch.nan)


def score_rank(
    search: Tensor,  # [B, L_s, D]
    rec: Tensor,  # [B, L_r, D]
    search_lengths: Tensor,  # [B]
    rec_lengths: Tensor,  # [B]
    items: Tensor,  # [I + 1, D], row 0 is padding
    user: Tensor | None,  # [B, D]
    weights: ScoringWeights,
    target: Tensor,  # [B] ids
    bonus: Tensor,  # [B] added to the target's score alone
    exclude: Tensor,  # [B, X] ids; those outside 1..I are nothing
) -> Tensor:
    """Find the target's place among all items, from 1, ties before it: [B], -1 for a NaN.

    1 + the number of other items, neither excluded nor of score -inf, that score at least as high.
    Two passes: a product of another shape may round the target's score differently.
    """
    arguments = (search, rec, search_lengths, rec_lengths, items, user, weights)
    goal = target.unsqueeze(1)  # [B, 1]
    of_target = torch.full_like(goal, -torch.inf, dtype=search.dtype)
    bad = torch.zeros_like(target, dtype=torch.bool)
    for ids, scores in _catalogue_scores(*arguments):
        found = (ids == goal).any(1)
        value = scores.gather(1, (goal - ids[0]).clamp(0, len(ids) - 1))
        of_target = torch.where(found.unsqueeze(1), value, of_target)
        bad = bad | scores.isnan().any(1)
    of_target = of_target + bonus.unsqueeze(1)
    bad = bad | ((target > 0) & of_target.isnan().squeeze(1))
    ahead = torch.zeros_like(target)
    for ids, scores in _catalogue_scores(*arguments):
        competes = ~listed(ids, torch.cat((exclude, goal), 1)) & (scores > -torch.inf)
        ahead += (competes & (scores >= of_target)).sum(1)
    return (ahead + 1).masked_fill(bad, -1)
