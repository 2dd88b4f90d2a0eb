"""Read the named columns of a CSV or Parquet file, and say exactly where it is malformed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import polars as pl

KINDS = {  # what a field must be, as named in messages
    "an integer": pl.Int64,
    "a number": pl.Float64,
    "text": pl.String,
}


def read_table(
    path: str | os.PathLike,
    fields: Mapping[str, str],
    *,
    nullable: tuple[str, ...] = (),
    keep: pl.Expr | None = None,
    separator: str = ",",
    quote_char: str | None = '"',
) -> pl.DataFrame:
    """Read ``fields`` (column name -> a key of KINDS) and the row number, counted from 1.

    Columns are found by name; a column of "anything" is taken as it is (nested Parquet). ``keep``
    filters while the file streams through, so that a large file need not fit into memory; rows it
    drops are checked all the same. Raises FileNotFoundError for a missing file and ValueError for a
    missing column or a field of the wrong kind, such as
    "rec_inter.csv, row 17, field timestamp: expected a number, got 'abc'".
    """
    path = Path(path)
    raw = _scan(path, separator, quote_char)
    try:
        present = raw.collect_schema().names()
        for name in fields:
            if name not in present:
                raise ValueError(f"{path.name}: column {name} is missing")
        typed = raw.with_row_index("row", offset=1).select(
            pl.col("row").cast(pl.Int64), *(_typed(name, kind) for name, kind in fields.items())
        )
        bad = pl.any_horizontal(
            pl.lit(False), *(pl.col(name).is_null() for name in fields if name not in nullable)
        )
        frame = (typed if keep is None else typed.filter(keep | bad)).collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path.name}: cannot be read: {reason}") from None
    wrong = frame.filter(bad)
    if wrong.height:
        first = wrong.sort("row").row(0, named=True)
        row = first["row"]
        field = next(name for name in fields if name not in nullable and first[name] is None)
        text = raw.select(field).slice(row - 1, 1).collect().item()
        raise field_error(path, row, field, fields[field], text)
    return frame


def count_rows(path: str | os.PathLike, separator: str = ",", quote_char: str | None = '"') -> int:
    """Count the rows of a file without its header."""
    return _scan(Path(path), separator, quote_char).select(pl.len()).collect().item()


def field_error(
    path: str | os.PathLike, row: int, field: str, expected: str, got: object
) -> ValueError:
    """Name the file, the row (from 1, without the header) and the field that is malformed."""
    shown = (
        "nothing" if got is None else repr(got if len(str(got)) <= 80 else f"{str(got)[:80]}...")
    )
    return ValueError(
        f"{Path(path).name}, row {row}, field {field}: expected {expected}, got {shown}"
    )


def check(
    frame: pl.DataFrame, valid: pl.Expr, path: str | os.PathLike, field: str, expected: str
) -> None:
    """Raise the error of the first row whose ``field`` is not ``valid``."""
    wrong = frame.filter(~valid)
    if wrong.height:
        first = wrong.sort("row").row(0, named=True)
        raise field_error(path, first["row"], field, expected, first[field])


def _scan(path: Path, separator: str, quote_char: str | None) -> pl.LazyFrame:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    if ".parquet" in path.suffixes:
        return pl.scan_parquet(path)
    return pl.scan_csv(path, separator=separator, quote_char=quote_char, infer_schema=False)


def _typed(name: str, kind: str) -> pl.Expr:
    column = pl.col(name)
    if kind == "anything":
        return column
    if kind == "a number":
        column = column.cast(pl.Float64, strict=False)
        return pl.when(column.is_finite()).then(column).alias(name)
    return column.cast(KINDS[kind], strict=False)
