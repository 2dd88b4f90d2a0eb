"""Reader of the Synerise data set (RecSys Challenge 2025): six months of an online retailer.

========================= ============================== ==========================================
file (Parquet)            columns                        becomes
========================= ============================== ==========================================
add_to_cart, product_buy  client_id, timestamp, sku      events; by default carts are the targets
search_query              client_id, timestamp, query    searches
product_properties        sku, category, price, name     names: frozen text vectors; optional
remove_from_cart          client_id, timestamp, sku      counted; optional
page_visit                client_id, timestamp, url      counted; optional
========================= ============================== ==========================================

Ids are integers, timestamps text (2022-07-01 12:30:00) of an unnamed time zone. ``query`` and
``name`` are product-quantised embeddings: 16 codes of 0..255 as NumPy prints them, "[ 12 255 3 ]".
The terms of a query are its codes with their places, "3:255"; an item's vector is the sum of one
fixed random vector a code, so that the product of two vectors counts the codes that they share.

Traps of the format:

- A purchase follows the cart of the same item, so nearly all purchases are repeats: they are no
  targets unless ``targets`` names them.
- Identical rows are frequent (16 % of purchases): a quantity, perhaps, at a resolution of a second.
  They are dropped as elsewhere. Events of a second tie; carts stand before purchases.
- Nothing links a search with what was found. As its clicks count the items put into the cart or
  bought within half an hour after it and before the next one.
- An url names no item, and a removal is no sign of interest: neither is an event.
- The documentation calls ``name`` embedding and speaks of 20 codes. Any number is read, the same in
  all rows; a column embedding is read where there is no name.
- Most of its nearly 20 million clients only visit and search. Searches of those without an event
  are not read, for no sample can come of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from . import rules
from .log import InteractionLog, Vectors
from .table import check, columns_of, count_rows, read_table, without_repeated

ACTIONS = ("add_to_cart", "product_buy")
_COUNTED = {"remove_from_cart": "removals are no interest", "page_visit": "an url is no item"}
_TARGETS = ("add_to_cart",)
_EVENT = {"client_id": rules.INTEGER, "timestamp": rules.DATE_TIME, "sku": rules.INTEGER}
_SEARCH = {"client_id": rules.INTEGER, "timestamp": rules.DATE_TIME, "query": rules.CODES}
_VISIT_MS = 30 * 60_000  # what follows a search within it belongs to it
_WIDTH = 64  # of an item's text vector
_N_CODES = 256
_CHUNK = 1 << 17  # items whose vectors are made at a time


def read(
    path: str | os.PathLike, *, targets: Sequence[str] = _TARGETS, keep_duplicates: bool = False
) -> InteractionLog:
    """Read the folder that holds the files.

    ``targets`` are those of add_to_cart and product_buy whose events may be predicted; the others
    stand in histories only. Rows that repeat another of their file are dropped without
    ``keep_duplicates``. Raises FileNotFoundError for a missing file that is not optional, and
    ValueError for an unknown target and, naming file, row and field, where a field is malformed.
    """
    folder = Path(path)
    unknown = [name for name in targets if name not in ACTIONS]
    if unknown or not targets:
        what = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"targets of synerise must be among {', '.join(ACTIONS)}, got {what}")
    parts, notes, order = [], [], 0
    for action in ACTIONS:
        file = folder / f"{action}.parquet"
        rows, repeated = without_repeated(read_table(file, _EVENT), file, keep_duplicates)
        parts.append(
            rows.select(
                user="client_id",
                item="sku",
                time="timestamp",
                order=pl.col("row") + order,
                target=pl.lit(action in targets),
            )
        )
        order += count_rows(file)
        kind = "targets" if action in targets else "no targets"
        notes += [f"{file.name}: kept {rows.height:,} events ({kind})", *repeated]
    events = pl.concat(parts)
    searches, more = _searches(folder / "search_query.parquet", events, keep_duplicates)
    clicks = _clicks(events, searches)
    notes += more
    notes.append(
        f"clicks: {clicks.height:,} events within {_VISIT_MS // 60_000} minutes of a search of "
        "their user; the files link none"
    )
    for name, reason in _COUNTED.items():
        if (file := folder / f"{name}.parquet").exists():
            notes.append(f"{file.name}: dropped {count_rows(file):,} rows: {reason}")
    properties = folder / "product_properties.parquet"
    vectors = _vectors(properties, events["item"]) if properties.exists() else None
    notes.append(f"text vectors of items: {f'read ({_WIDTH})' if vectors else 'none'}")
    return InteractionLog("synerise", events, searches, clicks, notes, vectors)


def _searches(
    file: Path, events: pl.DataFrame, keep_duplicates: bool
) -> tuple[pl.DataFrame, list[str]]:
    users = events["user"].unique()
    kept = read_table(file, _SEARCH, keep=pl.col("client_id").is_in(users.implode()))
    n_searches, n_kept = count_rows(file), kept.height
    _check_width(kept, file, "query")
    rows, repeated = without_repeated(kept, file, keep_duplicates)
    place = pl.int_range(pl.len()).cast(pl.String)
    terms = pl.concat_str(place, pl.lit(":"), pl.element().cast(pl.String))
    searches = rows.select(
        search="row", user="client_id", time="timestamp", terms=pl.col("query").list.eval(terms)
    )
    note = (
        f"{file.name}: kept {searches.height:,} searches; dropped {n_searches - n_kept:,} of users "
        "without an event"
    )
    return searches, [note, *repeated]


def _check_width(rows: pl.DataFrame, file: Path, column: str) -> None:
    if rows.height:
        width = rows[column].list.len()[0]
        same = pl.col(column).list.len() == width
        check(rows, same, file, column, f"{width} codes, as in the first row")


def _clicks(events: pl.DataFrame, searches: pl.DataFrame) -> pl.DataFrame:
    """Give each event to the last search of its user that began at most a visit before it."""
    asked = searches.select("user", "time", "search").sort("time", "search")
    acted = events.sort("time", "order").join_asof(
        asked,
        on="time",
        by="user",
        strategy="backward",
        tolerance=_VISIT_MS,
        check_sortedness=False,
    )
    return acted.filter(pl.col("search").is_not_null()).select("search", "item", "time")


def _vectors(file: Path, items: pl.Series) -> Vectors:
    """Stream the vectors of the items that have events."""
    column = "name" if "name" in columns_of(file) else "embedding"

    def chunks() -> Iterator[tuple[pl.Series, NDArray[np.float32]]]:
        fields = {"sku": rules.INTEGER, column: rules.CODES}
        rows = read_table(file, fields, keep=pl.col("sku").is_in(items.unique().implode()))
        check(rows, pl.col("sku").is_first_distinct(), file, "sku", "one row an item")
        _check_width(rows, file, column)
        for part in rows.iter_slices(_CHUNK):
            codes = part[column].explode().to_numpy().reshape(part.height, -1)
            yield part["sku"], code_vectors(codes)

    return chunks


def code_vectors(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Sum up a fixed random vector of unit length a code: codes [n, P] to unit-scale [n, D].

    The product of two is about the share of places where their codes are the same.
    """
    n, places = codes.shape
    signs = np.random.default_rng(0).integers(2, size=(places, _N_CODES, _WIDTH), dtype=np.int8)
    table = signs.astype(np.float32) * 2 - 1
    total = np.zeros((n, _WIDTH), dtype=np.float32)
    for place in range(places):
        total += table[place, codes[:, place]]
    return total / np.float32(np.sqrt(_WIDTH * places))
