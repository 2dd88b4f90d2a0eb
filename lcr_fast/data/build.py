"""prepare: an InteractionLog becomes a folder of prepared data (see ``prepared.py``)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from . import progress, splits
from .core import k_core as core_of
from .folder import require_free, write_folder
from .log import TERM_END, InteractionLog, Vectors
from .negatives import KINDS, NegativeSampler
from .prepared import SPLITS, PreparedData, Sizes
from .segments import lower_bound, offsets_of, owners
from .splits import Split

_HISTORY = ("min_history", "min_rec_history", "min_search_history")
_MOST = 2**63 - 1  # of Int64
_N_STEPS = 7  # that a progress bar tells
_NEGATIVES_CHUNK = 8192  # samples whose negatives are drawn at a time, to bound memory


def prepare(
    log: InteractionLog,
    out: str | os.PathLike,
    *,
    seed: int = 0,
    n_negatives: int = 99,
    negatives: str = "popularity",
    min_targets: int = 3,
    min_history: int = 1,
    min_rec_history: int = 0,
    min_search_history: int = 0,
    split: str = "user",
    time_shares: tuple[float, float] = (0.1, 0.1),
    k_core: int = 0,
    vocabulary: PreparedData | None = None,
    overwrite: bool = False,
) -> PreparedData:
    """Split a log by time and write it as prepared data.

    A target event becomes a sample if at least ``min_history`` events of either stream lie strictly
    before it, of the recommendation stream at least ``min_rec_history`` and at least
    ``min_search_history`` searches; users without a sample are dropped. With ``k_core`` only users
    and items with so many events each are read (see ``core.k_core``).

    ``split="user"`` is leave-one-out: of a user with at least ``min_targets`` samples the last is a
    test sample, the one before a validation sample if the user has three or more, and the rest are
    training samples: with ``min_targets=2`` a user of two gives one to training and one to test.
    Users with fewer samples only train. ``split="time"`` holds out the last ``time_shares``
    (validation, test) of all samples in time, of each user the last in either period.

    Every validation and test sample gets ``n_negatives`` distinct negatives (``negatives``:
    "popularity" or "uniform"; see ``NegativeSampler``); one whose user has seen so much that fewer
    are left is dropped, as is a training sample with none left, and counted in the notes.

    With ``vocabulary``, prepared earlier, all its ids and text vectors keep their numbers and new
    ids come behind them, so that a model of it reads this data too. Then users without a sample
    stay, for recommending, and there need not be any sample. Its histories are not carried over.

    The same log, options and seed give the same bytes. Raises ValueError for bad options, for a log
    without any sample, where negatives run out for all, and if ``out`` is occupied; nothing is
    written then.
    """
    history = dict(zip(_HISTORY, (min_history, min_rec_history, min_search_history), strict=True))
    least = {
        "seed": 0,
        "n_negatives": 0,
        "min_targets": 1,
        "k_core": 0,
        **dict.fromkeys(history, 0),
    }
    options: dict[str, Any] = {
        "seed": seed, "n_negatives": n_negatives, "negatives": negatives,
        "min_targets": min_targets, **history, "split": split, "k_core": k_core,
    }  # fmt: skip
    if split == "time":
        options["time_shares"] = list(time_shares)
    if vocabulary is not None:
        options["vocabulary"] = vocabulary.manifest.get("fingerprint")
    _check_options(options, least)
    if split == "time" and not log.common_clock:
        raise ValueError(f"{log.source}: times compare within a user only: no split by time")
    require_free(out, overwrite)
    with progress.steps("prepare", _N_STEPS) as begin:
        begin("histories")
        if k_core:
            log = core_of(log, k_core)
        made = _make(log, options, vocabulary, begin)
        data = PreparedData(made.arrays, {})
        begin("negatives")
        for number, name in enumerate(("valid", "test")):
            rng = np.random.default_rng([seed, number])
            made.arrays[f"{name}_negatives"] = _negatives(data, rng, name, negatives, n_negatives)
        manifest = {
            "source": log.source,
            "counts": _counts(data),
            "options": options,
            "lists_of_impressions": made.lists,
            "common_clock": log.common_clock,
            "notes": [*log.notes, *made.notes],
        }

        def fill(folder: Path) -> None:
            for name, array in made.arrays.items():
                np.save(folder / f"{name}.npy", array, allow_pickle=False)
            for name, vectors, ids, n_rows in (
                ("item_text", log.item_text, made.items, data.n_items + 1),
                ("query_text", log.query_text, made.queries, data.n_queries + 1),
            ):
                ours = None if vocabulary is None else vocabulary.arrays.get(name)
                if vectors is not None or ours is not None:
                    _write_vectors(folder / f"{name}.npy", vectors, ids, n_rows, ours)

        begin("files")
        folder = write_folder(out, manifest, fill, overwrite=overwrite)
    return PreparedData.open(folder, verify=False)


class _Made(NamedTuple):
    """What is made of a log: all arrays but the negatives, and what is said of them."""

    arrays: dict[str, NDArray]
    notes: list[str]
    items: pl.DataFrame  # value, number: of an item's id
    queries: pl.DataFrame  # value, number: of the key of a search that has the query
    lists: dict[str, int]  # of impressions: all, and those without their target


def _make(
    log: InteractionLog,
    options: dict[str, Any],
    vocabulary: PreparedData | None,
    begin: Callable[[str], None],
) -> _Made:
    history = {name: options[name] for name in _HISTORY}
    needed = vocabulary is None or options["split"] == "time"
    events = _with_samples(log, history, needed=needed)
    notes = [_samples_note(events, history)]
    searches, clicks = log.searches, log.clicks
    if vocabulary is None:
        events, searches, clicks, kept = _keep_users_with_samples(log, events)
        notes.append(kept)
    notes += _time_notes(log, events, clicks)
    known = _known_ids(vocabulary)
    begin("ids")
    users = _numbered([events["user"], searches["user"]], known["users"])
    items = _numbered([events["item"], clicks["item"], _shown(events)["item"]], known["items"])
    arrays: dict[str, NDArray] = {}
    begin("events")
    events = _add_events(arrays, events, users, items)
    begin("searches")
    searches = _add_searches(arrays, searches, users)
    _add_clicks(arrays, clicks, searches, items)
    queries = _add_queries(arrays, searches, known)
    _add_seen(arrays)
    for name, table in (("user", users), ("item", items)):
        arrays |= _id_table(name, table["text"])
    begin("samples")
    more, lists = _add_samples(arrays, events, items, options)
    notes += more
    if options["split"] == "user" and log.common_clock:
        notes += splits.later_than_tests(arrays["train_times"], arrays["test_times"])
    if vocabulary is not None:
        arrays["known_sizes"] = np.array(vocabulary.sizes, dtype=np.int64)
        notes.append(_vocabulary_note(vocabulary, PreparedData(arrays, {}).sizes))
    return _Made(arrays, notes, items, queries, lists)


def _check_options(options: dict[str, Any], least: dict[str, int]) -> None:
    for name, choices in (("negatives", KINDS), ("split", splits.KINDS)):
        if options[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {options[name]!r}")
    for name, value in least.items():
        if options[name] < value:
            raise ValueError(f"{name} must be at least {value}, got {options[name]}")
        if name != "seed" and options[name] > _MOST:
            raise ValueError(f"{name} must be at most {_MOST}, got {options[name]}")
    shares = options.get("time_shares", [0.1, 0.1])
    if not (len(shares) == 2 and min(shares) > 0 and sum(shares) < 1):
        raise ValueError(f"time_shares must be two above 0 that sum to less than 1, got {shares}")


def _counts(data: PreparedData) -> dict[str, int]:
    return {
        "users": data.n_users, "items": data.n_items, "queries": data.n_queries,
        "terms": data.n_terms, "events": len(data.rec_items), "searches": len(data.search_times),
        "clicks": len(data.click_items), **{split: len(data.split(split)) for split in SPLITS},
    }  # fmt: skip


def _with_samples(log: InteractionLog, history: dict[str, int], needed: bool) -> pl.DataFrame:
    """Mark the samples among the events; ValueError where there are none, if they are needed."""
    events = log.events
    if "impressions" not in events.columns:
        events = events.with_columns(impressions=pl.lit(None, pl.List(events["item"].dtype)))
    sample = pl.col("target")
    streams = {
        "min_history": (events, log.searches),
        "min_rec_history": (events,),
        "min_search_history": (log.searches,),
    }
    for name, least in history.items():
        if not least:
            continue
        # A history of n events exists once the n-th smallest time has passed.
        times = pl.concat([frame.select("user", "time") for frame in streams[name]])
        passed = times.group_by("user").agg(
            pl.col("time").sort().slice(least - 1, 1).first().alias(name)
        )
        events = events.join(passed, on="user", how="left", maintain_order="left")
        sample &= (pl.col("time") > pl.col(name)).fill_null(False)
    events = events.with_columns(sample=sample)
    if needed and not events["sample"].any():
        raise ValueError(
            f"{log.source}: no target event has a history of at least {_wanted(history)}, "
            f"so there is nothing to prepare (events: {events.height:,}, of them targets: "
            f"{events['target'].sum():,})"
        )
    return events


def _samples_note(events: pl.DataFrame, history: dict[str, int]) -> str:
    n_targets, n_samples = int(events["target"].sum()), int(events["sample"].sum())
    return (
        f"prepare: {n_samples:,} of {n_targets:,} targets are samples; "
        f"{n_targets - n_samples:,} dropped: fewer than {_wanted(history)} before them"
    )


def _keep_users_with_samples(
    log: InteractionLog, events: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, str]:
    """Drop what belongs to users without any of the samples marked among the events."""
    kept = events.filter("sample").select("user").unique()
    n_users = pl.concat([events["user"], log.searches["user"]]).n_unique()
    n_events, n_searches = events.height, log.searches.height
    events = events.join(kept, on="user", how="semi", maintain_order="left")
    searches = log.searches.join(kept, on="user", how="semi", maintain_order="left")
    clicks = log.clicks.join(searches, on="search", how="semi", maintain_order="left")
    note = (
        f"prepare: kept {kept.height:,} of {n_users:,} users; {n_users - kept.height:,} dropped, "
        f"with {n_events - events.height:,} events and {n_searches - searches.height:,} searches: "
        "no sample"
    )
    return events, searches, clicks, note


def _time_notes(log: InteractionLog, events: pl.DataFrame, clicks: pl.DataFrame) -> list[str]:
    """Say what of the order within a user the times leave open, and where streams are apart."""
    gap = log.time_gap()
    notes = [f"prepare: {gap}"] if gap else []
    tied = [
        f"{n:,} of {frame.height:,} {name}"
        for name, frame, keys in (
            ("events", events, ("user", "time")),
            ("clicks in searches", clicks, ("search", "time")),
        )
        if (n := int(frame.select(pl.struct(keys).is_duplicated().sum()).item()))
    ]
    if tied:
        notes.append(
            f"prepare: {' and '.join(tied)} have the time of another of their user or search; the "
            "order of the file decides"
        )
    return notes


def _wanted(history: dict[str, int]) -> str:
    """Name the history that a sample needs."""
    text = f"{history['min_history']} events"
    if least := history["min_rec_history"]:
        text += f", {least} of the recommendation stream"
    if least := history["min_search_history"]:
        text += f", {least} searches"
    return text


def _shown(events: pl.DataFrame) -> pl.DataFrame:
    """List the items shown with the samples, a row each: item."""
    shown = events.filter(pl.col("sample") & (pl.col("impressions").list.len() > 0))
    shown = shown.select(item="impressions").explode("item")
    return shown.filter(pl.col("item").is_not_null())


def _known_ids(vocabulary: PreparedData | None) -> dict[str, list[str]]:
    """List the ids of a vocabulary in the order of their numbers; a query's is its key."""
    if vocabulary is None:
        return {name: [] for name in Sizes._fields}
    ids = {
        "users": vocabulary.users.texts(),
        "items": vocabulary.items.texts(),
        "terms": vocabulary.terms.texts(),
    }
    terms = np.array(["", *ids["terms"]], dtype=object)[vocabulary.query_terms]
    bounds = vocabulary.query_term_offsets[1:]
    ids["queries"] = [TERM_END.join(terms[a:b]) for a, b in itertools.pairwise(bounds.tolist())]
    return ids


def _vocabulary_note(vocabulary: PreparedData, sizes: Sizes) -> str:
    """Say how many ids are new."""
    new = (
        f"{size - known:,} of {size:,} {name}"
        for name, known, size in zip(Sizes._fields, vocabulary.sizes, sizes, strict=True)
    )
    return (
        f"prepare: ids keep their numbers of {vocabulary.manifest.get('source', 'unknown')} "
        f"({str(vocabulary.manifest.get('fingerprint'))[:12]}); new behind them are "
        f"{', '.join(new)}; a model can score new items once it is extended"
    )


def _numbered(columns: list[pl.Series], known: Sequence[str]) -> pl.DataFrame:
    """Give the known ids the numbers from 1, and the other distinct values those behind, sorted.

    Returns value (null for a known id that no column has), text and number (Int32). As text, since
    a column of integers may follow one of text.
    """
    values = pl.concat([column.unique().rename("value") for column in columns]).unique().sort()
    found = values.to_frame().with_columns(text=pl.col("value").cast(pl.String))
    first = pl.DataFrame({"text": known}, schema={"text": pl.String})
    new = found.join(first, on="text", how="anti", maintain_order="left")
    first = first.join(found, on="text", how="left", maintain_order="left").select(found.columns)
    number = pl.int_range(1, pl.len() + 1, dtype=pl.Int32)
    return pl.concat([first, new]).with_columns(number=number)


def _number(frame: pl.DataFrame, column: str, table: pl.DataFrame, name: str) -> pl.DataFrame:
    """Add the dense number of a column's values as column ``name``; rows keep their order."""
    numbers = table.select(pl.col("value").alias(column), pl.col("number").alias(name))
    return frame.join(numbers, on=column, how="inner", maintain_order="left")


def _add_events(
    arrays: dict[str, NDArray], events: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame
) -> pl.DataFrame:
    events = _number(_number(events, "user", users, "u"), "item", items, "i")
    events = events.sort("u", "time", "order", maintain_order=True)
    arrays["rec_offsets"] = offsets_of(events["u"].to_numpy(), users.height + 1)
    arrays["rec_items"] = events["i"].to_numpy()
    arrays["rec_times"] = events["time"].cast(pl.Int64).to_numpy()
    return events


def _add_searches(
    arrays: dict[str, NDArray], searches: pl.DataFrame, users: pl.DataFrame
) -> pl.DataFrame:
    searches = _number(searches, "user", users, "u").sort("u", "time", maintain_order=True)
    searches = searches.with_columns(
        place=pl.int_range(pl.len(), dtype=pl.Int64),
        key=pl.col("terms").list.join(TERM_END).fill_null(""),
    )
    arrays["search_offsets"] = offsets_of(searches["u"].to_numpy(), users.height + 1)
    arrays["search_times"] = searches["time"].cast(pl.Int64).to_numpy()
    for column, dtype in (("relevant", pl.Int8), ("topic", pl.Int32)):
        if column in searches.columns:
            arrays[f"search_{column}"] = searches[column].fill_null(-1).cast(dtype).to_numpy()
    return searches


def _add_clicks(
    arrays: dict[str, NDArray], clicks: pl.DataFrame, searches: pl.DataFrame, items: pl.DataFrame
) -> None:
    places = searches.select("search", "place")
    clicks = clicks.join(places, on="search", how="inner", maintain_order="left")
    clicks = _number(clicks, "item", items, "i").sort("place", "time", maintain_order=True)
    clicks = clicks.unique(["place", "i"], keep="first", maintain_order=True)
    arrays["click_offsets"] = offsets_of(clicks["place"].to_numpy(), searches.height)
    arrays["click_items"] = clicks["i"].to_numpy()
    arrays["click_times"] = clicks["time"].cast(pl.Int64).to_numpy()


def _add_queries(
    arrays: dict[str, NDArray], searches: pl.DataFrame, known: dict[str, list[str]]
) -> pl.DataFrame:
    """Assign numbers to queries and terms; return the query number of each search key."""
    queries = _numbered([searches["key"]], known["queries"])
    numbered = _number(searches, "key", queries, "q").sort("place")
    arrays["search_queries"] = numbered["q"].to_numpy()
    texts = queries.select("number", value=pl.col("text").str.split(TERM_END)).explode("value")
    texts = texts.filter(pl.col("value") != "").with_columns(
        place=pl.int_range(pl.len(), dtype=pl.Int64)
    )
    terms = _numbered([texts["value"]], known["terms"])
    texts = _number(texts, "value", terms, "t").sort("place")
    arrays["query_term_offsets"] = offsets_of(texts["number"].to_numpy(), queries.height + 1)
    arrays["query_terms"] = texts["t"].to_numpy()
    arrays.update(_id_table("term", terms["text"]))
    return numbered.select(value="search", number="q")


def _add_seen(arrays: dict[str, NDArray]) -> None:
    """First sight of every item, in an event or in a click of a search."""
    n_users = len(arrays["rec_offsets"]) - 2
    every_user = np.arange(n_users + 1, dtype=np.int32)
    searcher = np.repeat(every_user, np.diff(arrays["search_offsets"]))
    users = np.concatenate(
        [
            np.repeat(every_user, np.diff(arrays["rec_offsets"])),
            np.repeat(searcher, np.diff(arrays["click_offsets"])),
        ]
    )
    items = np.concatenate([arrays["rec_items"], arrays["click_items"]])
    times = np.concatenate([arrays["rec_times"], arrays["click_times"]])
    # One number a pair: users are in order already, and NumPy's stable sort takes runs as they are.
    pairs = users.astype(np.int64) << 32 | items
    order = np.argsort(pairs, kind="stable")
    pairs = pairs[order]
    first = np.flatnonzero(np.diff(pairs, prepend=-1))
    pairs, times = pairs[first], np.minimum.reduceat(times[order], first)
    arrays["seen_offsets"] = offsets_of(pairs >> 32, n_users + 1)
    arrays["seen_items"] = (pairs & (2**32 - 1)).astype(np.int32)
    arrays["seen_times"] = times


def _add_samples(
    arrays: dict[str, NDArray],
    events: pl.DataFrame,
    items: pl.DataFrame,
    options: dict[str, Any],
) -> tuple[list[str], dict[str, int]]:
    place = np.flatnonzero(events["sample"].to_numpy())
    users = events["u"].to_numpy()[place]
    times = arrays["rec_times"][place]
    ends = {
        stream: lower_bound(
            arrays[f"{stream}_times"],
            arrays[f"{stream}_offsets"][users],
            arrays[f"{stream}_offsets"][users + 1],
            times,
        )
        for stream in ("rec", "search")
    }
    n_users = len(arrays["rec_offsets"]) - 2
    targets = arrays["rec_items"][place]
    data = PreparedData(arrays, {})
    repeat = data.seen.has(users, targets, times)
    least = options["min_targets"]
    if options["split"] == "time":
        split = splits.by_time(users, times, n_users, least, tuple(options["time_shares"]))
    else:
        split = splits.leave_one_out(users, n_users, least)
    if split.times is not None:
        arrays["split_times"] = split.times
    dropped = _drop_without_negatives(
        data, split, users, times, repeat, items.height, options["n_negatives"]
    )
    notes = splits.describe(split, users, least) + dropped
    impressions, lists = _impressions(events, items)
    if lists["without_target"]:
        notes.append(
            f"prepare: {lists['without_target']:,} of {lists['all']:,} lists of impressions lack "
            "their target; it is put behind them"
        )
    for number, name in enumerate(SPLITS):
        rows = np.flatnonzero(split.of_sample == number)
        arrays[f"{name}_users"] = users[rows]
        arrays[f"{name}_items"] = targets[rows]
        arrays[f"{name}_times"] = times[rows]
        for stream, end in ends.items():
            arrays[f"{name}_{stream}_end"] = end[rows]
        arrays[f"{name}_repeat"] = repeat[rows]
        if impressions.height:
            shown = impressions.join(
                pl.DataFrame({"sample": rows, "row": np.arange(len(rows))}), on="sample"
            ).sort("row", "rank")
            offsets = offsets_of(shown["row"].to_numpy(), len(rows))
            arrays[f"{name}_impression_offsets"] = offsets
            arrays[f"{name}_impressions"] = shown["i"].to_numpy()
    _add_counts(arrays, place[split.of_sample == 0], items.height)
    return notes, lists


def _drop_without_negatives(
    data: PreparedData,
    split: Split,
    users: NDArray,
    times: NDArray,
    repeat: NDArray,
    n_items: int,
    n_negatives: int,
) -> list[str]:
    """Take samples whose users have seen too much for their negatives out of the split.

    A held-out sample needs ``n_negatives``, a training sample one, which it may draw again.
    """
    held_out = split.of_sample > 0
    wanted = np.where(held_out, n_negatives, min(n_negatives, 1))
    # Whoever has seen few items at all need not be looked at closer.
    much = np.diff(data.seen_offsets)[users] + 1 > n_items - wanted
    rows = np.flatnonzero((split.of_sample >= 0) & much)
    offsets, _ = data.seen.before(users[rows], times[rows])
    free = n_items - np.diff(offsets) - ~repeat[rows]
    few = free < wanted[rows]
    rows, free = rows[few], free[few]
    if not len(rows):
        return []
    most = int(np.where(held_out[rows], free, -1).argmax())
    user = data.users[int(users[rows[most]])]
    seen = f"user {user!r} has seen all but {free[most]:,} of the {n_items:,} items"
    n_held_out = int(held_out[rows].sum())
    if n_held_out == held_out.sum() > 0 or len(rows) == (split.of_sample >= 0).sum():
        raise ValueError(
            f"{n_negatives} distinct negatives are wanted, but {seen}, and the others no "
            "fewer: lower --n-negatives"
        )
    split.of_sample[rows] = -1
    return [
        f"prepare: dropped {n_held_out:,} validation and test samples and "
        f"{len(rows) - n_held_out:,} training samples of {len(np.unique(users[rows])):,} users "
        f"with too few negatives left ({seen}): a lower --n-negatives than {n_negatives} keeps more"
    ]


def _impressions(events: pl.DataFrame, items: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Distinct items shown with each sample, in the order shown: sample, i, rank; and counts.

    A target that is missing from its own list is put behind it; a list of the target alone ranks
    nothing and is left out. Samples are numbered by their order in ``events``.
    """
    samples = events.filter("sample").with_columns(sample=pl.int_range(pl.len(), dtype=pl.Int64))
    samples = samples.filter(pl.col("impressions").list.len() > 0)
    there = samples.select(pl.col("impressions").list.contains(pl.col("item")).sum()).item()
    lists = {"all": samples.height, "without_target": samples.height - there}
    shown = samples.select("sample", item="impressions").explode("item")
    shown = shown.with_columns(rank=pl.int_range(pl.len(), dtype=pl.Int64))
    shown = _number(shown, "item", items, "i").select("sample", "i", "rank")
    target = samples.select("sample", "i", rank=pl.lit(shown.height, pl.Int64))
    both = pl.concat([shown, target]).group_by("sample", "i").agg(pl.col("rank").min())
    return both.filter(pl.len().over("sample") > 1), lists


def _add_counts(arrays: dict[str, NDArray], trained: NDArray, n_items: int) -> None:
    """Popularity from what training may know, with the events ``trained`` as targets.

    A training target may carry the held-out target's own time; it counts too.
    """
    end = PreparedData(arrays, {}).train_end
    known = arrays["rec_times"] < end[owners(arrays["rec_offsets"])]
    known[trained] = True
    items = arrays["rec_items"]
    for name, counted in (("item_count", items[known]), ("train_target_count", items[trained])):
        arrays[name] = np.bincount(counted, minlength=n_items + 1).astype(np.int64)


def _negatives(
    data: PreparedData, rng: np.random.Generator, split: str, kind: str, n: int
) -> NDArray[np.int32]:
    samples = data.split(split)
    sampler = NegativeSampler(data, kind)
    drawn = np.empty((len(samples), n), dtype=np.int32)
    for start in range(0, len(samples), _NEGATIVES_CHUNK):
        rows = slice(start, start + _NEGATIVES_CHUNK)
        drawn[rows] = sampler.draw(
            rng, samples.users[rows], samples.times[rows], samples.items[rows], n, distinct=True
        )
    return drawn


def _id_table(name: str, text: pl.Series) -> dict[str, NDArray]:
    lengths = text.str.len_bytes().to_numpy().astype(np.int64)
    joined = "".join(text.to_list()).encode()
    return {
        f"{name}_id_offsets": np.concatenate([[0, 0], np.cumsum(lengths)]).astype(np.int64),
        f"{name}_id_bytes": np.frombuffer(joined, dtype=np.uint8),
    }


def _write_vectors(
    path: Path,
    vectors: Vectors | None,
    numbers: pl.DataFrame,
    n_rows: int,
    known: NDArray[np.float32] | None,
) -> None:
    """Stream text vectors into a float32 array by dense id; ids without a vector stay 0.

    The ``known`` vectors of the first ids stay what they are.
    """

    def new_file(width: int) -> np.memmap:
        shape = (n_rows, width)
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)

    array = None if known is None else new_file(known.shape[1])
    dtype = numbers.schema["value"]
    for keys, block in vectors() if vectors else ():
        if keys.dtype != dtype:
            raise ValueError(f"{path.stem}: vectors are keyed by {keys.dtype}, ids are {dtype}")
        if array is None:
            array = new_file(block.shape[1])
        if block.shape[1] != array.shape[1]:
            raise ValueError(
                f"{path.stem}: vectors of {array.shape[1]} and {block.shape[1]} numbers"
            )
        wrong = np.flatnonzero(~np.isfinite(block).all(1))
        if len(wrong):
            raise ValueError(f"{path.stem}: the vector of {keys[int(wrong[0])]} is not finite")
        rows = keys.rename("value").to_frame().with_row_index("row")
        found = rows.join(numbers, on="value", how="inner", maintain_order="left")
        array[found["number"].to_numpy()] = block[found["row"].to_numpy()]
    if array is not None:
        if known is not None:
            array[: len(known)] = known
        array.flush()
