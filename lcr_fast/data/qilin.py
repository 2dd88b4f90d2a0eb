"""Reader of Qilin (THUIR/Qilin): Parquet folders, or CSVs with printed NumPy structs.

A clicked result of a recommendation request is an event and a target, the results of the request
that nobody clicked its impressions. A search row is a search, its clicked results the clicks. The
train and test parts are read together; ``prepare`` splits by time. ``recent_clicked_note_idxs``
carries no times and is not read, neither are dqa and user_feat.

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

from .log import InteractionLog, Vectors
from .table import check, field_error, read_table

_RECOMMENDATIONS = "rec_result_details_with_idx"
_RESULTS = "search_result_details_with_idx"
_BURST_MS = 1000  # results in view within a second of each other were scrolled to together
_LATEST_SECONDS = 1e12  # as ms this is 2001: whatever exceeds it is in ms
# A Chinese character is a term, so is a run of other letters and digits: queries have no spaces.
_TERM = r"\p{Han}|[\p{L}\p{N}--\p{Han}]+"

_STRUCT = re.compile(r"\{([^{}]*)\}")
_FIELD = re.compile(r"\s*'(\w+)':\s*('[^']*'|\"[^\"]*\"|[\w.+-]+)\s*(?:,|$)")


def read(path: str | os.PathLike) -> InteractionLog:
    """Read a folder of Qilin's configurations: recommendation_*, search_* and, for vectors, notes.

    Each is ``<name>/*.parquet``, ``<name>.parquet`` or ``<name>.csv``; the train parts must be
    there. Columns ``note_embedding`` and ``question_embedding``, where present, become frozen text
    vectors. Raises ValueError naming file, row and field where a cell is malformed.
    """
    folder = Path(path)
    requests = _read_parts(folder, "recommendation", _RECOMMENDATIONS, "request_timestamp", ())
    asked = _read_parts(folder, "search", _RESULTS, "search_timestamp", ("query",))
    events, notes = _events(requests)
    searches, clicks, more = _searches(asked)
    files = [file for name in ("search_train", "search_test") for file in _files(folder, name)]
    query_text = _vectors(files, "question_embedding", None)
    item_text = _vectors(_files(folder, "notes"), "note_embedding", "note_idx")
    texts = [f"text vectors of {what}: {'read' if text else 'none'}"
             for what, text in (("notes", item_text), ("queries", query_text))]  # fmt: skip
    return InteractionLog(
        "qilin", events, searches, clicks, notes + more + texts, item_text, query_text
    )


def _files(folder: Path, name: str) -> list[Path]:
    if (folder / name).is_dir():
        return sorted((folder / name).glob("*.parquet"))
    return [
        folder / f"{name}{end}"
        for end in (".parquet", ".csv")
        if (folder / f"{name}{end}").exists()
    ][:1]


def _read_parts(
    folder: Path, stream: str, details: str, stamp: str, more: tuple[str, ...]
) -> pl.DataFrame:
    """Read train and test: request (number over all files), user, ``more``, results.

    ``results`` is a list of structs note, click, time (ms, null where unknown).
    """
    parts = []
    for name in (f"{stream}_train", f"{stream}_test"):
        files = _files(folder, name)
        if not files and name.endswith("_train"):
            raise FileNotFoundError(f"{folder / name}: no .parquet or .csv found")
        parts += [_read_part(file, details, stamp, more) for file in files]
    return pl.concat(parts).with_columns(request=pl.int_range(pl.len(), dtype=pl.Int64))


def _read_part(file: Path, details: str, stamp: str, more: tuple[str, ...]) -> pl.DataFrame:
    fields = {"user_idx": "an integer", **dict.fromkeys(more, "text")}
    parquet = file.suffix == ".parquet"
    fields[details] = "anything" if parquet else "text"
    frame = read_table(file, fields, nullable=(*more, details))
    names = {"note_idx": pl.Int64, "click": pl.Float64, stamp: pl.Float64}
    if not parquet:
        cells = [
            parse_structs(cell, tuple(names), file, row, details)
            for row, cell in zip(frame["row"], frame[details], strict=True)
        ]
        frame = frame.with_columns(pl.Series(details, cells, pl.List(pl.Struct(names))))
    dtype = frame.schema[details]
    struct = dtype.inner if isinstance(dtype, pl.List) else None
    if not isinstance(struct, pl.Struct):
        raise ValueError(f"{file.name}: column {details} must be a list of structs, got {dtype}")
    for name in names:
        if name not in [field.name for field in struct.fields]:
            raise ValueError(f"{file.name}: column {details} lacks the field {name}")
    flat = frame.filter(pl.col(details).list.len() > 0).select("row", details).explode(details)
    flat = flat.unnest(details).select("row", *(pl.col(n).cast(t) for n, t in names.items()))
    check(flat, pl.col("note_idx").is_not_null(), file, "note_idx", "an integer")
    time = pl.when(pl.col(stamp).is_finite()).then(pl.col(stamp))
    ms = pl.when(time > _LATEST_SECONDS).then(time).otherwise(time * 1000).round().cast(pl.Int64)
    results = flat.group_by("row", maintain_order=True).agg(
        results=pl.struct(note="note_idx", click=(pl.col("click") > 0).fill_null(False), time=ms)
    )
    frame = frame.join(results, on="row", how="left", maintain_order="left")
    return frame.select(pl.col("user_idx").alias("user"), *more, "results")


def parse_structs(
    cell: str | None, wanted: tuple[str, ...], file: Path, row: int, field: str
) -> list[dict[str, float | None]]:
    """Parse a printed list of structs, "[{'note_idx': 3, 'click': 1.0} ...]", to numbers.

    Only the ``wanted`` fields are kept. Everything in the cell must be understood: nothing is ever
    evaluated, and a cell that is cut off or odd raises ValueError.
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
        for name in wanted:
            if name not in values:
                raise field_error(file, row, field, f"a struct with {name}", struct)
        parsed.append({name: _to_number(values[name], file, row, name) for name in wanted})
    return parsed


def _to_number(text: str, file: Path, row: int, field: str) -> float | None:
    if text in ("nan", "None"):
        return None
    try:
        number = float(text)
    except ValueError:
        raise field_error(file, row, field, "a number", text) from None
    return int(number) if field == "note_idx" else number


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
        "impressions",
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
        terms=pl.col("query").fill_null("").str.to_lowercase().str.extract_all(_TERM),
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
    files = [file for file in files if column in _columns(file)]
    if not files:
        return None

    def chunks() -> Iterator[tuple[pl.Series, NDArray[np.float32]]]:
        start = 0
        for file in files:
            fields = {column: "text" if file.suffix == ".csv" else "anything"}
            fields |= {} if key is None else {key: "an integer"}
            frame = read_table(file, fields)
            keys = frame[key] if key else start + frame["row"] - 1
            start += frame.height
            if frame.height:
                yield keys, _matrix(frame, column, file)

    return chunks


def _columns(file: Path) -> list[str]:
    scan = pl.scan_csv if file.suffix == ".csv" else pl.scan_parquet
    return scan(file).collect_schema().names()


def _matrix(frame: pl.DataFrame, column: str, file: Path) -> NDArray[np.float32]:
    cells = frame[column]
    if file.suffix == ".csv":
        cells = cells.str.strip_chars(" []\n").str.replace_all(r"\s+", " ").str.split(" ")
    vectors = cells.cast(pl.List(pl.Float32), strict=False)
    width = vectors.list.len()[0]
    valid = (pl.col("vector").list.len() == width) & ~pl.col("vector").list.contains(None)
    told = frame.select("row", column).with_columns(vector=vectors)
    check(told, valid, file, column, f"a vector of {width} numbers")
    return vectors.explode().to_numpy().reshape(len(vectors), width)
