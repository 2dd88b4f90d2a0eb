"""Reader of KuaiSAR (Zenodo 8181109), small and full release.

The recommendation stream holds the clicked rows of ``rec_inter.csv``, all of them targets; the
searches are the sessions of ``src_inter.csv``, their terms the word ids of the keyword. KuaiSAR
dates the search but not the clicks in it, so a click carries its search's time, and the clicks of a
search stand in the order of the file. A search without a keyword has no words. Users', items' and
network features are not read.
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from . import rules
from .log import InteractionLog
from .rules import is_positive
from .table import check, count_rows, read_table, without_repeated

_FOLDERS = ("KuaiSAR_v2", "KuaiSAR_final")
_REC_FIELDS = {
    "user_id": rules.INTEGER,
    "item_id": rules.INTEGER,
    "timestamp": rules.UNIX_MS,
    "click": rules.NUMBER,
}
_SEARCH_FIELDS = {
    "user_id": rules.INTEGER,
    "search_session_id": rules.LINE,
    "search_session_timestamp": rules.UNIX_MS,
    "keyword": rules.TEXT,
    "item_id": rules.INTEGER,
    "click_cnt": rules.NUMBER,
}
# Session ids are used again by other users and for other keywords.
_SESSION = ("user_id", "search_session_id", "search_session_timestamp", "keyword")
_WORD_LIST = r"^\[\s*([0-9]+\s*(,\s*[0-9]+\s*)*)?\]$"


def read(path: str | os.PathLike, *, keep_duplicates: bool = False) -> InteractionLog:
    """Read ``rec_inter.csv`` and ``src_inter.csv`` of a folder, or of a KuaiSAR folder in it.

    Times tie; the second key is the row. A result listed more than once in a session is clicked if
    any of its rows is. Rows that repeat another are dropped without ``keep_duplicates``. Raises
    ValueError naming file, row and field where a field is malformed.
    """
    folder = _folder(Path(path))
    events, notes = _events(folder / "rec_inter.csv", keep_duplicates)
    searches, clicks, more = _searches(folder / "src_inter.csv")
    return InteractionLog("kuaisar", events, searches, clicks, notes + more)


def _folder(path: Path) -> Path:
    if (path / "rec_inter.csv").exists():
        return path
    found = [name for name in _FOLDERS if (path / name).is_dir()]
    if len(found) > 1:
        raise ValueError(f"{path} holds {' and '.join(found)}: name one of them")
    return path / found[0] if found else path


def _events(path: Path, keep_duplicates: bool) -> tuple[pl.DataFrame, list[str]]:
    clicked = read_table(path, _REC_FIELDS, keep=is_positive(pl.col("click")))
    total = count_rows(path)
    rows, repeated = without_repeated(clicked, path, keep_duplicates)
    events = rows.select(
        user="user_id", item="item_id", time="timestamp", order="row", target=pl.lit(True)
    )
    return events, [
        f"{path.name}: kept {events.height:,} clicks of {events['user'].n_unique():,} users; "
        f"dropped {total - clicked.height:,} of {total:,} rows: not clicked",
        *repeated,
    ]


def _searches(path: Path) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
    rows = read_table(path, _SEARCH_FIELDS, nullable=("keyword",))
    words = pl.col("keyword")
    valid = words.is_null() | words.str.contains(_WORD_LIST)
    check(rows, valid, path, "keyword", "a list of word ids")
    rows = rows.with_columns(
        search=pl.col("row").min().over(_SESSION),
        time="search_session_timestamp",
        clicked=is_positive(pl.col("click_cnt")),
    )
    searches = rows.filter(pl.col("row") == pl.col("search")).select(
        "search", "time", user="user_id", terms=pl.col("keyword").str.extract_all("[0-9]+")
    )
    results = ["search", "item_id"]
    clicks = rows.filter("clicked").unique(results, keep="first", maintain_order=True)
    clicks = clicks.select("search", "time", item="item_id")
    n_results = rows.select(pl.struct(results).n_unique()).item()
    denied = rows.filter(~pl.col("clicked")).select("search", item="item_id").unique()
    conflicts = clicks.join(denied, on=["search", "item"], how="semi").height
    return (
        searches,
        clicks,
        [
            f"{path.name}: {rows.height:,} rows in {searches.height:,} search sessions of "
            f"{searches['user'].n_unique():,} users, {clicks['search'].n_unique():,} with a click",
            f"{path.name}: kept {clicks.height:,} clicked results, {conflicts:,} of them listed "
            f"both clicked and not; dropped {n_results - clicks.height:,}: not clicked",
            f"{path.name}: clicks are not dated: each has the time of its search, and its place in "
            "it is that of the row",
        ],
    )
