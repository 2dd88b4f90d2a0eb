"""Ranks of every target of a split: what they are worth, and how far two sets of them differ."""

import functools
import hashlib
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lcr_fast.data.prepared import PreparedData
from lcr_fast.metrics import parse_reward
from lcr_fast.storage import load_tensors, save_tensors

RANKS = "ranks.safetensors"
_KIND = "ranks"
CUTS = (1, 5, 10, 20)
_DRAWS = 1000
_KEPT_USERS = 1000  # of so many at most the draws are kept, 8 MB
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def rank_metrics(ranks: NDArray, cuts: Sequence[int] = CUTS) -> dict[str, NDArray]:
    """HR@k and NDCG@k for each cut k, and MRR, of every ranked target (rank > 0): [n] arrays.

    With one relevant item HR@k = [rank <= k], NDCG@k = HR@k / log2(rank + 1), MRR = 1 / rank.
    """
    ranks = ranks[ranks > 0].astype(np.float64)
    gain = 1 / np.log2(ranks + 1)
    metrics = {f"hr@{k}": (ranks <= k).astype(np.float64) for k in cuts}
    metrics |= {f"ndcg@{k}": np.where(ranks <= k, gain, 0.0) for k in cuts}
    return metrics | {"mrr": 1 / ranks}


def weighted_metric(ranks: NDArray, metric: str) -> NDArray:
    """Measure every ranked target by ``hr@k``, ``ndcg@k``, ``mrr`` or a weighted sum of them: [n].

    Raises ValueError for anything else.
    """
    terms = parse_reward(metric)
    measured = rank_metrics(ranks, cuts_of(name for _, name in terms))
    return np.sum([weight * measured[name] for weight, name in terms], 0)


def cuts_of(metrics: Iterable[str]) -> tuple[int, ...]:
    """List the cuts k of metrics, each once."""
    return tuple(dict.fromkeys(int(k) for _, at, k in (m.partition("@") for m in metrics) if at))


class Interval(NamedTuple):
    """A mean with its confidence interval, which one value alone does not have: NaN."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(
    values: NDArray, *, level: float = 0.95, draws: int = _DRAWS, seed: int = 0
) -> Interval:
    """Mean of a per-user metric [n] with its percentile bootstrap interval over users.

    One user alone has no interval (NaN), and none has no mean either.
    """
    return _intervals(values[:, None], _bootstrap_means(values[:, None], draws, seed), level)[0]


def _bootstrap_means(values: NDArray, draws: int = _DRAWS, seed: int = 0) -> NDArray:
    """Means of several metrics [n, M] over resampled users, the same for all: [draws, M]."""
    n, n_metrics = values.shape
    means = np.full((draws, n_metrics), np.nan)
    if not n:
        return means
    counts = _kept_counts(n, draws, seed) if n <= _KEPT_USERS else _counts(n, draws, seed)
    for draw, of_users in enumerate(counts):
        means[draw] = of_users @ values
    return means / n


def _counts(n: int, draws: int, seed: int) -> Iterator[NDArray]:
    """Count how often each of n users is drawn: [n] a draw."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.bincount(rng.integers(n, size=n), minlength=n).astype(float)


@functools.lru_cache(maxsize=8)  # every model, metric and group of as many users asks for them
def _kept_counts(n: int, draws: int, seed: int) -> NDArray:
    return np.stack(list(_counts(n, draws, seed)))


def _intervals(values: NDArray, means: NDArray, level: float = 0.95) -> list[Interval]:
    """Give metrics [n, M] the percentile intervals of their resampled means [draws, M]."""
    n, n_metrics = values.shape
    if not n:
        return [Interval(math.nan, math.nan, math.nan, 0)] * n_metrics
    low, high = _quantiles(means, level, n)
    return [
        Interval(float(mean), float(lo), float(hi), n)
        for mean, lo, hi in zip(values.mean(0), low, high, strict=True)
    ]


def _quantiles(means: NDArray, level: float, fewest: int) -> NDArray:
    """Low and high ends of resampled means [draws, M]; NaN where one user is all there is."""
    if fewest < 2:  # drawn again and again it is the same
        return np.full((2, means.shape[1]), np.nan)
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)


def across_seeds(values: Iterable[float]) -> Interval:
    """Mean with its 95 % interval by Student's t; one value alone has no interval (NaN)."""
    values = list(values)
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    df = n - 1
    # Beyond the table, the expansion of t about the normal quantile.
    t = _T95[df - 1] if df <= len(_T95) else 1.96 + 2.372 / df + 2.82 / df**2
    half = t * float(np.std(values, ddof=1)) / math.sqrt(n)  # which NaN passes
    return Interval(mean, mean - half, mean + half, n)


def samples_digest(data: PreparedData, split: str) -> str:
    """Name what a split asks for: its targets, their candidates and the size of the catalogue."""
    digest = hashlib.sha256(str(data.n_items).encode())
    for name in ("users", "items", "times", "negatives", "impression_offsets", "impressions"):
        array = data.arrays.get(f"{split}_{name}")
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Ranks:
    """The ranks of one split's targets by protocol, from 1; 0 where a target is not ranked.

    That is where there is nothing to rank it among, or where only some are ranked.
    """

    samples: str  # samples_digest of the split
    groups: dict[str, NDArray[np.bool_]]  # kinds of targets: members [n]
    by_protocol: dict[str, NDArray[np.int64]]  # [n]
    n_negatives: int = 0  # beside the target in the protocol "sampled"
    data: str | None = None  # fingerprint of the prepared data

    def rows(self, cuts: Sequence[int] = CUTS) -> list[dict[str, Any]]:
        """Measure by protocol, group and metric: rows of these with mean, low, high and n.

        The intervals are those of :func:`bootstrap`.
        """
        rows = []
        for protocol, ranks in self.by_protocol.items():
            for group, member in self.groups.items():
                measured = rank_metrics(ranks[member], cuts)
                values = np.stack(list(measured.values()), 1)
                intervals = _intervals(values, _bootstrap_means(values))
                for metric, interval in zip(measured, intervals, strict=True):
                    key = {"protocol": protocol, "targets": group, "metric": metric}
                    rows.append({**key, **interval._asdict()})
        return rows

    def restricted(self, to: NDArray[np.bool_]) -> "Ranks":
        """Keep the members of every group that a mask [n] marks."""
        return replace(self, groups={name: member & to for name, member in self.groups.items()})

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {f"group.{name}": torch.from_numpy(m) for name, m in self.groups.items()}
        tensors |= {f"rank.{name}": torch.from_numpy(r) for name, r in self.by_protocol.items()}
        tensors = {n: t if t.dtype == torch.bool else t.int() for n, t in tensors.items()}
        # A safetensors file keeps no order.
        info = {
            "samples": self.samples,
            "groups": list(self.groups),
            "protocols": list(self.by_protocol),
            "n_negatives": self.n_negatives,
            "data": self.data,
        }
        save_tensors(path, _KIND, tensors, info)

    @classmethod
    def load(cls, path: Path) -> "Ranks":
        """Read what :meth:`save` wrote; ValueError with one sentence on anything else."""
        tensors, info = load_tensors(path, _KIND)
        return cls(
            info["samples"],
            {name: tensors[f"group.{name}"].numpy() for name in info["groups"]},
            {name: tensors[f"rank.{name}"].long().numpy() for name in info["protocols"]},
            info["n_negatives"],
            info["data"],
        )


class Difference(NamedTuple):
    """The mean difference of a metric, with two intervals that ask two questions."""

    mean: float
    low: float  # over users: would other users of these models show it? NaN for one user
    high: float
    n: int  # users
    seeds_low: float  # over seeds: would other trainings show it? NaN for one pair
    seeds_high: float
    seeds: int


def spread(values: NDArray) -> Difference:
    """Mean of the same users' values or differences, [seeds, n], with both intervals."""
    users, seeds = bootstrap(values.mean(0)), across_seeds(values.mean(1))
    return Difference(*users, seeds.low, seeds.high, seeds.n)


def differences(
    pairs: Sequence[tuple[Ranks, Ranks]], cuts: Sequence[int] = CUTS
) -> list[dict[str, Any]]:
    """Compare first to second ranks user by user, a pair a seed: rows as :meth:`Ranks.rows`.

    A row holds protocol, targets, metric and a :class:`Difference`, over the targets that both of a
    pair rank and the protocols that all have. Over users: the percentile bootstrap of each user's
    difference, averaged over the pairs that have the same samples; pairs of other samples are
    resampled on their own. Over seeds: Student's t of the pairs' means. Raises ValueError where the
    two of a pair rank different samples.
    """
    for first, second in pairs:
        if first.samples != second.samples:
            raise ValueError("the ranks are not of the same samples")
    rows = []
    first = pairs[0][0]
    metrics = tuple(rank_metrics(np.ones(1), cuts))
    for protocol in first.by_protocol:
        if not all(protocol in ranks.by_protocol for pair in pairs for ranks in pair):
            continue
        both = _ranked_by_all(pairs, protocol)
        for group in first.groups:
            columns = [
                _difference_columns(*pair, protocol, group, both[pair[0].samples], cuts)
                for pair in pairs
            ]
            for metric, values in zip(metrics, _differences(pairs, columns), strict=True):
                key = {"protocol": protocol, "targets": group, "metric": metric}
                rows.append({**key, **values._asdict()})
    return rows


def _ranked_by_all(
    pairs: Sequence[tuple[Ranks, Ranks]], protocol: str
) -> dict[str, NDArray[np.bool_]]:
    """Mark the targets that all ranks of the same samples rank: masks [n] by samples."""
    marks: dict[str, NDArray[np.bool_]] = {}
    for ranks in (ranks for pair in pairs for ranks in pair):
        ranked = ranks.by_protocol[protocol] > 0
        marks[ranks.samples] = marks.get(ranks.samples, True) & ranked
    return marks


def _difference_columns(
    first: Ranks,
    second: Ranks,
    protocol: str,
    group: str,
    ranked: NDArray[np.bool_],
    cuts: Sequence[int],
) -> NDArray:
    """Differences of all metrics, user by user, of the ``ranked`` targets: [n, M]."""
    kept = ranked & first.groups[group]
    mine, theirs = (
        np.stack(list(rank_metrics(ranks.by_protocol[protocol][kept], cuts).values()), 1)
        for ranks in (first, second)
    )
    return mine - theirs


def _differences(pairs: Sequence[tuple[Ranks, Ranks]], columns: list[NDArray]) -> list[Difference]:
    """Give every column [n, M] of all pairs its difference; a pair without users has no say."""
    n_metrics = columns[0].shape[1]
    there = [(first, v) for (first, _), v in zip(pairs, columns, strict=True) if len(v)]
    if not there:
        nothing = math.nan
        return [Difference(nothing, nothing, nothing, 0, nothing, nothing, 0)] * n_metrics
    of_samples: dict[str, list[NDArray]] = {}
    for first, values in there:
        of_samples.setdefault(first.samples, []).append(values)
    means = np.zeros((_DRAWS, n_metrics))
    n = 0
    for seed, group in enumerate(of_samples.values()):
        values = np.mean(group, 0)
        means += len(group) / len(there) * _bootstrap_means(values, seed=seed)
        n += len(values)
    low, high = _quantiles(means, 0.95, min(len(group[0]) for group in of_samples.values()))
    found = []
    for column in range(n_metrics):
        spread = across_seeds(float(values[:, column].mean()) for _, values in there)
        found.append(
            Difference(
                spread.mean, float(low[column]), float(high[column]), n, spread.low, spread.high,
                spread.n,
            )
        )  # fmt: skip
    return found
