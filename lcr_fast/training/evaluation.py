"""Ranking evaluation: three candidate sets, kinds of targets, the score that selects models."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lcr_fast.batch import Batch
from lcr_fast.data.batching import Batcher
from lcr_fast.data.prepared import PreparedData, Samples
from lcr_fast.data.segments import padded
from lcr_fast.model import LCRSER
from lcr_fast.ops.ranking import target_rank
from lcr_fast.reference.scoring import listed
from lcr_fast.training import distributed
from lcr_fast.training.baselines import TITLES, Baselines
from lcr_fast.training.ranks import Ranks, samples_digest, weighted_metric
from lcr_fast.training.scorers import CatalogueScore, Score, Scorer, model_scorer

PROTOCOLS = ("sampled", "catalogue", "impressions")
_CATALOGUE_BLOCK = 2048
_BATCH = 256
CATALOGUE_SECONDS = 120
# Pairs of a user and an item that a model of width 64 scores in a second on two cores. Not timed
# when it is used: all models of a table, on any machine, rank the same users.
_CATALOGUE_RATE = 1_000_000


def make_batcher(
    data: PreparedData,
    split: str,
    model: LCRSER | None,
    search_of: NDArray | None = None,
    trim: bool = True,
) -> Batcher:
    """Batch a split in a model's history lengths, or in short ones for what does not read them.

    Where the data goes on with ids that the model has no row for, the batches hold none of them:
    events and clicks of such items are skipped, such users, queries and terms are 0.
    ``search_of`` and ``trim`` as in :class:`~lcr_fast.data.batching.Batcher`.
    """
    if model is None:
        return Batcher(data, split, max_rec_len=1, max_search_len=1, max_clicks=1, max_terms=1)
    config = model.config
    return Batcher(
        data.without_items_above(config.n_items),
        split,
        max_rec_len=config.max_rec_len,
        max_search_len=config.max_search_len,
        max_clicks=config.max_clicks,
        max_terms=min(data.max_terms, config.max_terms),
        trim=trim,
        search_of=search_of,
        largest_ids=config.largest_ids,
    )


def rank_targets(
    scorer: Scorer,
    batcher: Batcher,
    protocol: str,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = _BATCH,
    backend: str = "auto",
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Rank targets of a split, from 1, ties against them; 0 where there is nothing to rank.

    A target unknown to the model is not ranked either, and an unknown negative is left out.

    - ``sampled``: the target and its stored negatives;
    - ``catalogue``: every item, without those the user has seen (the target always stays);
    - ``impressions``: the items shown with the target, 0 where the data has none.

    ``rows`` are the samples to rank, all of them by default; the others stay 0. Over the catalogue
    a progress bar shows on a terminal. Processes of one job share the work.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    samples = batcher.samples
    ranks = np.zeros(len(samples), dtype=np.int64)
    chosen = np.arange(len(samples)) if rows is None else rows
    chosen = chosen[samples.items[chosen] > 0]
    bar = tqdm(
        total=len(chosen),
        desc="ranking in the catalogue",
        unit="user",
        leave=False,
        disable=protocol != "catalogue" or not sys.stderr.isatty(),
    )
    share = distributed.current()
    with bar, torch.inference_mode():
        for start in share.blocks(len(chosen), batch_size):
            rows = chosen[start : start + batch_size]
            if protocol == "impressions":
                rows, candidates, columns = _shown(samples, rows)
                if not len(rows):
                    continue
            else:
                negatives = _stored(samples)[rows] if protocol == "sampled" else None
                candidates, columns = with_target(samples.items[rows], negatives)
            batch = batcher.gather(rows, candidates, columns).to(device)
            score = scorer(batch)
            if protocol == "catalogue":
                seen = torch.from_numpy(
                    padded_seen(batcher.data, samples.users[rows], samples.times[rows])
                ).to(device)
                # What another user clicked has its bonus here, and is not excluded.
                own_searches = batcher.search_of is None
                if own_searches and isinstance(score, CatalogueScore):
                    rank = score.target_rank(batch.candidates[:, 0], seen)
                else:
                    rank = _catalogue_rank(score, batch, seen, batcher.data.n_items)
            else:
                excluded = batch.candidates == 0
                scores = score(batch.candidates)
                _require_numbers(scores)
                rank = target_rank(scores, batch.target, excluded=excluded, backend=backend)
            ranks[rows] = rank.cpu().numpy()
            bar.update(share.count * len(rows))
    return share.united(ranks)


def sample_batches(
    model: LCRSER, batcher: Batcher, rows: NDArray | None = None, *, negatives: bool = False
) -> Iterator[Batch]:
    """Yield samples, all or the ``rows`` [n], in batches on the model's device.

    Their candidates are the target alone, in column 0, or its stored ``negatives`` too.
    """
    samples = batcher.samples
    rows = np.arange(len(samples)) if rows is None else rows
    stored = samples.negatives if negatives else None
    for start in range(0, len(rows), _BATCH):
        some = rows[start : start + _BATCH]
        chosen = with_target(samples.items[some], None if stored is None else stored[some])
        yield batcher.gather(some, *chosen).to(model.head.target_weight.device)


def with_target(targets: NDArray, negatives: NDArray | None) -> tuple[NDArray, NDArray]:
    """Put the target in column 0 before its negatives: candidates [b, C], target columns [b]."""
    column = targets[:, None]
    candidates = column if negatives is None else np.concatenate((column, negatives), 1)
    return candidates, np.zeros(len(targets), dtype=np.int64)


def _stored(samples: Samples) -> NDArray:
    """Give the stored negatives [n, N]; ValueError where there are none to rank a target among."""
    if samples.negatives is None:
        raise ValueError("only valid and test have stored negatives")
    if not samples.negatives.shape[1]:
        raise ValueError(
            "the data has no evaluation negatives, among which every model would be perfect: "
            "prepare it with --n-negatives of at least 1, or leave the protocol sampled out"
        )
    return samples.negatives


def _shown(samples: Samples, rows: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Look up what was shown with each target: rows [n], candidates [n, C], target columns [n]."""
    if samples.impression_offsets is None or samples.impressions is None:
        return rows[:0], np.zeros((0, 0)), rows[:0]
    start, end = samples.impression_offsets[rows], samples.impression_offsets[rows + 1]
    known = end > start
    rows, start, count = rows[known], start[known], (end - start)[known]
    candidates, _ = padded(samples.impressions, start, count, count.max(initial=1))
    return rows, candidates, (candidates == samples.items[rows, None]).argmax(1)


def padded_seen(data: PreparedData, users: NDArray, times: NDArray) -> NDArray[np.int64]:
    """List what each user [b] has seen before a time [b]: item ids [b, X], padded with 0."""
    offsets, items = data.seen.before(users, times)
    count = np.diff(offsets)
    return padded(items, offsets[:-1], count, count.max(initial=0))[0]


def _catalogue_rank(score: Score, batch: Batch, seen: Tensor, n_items: int) -> Tensor:
    """Rank candidate 0 among all unseen items, block by block: [B]."""
    target = batch.candidates[:, :1]
    target_score = score(target)  # [B, 1]
    _require_numbers(target_score)  # nothing would be ahead of NaN
    ahead = torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
    # The target is taken out of the blocks, so that it never competes with itself.
    hidden = torch.cat((seen, target), 1)
    for first in range(1, n_items + 1, _CATALOGUE_BLOCK):
        ids = torch.arange(first, min(first + _CATALOGUE_BLOCK, n_items + 1), device=batch.device)
        scores = score(ids.unsqueeze(0)).masked_fill(listed(ids, hidden), -torch.inf)
        _require_numbers(scores)
        ahead += ((scores >= target_score) & (scores > -torch.inf)).sum(1)
    return ahead + 1


def _require_numbers(scores: Tensor) -> None:
    if scores.isnan().any():
        raise ValueError("the model's scores hold NaN")


def strata(data: PreparedData, split: str) -> dict[str, NDArray[np.bool_]]:
    """Kinds of targets: repeats (already seen) or new, covered (a training target) or not."""
    samples = data.split(split)
    covered = data.train_target_count[samples.items] > 0
    return {
        "all": np.ones(len(samples), dtype=bool),
        "repeat": np.array(samples.repeat),
        "new": ~samples.repeat,
        "covered": covered,
        "uncovered": ~covered,
    }


def rank_split(
    scorer: Scorer,
    data: PreparedData,
    split: str = "test",
    *,
    model: LCRSER | None = None,
    protocols: Sequence[str] = PROTOCOLS,
    catalogue_users: int | None = None,
    search_of: NDArray | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Ranks:
    """Rank the targets of a split by every protocol that the data has candidates for.

    In the catalogue ``catalogue_users`` of them are ranked, as :func:`catalogue_rows` says.
    ``search_of`` gives samples the searches of others, as :func:`make_batcher` says. Raises
    ValueError for a split without samples.
    """
    if isinstance(protocols, str):
        raise ValueError(f"protocols must be a sequence of names, [{protocols!r}], got a text")
    batcher = make_batcher(data, split, model, search_of)
    if not len(batcher):
        raise ValueError(f"the data has no {split} samples")
    if not batcher.samples.items.any():
        raise ValueError(f"the model knows no {split} target: extend it first (lcr-fast extend)")
    some = catalogue_rows(data, split, catalogue_users)
    ranks = {
        protocol: rank_targets(
            scorer,
            batcher,
            protocol,
            device=device,
            backend=backend,
            rows=some if protocol == "catalogue" else None,
        )
        for protocol in protocols
    }
    return Ranks(
        samples_digest(data, split),
        strata(data, split),
        {protocol: found for protocol, found in ranks.items() if found.any()},
        batcher.samples.negatives.shape[1] if batcher.samples.negatives is not None else 0,
        data.manifest.get("fingerprint"),
    )


def check_protocols(data: PreparedData, split: str, protocols: Sequence[str]) -> None:
    """Raise ValueError where none of the protocols has candidates for any target of a split."""
    impressions = data.split(split).impressions
    if set(protocols) == {"impressions"} and (impressions is None or not len(impressions)):
        raise ValueError(f"the data has no impressions to rank {split} targets among")


def catalogue_rows(data: PreparedData, split: str, n: int | None = None) -> NDArray[np.int64]:
    """Choose the samples of a split that are ranked in the whole catalogue: rows, in their order.

    ``n`` of them, 0 for all; by default as many as two cores rank in ``CATALOGUE_SECONDS``. The
    choice is random but always the same, and that of a smaller n is part of that of a larger one.
    Raises ValueError for a negative n.
    """
    n_samples = len(data.split(split))
    if n is None:
        n = max(CATALOGUE_SECONDS * _CATALOGUE_RATE // data.n_items, 1)
    elif n < 0:
        raise ValueError(f"catalogue_users must be at least 1, or 0 for all, got {n}")
    elif not n:
        n = n_samples
    return np.sort(np.random.default_rng(0).permutation(n_samples)[:n])


def rank_model(model: LCRSER, data: PreparedData, split: str = "test", **options: Any) -> Ranks:
    """Rank with a model as :func:`rank_split` does, on the model's device."""
    model.eval()
    return rank_split(
        model_scorer(model),
        data,
        split,
        model=model,
        device=model.head.target_weight.device,
        **options,
    )


def rank_baselines(data: PreparedData, split: str = "test", **options: Any) -> dict[str, Ranks]:
    """Rank with every baseline of :mod:`lcr_fast.training.baselines`, by name.

    Options as :func:`rank_split`.
    """
    baselines = Baselines(data, split)
    return {name: rank_split(baselines.scorer(name), data, split, **options) for name in TITLES}


def validation_score(
    model: LCRSER, batcher: Batcher, metric: str = "ndcg@5", backend: str = "auto"
) -> float:
    """Mean of a metric over the target and its stored negatives, the number that selects models.

    ``metric`` as in :func:`~lcr_fast.training.ranks.weighted_metric`. There must be a sample.
    """
    model.eval()
    device = model.head.target_weight.device
    ranks = rank_targets(model_scorer(model), batcher, "sampled", device=device, backend=backend)
    return float(weighted_metric(ranks, metric).mean())


def chance_level(batcher: Batcher, metric: str = "ndcg@5") -> float:
    """Give the validation score that a scorer without knowledge exceeds once in a thousand times.

    Such a scorer puts the target at every rank alike: the metric's mean, and 3 standard errors.
    Raises ValueError as :func:`selecting_gains` does. There must be a sample.
    """
    gains = selecting_gains(batcher, metric)
    return float(gains.mean() + 3 * gains.std() / np.sqrt(len(batcher)))


def selecting_gains(batcher: Batcher, metric: str) -> NDArray[np.float64]:
    """Give what a metric says of every rank among the stored negatives: [N + 1].

    Raises ValueError where nothing can be chosen by it: without negatives to rank a target among,
    or with so few that all ranks are worth the same.
    """
    gains = weighted_metric(np.arange(1, _stored(batcher.samples).shape[1] + 2), metric)
    if not np.ptp(gains):
        raise ValueError(
            f"nothing can be chosen by {metric}: it is the same for every list of a target and "
            f"{len(gains) - 1} evaluation negatives"
        )
    return gains
