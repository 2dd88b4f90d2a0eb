"""InteractionLog: what every reader returns and ``prepare`` takes, one user's events per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from .rules import ID, MAX_MS, MIN_UNIX_MS

# Frozen text vectors in chunks: keys [n] and float32 vectors [n, D]. A callable that starts again
# at each call, so that gigabytes are streamed and never held.
Vectors: TypeAlias = Callable[[], Iterator[tuple[pl.Series, NDArray[np.float32]]]]

TERM_END = "\x1f"  # joins the terms of a query into its key; no term holds it

COLUMNS = {
    "events": ("user", "item", "time", "order", "target"),
    "searches": ("search", "user", "time", "terms"),
    "clicks": ("search", "item", "time"),
}
OPTIONAL = {"events": ("impressions",), "searches": ("relevant", "topic"), "clicks": ()}
_INTEGERS = {"events": ("time", "order"), "searches": ("search", "time"), "clicks": ("time",)}
_LABELS = {"relevant": (pl.Int8, -1, 1), "topic": (pl.Int32, -(2**31), 2**31 - 1)}
# Unix times in seconds are 1.7e9, in ms 1.7e12: two streams so far apart are in two units, and so
# are the times of one stream where none lies between.
_UNIT_RATIO, _LEAST_UNIX = 100, 10**8


@dataclass
class InteractionLog:
    """The two streams of all users, with original ids (any integer or string) and Int64 ms times.

    - ``events``, the recommendation stream: user, item, time, order (second key; where it ties too,
      the row decides), target (may the event be predicted?) and optionally impressions (list of the
      items shown with it, null where unknown).
    - ``searches``: search (key, unique), user, time (where times tie, the row decides), terms (list
      of strings), optionally relevant (-1 unknown, 0 noise, 1 relevant) and topic (Int32).
    - ``clicks``: search, item, time (where times tie, the row decides).
    - ``notes``: what the reader kept and dropped, with counts and reasons, a line each.
    - ``item_text`` by original item id, ``query_text`` by the key of a search that has the query.
    - ``common_clock``: whether times of different users compare.

    Other columns are dropped. Raises ValueError for a missing column, a null, a column of another
    type, a text that is no id, a time beyond the year 5138, ids of two types, a search key that
    repeats, a click whose search is missing or later than it, and, on a common clock, times in two
    units, of one stream or two, or 0 for unknown among unix times.
    """

    source: str
    events: pl.DataFrame
    searches: pl.DataFrame
    clicks: pl.DataFrame
    notes: list[str] = field(default_factory=list)
    item_text: Vectors | None = None
    query_text: Vectors | None = None
    common_clock: bool = True

    def __post_init__(self) -> None:
        for name, columns in COLUMNS.items():
            frame = getattr(self, name)
            missing = [column for column in columns if column not in frame.columns]
            if missing:
                raise ValueError(f"{name} lacks the column {missing[0]}")
            there = [column for column in OPTIONAL[name] if column in frame.columns]
            frame = frame.select(*columns, *there)
            setattr(self, name, frame)
            for column in columns:
                if column != "terms" and frame[column].null_count():
                    raise ValueError(f"{name}.{column} has {frame[column].null_count()} nulls")
            for column in _INTEGERS[name]:
                _require(name, frame[column], frame[column].dtype.is_integer(), "an integer column")
            _check_times(name, frame["time"])
            for column in ("user", "item"):
                if column in columns:
                    _check_ids(name, frame[column])
        self._check_types()
        self._check_magnitudes()
        self._check_keys()
        self._check_units()

    def _check_types(self) -> None:
        target, terms = self.events["target"], self.searches["terms"]
        _require("events", target, target.dtype == pl.Boolean, "a column of true and false")
        texts = isinstance(terms.dtype, pl.List) and terms.dtype.inner in (pl.String, pl.Null)
        _require("searches", terms, texts, "a column of lists of text")
        self.searches = self.searches.cast({"terms": pl.List(pl.String)})
        held = pl.element().str.contains(TERM_END, literal=True).any()
        if self.searches["terms"].list.eval(held).list.any().any():
            raise ValueError(f"searches.terms has a term with {TERM_END!r}, which separates terms")
        for name, frames in (("user", ("events", "searches")), ("item", ("events", "clicks"))):
            first, second = (getattr(self, frame)[name].dtype for frame in frames)
            if first != second:
                raise ValueError(f"{name} is {first} in {frames[0]}, but {second} in {frames[1]}")
        if "impressions" in self.events.columns:
            shown, ids = self.events["impressions"], self.events["item"].dtype
            fits = shown.dtype == pl.Null or (
                isinstance(shown.dtype, pl.List)
                and (shown.dtype.inner == ids or not shown.list.len().sum())  # of no entry, no type
            )
            _require("events", shown, fits, f"a column of lists of {ids}")
            self.events = self.events.cast({"impressions": pl.List(ids)})
            if ids == pl.String:
                _check_ids("events", self.events["impressions"].explode().drop_nulls())
        for column, (dtype, least, most) in _LABELS.items():
            if column in self.searches.columns:
                values = self.searches[column]
                integers = values.dtype.is_integer() or values.dtype == pl.Null
                fits = integers and values.is_between(least, most).all()
                _require("searches", values, fits, f"integers in {least}..{most}")
                self.searches = self.searches.cast({column: dtype})

    def _check_keys(self) -> None:
        if self.searches["search"].is_duplicated().any():
            raise ValueError("searches.search repeats: a key names one search")
        searches, clicks = self.searches["search"].dtype, self.clicks["search"].dtype
        if searches != clicks:
            raise ValueError(f"search is {searches} in searches, but {clicks} in clicks")
        began = self.searches.select("search", began="time")
        clicked = self.clicks.select("search", "time").join(began, on="search", how="left")
        if unknown := clicked["began"].null_count():
            raise ValueError(f"{unknown} clicks name a search that is not in searches")
        if early := clicked.filter(pl.col("time") < pl.col("began")).height:
            raise ValueError(f"{early} clicks precede their search")

    def _check_magnitudes(self) -> None:
        """Raise where some times of a stream are in unix ms, and none leads up to them.

        A clock of its own may start at 0 and run for years, but not leap. Where each user has a
        clock, 0 is where it starts.
        """
        if not self.common_clock:
            return
        for name in COLUMNS:
            times = getattr(self, name)["time"]
            unix = times >= MIN_UNIX_MS
            low, high = times.filter(~unix).max(), times.filter(unix).min()
            if low is None or high is None or low * _UNIT_RATIO > high:
                continue
            raise ValueError(
                f"{self.source}: {name}.time holds {low} as well as {high}, and nothing between: "
                "times in two units, or unknown ones"
            )

    def _check_units(self) -> None:
        """Raise where the streams do not overlap and their times are of two magnitudes."""
        if not self.time_gap():
            return
        low, high = sorted(
            abs(float(frame["time"].median()))  # type: ignore[arg-type]  # no frame is empty
            for frame in (self.events, self.searches)
        )
        if low >= _LEAST_UNIX and high >= _UNIT_RATIO * low:
            raise ValueError(
                f"{self.source}: {self.time_gap()}; times are of two magnitudes, so one of the "
                "streams is not in ms"
            )

    def time_gap(self) -> str:
        """Say that the times of the two streams do not overlap; "" where they do."""
        if not (self.common_clock and self.events.height and self.searches.height):
            return ""
        first, last = (
            [getattr(frame["time"], end)() for frame in (self.events, self.searches)]
            for end in ("min", "max")
        )
        if max(first) <= min(last):
            return ""
        return (
            f"the streams do not overlap in time: events from {first[0]} to {last[0]}, searches "
            f"from {first[1]} to {last[1]}"
        )


def _require(frame: str, column: pl.Series, holds: bool | None, what: str) -> None:
    if not holds:
        raise ValueError(f"{frame}.{column.name} must be {what}, got {column.dtype}")


def _check_times(frame: str, times: pl.Series) -> None:
    wrong = times.filter(~times.is_between(-MAX_MS, MAX_MS))
    if len(wrong):
        raise ValueError(f"{frame}.time holds {wrong[0]}, which is no time in ms (up to {MAX_MS})")


def _check_ids(frame: str, ids: pl.Series) -> None:
    _require(frame, ids, ids.dtype.is_integer() or ids.dtype == pl.String, "integers or text")
    typed = ID.typed(pl.col(ids.name), ids.dtype)
    assert typed is not None  # both types can keep the rule
    wrong = ids.to_frame().filter(typed.is_null())[ids.name]
    if len(wrong):
        raise ValueError(f"{frame}.{ids.name} holds {wrong[0]!r}, which is no id")
