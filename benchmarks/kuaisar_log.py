"""Write a log like KuaiSAR's, of any size, in bounded memory, and count what is in it.

    python benchmarks/kuaisar_log.py OUT [--rows 19664885] [--seed 0]

OUT gets ``rec_inter.csv`` and ``src_inter.csv`` with the documented columns. Of the full release
are the numbers of rows of either stream, users, items of either stream and queries, half of the
recommendations clicked, 60 % of the searches with a click, the 19 days, and the bytes of a row; a
log of other size has all of them in proportion. Guessed are the lengths of searches and of what is
recommended at once (which ties in time), the laws of popularity and activity, and how often the
traps come: ids of sessions used again by other users and for other keywords, sessions whose rows
lie apart, rows that repeat another, results listed both clicked and not, searches without words,
also with no keyword at all. The same size and seed give the same bytes.

What a reader has to find is counted while writing, block by block, and printed as JSON.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

_BLOCK = 1 << 18  # rows that are made at a time
_BEGIN, _END = 1_684_737_000_000, 1_686_360_600_000  # 2023-05-22 14:30 to 2023-06-10 09:30, Beijing
_BEIJING_MS = 8 * 3_600_000
_AT_ONCE = 8  # recommendations of one time, at most
_RESULTS = 15  # of a search, at most
_REPEATED = 0.01  # rows that repeat the one before; of a search, as many again deny its click
_SAME_SESSION = 0.05  # searches of the session before, with other keywords
_WORDLESS, _WITHOUT_KEYWORD = 0.005, 0.001
_SCATTER = 2_654_435_761  # a prime, so that a product modulo anything smaller permutes
_ITEM_TYPES = ("VIDEO", "IMAGE_ATLAS", "USER", "LIVE", "COMMODITY", "MUSIC", "ADVERT")
_SOURCES = ("USER_INPUT", "RELATED_QUERY", "HOME_PAGE", "COMMENT", "HISTORY")

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """How much there is of everything, duplicates and rows without a click too."""

    rec_rows: int = 14_605_716
    search_rows: int = 5_059_169
    users: int = 25_877
    rec_items: int = 4_046_367
    search_items: int = 3_026_189
    items: int = 6_890_707  # of either stream
    queries: int = 453_667

    @classmethod
    def of(cls, rows: int) -> "Size":
        """Scale the full release to a number of rows, of both streams together."""
        full = dataclasses.astuple(cls())
        rec, *others = (max(1, round(n * rows / sum(full[:2]))) for n in full)
        others[0] = max(1, rows - rec)
        return cls(rec, *others)


@dataclass
class Counts:
    """What a reader of the log has to find."""

    rec_rows: int = 0
    clicks: int = 0  # clicked rows, without those that repeat another
    repeated: int = 0  # clicked rows that do
    search_rows: int = 0
    sessions: int = 0
    sessions_clicked: int = 0
    results_clicked: int = 0  # distinct in their session
    results_unclicked: int = 0
    conflicts: int = 0  # results listed both clicked and not
    users: int = 0  # with a click or a search
    items: int = 0  # with a click in either stream
    queries: int = 0  # all without words as one


class _Ids:
    """Ids of a range: each once among the rows that are to come, popular ones again and again."""

    def __init__(self, first: int, size: int, uses: int) -> None:
        self._first, self._size, self._fresh, self._uses = first, size, 0, uses

    def draw(self, rng: np.random.Generator, n: int) -> tuple[Ints, NDArray[np.bool_]]:
        """Draw the next n of them, and tell which are there for the first time."""
        ids = (self._size * rng.random(n) ** 2).astype(np.int64)
        wanted = min(n, round((self._size - self._fresh) * min(1.0, n / max(self._uses, 1))))
        fresh = np.zeros(n, dtype=bool)
        fresh[rng.permutation(n)[:wanted]] = True
        ids[fresh] = np.arange(self._fresh, self._fresh + wanted)
        self._fresh, self._uses = self._fresh + wanted, self._uses - n
        return self._first + ids, fresh


class _Writer:
    """Writes the two files of a log, and counts."""

    def __init__(self, folder: Path, size: Size, seed: int) -> None:
        self.folder, self.size, self.seed = folder, size, seed
        self.counts = Counts(rec_rows=size.rec_rows, search_rows=size.search_rows)
        self._users = np.zeros(size.users, dtype=bool)
        self._items = np.zeros(size.items, dtype=bool)
        self._queries = np.zeros(size.queries + 1, dtype=bool)
        self._rec_items = _Ids(0, size.rec_items, size.rec_rows)
        first = size.items - size.search_items
        self._search_items = _Ids(first, size.search_items, size.search_rows)
        n_searches = 2 * size.search_rows // (1 + _RESULTS)
        self._search_queries, self._n_sessions = _Ids(1, size.queries, n_searches), 0

    def write(self) -> Counts:
        self._stream("rec_inter.csv", 0, self.size.rec_rows, self._recommendations)
        self._stream("src_inter.csv", 1, self.size.search_rows, self._searches)
        self.counts.users, self.counts.items = int(self._users.sum()), int(self._items.sum())
        self.counts.queries = int(self._queries.sum())
        return self.counts

    def _stream(self, name: str, stream: int, rows: int, make: Callable[..., pl.DataFrame]) -> None:
        """Write a stream by blocks, each with random numbers and a span of time of its own."""
        starts = range(0, rows, _BLOCK)
        bounds = np.linspace(_BEGIN, _END, len(starts) + 1).astype(np.int64)
        with (self.folder / name).open("wb") as file:
            for number, start in enumerate(starts):
                rng = np.random.default_rng([self.seed, stream, number])
                n = min(_BLOCK, rows - start)
                frame = make(rng, n, bounds[number], bounds[number + 1])
                frame.write_csv(file, include_header=number == 0)

    def _groups(
        self, rng: np.random.Generator, n: int, most: int, begin: int, end: int
    ) -> tuple[Ints, Ints, Ints]:
        """Part n rows into groups of 1 to ``most``: of each row its group, of those user, time."""
        lengths = rng.integers(1, most + 1, size=n)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), n)) + 1]
        lengths[-1] -= lengths.sum() - n
        users = (self.size.users * rng.random(len(lengths)) ** 1.5).astype(np.int64)
        times = np.sort(rng.integers(begin, end, size=len(lengths)))
        return np.repeat(np.arange(len(lengths)), lengths), users, times

    def _recommendations(
        self, rng: np.random.Generator, n: int, begin: int, end: int
    ) -> pl.DataFrame:
        group, users, times = self._groups(rng, n, _AT_ONCE, begin, end)
        items, fresh = self._rec_items.draw(rng, n)
        duration = rng.integers(3_000, 120_000, size=n)
        searched = rng.random(n) < 0.02
        columns = {
            "user_id": users[group],
            "item_id": items,
            "duration_ms": duration.astype(float),
            "playing_time": np.floor(duration * rng.random(n) * 1.5),
            "timestamp": times[group],
            "forward": (rng.random(n) < 0.002).astype(np.int64),
            "like": (rng.random(n) < 0.02).astype(np.int64),
            "follow": (rng.random(n) < 0.003).astype(np.int64),
            "search_item_related": (searched & (rng.random(n) < 0.5)).astype(np.int64),
            "search": searched.astype(np.int64),
            "click": (rng.random(n) < 0.5).astype(np.int64),
        }
        again = _again(rng, group, fresh, _REPEATED)
        columns = {name: values[again] for name, values in columns.items()}
        self._count_recommendations(columns)
        columns["item_id"] = self._scattered(columns["item_id"])
        return pl.DataFrame(columns).with_columns(
            pl.col("timestamp").cast(pl.Float64), time=_text_of("timestamp")
        )

    def _count_recommendations(self, columns: dict[str, NDArray]) -> None:
        clicked = columns["click"] > 0
        users, items, times = (
            columns[name][clicked] for name in ("user_id", "item_id", "timestamp")
        )
        _, distinct = _numbered(users, items, times)
        self.counts.clicks += distinct
        self.counts.repeated += len(users) - distinct
        self._users[users] = True
        self._items[items] = True

    def _searches(self, rng: np.random.Generator, n: int, begin: int, end: int) -> pl.DataFrame:
        group, users, times = self._groups(rng, n, _RESULTS, begin, end)
        n_searches = len(users)
        queries, _ = self._search_queries.draw(rng, n_searches)
        wordless = rng.random(n_searches)
        queries[wordless < _WORDLESS] = 0
        queries[wordless < _WITHOUT_KEYWORD] = -1
        sessions = (self._n_sessions + np.arange(n_searches)) // 2
        self._n_sessions += n_searches
        same = np.flatnonzero(rng.random(n_searches - 1) < _SAME_SESSION) + 1
        for values in (users, times, sessions):
            values[same] = values[same - 1]
        items, fresh = self._search_items.draw(rng, n)
        first = np.concatenate([[True], np.diff(group) > 0])
        clicked = first | (rng.random(n) < 0.15)
        clicked &= (rng.random(n_searches) < 0.6)[group]
        columns = {
            "query": queries[group],
            "item_id": items,
            "click_cnt": np.where(clicked, 1 + (rng.random(n) < 0.1), 0),
            "search_session_id": sessions[group],
            "item_type": rng.choice(len(_ITEM_TYPES), n, p=[0.7, *[0.05] * 6]),
            "user_id": users[group],
            "search_session_timestamp": times[group],
            "search_source": rng.integers(len(_SOURCES), size=n_searches)[group],
        }
        again = _again(rng, group, fresh, 2 * _REPEATED)
        order = np.argsort(np.arange(n) + 40 * rng.random(n))
        denied = (again < np.arange(n)) & (rng.random(n) < 0.5)
        columns = {name: values[again] for name, values in columns.items()}
        columns["click_cnt"][denied] = 0
        columns = {name: values[order] for name, values in columns.items()}
        self._count_searches(columns)
        columns["item_id"] = self._scattered(columns["item_id"])
        frame = pl.DataFrame(columns).with_columns(
            keyword=_keyword(pl.col("query"), self.size.queries),
            item_type=_named("item_type", _ITEM_TYPES),
            search_source=_named("search_source", _SOURCES),
            search_session_timestamp=pl.col("search_session_timestamp").cast(pl.Float64),
            search_session_time=_text_of("search_session_timestamp"),
        )
        return frame.select("keyword", pl.exclude("keyword", "query"))

    def _count_searches(self, columns: dict[str, NDArray]) -> None:
        names = ("user_id", "search_session_id", "search_session_timestamp", "query")
        session, n_sessions = _numbered(*(columns[name] for name in names))
        result, n_results = _numbered(session, columns["item_id"])
        clicked = columns["click_cnt"] > 0
        both = np.zeros((2, n_results), dtype=bool)
        both[clicked.astype(int), result] = True
        self.counts.sessions += n_sessions
        self.counts.sessions_clicked += len(np.unique(session[clicked]))
        self.counts.results_clicked += int(both[1].sum())
        self.counts.results_unclicked += int((~both[1]).sum())
        self.counts.conflicts += int(both.all(0).sum())
        self._users[columns["user_id"]] = True
        self._items[columns["item_id"][clicked]] = True
        self._queries[np.maximum(columns["query"], 0)] = True

    def _scattered(self, items: Ints) -> Ints:
        """Part the ids of items from their popularity."""
        return items * _SCATTER % self.size.items + 1


def _again(rng: np.random.Generator, group: Ints, fresh: NDArray, share: float) -> Ints:
    """Choose the row that stands at each place: mostly its own, else the one before in its group.

    What is there for the first time stays.
    """
    rows = np.arange(len(group))
    again = (rng.random(len(group)) < share) & ~fresh
    again[1:] &= group[1:] == group[:-1]
    again[0] = False
    return rows - again


def _numbered(*columns: NDArray) -> tuple[Ints, int]:
    """Give equal rows of some columns one number each; return them, and how many there are."""
    order = np.lexsort(columns)
    differs = np.zeros(max(len(order) - 1, 0), dtype=bool)
    for column in columns:
        ordered = column[order]
        differs |= ordered[1:] != ordered[:-1]
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(differs)])[: len(order)]
    return numbers, int(differs.sum()) + min(len(order), 1)


def _text_of(milliseconds: str) -> pl.Expr:
    local = (pl.col(milliseconds) + _BEIJING_MS).cast(pl.Datetime("ms"))
    return local.dt.strftime("%Y-%m-%d %H:%M:%S")


def _named(column: str, names: tuple[str, ...]) -> pl.Expr:
    return pl.col(column).replace_strict(dict(enumerate(names)))


def _keyword(query: pl.Expr, n_words: int) -> pl.Expr:
    """List the words of a query as text: its own word, and up to four that others have too."""
    others = [
        pl.when(query * _SCATTER // 1024 % 5 >= place).then(query * (_SCATTER + place) % n_words)
        for place in range(1, 5)
    ]
    words = pl.concat_str(query, *others, separator=", ", ignore_nulls=True)
    text = pl.when(query == 0).then(pl.lit("")).otherwise(words)
    return pl.when(query >= 0).then(pl.format("[{}]", text))


def write(folder: str | Path, rows: int, seed: int = 0) -> Counts:
    """Write the log of a number of rows into a folder; return what is in it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return _Writer(folder, Size.of(rows), seed).write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    full = Size()
    parser.add_argument("--rows", type=int, default=full.rec_rows + full.search_rows)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts = write(arguments.out, arguments.rows, arguments.seed)
    sys.stdout.write(json.dumps(dataclasses.asdict(counts)) + "\n")


if __name__ == "__main__":
    main()
