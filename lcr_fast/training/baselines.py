"""Baselines that count: what a model must beat before it can be said to have learned.

Each gives every item of the catalogue a score: an explicit one to the few items that a user's
history or its counts speak of, a multiple of popularity to all others. Smoothed by ``MU``
pseudo-observations of the next coarser counts,

    popularity   p(i)     = (n(i) + 1) / (n + I)
    last_query   p(i | q) = (n(q, i) + MU p(i | terms of q)) / (n(q) + MU)
                 p(i | terms) = mean over the terms t of q of  (n(t, i) + MU p(i)) / (n(t) + MU)
    last_item    p(i | j) = (n(j, i) + MU p(i)) / (n(j) + MU)
    recency      place of i's last occurrence in the history, 0 for all other items

q is the user's last search and j the last event of the recommendation history, both strictly
before the target's time; without one, what it is smoothed by remains. n(q, i) counts the searches
of q after which a user acted on i before the next search, in an event or in a click, each search
once; n(j, i) the times that i follows j in a history. ``recency+X`` ranks the history by recency
and all other items by X.

Counts know nothing at or after a user's first held-out target; histories are read whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcr_fast.batch import Batch
from lcr_fast.data.prepared import PreparedData
from lcr_fast.data.segments import lower_bound, offsets_of, owners, ranges

MU = 1.0

TITLES = {
    "popularity": "popularity",
    "recency": "recency",
    "last_query": "items after the last query",
    "last_item": "items after the last item",
    "recency+popularity": "recency, then popularity",
    "recency+last_query": "recency, then after the last query",
    "recency+last_item": "recency, then after the last item",
}


class _Evidence(NamedTuple):
    """Scores of B users: explicit ones, and the weight of popularity for every item."""

    rows: NDArray  # [n] users of the explicit scores
    items: NDArray  # [n]; a (user, item) may occur again, and counts with its sum
    values: NDArray  # float64 [n]
    weight: NDArray  # float64 [B]

    def then(self, other: "_Evidence") -> "_Evidence":
        """Rank by this evidence, and what it does not speak of by another below 1."""
        return _Evidence(
            np.concatenate((self.rows, other.rows)),
            np.concatenate((self.items, other.items)),
            np.concatenate((self.values, other.values)),
            other.weight,
        )


@dataclass(frozen=True)
class _Counts:
    """n(context, item), by context; contexts without a count have no entries."""

    offsets: NDArray  # [contexts + 1]
    items: NDArray
    counts: NDArray  # float64

    @classmethod
    def of(cls, contexts: NDArray, items: NDArray, weights: NDArray, n: int) -> "_Counts":
        """Add up weighted (context, item) pairs; contexts lie in 0..n-1."""
        size = int(items.max(initial=0)) + 1
        keys, place = np.unique(contexts.astype(np.int64) * size + items, return_inverse=True)
        contexts, items = np.divmod(keys, size)
        return cls(offsets_of(contexts, n), items, np.bincount(place, weights, len(keys)))

    @cached_property
    def totals(self) -> NDArray:
        return np.diff(np.concatenate(([0.0], np.cumsum(self.counts)))[self.offsets])


class _SparseScore:
    """Scores of one batch; ranks the catalogue by counting, not by scoring every item."""

    def __init__(
        self,
        evidence: _Evidence,
        prior: NDArray,  # [I + 1]
        levels: tuple[NDArray, NDArray],  # distinct values of the prior, and how often each occurs
        device: torch.device,
    ) -> None:
        self.weight, self.prior, self.levels = evidence.weight, prior, levels
        self.device = device
        self.keys, place = np.unique(self._key(evidence.rows, evidence.items), return_inverse=True)
        self.values = np.bincount(place, evidence.values, len(self.keys))

    def _key(self, rows: NDArray, items: NDArray) -> NDArray:
        return rows * len(self.prior) + items

    def _scores(self, rows: NDArray, items: NDArray) -> NDArray:
        """Score items of users; both broadcast."""
        scores = self.weight[rows] * self.prior[items]
        if not len(self.keys):
            return scores
        keys = self._key(rows, items)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return scores + np.where(self.keys[place] == keys, self.values[place], 0.0)

    def __call__(self, ids: Tensor) -> Tensor:
        rows = np.arange(len(self.weight))[:, None]
        return torch.from_numpy(self._scores(rows, ids.cpu().numpy())).to(self.device)

    def target_rank(self, target: Tensor, exclude: Tensor) -> Tensor:
        """Rank ``target`` [B] among all items but ``exclude`` [B, X], ties before it: [B]."""
        rows = np.arange(len(self.weight))
        goal = target.cpu().numpy()
        limit = self._scores(rows, goal)
        hidden = np.concatenate((exclude.cpu().numpy(), goal[:, None]), 1)
        hidden = np.unique(self._key(rows[:, None], hidden)[hidden > 0])
        # Items without an explicit score: all of them, less those that have one or are hidden.
        levels, sizes = self.levels
        ahead = (self.weight[:, None] * levels >= limit[:, None]) @ sizes
        others = np.union1d(self.keys, hidden)
        row, item = np.divmod(others, len(self.prior))
        ahead -= np.bincount(
            row, self.weight[row] * self.prior[item] >= limit[row], len(rows)
        ).astype(np.int64)
        row, item = np.divmod(np.setdiff1d(self.keys, hidden), len(self.prior))
        ahead += np.bincount(row, self._scores(row, item) >= limit[row], len(rows)).astype(np.int64)
        return torch.from_numpy(ahead + 1).to(self.device)


class Baselines:
    """All baselines of one split of a data set; counts are made when they are first needed."""

    def __init__(self, data: PreparedData, split: str = "test") -> None:
        self.data, self.samples = data, data.split(split)

    def scorer(self, name: str) -> Callable[[Batch], _SparseScore]:
        """Score the split's samples, which a batch names by ``Batch.row``.

        Raises ValueError for a name that is not in ``TITLES``.
        """
        if name not in TITLES:
            raise ValueError(f"baseline must be one of {', '.join(TITLES)}, got {name!r}")
        parts = [getattr(self, f"_{part}") for part in name.split("+")]

        def read(batch: Batch) -> _SparseScore:
            rows = batch.row.cpu().numpy()
            evidence = parts[0](rows)
            for part in parts[1:]:
                evidence = evidence.then(part(rows))
            return _SparseScore(evidence, self._prior, self._levels, batch.device)

        return read

    # -- evidence, of the samples ``rows`` [B] ----------------------------------------------------

    def _popularity(self, rows: NDArray) -> _Evidence:
        none = np.zeros(0, dtype=np.int64)
        return _Evidence(none, none, np.zeros(0), np.ones(len(rows)))

    def _recency(self, rows: NDArray) -> _Evidence:
        start = self.data.rec_offsets[self.samples.users[rows]]
        length = self.samples.rec_end[rows] - start
        items = self.data.rec_items[ranges(start, length)].astype(np.int64)
        owner = np.repeat(np.arange(len(rows)), length)
        place = ranges(np.zeros_like(length), length) + 1.0
        # The last occurrence of an item is the first in the reverse order.
        size = len(self._prior)
        keys, first = np.unique((owner * size + items)[::-1], return_index=True)
        owner, items = np.divmod(keys, size)
        return _Evidence(owner, items, place[::-1][first], np.zeros(len(rows)))

    def _last_query(self, rows: NDArray) -> _Evidence:
        data, users = self.data, self.samples.users[rows]
        last = self.samples.search_end[rows] - 1
        found = np.flatnonzero(last >= data.search_offsets[users])
        queries = data.search_queries[last[found]].astype(np.int64)
        query_rows, items, values, of_query = _smoothed(self._after_query, queries)
        start = self._query_terms.offsets[queries]
        length = self._query_terms.offsets[queries + 1] - start
        terms = self._query_terms.items[ranges(start, length)]
        term_rows, term_items, term_values, of_term = _smoothed(self._after_term, terms)
        # From places among the terms to places among the queries.
        owner = np.repeat(np.arange(len(queries)), length)
        term_rows = owner[term_rows]
        term_values = of_query[term_rows] * term_values / length[term_rows]
        left = np.where(length > 0, 0.0, 1.0) + np.bincount(
            owner, of_term / np.maximum(length, 1)[owner], len(queries)
        )
        weight = np.ones(len(rows))
        weight[found] = of_query * left
        return _Evidence(
            found[np.concatenate((query_rows, term_rows))],
            np.concatenate((items, term_items)),
            np.concatenate((values, term_values)),
            weight,
        )

    def _last_item(self, rows: NDArray) -> _Evidence:
        users = self.samples.users[rows]
        last = self.samples.rec_end[rows] - 1
        found = np.flatnonzero(last >= self.data.rec_offsets[users])
        items = self.data.rec_items[last[found]]
        owner, items, values, left = _smoothed(self._after_item, items)
        weight = np.ones(len(rows))
        weight[found] = left
        return _Evidence(found[owner], items, values, weight)

    # -- counts of the training period ------------------------------------------------------------

    @cached_property
    def _prior(self) -> NDArray:
        """p(i) of every item; row 0 is padding."""
        counts = np.array(self.data.item_count, dtype=np.float64)
        return (counts + 1) / (counts.sum() + self.data.n_items)

    @cached_property
    def _levels(self) -> tuple[NDArray, NDArray]:
        values, sizes = np.unique(self._prior[1:], return_counts=True)
        return values, sizes

    @cached_property
    def _known_events(self) -> tuple[NDArray, NDArray]:
        """Events of the training period, in order, and their users."""
        data = self.data
        users = owners(data.rec_offsets)
        known = np.flatnonzero(data.rec_times < data.train_end[users])
        return known, users[known]

    @cached_property
    def _after_query(self) -> _Counts:
        data = self.data
        events, users = self._known_events
        start = data.search_offsets[users]
        search = lower_bound(
            data.search_times, start, data.search_offsets[users + 1], data.rec_times[events]
        )
        under = search > start
        searches, items = search[under] - 1, data.rec_items[events[under]]
        clicked = owners(data.click_offsets)
        known = data.click_times < data.train_end[owners(data.search_offsets)[clicked]]
        # Some logs give a click as an event too: a search counts once for an item.
        size = len(self._prior)
        keys = np.unique(
            np.concatenate(
                (searches * size + items, clicked[known] * size + data.click_items[known])
            )
        )
        searches, items = np.divmod(keys, size)
        return _Counts.of(
            data.search_queries[searches], items, np.ones(len(items)), data.n_queries + 1
        )

    @cached_property
    def _query_terms(self) -> _Counts:
        """The distinct terms of every query."""
        data = self.data
        queries = owners(data.query_term_offsets)
        ones = np.ones(len(queries))
        return _Counts.of(queries, data.query_terms, ones, data.n_queries + 1)

    @cached_property
    def _after_term(self) -> _Counts:
        pairs, terms = self._after_query, self._query_terms
        queries = owners(pairs.offsets)
        length = np.diff(terms.offsets)[queries]
        place = np.repeat(np.arange(len(queries)), length)
        contexts = terms.items[ranges(terms.offsets[queries], length)]
        return _Counts.of(contexts, pairs.items[place], pairs.counts[place], self.data.n_terms + 1)

    @cached_property
    def _after_item(self) -> _Counts:
        events, users = self._known_events
        items = self.data.rec_items[events]
        follows = users[1:] == users[:-1]
        before, after = items[:-1][follows], items[1:][follows]
        return _Counts.of(before, after, np.ones(len(after)), len(self._prior))


def _smoothed(counts: _Counts, contexts: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Look up n(c, i) / (n(c) + MU) for contexts [n]; and what is left to the coarser counts, [n].

    Returns places among the contexts, items and values, an entry a count; and MU / (n(c) + MU).
    """
    total = counts.totals[contexts] + MU
    length = counts.offsets[contexts + 1] - counts.offsets[contexts]
    index = ranges(counts.offsets[contexts], length)
    owner = np.repeat(np.arange(len(contexts)), length)
    return owner, counts.items[index], counts.counts[index] / total[owner], MU / total
