"""Reader of JDsearch (``user_behavior_data.txt``): one line a user.

The recommendation stream holds the behaviours without a query (-1), all of them targets. Behaviours
in a row under the same query are one search, with the products as its clicks. Times are seconds
since the user's first behaviour: they compare within a user only. Product metadata is not read.
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from . import rules
from .log import InteractionLog
from .rules import is_positive
from .table import check, read_table, without_repeated

_HISTORY = ("history_qry_list", "history_wid_list", "history_type_list")
_TIMES = "history_time_list"
_CANDIDATES = ("candidate_wid_list", "candidate_label_list")
_NO_QUERY = "-1"
_NO_QUERY_AMISS = r"^(?:-1\.0+|\s+-1\s*|-1\s+)$"
_TERM_END = "\x18"
_MAX_SECONDS = rules.MAX_MS // 1000
_PRODUCT = pl.element().str.contains("^[0-9]+$")
_FILES = ("user_behavior_data.txt", "user_behavior_data_sample.txt")


def read(
    path: str | os.PathLike, *, test_query: bool = False, keep_duplicates: bool = False
) -> InteractionLog:
    """Read the behaviour file, or the folder that holds it.

    The final test query is a product search, not a recommendation, and is left out. With
    ``test_query`` the product of its highest label (the first of several) becomes a target at the
    query's time with the candidates nobody acted on, and it, as impressions; the query itself stays
    hidden, for a history is strictly before. A line that repeats another is dropped without
    ``keep_duplicates``, which makes it a user of its own. Raises ValueError naming file, row and
    field where lists are malformed or of unequal length.
    """
    path = _file(Path(path))
    fields = dict.fromkeys(("query", *_CANDIDATES, *_HISTORY, _TIMES), rules.TEXT)
    nullable = (*_HISTORY, *_CANDIDATES)
    rows = read_table(path, fields, nullable=nullable, separator="\t", quote_char=None)
    rows, repeated = without_repeated(rows, path, keep_duplicates)
    rows = rows.rename({"row": "user"}).with_columns(_entries(name) for name in fields)
    behaviours, asked = _behaviours(rows, path)
    events = behaviours.filter(~pl.col("searched")).select(
        "user", "time", "order", item="product", target=pl.lit(True)
    )
    found = behaviours.filter("searched").with_columns(search=pl.col("order").min().over("run"))
    searches = found.filter(pl.col("order") == pl.col("search")).select(
        "search", "user", "time", terms=pl.col("query").str.split(_TERM_END)
    )
    clicks = found.select("search", "time", item="product")
    notes = [
        f"{path.name}: {rows.height:,} users, {behaviours.height:,} behaviours",
        f"kept {events.height:,} behaviours without a query as events and "
        f"{clicks.height:,} behaviours in {searches.height:,} searches",
    ]
    if test_query:
        tested = _test_targets(rows, asked, path, behaviours.height)
        notes.append(
            f"kept the test query of {tested.height:,} users as a target; "
            f"dropped {rows.height - tested.height:,} without a positive label"
        )
        events = pl.concat([events, tested], how="diagonal")
    else:
        notes.append(f"dropped {rows.height:,} test queries: product searches, no recommendations")
    notes += repeated
    return InteractionLog("jdsearch", events, searches, clicks, notes, common_clock=False)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _FILES:
        if (path / name).exists():
            return path / name
    raise FileNotFoundError(f"{path / _FILES[0]}: not found")


def _entries(name: str) -> pl.Expr:
    """Split a list into its entries; "" is a list of none, elsewhere an entry that is missing."""
    text = pl.col(name).fill_null("")
    none = pl.lit([], pl.List(pl.String))
    return pl.when(text == "").then(none).otherwise(text.str.split("_")).alias(name)


def _behaviours(rows: pl.DataFrame, path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """List every behaviour with its time, and the time of every user's test query."""
    told = rows.rename({"user": "row"})
    for name in _HISTORY[1:]:
        same = pl.col(name).list.len() == pl.col(_HISTORY[0]).list.len()
        check(told, same, path, name, "as many entries as history_qry_list")
    longer = pl.col(_TIMES).list.len() == pl.col(_HISTORY[0]).list.len() + 1
    check(told, longer, path, _TIMES, "one entry more than history_qry_list")
    seconds = pl.col(_TIMES).cast(pl.List(pl.Int64), strict=False)
    times = told.with_columns(seconds=seconds)
    each = pl.col("seconds").list.eval(pl.element().is_between(0, _MAX_SECONDS)).list
    valid = each.all() & ~each.contains(None) & (pl.col("seconds").list.sum() <= _MAX_SECONDS)
    check(times, valid, path, _TIMES, "intervals in seconds")
    products = pl.col("history_wid_list").list.eval(_PRODUCT).list.all()
    check(told, products, path, "history_wid_list", "product ids")
    # "" among the terms, or in place of them.
    empty = pl.element().str.split(_TERM_END).list.contains("")
    words = ~empty & ~pl.element().str.contains(_NO_QUERY_AMISS)
    queries = pl.col("history_qry_list").list.eval(words).list.all()
    check(told, queries, path, "history_qry_list", "queries, or -1 for none")
    asked = times.select(user="row", time=pl.col("seconds").list.sum() * 1000)
    history = times.select(
        user="row",
        query="history_qry_list",
        product="history_wid_list",
        time=pl.col("seconds").list.head(pl.col("seconds").list.len() - 1),
    )
    history = history.filter(pl.col("query").list.len() > 0).explode("query", "product", "time")
    history = history.with_columns(
        time=pl.col("time").cum_sum().over("user") * 1000,
        order=pl.int_range(pl.len(), dtype=pl.Int64),
        searched=pl.col("query") != _NO_QUERY,
        run=pl.struct("user", "query").rle_id(),
    )
    return history, asked


def _test_targets(
    rows: pl.DataFrame, asked: pl.DataFrame, path: Path, first_order: int
) -> pl.DataFrame:
    products, labels = _CANDIDATES
    told = rows.rename({"user": "row"})
    same = pl.col(labels).list.len() == pl.col(products).list.len()
    check(told, same, path, labels, "as many entries as candidate_wid_list")
    check(told, pl.col(products).list.eval(_PRODUCT).list.all(), path, products, "product ids")
    numbers = pl.col(labels).cast(pl.List(pl.Float64), strict=False)
    finite = numbers.list.eval(pl.element().is_finite()).list
    check(told, finite.all() & ~finite.contains(None), path, labels, "numbers")
    shown = told.select(user="row", item=products, label=numbers)
    shown = shown.filter(pl.col("label").list.len() > 0).explode("item", "label")
    best = shown.filter(is_positive(pl.col("label"))).group_by("user", maintain_order=True)
    targets = best.agg(item=pl.col("item").get(pl.col("label").arg_max()))
    others = shown.filter(~is_positive(pl.col("label"))).group_by("user", maintain_order=True)
    targets = targets.join(others.agg(impressions="item"), on="user", how="left")
    with_target = pl.col("impressions").list.concat(pl.concat_list("item"))
    targets = targets.with_columns(impressions=with_target)
    return targets.join(asked, on="user").with_columns(
        target=pl.lit(True), order=first_order + pl.col("user")
    )
