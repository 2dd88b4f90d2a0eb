"""Reader of Amazon reviews with queries: the 5-core of 2014 and qrels of product search.

The way in which UniSAR, GenSAR and others make a log of search and recommendation from reviews:

=================================== ===========================================================
file, also with .gz                 content
=================================== ===========================================================
reviews_CATEGORY_5.json             one JSON object a line: reviewerID, asin, unixReviewTime (s)
query_text.txt                      one query a line, numbered from 0
train.qrels, test.qrels             REVIEWERID_QUERY 0 ASIN LABEL; test.qrels is optional
=================================== ===========================================================

The reviews are McAuley's, the other three of Ai's Amazon-Product-Search-Datasets. A review is an
event and a target. A pair of user and item with label 1 is a search as well: at the time of the
review, with the item as its click. Of the queries that a pair has one is drawn, as the recipe does:
the one of lowest CRC-32 of its line, so that neither a seed nor the order of the files matters.

Traps of the format:

- Nobody searched: queries are the categories of the item that was bought (stopwords and repeated
  words left out), so a search says its item's category. What a model gains from searches here is
  that, no interest that was typed.
- A search is as late as the review that it is made of. Histories hold what is strictly before a
  target, so no target is betrayed by its own search, as it would be where ties are sorted.
- Times are days: reviews of one day tie, and none of them is the history of another.
- The folders of the qrels are named as the reviews' file (``reviews_CDs_and_Vinyl_5.json.gz``).
- Metadata of 2014 are Python literals, not JSON; they are not needed, and nothing is evaluated.
"""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

import polars as pl

from . import ndjson
from .log import InteractionLog
from .ndjson import Field
from .table import field_error, without_repeated

_REVIEW = {
    "user": Field(("reviewerID",), ndjson.ID),
    "item": Field(("asin",), ndjson.ID),
    "time": Field(("unixReviewTime",), ndjson.SECONDS),
}
_QREL = re.compile(r"(\S+)_(0|[1-9][0-9]*)[ \t]+\S+[ \t]+(\S+)[ \t]+([01])", re.ASCII)
_TERM = r"[^ \t]+"


def read(path: str | os.PathLike, *, keep_duplicates: bool = False) -> InteractionLog:
    """Read the folder that holds the files.

    Reviews that repeat another are dropped without ``keep_duplicates``. Raises FileNotFoundError
    for a missing file and ValueError naming file, row and field where one is malformed.
    """
    folder = Path(path)
    reviews = _find(folder, "reviews_*.json")
    if reviews is None:
        raise FileNotFoundError(
            f"{folder / 'reviews_*.json'}: not found, nor with .gz; of reviews without queries, as "
            "those of 2023 (.jsonl), write frames"
        )
    rows = ndjson.read_documents(reviews, _REVIEW)
    rows, repeated = without_repeated(rows, reviews, keep_duplicates)
    events = rows.select("user", "item", "time", order="row", target=pl.lit(True))
    queries = [line.strip() for _, line in ndjson.lines(_file(folder, "query_text.txt"))]
    pairs, notes = _pairs(folder, len(queries))
    reviewed = rows.unique(["user", "item"], keep="first", maintain_order=True)
    found = reviewed.join(pairs, on=["user", "item"], how="inner", maintain_order="left")
    found = found.with_columns(text=pl.Series(queries, dtype=pl.String).gather(found["query"]))
    searches = found.select(
        "user", "time", search="row", terms=pl.col("text").str.extract_all(_TERM)
    )
    clicks = found.select("item", "time", search="row")
    notes = [
        f"{reviews.name}: kept {events.height:,} reviews of {events['user'].n_unique():,} users",
        *notes,
        f"kept {searches.height:,} searches, each at the time of the review that it is made of; "
        f"dropped {pairs.height - searches.height:,} pairs of user and item without a review",
        *repeated,
    ]
    return InteractionLog("amazon", events, searches, clicks, notes)


def _file(folder: Path, name: str) -> Path:
    file = _find(folder, name)
    if file is None:
        raise FileNotFoundError(f"{folder / name}: not found, nor with .gz")
    return file


def _find(folder: Path, name: str) -> Path | None:
    """Find a file of a folder, as it is or gzipped."""
    files = [file for end in ("", ".gz") for file in folder.glob(name + end)]
    if len(files) > 1:
        raise ValueError(f"{folder} holds {' and '.join(f.name for f in sorted(files))}: keep one")
    return files[0] if files else None


def _pairs(folder: Path, n_queries: int) -> tuple[pl.DataFrame, list[str]]:
    """Draw the query of every pair of user and item: user, item, query; and a note a file."""
    drawn: dict[tuple[str, str], tuple[int, int]] = {}
    notes = []
    for name in ("train.qrels", "test.qrels"):
        file = _find(folder, name) if name == "test.qrels" else _file(folder, name)
        if file is None:
            notes.append(f"no {name}: there is no such file")
            continue
        n_rows = n_wanted = 0
        for row, line in ndjson.lines(file):
            text = line.strip(" \t\r\n")
            if (fields := _QREL.fullmatch(text)) is None:
                raise field_error(file, row, "qrel", "USER_QUERY 0 ITEM 0|1", text)
            user, query, item, label = fields.groups()
            if int(query) >= n_queries:
                raise field_error(file, row, "query", f"one of 0..{n_queries - 1}", query)
            n_rows += 1
            if label == "0":
                continue
            n_wanted += 1
            lot = zlib.crc32(f"{user}_{query} {item}".encode()), int(query)
            drawn[user, item] = min(drawn.get((user, item), lot), lot)
        notes.append(f"{file.name}: {n_rows:,} rows; dropped {n_rows - n_wanted:,}: label 0")
    pairs = [(user, item, query) for (user, item), (_, query) in drawn.items()]
    schema = {"user": pl.String(), "item": pl.String(), "query": pl.Int64()}
    return pl.DataFrame(pairs, schema=schema, orient="row"), notes
