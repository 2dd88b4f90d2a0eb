"""Reader of Qilin (THUIR/Qilin): Parquet folders, or CSVs with printed NumPy structs.

A clicked result of a recommendation request is an event and a target, the results of the request
that nobody clicked, and it, its impressions. A search row is a search, its clicked results the
clicks. The train and test parts are read together; ``prepare`` splits by time.
``recent_clicked_note_idxs`` carries no times and is not read, neither are dqa and user_feat.

Times: request_timestamp is in ms, search_timestamp in s; both become ms. The stamps of a request
are the moments its results came into view, milliseconds apart: results of one burst get the time
of its first, so that a click is not the history of its neighbour.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from . import rules
from .log import InteractionLog, Vectors
from .rules import INTEGER, NUMBER, is_missing, is_positive
from .table import (
    check,
    columns_of,
    count_rows,
    field_error,
    is_columnar,
    keep_one,
    parts_of,
    read_table,
    without_repeated,
)

_RECOMMENDATIONS = "rec_result_details_with_idx"
_RESULTS = "search_result_details_with_idx"
_BURST_MS = 1000  # results in view within a second of each other were scrolled to together
_LATEST_SECONDS = 1e12  # as ms this is 2001: whatever exceeds it is in ms

_STRUCT = re.compile(r"\{([^{}]*)\}")
_FIELD = re.compile(r"\s*'(\w+)':\s*('[^']*'|\"[^\"]*\"|[\w.+-]+)\s*(?:,|$)")


def read(path: str | os.PathLike, *, keep_duplicates: bool = False) -> InteractionLog:
    """Read a folder of Qilin's configurations: recommendation_*, search_* and, for vectors, notes.

    Each is ``<name>/*.parquet``, ``<name>.parquet`` or ``<name>.csv``; the train parts must be
    there. Columns ``note_embedding`` and ``question_embedding``, where present, become frozen text
    vectors. A click that is null or NaN is none. Rows that repeat another, of train or test,
    are dropped without ``keep_duplicates``. Raises ValueError naming file, row and field where a
    cell is malformed.
    """
    folder = Path(path)
    requests, repeated = _read_parts(
        folder, "recommendation", (), _RECOMMENDATIONS, "request_timestamp", keep_duplicates
    )
    asked, again = _read_parts(
        folder, "search", ("query",), _RESULTS, "search_timestamp", keep_duplicates
    )
    events, notes = _events(requests)
    searches, clicks, more = _searches(asked)
    files = [file for name in ("search_train", "search_test") for file in _files(folder, name)]
    query_text = _vectors(files, "question_embedding", None)
    item_text = _vectors(_files(folder, "notes"), "note_embedding", "note_idx")
    texts = [
        f"text vectors of {what}: {'read' if text else 'none'}"
        for what, text in (("notes", item_text), ("queries", query_text))
    ]
    return InteractionLog(
        "qilin",
        events,
        searches,
        clicks,
        notes + more + texts + repeated + again,
        item_text,
        query_text,
    )


def _files(folder: Path, name: str) -> list[Path]:
    found = [folder / f"{name}{end}" for end in (".parquet", ".csv")]
    found = [file for file in found if file.exists()]
    if (folder / name).is_dir():
        keep_one([folder / name, *found])
        found = [part for part in parts_of(folder / name) if is_columnar(part)]
        if not found:
            raise ValueError(f"{folder / name}: is a folder without Parquet files")
    return keep_one(found)


def _read_parts(
    folder: Path,
    stream: str,
    more: tuple[str, ...],
    details: str,
    stamp: str,
    keep_duplicates: bool,
) -> tuple[pl.DataFrame, list[str]]:
    """Read train and test: request (number over all files), user, ``more``, results; and notes.

    ``results`` is a list of structs note, click, time (ms, null where unknown).
    """
    parts, n_rows = [], 0
    for name in (f"{stream}_train", f"{stream}_test"):
        files = _files(folder, name)
        if not files and name.endswith("_train"):
            raise FileNotFoundError(f"{folder / name}: no .parquet or .csv found")
        for file in files:
            part = _read_part(file, more, details, stamp)
            parts.append(part.with_columns(pl.col("row") + n_rows))
            n_rows += part.height
    rows, notes = without_repeated(pl.concat(parts), stream, keep_duplicates)
    # Numbered as the files have them: text vectors go by these numbers.
    return rows.with_columns(request=pl.col("row") - 1).drop("row"), notes


def _read_part(file: Path, more: tuple[str, ...], details: str, stamp: str) -> pl.DataFrame:
    parquet = file.suffix == ".parquet"
    fields = {"user_idx": INTEGER, **dict.fromkeys(more, rules.TEXT)}
    fields[details] = rules.ANYTHING if parquet else rules.TEXT
    frame = read_table(file, fields, nullable=(*more, details))
    names = ("note_idx", "click", stamp)
    if not parquet:
        cells = [
            parse_structs(cell, names, file, row, details)
            for row, cell in zip(frame["row"], frame[details], strict=True)
        ]
        texts = pl.List(pl.Struct(dict.fromkeys(names, pl.String)))
        frame = frame.with_columns(pl.Series(details, cells, texts))
    dtype = frame.schema[details]
    struct = dtype.inner if isinstance(dtype, pl.List) else None
    if not isinstance(struct, pl.Struct):
        raise ValueError(f"{file.name}: column {details} must be a list of structs, got {dtype}")
    types = struct.to_schema()
    for name in names:
        if name not in types:
            raise ValueError(f"{file.name}: column {details} lacks the field {name}")
    flat = frame.filter(pl.col(details).list.len() > 0).select("row", details).explode(details)
    flat = flat.select("row", *(pl.col(details).struct.field(name) for name in names))
    flat = _typed(flat, file, stamp)
    results = flat.group_by("row", maintain_order=True).agg(
        results=pl.struct(note="note_idx", click=is_positive(pl.col("click")), time=stamp)
    )
    frame = frame.join(results, on="row", how="left", maintain_order="left")
    return frame.select("row", *more, "results", user="user_idx")


def _typed(flat: pl.DataFrame, file: Path, stamp: str) -> pl.DataFrame:
    """Bring the fields of results, a row each, to their types; the time to ms."""
    for name, rule in (("note_idx", INTEGER), ("click", NUMBER), (stamp, NUMBER)):
        dtype = flat.schema[name]
        if dtype == pl.Null:
            flat, dtype = flat.with_columns(pl.col(name).cast(pl.Float64)), pl.Float64()
        value = rule.typed(pl.col(name), dtype)
        if value is None:
            raise ValueError(f"{file.name}: field {name} is {dtype}, expected {rule.expected}")
        valid = value.is_not_null()
        if name != "note_idx":
            valid |= is_missing(pl.col(name), dtype)
        check(flat, valid, file, name, rule.expected)
        flat = flat.with_columns(value.alias(name))
    in_ms = pl.col(stamp) > _LATEST_SECONDS
    ms = pl.when(in_ms).then(pl.col(stamp)).otherwise(pl.col(stamp) * 1000).round()
    valid = pl.col(stamp).is_null() | ms.is_between(0, rules.MAX_MS)
    check(flat, valid, file, stamp, "a unix time in s or ms")
    return flat.with_columns(ms.cast(pl.Int64).alias(stamp))


def parse_structs(
    cell: str | None, wanted: tuple[str, ...], file: Path, row: int, field: str
) -> list[dict[str, str | None]]:
    """Parse a printed list of structs, "[{'note_idx': 3, 'click': 1.0} ...]", to the numbers' text.

    Only the ``wanted`` fields are kept; None stands for "None". Everything in the cell must be
    understood: nothing is ever evaluated, and a cell that is cut off or odd raises ValueError.
    """
    text = (cell or "[]").strip()
    structs = _STRUCT.findall(text)
    if not re.fullmatch(r"\[[\s,]*\]", _STRUCT.sub("", text)):
        raise field_error(file, row, field, "a list of structs", text)
    parsed = []
    for struct in structs:
        pairs = _FIELD.findall(struct)
        if _FIELD.sub("", struct).strip():
            raise field_error(file, row, field, "'name': value pairs", struct)
        values = dict(pairs)
        if len(values) < len(pairs):
            raise field_error(file, row, field, "each name once", struct)
        for name in wanted:
            if name not in values:
                raise field_error(file, row, field, f"a struct with {name}", struct)
        told = {name: values[name] for name in wanted}
        parsed.append({name: None if text == "None" else text for name, text in told.items()})
    return parsed


def _results(requests: pl.DataFrame) -> pl.DataFrame:
    listed = requests.filter(pl.col("results").list.len() > 0)
    return listed.explode("results").unnest("results")


def _events(requests: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    results = _results(requests)
    dated = results.filter(pl.col("time").is_not_null()).sort(
        "request", "time", maintain_order=True
    )
    burst = (pl.col("time").diff() > _BURST_MS).fill_null(False).cum_sum().over("request")
    dated = dated.with_columns(burst=burst).with_columns(
        time=pl.col("time").min().over("request", "burst")
    )
    clicked = dated.filter("click").unique(
        ["request", "burst", "note"], keep="first", maintain_order=True
    )
    chosen = pl.col("click").any().over("request", "note")
    ignored = (
        results.filter(~chosen)
        .group_by("request")
        .agg(impressions=pl.col("note").unique(maintain_order=True))
    )
    events = clicked.join(ignored, on="request", how="left", maintain_order="left").select(
        "user",
        "time",
        impressions=pl.col("impressions").list.concat(pl.concat_list("note")),
        item="note",
        order=pl.int_range(pl.len(), dtype=pl.Int64),
        target=pl.lit(True),
    )
    undated = results.filter(pl.col("time").is_null() & pl.col("click")).height
    return events, [
        f"recommendation: {requests.height:,} requests with {results.height:,} results; kept "
        f"{events.height:,} clicks, dropped {undated:,} clicks without a time"
    ]


def _searches(asked: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
    results = _results(asked).filter(pl.col("time").is_not_null())
    began = results.group_by("request").agg(pl.col("time").min())
    searches = asked.join(began, on="request", maintain_order="left").select(
        "user",
        "time",
        search="request",
        terms=rules.terms(pl.col("query").fill_null("")),
    )
    clicks = results.filter("click").select("time", search="request", item="note")
    return (
        searches,
        clicks,
        [
            f"search: kept {searches.height:,} of {asked.height:,} searches and {clicks.height:,} "
            f"clicks; dropped {asked.height - searches.height:,} searches without a dated result"
        ],
    )


def _vectors(files: list[Path], column: str, key: str | None) -> Vectors | None:
    """Stream the vectors of a column, keyed by another column or by the row over all files."""
    named = [column in columns_of(file) for file in files]
    if not any(named):
        return None

    def chunks() -> Iterator[tuple[pl.Series, NDArray[np.float32]]]:
        start, width = 0, None
        for file, here in zip(files, named, strict=True):
            if not here:
                start += count_rows(file)
                continue
            fields = {column: rules.TEXT if file.suffix == ".csv" else rules.ANYTHING}
            fields |= {} if key is None else {key: INTEGER}
            frame = read_table(file, fields)
            keys = frame[key] if key else start + frame["row"] - 1
            start += frame.height
            if frame.height:
                vectors = _matrix(frame, column, file, width)
                width = vectors.shape[1]
                yield keys, vectors

    return chunks


def _matrix(frame: pl.DataFrame, column: str, file: Path, width: int | None) -> NDArray[np.float32]:
    """Bring the vectors of a column, all of one width, into a matrix of finite numbers."""
    cells = frame[column]
    if file.suffix == ".csv":
        cells = cells.str.strip_chars(" []\n").str.replace_all(r"\s+", " ").str.split(" ")
    elif isinstance(cells.dtype, pl.Array):
        cells = cells.arr.to_list()
    if not isinstance(cells.dtype, pl.List) or cells.dtype.inner.is_nested():
        raise ValueError(
            f"{file.name}: column {column} is {cells.dtype}, expected lists of numbers"
        )
    vectors = cells.cast(pl.List(pl.Float32), strict=False)
    width = width or vectors.list.len()[0]
    numbers = pl.col("vector").list.eval(pl.element().is_finite()).list
    told = frame.select("row", column).with_columns(vector=vectors)
    valid = (numbers.len() == width) & numbers.all() & ~numbers.contains(None)
    check(told, valid, file, column, f"a vector of {width} finite numbers")
    return vectors.explode().to_numpy().reshape(len(vectors), width)
