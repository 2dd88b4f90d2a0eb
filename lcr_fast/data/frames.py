"""Reader of any other data set, brought into the columns of an InteractionLog as Parquet files.

The way in for one's own logs, and for prepared pickles of other projects: a pickle runs code when
it is loaded, so none is ever read here. Load it where that is acceptable, and write its tables out.
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from .log import InteractionLog


def read(path: str | os.PathLike) -> InteractionLog:
    """Read ``events.parquet``, ``searches.parquet`` and ``clicks.parquet`` of a folder.

    Their columns are those of ``InteractionLog``. Raises FileNotFoundError for a missing file and
    ValueError for one that is unreadable or lacks a column.
    """
    folder = Path(path)
    events, searches, clicks = (
        _frame(folder / f"{name}.parquet") for name in ("events", "searches", "clicks")
    )
    note = (
        f"kept {events.height:,} events, {searches.height:,} searches, {clicks.height:,} clicks; "
        "dropped none"
    )
    return InteractionLog(folder.name, events, searches, clicks, [note])


def _frame(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    try:
        return pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path.name}: cannot be read: {str(error).splitlines()[0]}") from None
