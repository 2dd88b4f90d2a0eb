"""Reader of KuaiSAR (Zenodo 8181109), small and full release.

The recommendation stream holds the clicked rows of ``rec_inter.csv``, all of them targets; the
searches are the sessions of ``src_inter.csv``, their terms the word ids of the keyword. KuaiSAR
dates the search but not the clicks in it, so a click carries its search's time. Users', items' and
network features are not read.
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from .log import InteractionLog
from .table import check, count_rows, read_table

_FOLDERS = ("KuaiSAR_v2", "KuaiSAR_final")
_REC_FIELDS = {
    "user_id": "an integer",
    "item_id": "an integer",
    "timestamp": "a number",
    "click": "a number",
}
_SEARCH_FIELDS = {
    "user_id": "an integer",
    "search_session_id": "text",
    "search_session_timestamp": "a number",
    "keyword": "text",
    "item_id": "an integer",
    "click_cnt": "a number",
}
# Session ids are used again by other users and for other keywords.
_SESSION = ("user_id", "search_session_id", "search_session_timestamp", "keyword")
_WORD_LIST = r"^\[\s*(\d+\s*(,\s*\d+\s*)*)?\]$"


def read(path: str | os.PathLike) -> InteractionLog:
    """Read ``rec_inter.csv`` and ``src_inter.csv`` of a folder, or of a KuaiSAR folder in it.

    Times tie; the second key is the row. A result listed more than once in a session is clicked if
    any of its rows is. Raises ValueError naming file, row and field where a field is malformed.
    """
    folder = _folder(Path(path))
    events, notes = _events(folder / "rec_inter.csv")
    searches, clicks, more = _searches(folder / "src_inter.csv")
    return InteractionLog("kuaisar", events, searches, clicks, notes + more)


def _folder(path: Path) -> Path:
    if (path / "rec_inter.csv").exists():
        return path
    found = [name for name in _FOLDERS if (path / name).is_dir()]
    if len(found) > 1:
        raise ValueError(f"{path} holds {' and '.join(found)}: name one of them")
    return path / found[0] if found else path


def _milliseconds(field: str) -> pl.Expr:
    """Tell whether a time can be unix milliseconds: seconds would sort before all else."""
    return pl.col(field) > 1e11


def _events(path: Path) -> tuple[pl.DataFrame, list[str]]:
    keep = (pl.col("click") > 0) | ~_milliseconds("timestamp")
    rows = read_table(path, _REC_FIELDS, keep=keep)
    check(rows, _milliseconds("timestamp"), path, "timestamp", "unix milliseconds")
    total = count_rows(path)
    events = rows.select(
        user="user_id",
        item="item_id",
        time=pl.col("timestamp").round().cast(pl.Int64),
        order="row",
        target=pl.lit(True),
    )
    return events, [
        f"{path.name}: kept {events.height:,} clicks of {events['user'].n_unique():,} users; "
        f"dropped {total - events.height:,} of {total:,} rows: not clicked"
    ]


def _searches(path: Path) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
    rows = read_table(path, _SEARCH_FIELDS)
    time = "search_session_timestamp"
    check(rows, _milliseconds(time), path, time, "unix milliseconds")
    check(rows, pl.col("keyword").str.contains(_WORD_LIST), path, "keyword", "a list of word ids")
    rows = rows.with_columns(
        search=pl.col("row").min().over(_SESSION), time=pl.col(time).round().cast(pl.Int64)
    )
    results = rows.group_by("search", "item_id").agg(
        pl.col("time").first(),
        clicked=(pl.col("click_cnt") > 0).any(),
        conflicting=(pl.col("click_cnt") > 0).n_unique() > 1,
    )
    searches = rows.filter(pl.col("row") == pl.col("search")).select(
        "search", "time", user="user_id", terms=pl.col("keyword").str.extract_all(r"\d+")
    )
    clicks = results.filter("clicked").select("search", "time", item="item_id")
    conflicts = int(results["conflicting"].sum())
    return (
        searches,
        clicks,
        [
            f"{path.name}: {rows.height:,} rows in {searches.height:,} search sessions of "
            f"{searches['user'].n_unique():,} users, {clicks['search'].n_unique():,} with a click",
            f"{path.name}: kept {clicks.height:,} clicked results, {conflicts:,} of them listed "
            f"both clicked and not; dropped {results.height - clicks.height:,}: not clicked",
        ],
    )
