"""Looks inside a trained model: what its searches are worth, its states, its attention."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.objectives import distance
from lcr_fast.reference import pool_steps
from lcr_fast.training.evaluation import PROTOCOLS, make_batcher, rank_model, sample_batches
from lcr_fast.training.ranks import differences
from lcr_fast.weights import REC, SEARCH


def exchanged_searches(data: PreparedData, split: str = "test", seed: int = 0) -> NDArray:
    """Deal the searches of a split's samples to each other: whose each sample shows, [n].

    Samples without searches stay without; all others change theirs, if there are two of them.
    """
    samples = data.split(split)
    search_of = np.arange(len(samples))
    order = np.random.default_rng(seed).permutation(np.flatnonzero(searched(data, split)))
    search_of[order] = np.roll(order, 1)
    return search_of


def searched(data: PreparedData, split: str) -> NDArray[np.bool_]:
    """Mark the samples of a split whose history has a search: [n]."""
    _, searches = data.history_lengths(split)
    return searches > 0


def search_effects(
    model: LCRSER,
    data: PreparedData,
    split: str = "test",
    protocols: Sequence[str] = PROTOCOLS,
) -> dict[str, list[dict[str, Any]]]:
    """Measure what a user's own searches are worth to a model that is not trained anew.

    Rows of :func:`~lcr_fast.training.ranks.differences` over the samples that have searches: with
    their own less with those of other users (``others``), and less without any (``none``). Not over
    the catalogue, where each would cost as much as the whole evaluation.
    """
    exchanged = exchanged_searches(data, split)
    protocols = [name for name in protocols if name != "catalogue"]
    own, others, none = (
        rank_model(model, data, split, protocols=protocols, search_of=search_of).restricted(
            searched(data, split)
        )
        for search_of in (None, exchanged, np.full(len(exchanged), -1))
    )
    return {"others": differences([(own, others)]), "none": differences([(own, none)])}


@torch.inference_mode()
def state_distances(model: LCRSER, data: PreparedData, split: str = "test") -> dict[str, Any]:
    """Distance of pooled states to the target per step (cf. the paper's Fig. 4 and 5).

    Mean Euclidean distance from e_t to q_x(h^(k)), k = 0..K, and to q_x(a^(k)), k = 1..K, for each
    stream, over users whose two streams both have events (no numbers where nobody has); pooling q
    is at the target.
    """
    sums: dict[str, Tensor] = {}
    n_users = 0
    model.eval()
    for batch in sample_batches(model, make_batcher(data, split, model)):
        states = model.states(batch)
        both = (batch.search_lengths > 0) & (batch.rec_lengths > 0)
        target = model.item_vectors(batch.candidates[:, 0])
        lengths = (batch.search_lengths, batch.rec_lengths)
        a, h = pool_steps(states, *lengths, model.target_keys(target)).unbind(2)  # [B, K, 2, D]
        pooled = (
            model.pool(states.h[0][x], lengths[x], target.unsqueeze(1), x)[0] for x in (SEARCH, REC)
        )
        h = torch.cat((torch.stack(tuple(pooled), 2), h), 1)  # [B, K + 1, 2, D]
        for name, vectors in (("h", h), ("a", a)):
            distances = distance(target[:, None, None], vectors)[both]  # [b, n, 2]
            total = distances.double().sum(0).cpu()  # [n, 2]
            sums[name] = sums[name] + total if name in sums else total
        n_users += int(both.sum())
    means = {name: total / max(n_users, 1) for name, total in sums.items()}
    return {
        f"{name}_{stream}": mean[:, x].tolist() if len(mean) and n_users else []
        for name, mean in means.items()
        for x, stream in ((SEARCH, "search"), (REC, "rec"))
    }


class RelevanceShare(NamedTuple):
    """Attention mass on relevant searches, over users with both relevant and noise searches."""

    chance: float  # share of relevant searches among the shown ones
    target: float  # of the target-aware aggregation at the target
    cross: float  # of the recommendation stream's cross-attention; NaN without a step
    n: int


@torch.inference_mode()
def relevance_share(model: LCRSER, data: PreparedData, split: str = "test") -> RelevanceShare:
    """Measure how much attention goes to searches that the data knows to be relevant.

    Cross-attention is averaged over steps, heads and the events that query. NaN where the data
    has no ground truth.
    """
    model.eval()
    batcher = make_batcher(data, split, model)
    totals = np.zeros(3)
    n = 0
    for batch in sample_batches(model, batcher):
        states = model.states(batch)
        truth = batcher.relevant(batch.row.cpu().numpy(), batch.search_queries.shape[1])
        relevant = torch.from_numpy(truth == 1).to(batch.device)  # [B, L_s]
        noise = torch.from_numpy(truth == 0).to(batch.device)
        keep = relevant.any(1) & noise.any(1) & (batch.rec_lengths > 0)
        if not keep.any():
            continue
        target = model.item_vectors(batch.candidates[:, :1])
        search = model.read(states.h[0], states.h[-1])[SEARCH]
        alpha = model.pool(search, batch.search_lengths, target, SEARCH)[1][:, 0]  # [B, L_s]
        n_relevant = relevant.sum(1)
        shares = [n_relevant / (n_relevant + noise.sum(1)), (alpha * relevant).sum(1)]
        looks = [pair[REC] for pair in model.cross_attention(states, batch)]
        if looks:
            mass = torch.stack(looks).mean((0, 2)) @ relevant.to(alpha.dtype).unsqueeze(-1)
            queries = torch.arange(mass.shape[1], device=mass.device) < batch.rec_lengths[:, None]
            shares.append((mass.squeeze(-1) * queries).sum(1) / queries.sum(1).clamp(min=1))
        else:
            shares.append(torch.full_like(shares[0], float("nan")))
        totals += [float(share[keep].double().sum()) for share in shares]
        n += int(keep.sum())
    chance, at_target, cross = totals / n if n else np.full(3, np.nan)
    return RelevanceShare(float(chance), float(at_target), float(cross), n)
