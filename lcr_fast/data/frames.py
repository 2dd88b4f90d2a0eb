"""Reader of any other data set, brought into the columns of an InteractionLog.

The way in for one's own logs, and for prepared pickles of other projects: a pickle runs code when
it is loaded, so none is ever read here. Load it where that is acceptable, and write its tables out.

A folder holds the tables ``events``, ``searches`` and ``clicks``, each as Parquet (a file, or a
folder of parts) or as text: .csv, or .tsv, also gzipped (.csv.gz). In text the terms of a search
and the ids of impressions are separated by spaces, so that an id in impressions holds none.
RecBole's atomic file, ``NAME.inter``, may stand for the events: then searches and clicks may be
missing.
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from . import rules
from .log import COLUMNS, OPTIONAL, InteractionLog
from .table import check, columns_of, read_table, without_repeated

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
_ENDS = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
_ATOMIC = ".inter"
_ATOMIC_FIELDS = {"user_id:token": "user", "item_id:token": "item", "timestamp:float": "time"}
_DEFAULTS = {"order": pl.col("row"), "target": pl.lit(True)}
_COARSER = {
    "ms": ("seconds", "s, or ms if they are meant"), "us": ("milliseconds", "ms"),
    "ns": ("microseconds", "us"),
}  # fmt: skip
_SECONDS = (900_000_000, 2_500_000_000)  # as ms no unix times, but days 10 to 29 of a clock
_NUMBER, _TERMS = pl.Int64(), pl.List(pl.String)
_NULLABLE = ("terms", "impressions", "relevant", "topic")
_RULES = {
    "user": rules.ID, "item": rules.ID, "order": rules.INTEGER, "target": rules.FLAG,
    "impressions": rules.IDS, "search": rules.ID, "terms": rules.WORDS, "relevant": rules.INTEGER,
    "topic": rules.INTEGER,
}  # fmt: skip


def read(
    path: str | os.PathLike, *, time_unit: str | None = None, keep_duplicates: bool = False
) -> InteractionLog:
    """Read the tables of a folder, or a RecBole file alone.

    Columns are those of ``InteractionLog``; others are ignored. Without a column order the row
    decides where times tie, without target every event is one; empty terms are none. Times are in
    ``time_unit`` ("s", "ms", "us", "ns"; default: ms, and s in an atomic file) or Datetimes. A row
    that repeats another in all columns read, its time as the file has it, is dropped without
    ``keep_duplicates``. Raises FileNotFoundError for a missing file and ValueError for one that is
    unreadable, lacks a column, or has one but for capitals or spaces, where a field is malformed,
    and where all times look like unix times in a coarser unit (in s, where no unit is given).
    """
    path = Path(path)
    paths = _paths(path)
    unit = time_unit or ("s" if _ends_with(paths["events"], _ATOMIC) else "ms")
    tables, notes = {}, []
    for name, file in paths.items():
        table, ignored = _read(name, file, unit)
        # The key of a search names one: a row that is there twice is one search all the same.
        keep = keep_duplicates and name != "searches"
        table, repeated = without_repeated(table, file, keep)
        absent = [column for column in COLUMNS[name] if column not in table.columns]
        tables[name] = table.with_columns(_DEFAULTS[column].alias(column) for column in absent)
        notes += ignored + repeated
    for name in ("searches", "clicks"):
        if name not in tables:
            types: dict[str, pl.DataType] = {"terms": _TERMS}
            columns = ("row", *COLUMNS[name])
            tables[name] = pl.DataFrame(schema={c: types.get(c, _NUMBER) for c in columns})
            notes.append(f"no {name}: there is no such file")
    if time_unit != "ms" and unit in _COARSER:
        _refuse_coarser(tables, path, unit)
    notes += _share_ids(tables, paths, "user", "searches")
    notes += _share_ids(tables, paths, "item", "clicks")
    if not _ends_with(paths["events"], ".parquet"):
        _check_lists(tables["events"], paths["events"])
    notes += _missing_words(tables["searches"])
    _number_searches(tables, paths)
    events, searches, clicks = (tables[name].drop("row") for name in COLUMNS)
    kept = f"kept {events.height:,} events, {searches.height:,} searches, {clicks.height:,} clicks"
    return InteractionLog(path.name, events, searches, clicks, [kept, *notes])


def _ends_with(path: Path, *ends: str) -> bool:
    return path.name.removesuffix(".gz").endswith(ends)


def _paths(path: Path) -> dict[str, Path]:
    """Find the file of each table that is there: events always, the others too but for .inter."""
    if path.is_file():
        if not _ends_with(path, _ATOMIC):
            raise ValueError(f"{path}: not a folder of tables, nor a RecBole file (.inter)")
        return {"events": path}
    paths = {}
    for name in COLUMNS:
        found = [path / f"{name}{end}" for end in _ENDS if (path / f"{name}{end}").exists()]
        if name == "events":
            found += sorted(file for file in path.glob("[!.]*.inter*") if _ends_with(file, _ATOMIC))
        if len(found) > 1:
            raise ValueError(f"{path} holds {' and '.join(f.name for f in found)}: keep one")
        if found:
            paths[name] = found[0]
    lone = len(paths) == 1 and "events" in paths and _ends_with(paths["events"], _ATOMIC)
    for name in COLUMNS:
        if name not in paths and not lone:
            header = ",".join(column for column in COLUMNS[name] if column not in _DEFAULTS)
            more = "" if name == "events" else f"; where there are none, write {header} alone"
            raise FileNotFoundError(
                f"{path / name}.parquet: not found, nor as {', '.join(_ENDS[1:])}{more}"
            )
    return paths


def _read(name: str, file: Path, unit: str) -> tuple[pl.DataFrame, list[str]]:
    """Read the columns of a table that are there; some need not be."""
    separator = _SEPARATORS.get(Path(file.name.removesuffix(".gz")).suffix, ",")
    quote_char = None if _ends_with(file, _ATOMIC) else '"'
    present = columns_of(file, separator, quote_char)
    columns = (*COLUMNS[name], *OPTIONAL[name])
    names = {column: column for column in columns if column in present}
    names |= {c: c for c in COLUMNS[name] if c not in _DEFAULTS}  # missed where they are
    if _ends_with(file, _ATOMIC):
        names = _ATOMIC_FIELDS
    fields = {
        there: rules.time(unit, days=True) if column == "time" else _RULES[column]
        for there, column in names.items()
    }
    time = next(there for there, column in names.items() if column == "time")
    # Rounding to ms may make two rows one; whole ms stay what they are.
    dtypes = present.get(time, [])
    whole = unit == "ms" and all(dtype.is_integer() for dtype in dtypes)
    table = read_table(
        file,
        fields,
        as_read=() if whole else (time,),
        nullable=tuple(there for there, column in names.items() if column in _NULLABLE),
        separator=separator,
        quote_char=quote_char,
    ).rename(names)
    others = [column for column in present if column not in names]
    for other in others:
        if (meant := other.strip().lower()) in columns and meant not in names:
            raise ValueError(f"{file.name}: column {other!r} would be ignored: rename it {meant!r}")
    notes = [f"{file.name}: ignored the columns {', '.join(others)}"] if others else []
    if pl.Date in dtypes:
        notes.append(
            f"{file.name}: {time} is a day: what a user does on it ties, and is not the history of "
            "another target of that day"
        )
    if any(isinstance(dtype, pl.Datetime) and dtype.time_zone is None for dtype in dtypes):
        notes.append(f"{file.name}: {time} names no time zone: read as UTC")
    return table, notes


def _refuse_coarser(tables: dict[str, pl.DataFrame], path: Path, unit: str) -> None:
    """Raise where all known times are of January 1970, as unix times in a coarser unit would be."""
    known = (table["time"].filter(table["time"] > 0) for table in tables.values())
    times = [each for each in known if len(each)]
    if not times or not all(each.is_between(*_SECONDS).all() for each in times):
        return
    like = times[0][0] * {"ms": 1, "us": 1000, "ns": 10**6}[unit]
    coarser, meant = _COARSER[unit]
    raise ValueError(
        f"{path}: all times are like {like}, as unix {coarser} are: pass --time-unit {meant}"
    )


def _share_ids(
    tables: dict[str, pl.DataFrame], paths: dict[str, Path], column: str, other: str
) -> list[str]:
    """Give the ids of two tables one type: a text file does not say whether "7" is a number.

    Its ids are numbers where all are, unless a Parquet file beside it has text. A table without a
    row says nothing, whatever its type. Returns a note where one file's look like numbers alone.
    """
    names = [name for name in ("events", other) if tables[name].height]
    texts = [name for name in names if not _ends_with(paths[name], ".parquet")]
    typed = [tables[name].schema[column] for name in names if name not in texts]
    number = pl.col(column).cast(pl.Int64, strict=False)
    plain = (number.cast(pl.String) == pl.col(column)).fill_null(False).all()
    plains = [name for name in texts if tables[name].select(plain).item()]
    if pl.String not in typed and plains == texts:
        for name in texts:
            tables[name] = tables[name].with_columns(number)
            if column == "item" and "impressions" in tables[name].columns:
                tables[name] = _with_numbers(tables[name], paths[name])
    for empty, full in ((other, "events"), ("events", other)):
        if not tables[empty].height:
            tables[empty] = tables[empty].cast({column: tables[full].schema[column]})
    if len(plains) != 1 or len(texts) != 2:
        return []
    (text,) = set(texts) - set(plains)
    return [
        f"{column}: all ids are numbers in {paths[plains[0]].name}, but not in "
        f"{paths[text].name}: read as text"
    ]


def _check_lists(events: pl.DataFrame, path: Path) -> None:
    """Raise where ids that are text cannot be told in the impressions of a text file."""
    if "impressions" not in events.columns or events.schema["item"] != pl.String:
        return
    listed = events.filter(pl.col("impressions").list.len() > 0)
    if listed.height:
        one = ~pl.col("item").str.contains(" ", literal=True)
        expected = "an id without a space, as impressions are listed between spaces (write Parquet)"
        check(events, one, path, "item", expected)
    entry = pl.col("entry")
    joined = listed.select("row", "item", entry="impressions").explode("entry")
    joined = joined.filter(entry.str.contains(r"[|,;]") & (entry != pl.col("item")))
    parts = entry.str.replace_all(r"[|,;]", "|").str.split("|")
    wrong = joined.filter(parts.list.contains(pl.col("item"))).select("row").unique()
    valid = ~pl.col("row").is_in(wrong["row"].implode())
    check(listed, valid, path, "impressions", "ids between spaces")


def _with_numbers(events: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Make the impressions of a text file numbers, as its items are."""
    shown = pl.col("impressions")
    numbers = shown.cast(pl.List(pl.Int64), strict=False)
    valid = shown.is_null() | (numbers.cast(pl.List(pl.String)) == shown)
    check(events, valid, path, "impressions", "ids that are integers, as the items are")
    return events.with_columns(numbers)


def _missing_words(searches: pl.DataFrame) -> list[str]:
    """Say where searches are for what a program writes for nothing: a word, or none was typed."""
    alone = searches["terms"].filter(searches["terms"].list.len() == 1).list.first()
    counts = alone.filter(alone.is_in(rules.NO_ID)).value_counts().sort("terms")
    return [
        f"searches: {n:,} are for {word!r} alone, read as a word: if it says that none was typed, "
        "leave terms empty"
        for word, n in counts.iter_rows()
    ]


def _number_searches(tables: dict[str, pl.DataFrame], paths: dict[str, Path]) -> None:
    """Replace the keys of searches, which may be text, by the row of the search."""
    searches, clicks = (tables[name].cast({"search": pl.String}) for name in ("searches", "clicks"))
    if "searches" in paths:
        distinct = pl.col("search").is_first_distinct()
        check(searches, distinct, paths["searches"], "search", "a key of its own")
    numbers = searches.select("search", number="row", began="time")
    known = clicks.join(numbers, on="search", how="left", maintain_order="left")
    if "clicks" in paths:
        found = pl.col("number").is_not_null()
        check(known, found, paths["clicks"], "search", "the key of a search")
        late = pl.col("time") >= pl.col("began")
        check(known, late, paths["clicks"], "time", "a time in ms, not before its search's")
    tables["searches"] = searches.with_columns(search="row")
    tables["clicks"] = known.with_columns(search="number").drop("number", "began")
