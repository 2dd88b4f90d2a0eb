"""PreparedData: the histories, samples and stored negatives of a data set, memory-mapped.

All ids are dense and start at 1; 0 is padding. U users, I items, Q distinct queries, V terms,
S searches. Ids are int32, offsets and times (ms) int64.

==================================== ============== ==============================================
array                                shape          meaning
==================================== ============== ==============================================
rec_offsets                          [U+2]          user u's events are rec_offsets[u]:[u+1]
rec_items, rec_times                 [events]       sorted by (time, order) within a user
search_offsets                       [U+2]          user u's searches
search_times, search_queries         [S]            sorted by time within a user
search_relevant, search_topic        [S]            ground truth of generated data; optional
click_offsets                        [S+1]          the clicks of a search, each item once
click_items, click_times             [clicks]       sorted by time within a search
query_term_offsets, query_terms      [Q+2], [..]    term ids of a query
seen_offsets                         [U+2]          distinct items of a user's events and clicks
seen_items, seen_times               [..]           sorted by item; time of the first sight
item_count                           [I+1]          events that training knows (``train_end``)
train_target_count                   [I+1]          training samples with this target
{user,item,term}_id_offsets, _bytes  [N+2], [..]    original ids as UTF-8
item_text, query_text                [I+1|Q+1, D]   frozen float32 text vectors; optional
split_times                          [2]            of a split by time: begin of valid and test
known_sizes                          [4]            how many users, items, queries and terms have
                                                    the numbers of a vocabulary; optional
{split}_users, _items, _times        [n]            a sample: user, target item, target time
{split}_rec_end, _search_end         [n]            ends of the history in rec_* and search_*
{split}_repeat                       [n]            was the target among the seen items before?
{split}_negatives                    [n, N]         valid and test
{split}_impression_offsets           [n+1]          optional
{split}_impressions                  [..]           distinct items shown, the target among them
==================================== ============== ==============================================

A history holds what is strictly before the target's time. Samples are sorted by (user, time).
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .folder import PreparedDataError, open_folder
from .segments import lower_bound, owners, ranges

SPLITS = ("train", "valid", "test")

_OFFSETS = {  # offsets -> the arrays they divide
    "rec_offsets": ("rec_items", "rec_times"),
    "search_offsets": ("search_times", "search_queries", "search_relevant", "search_topic"),
    "click_offsets": ("click_items", "click_times"),
    "query_term_offsets": ("query_terms",),
    "seen_offsets": ("seen_items", "seen_times"),
    "user_id_offsets": ("user_id_bytes",),
    "item_id_offsets": ("item_id_bytes",),
    "term_id_offsets": ("term_id_bytes",),
    **{f"{split}_impression_offsets": (f"{split}_impressions",) for split in SPLITS},
}
_SORTED = {
    "rec_times": "rec_offsets",
    "search_times": "search_offsets",
    "click_times": "click_offsets",
    "seen_items": "seen_offsets",
}
_ITEMS = (
    *("rec_items", "click_items", "seen_items"),
    *(f"{split}_{name}" for split in SPLITS for name in ("items", "negatives", "impressions")),
)
_SAMPLE = {"users": "i4", "items": "i4", "times": "i8"}
_SAMPLE |= {"rec_end": "i8", "search_end": "i8", "repeat": "b1"}
_OPTIONAL = {"search_relevant": "i1", "search_topic": "i4", "item_text": "f4", "query_text": "f4"}
_OPTIONAL |= {"split_times": "i8", "known_sizes": "i8"}
_OPTIONAL |= {f"{split}_impression_offsets": "i8" for split in SPLITS}
_OPTIONAL |= {f"{split}_impressions": "i4" for split in SPLITS}
_REQUIRED = {
    "rec_offsets": "i8", "rec_items": "i4", "rec_times": "i8",
    "search_offsets": "i8", "search_times": "i8", "search_queries": "i4",
    "click_offsets": "i8", "click_items": "i4", "click_times": "i8",
    "query_term_offsets": "i8", "query_terms": "i4",
    "seen_offsets": "i8", "seen_items": "i4", "seen_times": "i8",
    "item_count": "i8", "train_target_count": "i8",
    "user_id_offsets": "i8", "user_id_bytes": "u1",
    "item_id_offsets": "i8", "item_id_bytes": "u1",
    "term_id_offsets": "i8", "term_id_bytes": "u1",
    "valid_negatives": "i4", "test_negatives": "i4",
}  # fmt: skip
_REQUIRED |= {f"{s}_{name}": dtype for s in SPLITS for name, dtype in _SAMPLE.items()}


class Sizes(NamedTuple):
    """How many ids of each kind have a number."""

    users: int
    items: int
    queries: int
    terms: int


@dataclass(frozen=True)
class Samples:
    """The samples of one split: who, when, which target, and where the histories end."""

    users: NDArray[np.int32]  # [n]
    items: NDArray[np.int32]  # [n] targets
    times: NDArray[np.int64]  # [n]
    rec_end: NDArray[np.int64]  # [n]
    search_end: NDArray[np.int64]  # [n]
    repeat: NDArray[np.bool_]  # [n]
    negatives: NDArray[np.int32] | None  # [n, N]; valid and test
    impression_offsets: NDArray[np.int64] | None  # [n + 1]
    impressions: NDArray[np.int32] | None  # distinct, with the target; no rows where unknown

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class SeenItems:
    """The distinct items of every user with the time of the first sight."""

    offsets: NDArray[np.int64]  # [U + 2]
    items: NDArray[np.int32]  # sorted within a user
    times: NDArray[np.int64]

    def has(self, users: NDArray, items: NDArray, times: NDArray) -> NDArray[np.bool_]:
        """Tell whether the users saw the items strictly before the times; all three broadcast."""
        users = np.asarray(users)
        end = self.offsets[users + 1]
        place = lower_bound(self.items, self.offsets[users], end, items)
        if not len(self.items):
            return np.zeros(np.broadcast_shapes(place.shape, np.shape(times)), bool)
        found = place < end
        place = np.where(found, place, 0)
        return found & (self.items[place] == items) & (self.times[place] < times)

    def before(self, users: NDArray, times: NDArray) -> tuple[NDArray, NDArray]:
        """List what each user saw strictly before its time: offsets [n + 1], int64 items [..]."""
        length = self.offsets[users + 1] - self.offsets[users]
        index = ranges(self.offsets[users], length)
        row = np.repeat(np.arange(len(users)), length)
        kept = self.times[index] < np.asarray(times)[row]
        counts = np.bincount(row[kept], minlength=len(users))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return offsets, self.items[index[kept]].astype(np.int64)


@dataclass(frozen=True)
class IdTable:
    """Original ids as text, by dense id; 0 is the empty text."""

    offsets: NDArray[np.int64]
    bytes: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(f"id {number} is outside 0..{len(self) - 1}")
        return self.bytes[self.offsets[number] : self.offsets[number + 1]].tobytes().decode()

    def find(self, text: str) -> int:
        """Return the dense id of an original id; raises KeyError where it is unknown."""
        return self._numbers[text]

    def texts(self) -> list[str]:
        """List the original ids by their numbers, from 1."""
        joined = self.bytes.tobytes()
        return [joined[a:b].decode() for a, b in itertools.pairwise(self.offsets[1:].tolist())]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.texts(), 1)}


class PreparedData:
    """A prepared data set; the arrays of the module's table are in ``arrays`` and as attributes.

    Open a folder with ``PreparedData.open``; create one with ``lcr_fast.data.build.prepare``.
    """

    def __init__(self, arrays: Mapping[str, NDArray], manifest: Mapping[str, Any]) -> None:
        self.arrays = dict(arrays)
        self.manifest = dict(manifest)
        names = ("seen_offsets", "seen_items", "seen_times")
        self.seen = SeenItems(*(self.arrays[name] for name in names))

    @classmethod
    def open(cls, path: str | os.PathLike, verify: bool = True) -> PreparedData:
        """Open a prepared folder, memory-mapped.

        ``verify=False`` skips reading every file (checksums, and that offsets, ids and times make
        sense), which takes seconds for gigabytes. Raises PreparedDataError (a ValueError) with one
        sentence that names the file and what is wrong with it.
        """
        arrays, manifest = open_folder(path, verify=verify)
        _check_schema(arrays, Path(path))
        if verify:
            _check_structure(arrays, Path(path))
        return cls(arrays, manifest)

    def __getattr__(self, name: str) -> NDArray:
        try:
            return self.__dict__["arrays"][name]
        except KeyError:
            raise AttributeError(f"prepared data has no {name}") from None

    @property
    def fingerprint(self) -> str:
        """SHA-256 that names the content of all arrays, taken when they were prepared."""
        return self.manifest["fingerprint"]

    @property
    def n_users(self) -> int:
        return len(self.rec_offsets) - 2

    @property
    def n_items(self) -> int:
        return len(self.item_count) - 1

    @property
    def n_queries(self) -> int:
        return len(self.query_term_offsets) - 2

    @property
    def n_terms(self) -> int:
        return len(self.term_id_offsets) - 2

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.n_users, self.n_items, self.n_queries, self.n_terms)

    def vocabulary(self, sizes: Sizes | None = None, text: Sequence[str] = ()) -> str:
        """SHA-256 that names the first ids of every kind in their order, all of them by default.

        And the text vectors of those ids, of the arrays ``text``. Raises ValueError for more than
        there is.
        """
        wanted = self.sizes if sizes is None else sizes
        if not self._has(wanted, text):
            raise ValueError(f"the data has {self.sizes}, not {wanted} with {list(text)}")
        tables = [(f"{name}_id_offsets", f"{name}_id_bytes") for name in ("user", "item", "term")]
        tables.insert(Sizes._fields.index("queries"), ("query_term_offsets", "query_terms"))
        digest = hashlib.sha256(np.array(wanted, dtype="<i8").tobytes())
        for (offsets, values), size in zip(tables, wanted, strict=True):
            bounds = self.arrays[offsets][: size + 2]
            digest.update(np.ascontiguousarray(bounds).data)
            digest.update(np.ascontiguousarray(self.arrays[values][: bounds[-1]]).data)
        for name in text:
            n_rows = {"item_text": wanted.items, "query_text": wanted.queries}[name] + 1
            digest.update(np.ascontiguousarray(self.arrays[name][:n_rows]).data)
        return digest.hexdigest()

    def continues(self, vocabulary: str, sizes: Sizes, text: Sequence[str] = ()) -> bool:
        """Tell whether this was prepared to go on from a vocabulary: its ids, then others."""
        if "known_sizes" not in self.arrays or not self._has(sizes, text):
            return False
        return self.vocabulary(sizes, text) == vocabulary

    def _has(self, sizes: Sizes, text: Sequence[str]) -> bool:
        enough = all(size <= ours for size, ours in zip(sizes, self.sizes, strict=True))
        return enough and all(name in self.arrays for name in text)

    @cached_property
    def max_terms(self) -> int:
        """The terms of the longest query."""
        return int(np.diff(self.query_term_offsets).max(initial=0))

    @cached_property
    def users(self) -> IdTable:
        return IdTable(self.user_id_offsets, self.user_id_bytes)

    @cached_property
    def items(self) -> IdTable:
        return IdTable(self.item_id_offsets, self.item_id_bytes)

    @cached_property
    def terms(self) -> IdTable:
        return IdTable(self.term_id_offsets, self.term_id_bytes)

    @cached_property
    def train_end(self) -> NDArray[np.int64]:
        """Time of every user [U + 1] from which on training knows nothing.

        That of the first held-out target, or where the split is by time, of the split.
        """
        end = np.full(self.n_users + 1, np.iinfo(np.int64).max)
        if "split_times" in self.arrays:
            end[:] = self.split_times[0]
        for name in SPLITS[1:]:
            samples = self.split(name)
            np.minimum.at(end, samples.users, samples.times)
        return end

    def history_lengths(self, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count the events and the searches before each target of a split: [n] each."""
        samples = self.split(split)
        events = samples.rec_end - self.rec_offsets[samples.users]
        return events, samples.search_end - self.search_offsets[samples.users]

    def query(self, number: int) -> str:
        """Return the terms of a query as one text."""
        start, end = self.query_term_offsets[number : number + 2]
        return " ".join(self.terms[int(term)] for term in self.query_terms[start:end])

    def split(self, name: str) -> Samples:
        """Return the samples of "train", "valid" or "test"."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        arrays = {f.name: self.arrays.get(f"{name}_{f.name}") for f in fields(Samples)}
        return Samples(**arrays)  # type: ignore[arg-type]  # the required ones are there

    def without_items_above(self, n_items: int) -> PreparedData:
        """Return what one can read who knows items 1..n_items alone; itself where that is all.

        Events, clicks, sights and impressions of other items are left out; a target or negative
        that is one is 0. Samples stay; one with an unknown target has no impressions.
        """
        if self.n_items <= n_items:
            return self
        arrays = dict(self.arrays)
        for offsets in ("rec_offsets", "click_offsets", "seen_offsets"):
            items = arrays[_OFFSETS[offsets][0]]
            places = _select(arrays, offsets, items <= n_items)
            if offsets == "rec_offsets":
                for split in SPLITS:
                    arrays[f"{split}_rec_end"] = places[arrays[f"{split}_rec_end"]]
        for split in SPLITS:
            for name in (f"{split}_items", f"{split}_negatives"):
                if name in arrays:
                    arrays[name] = np.where(arrays[name] <= n_items, arrays[name], 0)
            offsets = f"{split}_impression_offsets"
            if offsets in arrays:
                row = owners(arrays[offsets])
                kept = arrays[f"{split}_impressions"] <= n_items
                kept &= arrays[f"{split}_items"][row] > 0
                n_shown = np.bincount(row[kept], minlength=len(arrays[offsets]) - 1)
                _select(arrays, offsets, kept & (n_shown[row] > 1))  # one alone ranks nothing
        for name in ("item_count", "train_target_count", "item_text"):
            if name in arrays:
                arrays[name] = arrays[name][: n_items + 1]
        arrays["item_id_offsets"] = arrays["item_id_offsets"][: n_items + 2]
        arrays["item_id_bytes"] = arrays["item_id_bytes"][: arrays["item_id_offsets"][-1]]
        return PreparedData(arrays, self.manifest)

    def summary(self) -> str:
        """Describe the data in a few lines: sizes, samples a split, and the notes."""
        lines = [
            f"source {self.manifest.get('source', 'unknown')}",
            f"{self.n_users:,} users, {self.n_items:,} items, {self.n_queries:,} queries, "
            f"{self.n_terms:,} terms",
            f"{len(self.rec_items):,} recommendation events, {len(self.search_times):,} searches, "
            f"{len(self.click_items):,} clicks in searches",
            *(self._describe_split(name) for name in SPLITS),
            *self.manifest.get("notes", ()),
        ]
        return "\n".join(lines)

    def _describe_split(self, name: str) -> str:
        samples = self.split(name)
        if not len(samples):
            return f"{name}: no samples"
        covered = self.train_target_count[samples.items] > 0
        _, searches = self.history_lengths(name)
        text = (
            f"{name}: {len(samples):,} samples, {samples.repeat.mean():.1%} repeats, "
            f"{covered.mean():.1%} of the targets are training targets, "
            f"{(searches > 0).mean():.1%} with searches before them ({searches.mean():.1f} each)"
        )
        if samples.impression_offsets is not None:
            shown = np.diff(samples.impression_offsets)
            text += f", {np.count_nonzero(shown):,} with impressions"
        return text


def _select(arrays: dict[str, NDArray], offsets: str, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Keep some values of all arrays that offsets divide; return the new place of each old one."""
    places = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    for name in _OFFSETS[offsets]:
        if name in arrays:
            arrays[name] = arrays[name][kept]
    arrays[offsets] = places[arrays[offsets]]
    return places


def _check_schema(arrays: Mapping[str, NDArray], folder: Path) -> None:
    for name in _REQUIRED:
        if name not in arrays:
            raise PreparedDataError(f"{folder / name}.npy: missing from the manifest")
    for name, dtype in (_REQUIRED | _OPTIONAL).items():
        if name in arrays and arrays[name].dtype != np.dtype(dtype):
            got = arrays[name].dtype
            raise PreparedDataError(
                f"{folder / name}.npy: dtype {got}, but the format says {np.dtype(dtype)}"
            )


def _check_structure(arrays: Mapping[str, NDArray], folder: Path) -> None:
    for name, wrong in _faults(arrays):
        raise PreparedDataError(f"{folder / name}.npy: {wrong}")


def _faults(arrays: Mapping[str, NDArray]):
    """Yield (array, what is wrong with it); each check may rely on the ones before."""
    for offsets, divided in _OFFSETS.items():
        for name in divided:
            if offsets in arrays and name in arrays:
                yield from _offset_faults(arrays, offsets, name)
    n_users, n_items = len(arrays["rec_offsets"]) - 2, len(arrays["item_count"]) - 1
    n_queries, n_terms = len(arrays["query_term_offsets"]) - 2, len(arrays["term_id_offsets"]) - 2
    lengths = {"search_offsets": n_users + 2, "seen_offsets": n_users + 2}
    lengths |= {"user_id_offsets": n_users + 2, "item_id_offsets": n_items + 2}
    lengths |= {"click_offsets": len(arrays["search_times"]) + 1, "train_target_count": n_items + 1}
    lengths |= {"split_times": 2, "known_sizes": len(Sizes._fields)}
    lengths |= {"item_text": n_items + 1, "query_text": n_queries + 1}
    for split in SPLITS:
        lengths |= {f"{split}_{name}": len(arrays[f"{split}_users"]) for name in _SAMPLE}
        lengths[f"{split}_negatives"] = len(arrays[f"{split}_users"])
        lengths[f"{split}_impression_offsets"] = len(arrays[f"{split}_users"]) + 1
    for name, length in lengths.items():
        if name in arrays and len(arrays[name]) != length:
            yield name, f"{len(arrays[name])} rows where {length} are expected"
    if "known_sizes" in arrays:
        known, there = arrays["known_sizes"], np.array([n_users, n_items, n_queries, n_terms])
        if ((known < 0) | (known > there)).any():
            yield "known_sizes", f"{known.tolist()} of {there.tolist()} ids"
    limits = dict.fromkeys(_ITEMS, n_items) | {f"{split}_users": n_users for split in SPLITS}
    limits |= {"search_queries": n_queries, "query_terms": n_terms}
    for name, limit in limits.items():
        if name in arrays and not _within(arrays[name], 1, limit):
            yield name, f"an id outside 1..{limit}"
    for name, rows in _SORTED.items():
        if not _sorted(arrays[name], arrays[rows], strictly=name == "seen_items"):
            yield name, "not sorted within its rows"
    for split in SPLITS:
        users = arrays[f"{split}_users"]
        for stream in ("rec", "search"):
            ends, bounds = arrays[f"{split}_{stream}_end"], arrays[f"{stream}_offsets"]
            if ((ends < bounds[users]) | (ends > bounds[users + 1])).any():
                yield f"{split}_{stream}_end", "a history that ends outside its user's events"


def _offset_faults(arrays: Mapping[str, NDArray], offsets: str, divided: str):
    values = arrays[offsets]
    if values.ndim != 1 or not len(values) or values[0] != 0 or (np.diff(values) < 0).any():
        yield offsets, "not a sequence of offsets that starts at 0 and never falls"
    elif values[-1] != len(arrays[divided]):
        yield offsets, f"ends at {values[-1]}, but {divided} has {len(arrays[divided])} values"


def _within(values: NDArray, low: int, high: int) -> bool:
    return not values.size or (low <= values.min() and values.max() <= high)


def _sorted(values: NDArray, offsets: NDArray, strictly: bool) -> bool:
    if len(values) < 2:
        return True
    rises = np.diff(values.astype(np.int64)) >= int(strictly)
    starts = offsets[1:-1]
    rises[starts[(starts > 0) & (starts < len(values))] - 1] = True
    return bool(rises.all())
