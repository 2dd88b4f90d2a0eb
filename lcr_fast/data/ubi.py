"""Reader of search logs in the User Behavior Insights standard (UBI 1.0 to 1.3), as NDJSON.

OpenSearch's plugin writes the index ``ubi_queries``, an application the index ``ubi_events``. Read
are exports of them in a folder, ``ubi_queries*`` and ``ubi_events*`` or both in one
``ubi_queries_events*``, each .ndjson, .jsonl or .json, also .gz: a document a line, as it is,
within ``_source`` (elasticdump), or behind a line of the bulk API.

============ ============================================ =========================================
index        field                                        is
============ ============================================ =========================================
ubi_queries  query_id                                     the key of a search
ubi_queries  client_id                                    the user
ubi_queries  timestamp                                    ISO 8601, or unix milliseconds
ubi_queries  user_query                                   what was typed; may be missing
ubi_queries  query_response_hit_ids                       the items found; may be missing
ubi_events   action_name, client_id, timestamp            as the specification says
ubi_events   query_id                                     the search it follows; may be missing
ubi_events   event_attributes.object.object_id            the item; may be missing
============ ============================================ =========================================

The recommendation stream holds every click, view, watch, add_to_cart and purchase of an item,
whether a search led to it or not; by default clicks are the targets. What was done under a query on
one of its results is a click of that search too: on a hit, or on what an impression event saw. The
impressions of a target are what was seen under its query, or else the hits, whichever holds it.

Traps of the format:

- The list of hits is called query_response_hit_ids; older writers say query_response_object_ids or
  query_response_objects_ids, which are read too.
- Where object_id_field was not given, the plugin lists internal document numbers as hits, of one
  query but not of another. The hits of a query are left aside, and its results taken for unknown,
  if none of them is the item of any event of the log, an impression or another: then nothing done
  under the query is among them either. Hits of a true id that nobody ever saw or touched go too.
- Impression events tell what scrolled into view and may be lost: a hit without one may be clicked.
- A query_id sticks to all that a client does until the next search: what is not among the results
  is no click of that search, where the results are known.
- client_id may live a visit or a year, and is "" where nobody gave one: such rows are dropped. Bots
  and tests have one too; drop them before.
- Searches without a word, as browsing and filters send them, are dropped; what was done under them
  stays in the recommendation stream.
- Browsers date events, servers date queries: a click dated before its search is taken to be as late
  as it. A time without a zone is UTC.
- A query_id that is there again (paging) names one search, as of its first row.
- Impressions repeat as one scrolls; ids are text or integers, and 7 is "7".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from . import ndjson, rules
from .log import InteractionLog
from .ndjson import Columns, Field
from .table import keep_one, without_repeated

ACTIONS = ("click", "click_through", "view", "watch", "add_to_cart", "purchase")
_TARGETS = ("click", "click_through")
_SHOWN = "impression"
_HITS = ("query_response_hit_ids", "query_response_object_ids", "query_response_objects_ids")
_FIELDS = {
    "ubi_queries": {
        "query": Field(("query_id",), ndjson.ID, nullable=True),
        "user": Field(("client_id",), ndjson.ID, nullable=True),
        "time": Field(("timestamp",), ndjson.INSTANT),
        "text": Field(("user_query",), ndjson.TEXT, nullable=True),
        **{name: Field((name,), ndjson.IDS, nullable=True) for name in _HITS},
    },
    "ubi_events": {
        "action": Field(("action_name",), ndjson.TEXT),
        "user": Field(("client_id",), ndjson.ID, nullable=True),
        "time": Field(("timestamp",), ndjson.INSTANT),
        "query": Field(("query_id",), ndjson.ID, nullable=True),
        "item": Field(("event_attributes", "object", "object_id"), ndjson.ID, nullable=True),
    },
}
_ENDS = (".ndjson", ".jsonl", ".json")
_BULK = ("index", "create")


def read(
    path: str | os.PathLike, *, targets: Sequence[str] = _TARGETS, keep_duplicates: bool = False
) -> InteractionLog:
    """Read the folder that holds the exports.

    ``targets`` are the actions whose events may be predicted; they are read whatever their name.
    Documents that repeat another in all that is read are dropped without ``keep_duplicates``.
    Raises FileNotFoundError where no file is there, ValueError where one is there twice (as it is
    and as .gz), where the log has no query, no event or no target, and naming file, row and field
    where one is malformed.
    """
    folder = Path(path)
    tables = _documents(folder)
    queries, events = (tables[name] for name in _FIELDS)
    notes = [f"ubi_queries: {queries.height:,} documents; ubi_events: {events.height:,}"]
    queries, lost = _with_user(queries, "ubi_queries")
    events, also_lost = _with_user(events, "ubi_events")
    events, repeated = without_repeated(events, "ubi_events", keep_duplicates)
    searches, more = _searches(queries)
    acted, told = _acted(events, targets)
    shown, aside = _results(queries, events, acted)
    clicks, clicked = _clicks(acted, searches, shown)
    notes += [*lost, *also_lost, *more, *told, *aside, *clicked, *repeated]
    found = acted.join(shown, on=["user", "query"], how="left", maintain_order="left")
    # A list without the target is not what it was chosen from.
    seen, hits = (
        pl.when(pl.col("target") & pl.col(name).list.contains(pl.col("item"))).then(name)
        for name in ("seen", "hits")
    )
    return InteractionLog(
        "ubi",
        found.select(
            "user",
            "item",
            "time",
            "target",
            order="row",
            impressions=pl.coalesce(seen, hits),
        ),
        searches.select("search", "user", "time", "terms"),
        clicks,
        notes,
    )


def _documents(folder: Path) -> dict[str, pl.DataFrame]:
    """Read the fields of all documents by index; ``row`` counts over all files."""
    files = []
    for file in sorted(folder.glob("ubi_*")):
        if not set(_ENDS) & set(file.suffixes) or _index_of(file.name) is None:
            continue
        if not file.name.removesuffix(".gz").endswith(_ENDS):  # packed otherwise, rotated, half
            ends = ", ".join(_ENDS)
            raise ValueError(
                f"{file}: would be left out, expected a name that ends in {ends} or .gz behind it: "
                "unpack, rename or move it"
            )
        files.append(file)
    if not keep_one(files):
        raise FileNotFoundError(f"{folder}/ubi_queries.ndjson: not found, nor ubi_events.ndjson")
    parts: dict[str, list[pl.DataFrame]] = {name: [] for name in _FIELDS}
    start = 0
    for file in files:
        columns = {name: Columns(file, fields) for name, fields in _FIELDS.items()}
        row, following = 0, None
        for row, document in ndjson.documents(file):
            if (index := _bulk(document)) is not None:
                following = index
                continue
            index, following = following or _index_of(file.name), None
            if isinstance(source := document.get("_source"), dict):
                index = _index_of(str(document.get("_index", ""))) or index
                document = source
            if index not in columns:
                raise ValueError(
                    f"{file.name}, row {row}: of neither ubi_queries nor ubi_events, say _index"
                )
            columns[index].add(row, document)
        for name, part in columns.items():
            parts[name].append(part.frame().with_columns(pl.col("row") + start))
        start += row
    tables = {name: pl.concat(frames) for name, frames in parts.items()}
    for name, table in tables.items():
        if not table.height:
            raise ValueError(f"{folder}: no document of {name}")
    return tables


def _index_of(name: str) -> str | None:
    """Tell the index that a name begins with; "" for a file of both."""
    if name.startswith("ubi_queries_events"):
        return ""
    return next((index for index in _FIELDS if name.startswith(index)), None)


def _bulk(document: Mapping[str, Any]) -> str | None:
    """Tell the index of a line of the bulk API, "" where it names none; None for a document."""
    if len(document) != 1:
        return None
    ((action, about),) = document.items()
    if action not in _BULK or not isinstance(about, dict) or about.keys() - {"_index", "_id"}:
        return None
    return _index_of(str(about.get("_index", ""))) or ""


def _with_user(rows: pl.DataFrame, index: str) -> tuple[pl.DataFrame, list[str]]:
    kept = rows.filter(pl.col("user").is_not_null())
    if kept.height == rows.height:
        return rows, []
    return kept, [f"{index}: dropped {rows.height - kept.height:,} documents without a client_id"]


def _searches(queries: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Make a search of each query of a user: search, user, query, time, terms; and notes."""
    named = queries.filter(pl.col("query").is_not_null())
    once = named.sort("time", "row").unique(["user", "query"], keep="first", maintain_order=True)
    terms = rules.terms(pl.col("text").fill_null(""))
    once = once.select("user", "query", "time", search="row", terms=terms)
    searches = once.filter(pl.col("terms").list.len() > 0)
    return searches, [
        f"kept {searches.height:,} searches; dropped {once.height - searches.height:,} without a "
        f"word, {queries.height - named.height:,} without a query_id and "
        f"{named.height - once.height:,} whose query_id is there already"
    ]


def _results(
    queries: pl.DataFrame, events: pl.DataFrame, acted: pl.DataFrame
) -> tuple[pl.DataFrame, list[str]]:
    """List what each query showed: user, query, seen, hits (null where unknown); and a note."""
    key = ["user", "query"]
    there = pl.col("query").is_not_null() & pl.col("item").is_not_null()
    seen = events.filter(there & (pl.col("action") == _SHOWN)).select(*key, "item")
    hits = queries.with_columns(item=pl.coalesce(_HITS)).filter(pl.col("query").is_not_null())
    hits = hits.select(*key, "item").explode("item").filter(pl.col("item").is_not_null())
    touched = hits.join(events, on="item", how="semi").select(key)
    unknown = hits.join(touched, on=key, how="anti").select(key).unique()
    aside = unknown.join(acted, on=key, how="semi").height
    hits = hits.join(touched, on=key, how="semi", maintain_order="left")
    lists = [
        frame.group_by(key, maintain_order=True).agg(
            pl.col("item").unique(maintain_order=True).alias(name)
        )
        for name, frame in (("seen", seen), ("hits", hits))
    ]
    shown = lists[0].join(lists[1], on=key, how="full", coalesce=True)
    note = (
        f"left the hits of {aside:,} queries aside, under which something was done: none of them "
        "is the item of any event (internal document numbers, perhaps)"
    )
    return shown, [note] if aside else []


def _acted(events: pl.DataFrame, targets: Sequence[str]) -> tuple[pl.DataFrame, list[str]]:
    """Keep the actions on an item, with target; ValueError where none is one."""
    actions = pl.col("action").is_in([*ACTIONS, *targets])
    item = pl.col("item").is_not_null()
    acted = events.filter(actions & item)
    acted = acted.with_columns(target=pl.col("action").is_in(list(targets)))
    counts = events.group_by("action").len().sort(["len", "action"], descending=[True, False])
    named = ", ".join(f"{name} ({n:,})" for name, n in counts.head(8).iter_rows())
    if not acted["target"].any():
        raise ValueError(
            f"ubi: no event on an item is a {' or '.join(targets) or 'target'} (--targets); "
            f"actions are {named}, and {events['item'].count():,} of {events.height:,} events have "
            "an event_attributes.object.object_id"
        )
    return acted, [
        f"actions: {named}",
        f"kept {acted.height:,} events on an item, {int(acted['target'].sum()):,} of them targets "
        f"({', '.join(targets)}); dropped {events.filter(actions & ~item).height:,} without an "
        f"object_id and {events.filter(~actions).height:,} of other actions",
    ]


def _clicks(
    acted: pl.DataFrame, searches: pl.DataFrame, shown: pl.DataFrame
) -> tuple[pl.DataFrame, list[str]]:
    """Give actions under a query on one of its results to its search; and a note."""
    key = ["user", "query"]
    asked = searches.select(*key, "search", began="time")
    under = acted.join(asked, on=key, how="inner", maintain_order="left")
    under = under.join(shown, on=key, how="left", maintain_order="left")
    seen, hits = (pl.col(name).list.contains(pl.col("item")) for name in ("seen", "hits"))
    unknown = pl.col("seen").is_null() & pl.col("hits").is_null()
    clicks = under.filter(unknown | seen.fill_null(False) | hits.fill_null(False))
    early = clicks.filter(pl.col("time") < pl.col("began")).height
    astray = acted["query"].count() - under.height
    at = pl.max_horizontal("time", "began")
    return clicks.select("search", "item", time=at), [
        f"kept {clicks.height:,} events under a query as clicks of its search, {early:,} of them "
        f"dated before it; {under.height - clicks.height:,} are none: their item is not among its "
        f"results; {astray:,} more have the query_id of no search of their user that was kept"
    ]
