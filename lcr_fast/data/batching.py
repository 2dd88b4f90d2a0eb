"""Batcher: the histories of many samples as one padded Batch, by array indexing alone."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from ..batch import Batch
from .prepared import PreparedData
from .segments import lower_bound, padded


class Batcher:
    """Assemble batches of one split from prepared data.

    Of each stream the most recent ``max_rec_len`` and ``max_search_len`` events strictly before the
    target's time, oldest first; of a search its first ``max_clicks`` clicks made strictly before
    that time, so a search still open shows what was known then. Of a query its first ``max_terms``
    terms, by default all. With ``trim`` the padding ends at the longest row of the batch,
    without it every batch has the full shape. ``search_of`` [n] names for every sample the one
    whose searches it shows, -1 for none; default: its own. Users, queries and terms beyond the
    ``largest_ids`` of their fields are unknown: 0.
    """

    def __init__(
        self,
        data: PreparedData,
        split: str,
        *,
        max_rec_len: int,
        max_search_len: int,
        max_clicks: int,
        max_terms: int | None = None,
        trim: bool = True,
        search_of: NDArray | None = None,
        largest_ids: Mapping[str, int] | None = None,
    ) -> None:
        self.data = data
        self.samples = data.split(split)
        self.max_rec_len = max_rec_len
        self.max_search_len = max_search_len
        self.max_clicks = max_clicks
        self.max_terms = data.max_terms if max_terms is None else max_terms
        self.trim = trim
        self.search_of = search_of
        sizes = {
            "user": data.n_users,
            "search_queries": data.n_queries,
            "search_terms": data.n_terms,
        }
        known = largest_ids or {}
        self._largest = {
            name: known[name] for name, size in sizes.items() if known.get(name, size) < size
        }

    def __len__(self) -> int:
        return len(self.samples)

    def gather(self, rows: NDArray, candidates: NDArray, target: NDArray) -> Batch:
        """Assemble the samples ``rows`` [b] with their candidates [b, C], as CPU tensors.

        ``target`` [b] is the column of the positive, -1 where there is none. ``Batch.row`` holds
        ``rows``.
        """
        rows = np.asarray(rows)
        samples = self.samples
        users = samples.users[rows]
        shown = rows if self.search_of is None else self.search_of[rows]
        searchers = samples.users[shown]
        search_end = np.where(
            shown < 0, self.data.search_offsets[searchers], samples.search_end[shown]
        )
        searches = self._searches(searchers, samples.times[shown], search_end)
        return self._assemble(users, samples.rec_end[rows], searches, candidates, target, rows)

    def at(self, users: NDArray, times: NDArray, candidates: NDArray) -> Batch:
        """Assemble what is known of users [b] strictly before times [b], for serving.

        The batch has no targets; its rows are 0..b-1.
        """
        users, times = np.asarray(users), np.asarray(times)
        rec_end, search_end = (
            lower_bound(values, offsets[users], offsets[users + 1], times)
            for values, offsets in (
                (self.data.rec_times, self.data.rec_offsets),
                (self.data.search_times, self.data.search_offsets),
            )
        )
        rows = np.arange(len(users))
        none = np.full(len(users), -1)
        searches = self._searches(users, times, search_end)
        return self._assemble(users, rec_end, searches, candidates, none, rows)

    def relevant(self, rows: NDArray, length: int) -> NDArray[np.int8]:
        """Ground truth of the searches a batch of ``rows`` shows: int8 [b, length].

        1 relevant, 0 noise, -1 unknown or padding; aligned with ``Batch.search_queries``, whose
        length is to be passed. All -1 where the data has no ground truth.
        """
        rows = np.asarray(rows)
        truth = self.data.arrays.get("search_relevant")
        if truth is None:
            return np.full((len(rows), length), -1, dtype=np.int8)
        users, end = self.samples.users[rows], self.samples.search_end[rows]
        start, count = _recent(self.data.search_offsets[users], end, self.max_search_len)
        values, mask = padded(truth, start, count, length)
        return np.where(mask, values, -1).astype(np.int8)

    def _assemble(self, users, rec_end, searches, candidates, target, rows) -> Batch:
        data = self.data
        start, rec_lengths = _recent(data.rec_offsets[users], rec_end, self.max_rec_len)
        rec_items, _ = padded(
            data.rec_items, start, rec_lengths, self._width(rec_lengths, self.max_rec_len)
        )
        arrays = {
            "user": users,
            "rec_items": rec_items,
            "rec_lengths": rec_lengths,
            **searches,
            "candidates": candidates,
            "target": target,
            "row": rows,
        }
        for name, largest in self._largest.items():
            arrays[name] = np.where(arrays[name] <= largest, arrays[name], 0)
        return Batch(**{name: _tensor(array) for name, array in arrays.items()})

    def _searches(self, users: NDArray, times: NDArray, search_end: NDArray) -> dict[str, NDArray]:
        """Gather the searches of users [b] up to an end, as they were known at times [b]."""
        data = self.data
        start, search_lengths = _recent(data.search_offsets[users], search_end, self.max_search_len)
        width = self._width(search_lengths, self.max_search_len)
        queries, mask = padded(data.search_queries, start, search_lengths, width)
        terms = self.terms(queries)
        searches = np.where(mask, start[:, None] + np.arange(width), 0)
        return {
            "search_queries": queries,
            "search_terms": terms,
            "search_clicks": self._clicks(searches, mask, times),
            "search_lengths": search_lengths,
        }

    def terms(self, queries: NDArray) -> NDArray:
        """Look up the terms of queries [...]: [..., max_terms], padded with 0."""
        rows = _rows(self.data.query_term_offsets, queries)
        return padded(self.data.query_terms, *rows, self.max_terms)[0]

    def _clicks(self, searches: NDArray, mask: NDArray, times: NDArray) -> NDArray:
        """Take the first clicks of searches [b, L] made before times [b]: [b, L, max_clicks]."""
        if not mask.any():
            return np.zeros((*searches.shape, self.max_clicks), dtype=np.int64)
        start, count = _rows(self.data.click_offsets, searches)
        count = np.where(mask, count, 0)
        items, clicked = padded(self.data.click_items, start, count, self.max_clicks)
        made, _ = padded(self.data.click_times, start, count, self.max_clicks)
        return np.where(clicked & (made < times[:, None, None]), items, 0)

    def _width(self, lengths: NDArray, limit: int) -> int:
        return int(lengths.max(initial=0)) if self.trim else limit


def _recent(first: NDArray, end: NDArray, limit: int) -> tuple[NDArray, NDArray]:
    """Start and length of the last ``limit`` events in first:end."""
    start = np.maximum(first, end - limit)
    return start, end - start


def _rows(offsets: NDArray, rows: NDArray) -> tuple[NDArray, NDArray]:
    """Start and length of rows of a ragged array."""
    start = offsets[rows]
    return start, offsets[rows + 1] - start


def _tensor(array: NDArray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64))
