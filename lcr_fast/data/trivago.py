"""Reader of trivago sessions (RecSys Challenge 2019), seen as joint search and recommendation.

The recommendation stream holds every action on an item: ``interaction item *``, ``search for item``
and ``clickout item``. Clickouts are the targets, their impressions the candidates. A search is a
typed text (``search for destination``, ``search for poi``), its terms the words; its clicks are the
items acted on after it and before the next one, in the same session.
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from . import rules
from .log import InteractionLog
from .table import check, read_table, without_repeated

_FIELDS = {
    "user_id": rules.ID,
    "session_id": rules.LINE,
    "timestamp": rules.SECONDS,
    "step": rules.INTEGER,
    "action_type": rules.LINE,
    "reference": rules.LINE,
    "impressions": rules.TEXT,
}
_TARGET = "clickout item"
_TEXT_SEARCHES = ("search for destination", "search for poi")
_ITEM = "[0-9]+"


def read(path: str | os.PathLike, *, keep_duplicates: bool = False) -> InteractionLog:
    """Read a Parquet or CSV file of sessions, or the folder that holds one.

    Times are seconds in the file and often tie; the second key is the order of (timestamp, step,
    row) within a session, and of sessions their order in the file. Session ids may be used for two
    visits, so a visit is followed by time, not by step alone. Rows that repeat another are dropped
    without ``keep_duplicates``. Raises ValueError naming file, row and field where a field is
    malformed.
    """
    path = _file(Path(path))
    rows = read_table(path, _FIELDS, nullable=("reference", "impressions"))
    shown = pl.col("impressions")
    listed = shown.is_null() | (shown == "") | shown.str.contains(rf"^{_ITEM}(\|{_ITEM})*$")
    check(rows, listed, path, "impressions", "item ids separated by |")
    rows, repeated = without_repeated(rows, path, keep_duplicates)
    n_rows, n_users = rows.height, rows["user_id"].n_unique()
    n_sessions = rows.select(pl.struct("user_id", "session_id").n_unique()).item()
    rows = rows.with_columns(visit=pl.col("row").min().over("user_id", "timestamp", "session_id"))
    rows = rows.sort("user_id", "timestamp", "visit", "step", "row").with_columns(
        order=pl.int_range(pl.len(), dtype=pl.Int64), time="timestamp"
    )
    item_action = pl.col("action_type").str.starts_with("interaction item") | pl.col(
        "action_type"
    ).is_in(["search for item", _TARGET])
    is_item = pl.col("reference").str.contains(f"^{_ITEM}$").fill_null(False)
    text_search = pl.col("action_type").is_in(_TEXT_SEARCHES)
    typed = pl.col("reference").str.contains(rules.WORD).fill_null(False)
    rows = rows.with_columns(
        search=pl.when(text_search & typed)
        .then("order")
        .forward_fill()
        .over("user_id", "session_id", order_by="order")
    )
    actions = rows.filter(item_action & is_item)
    texts = rows.filter(text_search & typed)
    counts = rows.select(
        item=item_action.sum(),
        unusable=(item_action & ~is_item).sum(),
        empty=(text_search & ~typed).sum(),
        other=(~item_action & ~text_search).sum(),
    ).row(0, named=True)
    events = actions.select(
        "time",
        "order",
        user="user_id",
        item="reference",
        target=pl.col("action_type") == _TARGET,
        impressions=pl.when(pl.col("action_type") == _TARGET).then(
            pl.col("impressions").str.extract_all(_ITEM)
        ),
    )
    searches = texts.select(
        "search",
        "time",
        user="user_id",
        terms=rules.terms(pl.col("reference"), rules.WORD),
    )
    clicks = actions.filter(pl.col("search").is_not_null()).select(
        "search", "time", item="reference"
    )
    notes = [
        f"{path.name}: {n_rows:,} rows, {n_users:,} users, {n_sessions:,} sessions",
        f"kept {events.height:,} item events, {int(events['target'].sum()):,} of them clickouts "
        f"(targets); dropped {counts['unusable']:,} whose reference is no item id",
        f"kept {searches.height:,} text searches with {clicks.height:,} actions on items after "
        f"them; dropped {counts['empty']:,} without a word",
        f"dropped {counts['other']:,} other actions (filters, sort orders)",
        *repeated,
    ]
    return InteractionLog("trivago", events, searches, clicks, notes)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(file for file in path.glob("[!.]*") if {".parquet", ".csv"} & set(file.suffixes))
    if len(files) != 1:
        named = f": {', '.join(file.name for file in files)}" if files else ""
        raise ValueError(f"{path} holds {len(files)} .parquet or .csv files, expected one{named}")
    return files[0]
