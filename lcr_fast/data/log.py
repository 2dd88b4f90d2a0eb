"""InteractionLog: what every reader returns and ``prepare`` takes, one user's events per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

# Frozen text vectors in chunks: keys [n] and float32 vectors [n, D]. A callable that starts again
# at each call, so that gigabytes are streamed and never held.
Vectors: TypeAlias = Callable[[], Iterator[tuple[pl.Series, NDArray[np.float32]]]]

_COLUMNS = {
    "events": ("user", "item", "time", "order", "target"),
    "searches": ("search", "user", "time", "terms"),
    "clicks": ("search", "item", "time"),
}
_INTEGERS = {"events": ("time", "order"), "searches": ("search", "time"), "clicks": ("time",)}


@dataclass
class InteractionLog:
    """The two streams of all users, with original ids (any integer or string) and Int64 ms times.

    - ``events``, the recommendation stream: user, item, time, order (second key, unique where the
      times of a user tie),
      target (may the event be predicted?) and optionally impressions (list of the items shown with
      it, null where unknown).
    - ``searches``: search (key, unique; second key where times tie), user, time, terms (list of
      strings), optionally relevant (-1 unknown, 0 noise, 1 relevant) and topic (Int32).
    - ``clicks``: search, item, time.
    - ``notes``: what the reader kept and dropped, with counts and reasons, a line each.
    - ``item_text`` by original item id, ``query_text`` by the key of a search that has the query.

    Raises ValueError for a missing column, a null, a time that is no integer, ids of two types, a
    search key that repeats, and a click whose search is missing or later than it.
    """

    source: str
    events: pl.DataFrame
    searches: pl.DataFrame
    clicks: pl.DataFrame
    notes: list[str] = field(default_factory=list)
    item_text: Vectors | None = None
    query_text: Vectors | None = None

    def __post_init__(self) -> None:
        for name, columns in _COLUMNS.items():
            frame = getattr(self, name)
            missing = [column for column in columns if column not in frame.columns]
            if missing:
                raise ValueError(f"{name} lacks the column {missing[0]}")
            for column in columns:
                if column != "terms" and frame[column].null_count():
                    raise ValueError(f"{name}.{column} has {frame[column].null_count()} nulls")
            for column in _INTEGERS[name]:
                if not frame[column].dtype.is_integer():
                    got = frame[column].dtype
                    raise ValueError(f"{name}.{column} must be an integer column, got {got}")
        if self.searches["search"].is_duplicated().any():
            raise ValueError("searches.search repeats: a key names one search")
        for name, frames in (("user", ("events", "searches")), ("item", ("events", "clicks"))):
            first, second = (getattr(self, frame)[name].dtype for frame in frames)
            if first != second:
                raise ValueError(f"{name} is {first} in {frames[0]}, but {second} in {frames[1]}")
        began = self.searches.select("search", began="time")
        clicks = self.clicks.select("search", "time").join(began, on="search", how="left")
        if unknown := clicks["began"].null_count():
            raise ValueError(f"{unknown} clicks name a search that is not in searches")
        if early := clicks.filter(pl.col("time") < pl.col("began")).height:
            raise ValueError(f"{early} clicks precede their search")
