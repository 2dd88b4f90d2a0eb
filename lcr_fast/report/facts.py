"""What prepared data hold: counts, histories, overlaps, and warnings of what makes results void."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from lcr_fast.config import LCRConfig
from lcr_fast.data.prepared import SPLITS, PreparedData
from lcr_fast.data.segments import owners, ranges
from lcr_fast.training.analysis import searched

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_LEAST_UNIX_MS = 10**11  # smaller times are of no calendar
_BINS = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50, 100)  # lower bounds of history lengths
# Shares from which on a fact is worth a warning. Rules of thumb, said with the number itself.
_MANY_REPEATS, _FEW_SEARCHES, _MANY_TIES, _LATE, _UNCOVERED = 0.3, 0.3, 0.02, 0.1, 0.5
_APART, _LACKING, _ONE_USER, _MANY_LONG = 0.05, 0.5, 0.1, 0.01
_FEW_CLICKS, _ONE_ITEM, _FEW_TESTED, _SHORT, _AGAIN, _EASY = 0.1, 0.1, 500, 3, 0.3, 0.5

_LONG_QUERIES = f"searches with more than {LCRConfig.max_terms} terms"


class Fact(NamedTuple):
    """One line of the table."""

    about: str
    name: str
    text: str
    value: float  # NaN where there is nothing to measure


class Histogram(NamedTuple):
    """How many samples have a history of so many events."""

    title: str
    bins: list[str]
    counts: list[int]


class Facts(NamedTuple):
    """All that is said of prepared data."""

    source: str
    facts: list[Fact]
    histograms: list[Histogram]
    warnings: list[str]
    notes: list[str]


def facts_of(data: PreparedData, split: str = "test") -> Facts:
    """Measure prepared data; what concerns targets and histories, on the samples of a split."""
    found = [*_counts(data), *_streams(data), *_targets(data, split), *_overlaps(data, split)]
    histograms = [
        _histogram(f"{name} before a {split} target", lengths)
        for name, lengths in _lengths(data, split).items()
    ]
    source, notes = (data.manifest.get(name) for name in ("source", "notes"))
    warnings = list(_warnings(data, {fact.name: fact.value for fact in found}, split))
    return Facts(str(source or "unknown"), found, histograms, warnings, list(notes or []))


def _counts(data: PreparedData) -> Iterator[Fact]:
    for name, count in zip(("users", "items", "queries", "terms"), data.sizes, strict=True):
        yield Fact("size", name, f"{count:,}", count)
    for name, array in (
        ("events", data.rec_items),
        ("searches", data.search_times),
        ("clicks in searches", data.click_items),
    ):
        yield Fact("size", name, f"{len(array):,}", len(array))
    for name in SPLITS:
        n = len(data.split(name))
        yield Fact("size", f"{name} samples", f"{n:,}", n)


def _streams(data: PreparedData) -> Iterator[Fact]:
    for name, times in (("events", data.rec_times), ("searches", data.search_times)):
        yield Fact(
            "time", f"span of {name}", _span(times), float(np.ptp(times)) if len(times) else 0
        )
    for name, times, offsets in (
        ("events", data.rec_times, data.rec_offsets),
        ("clicks in searches", data.click_times, data.click_offsets),
    ):
        again, tied = _neighbours(times, offsets)
        yield _share("time", f"{name} at the time of another", (again | tied).sum(), len(times))
    again, _ = _neighbours(data.rec_items, data.rec_offsets)
    yield _share("events", "events that repeat the one before", again.sum(), len(data.rec_items))
    n_clicks = np.diff(data.click_offsets)
    yield _share("searches", "searches with a click", (n_clicks > 0).sum(), len(n_clicks))
    n_terms = np.diff(data.query_term_offsets)[data.search_queries]
    yield _share("searches", "searches with a term", (n_terms > 0).sum(), len(n_terms))
    long = (n_terms > LCRConfig.max_terms).sum()
    yield _share("searches", _LONG_QUERIES, long, len(n_terms))
    busiest = np.diff(data.rec_offsets).max(initial=0)
    yield _share("events", "events of the busiest user", busiest, len(data.rec_items))
    counts = np.sort(data.item_count)[::-1]
    top = max(data.n_items // 100, 1)
    yield _share(
        "events", "events on the most popular 1 % of items", counts[:top].sum(), counts.sum()
    )


def _targets(data: PreparedData, split: str) -> Iterator[Fact]:
    samples, n = data.split(split), len(data.split(split))
    covered = data.train_target_count[samples.items] > 0
    yield _share(split, "targets seen before (repeats)", samples.repeat.sum(), n)
    yield _share(split, "targets that are training targets too", covered.sum(), n)
    known = data.item_count[samples.items] > 0
    yield _share(split, "targets with any event that training knows", known.sum(), n)
    most = np.bincount(samples.items).max(initial=0)
    yield _share(split, "targets on the most frequent one", most, n)
    yield _share(split, "targets with a search before them", searched(data, split).sum(), n)
    for name, lengths in _lengths(data, split).items():
        middle = float(np.median(lengths)) if n else float("nan")
        text = f"{middle:g}, mean {lengths.mean():.1f}, most {lengths.max()}" if n else "none"
        yield Fact(split, f"{name} before a target, median", text, middle)
    trained, tested = data.train_times, samples.times
    late = (trained > np.median(tested)).sum() if n else 0
    compared = len(trained) if _common_clock(data) else 0
    yield _share(split, "training samples later than the median target", late, compared)
    if samples.negatives is not None and n:
        stored = samples.negatives.shape[1]
        yield _share(split, "items that are candidates of a target", stored + 1, data.n_items)
    if samples.impression_offsets is not None:
        shown = np.diff(samples.impression_offsets)
        yield _share(split, "targets with the items shown", (shown > 0).sum(), n)


def _common_clock(data: PreparedData) -> bool:
    """Tell whether times of different users compare."""
    return data.manifest.get("common_clock", True)


def _overlaps(data: PreparedData, split: str) -> Iterator[Fact]:
    """Measure how much the two streams are about the same items."""
    clicked, read = (np.unique(items) for items in (data.click_items, data.rec_items))
    shared = len(np.intersect1d(clicked, read, assume_unique=True))
    yield _share("streams", "items clicked in searches that have events", shared, len(clicked))
    pairs = (
        _pairs(data, owners(data.search_offsets)[owners(data.click_offsets)], data.click_items),
        _pairs(data, owners(data.rec_offsets), data.rec_items),
    )
    both = len(np.intersect1d(*pairs, assume_unique=True))
    yield _share(
        "streams", "pairs of user and clicked item that are events too", both, len(pairs[0])
    )
    samples = data.split(split)
    rows = np.flatnonzero(searched(data, split))
    last = samples.search_end[rows] - 1
    hours = (samples.times[rows] - data.search_times[last]) / 3.6e6
    middle = float(np.median(hours)) if len(rows) else float("nan")
    text = duration(middle * 3.6e6) if len(rows) else "none"
    yield Fact("streams", f"from the last search to a {split} target, median", text, middle)
    first, clicks = data.click_offsets[last], np.diff(data.click_offsets)[last]
    owner, places = np.repeat(rows, clicks), ranges(first, clicks)
    hit = data.click_items[places] == samples.items[owner]
    hit &= data.click_times[places] < samples.times[owner]
    led = len(np.unique(owner[hit]))
    yield _share("streams", f"{split} targets clicked in the search before", led, len(rows))


def _pairs(data: PreparedData, users: NDArray, items: NDArray) -> NDArray[np.int64]:
    return np.unique(users.astype(np.int64) * (data.n_items + 1) + items)


def _neighbours(values: NDArray, offsets: NDArray) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Mark the values that equal the one before, and those that equal the one behind, in a row."""
    same = np.zeros(len(values) + 1, dtype=bool)
    if len(values):
        same[1:-1] = values[1:] == values[:-1]
        same[offsets[(offsets > 0) & (offsets < len(values))]] = False
    return same[:-1], same[1:]


def _lengths(data: PreparedData, split: str) -> dict[str, NDArray[np.int64]]:
    return dict(zip(("events", "searches"), data.history_lengths(split), strict=True))


def _histogram(title: str, lengths: NDArray) -> Histogram:
    place = np.searchsorted(_BINS, lengths, side="right") - 1
    counts = np.bincount(place, minlength=len(_BINS)).tolist()
    ends = [*(_BINS[1:]), None]
    names = [
        f"{low}+" if end is None else str(low) if end == low + 1 else f"{low}-{end - 1}"
        for low, end in zip(_BINS, ends, strict=True)
    ]
    used = max((n for n, count in enumerate(counts) if count), default=0) + 1
    return Histogram(title, names[:used], counts[:used])


def _share(about: str, name: str, part: float, whole: float) -> Fact:
    if not whole:
        return Fact(about, name, "none", float("nan"))
    return Fact(about, name, f"{part / whole:.1%} ({int(part):,} of {int(whole):,})", part / whole)


def _span(times: NDArray[np.int64]) -> str:
    if not len(times):
        return "none"
    first, last = int(times.min()), int(times.max())
    days = duration(last - first)
    if first < _LEAST_UNIX_MS:
        return f"{days}, on a clock of its own"
    dates = (f"{_EPOCH + timedelta(milliseconds=each):%Y-%m-%d %H:%M}" for each in (first, last))
    return f"{' to '.join(dates)} ({days})"


def duration(ms: float) -> str:
    """Spell a time in the largest unit that it has two of."""
    for unit, length in (("days", 86_400_000), ("hours", 3_600_000), ("minutes", 60_000)):
        if ms >= 2 * length:
            return f"{ms / length:,.1f} {unit}"
    return f"{ms / 1000:,.1f} seconds"


def _warnings(data: PreparedData, values: dict[str, float], split: str) -> Iterator[str]:
    """Say what of the data makes which results mean little."""
    if not len(data.split("valid")):
        yield "there is no validation sample, by which an epoch is chosen: no model can be trained"
    n = len(data.split(split))
    if not n:
        yield f"there is no {split} sample: nothing can be evaluated"
        return
    if n < _FEW_TESTED:
        yield (
            f"{n:,} {split} samples: a 95 % interval of HR@1 is up to {1.96 * 0.5 / n**0.5:.3f} "
            "wide to either side, so small differences show nothing"
        )
    share = values["targets seen before (repeats)"]
    if share > _MANY_REPEATS:
        yield (
            f"{share:.0%} of the targets are repeats. Sampled negatives are never seen before, so "
            "any model that knows what was seen ranks a repeat first: compare on new targets, and "
            "with recency"
        )
    share = values["targets with a search before them"]
    if share < _FEW_SEARCHES:
        yield (
            f"only {share:.0%} of the targets have a search before them: what searches add is "
            "measured on these alone (--min-search-history 1)"
        )
    share = values[_LONG_QUERIES]
    if share > _MANY_LONG:
        yield (
            f"{share:.0%} of the searches have more than {LCRConfig.max_terms} terms, of which a "
            "model reads the first ones: --max-terms says how many"
        )
    share = values["events at the time of another"]
    if share > _MANY_TIES:
        yield (
            f"{share:.0%} of the events have the time of another of their user: the order of the "
            "file decides between them, and none is the history of another"
        )
    share = values["training samples later than the median target"]
    if share > _LATE and "split_times" not in data.arrays:
        yield (
            f"{share:.0%} of the training samples are later than the median {split} target: models "
            "know what others did after it (prepare --split time)"
        )
    share = 1 - values["targets that are training targets too"]
    if share > _UNCOVERED:
        yield (
            f"{share:.0%} of the {split} targets are no training target: ids alone learn next to "
            "nothing of such items; text vectors, or --k-core, would help"
        )
    share = values["searches with a click"]
    if share < _FEW_CLICKS:
        yield f"only {share:.0%} of the searches have a click: they say their words alone"
    share = values["items clicked in searches that have events"]
    if share < _APART:
        yield (
            f"only {share:.1%} of the items clicked in searches have events: are the ids of both "
            "of one kind?"
        )
    lists = data.manifest.get("lists_of_impressions") or {"all": 0, "without_target": 0}
    if lists["without_target"] > _LACKING * lists["all"]:
        yield (
            f"{lists['without_target'] / lists['all']:.0%} of the lists of impressions lack their "
            "target, which is put behind them: are their ids those of the items?"
        )
    share = values["targets on the most frequent one"]
    if share > _ONE_ITEM:
        yield f"one item is the target of {share:.0%} of the {split} samples: popularity wins there"
    share = values["events of the busiest user"]
    if share > max(_ONE_USER, 5 / data.n_users):
        busiest = data.users[int(np.diff(data.rec_offsets).argmax())]
        yield (
            f"{share:.0%} of the events are of one user, {busiest!r}: does the id stand for those "
            "without one?"
        )
    share = values["events that repeat the one before"]
    if share > _AGAIN:
        yield (
            f"{share:.0%} of the events are on the item of the event before: one action logged "
            "more than once, perhaps, which makes the next one easy to guess"
        )
    if values["events before a target, median"] < _SHORT:
        yield (
            f"half of the targets have fewer than {_SHORT} events before them: there is little to "
            "reason about"
        )
    share = values.get("items that are candidates of a target", 0)
    if share > _EASY:
        yield f"{share:.0%} of all items are candidates: sampled and full ranking are nearly one"
    if (_common_clock(data) and len(data.search_times)) and (
        data.rec_times.min() > data.search_times.max()
        or data.search_times.min() > data.rec_times.max()
    ):
        yield "the two streams do not overlap in time: is one of them in another unit?"


def fact_table(facts: Facts) -> str:
    """Lay out the facts, the histograms and the warnings as Markdown."""
    rows = [(fact.about, fact.name, fact.text) for fact in facts.facts]
    parts = [
        f"Data of {facts.source}:\n\n"
        + tabulate(rows, ("of", "what", ""), tablefmt="github", disable_numparse=True)
    ]
    for each in facts.histograms:
        parts.append(
            f"{each.title}:\n\n" + tabulate([each.counts], each.bins, tablefmt="github", intfmt=",")
        )
    parts += [f"Warning: {warning}." for warning in facts.warnings]
    return "\n\n".join(parts)
