"""Read the named columns of a CSV or Parquet file, and say exactly where it is malformed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import polars as pl

from . import progress
from .rules import BREAK, TEXT, Rule, is_missing

_AS_READ = " as read"  # behind the name of a field that comes a second time
_ENDINGS = re.compile(
    r"(?:\.(?:parquet|csv|tsv|json|jsonl|ndjson|gz|zst|bz2|xz|zip|bak|old|orig)|~)+\Z"
)
_COPY = re.compile(r"(?:[ _-]+copy(?: ?\(?\d+\)?)?| ?\(\d+\))\Z", re.IGNORECASE)
_FOREIGN = {
    "a zip archive": b"PK\x03\x04", "packed by xz": b"\xfd7zXZ", "packed by bzip2": b"BZh",
    "a 7z archive": b"7z\xbc\xaf", "UTF-16": b"\xff\xfe", "UTF-16 (big-endian)": b"\xfe\xff",
}  # fmt: skip
_LIKE_ROWS = " like rows"  # and of a column of text whose value may hold other rows


def read_table(
    path: str | os.PathLike,
    fields: Mapping[str, Rule],
    *,
    nullable: tuple[str, ...] = (),
    keep: pl.Expr | None = None,
    as_read: tuple[str, ...] = (),
    separator: str = ",",
    quote_char: str | None = '"',
) -> pl.DataFrame:
    """Read ``fields`` (column name -> its rule) and the row number, counted from 1.

    Columns are found by name. In delimited text one carriage return at the end of any field is
    dropped, as at the end of a line. A value is null where the rule is broken, which only a missing
    value of a ``nullable`` field may do. ``keep`` filters while the file streams through, so that a
    large file need not fit into memory; rows it drops are checked all the same. Of the fields
    ``as_read`` the values of the file come too, for ``without_repeated``. Raises FileNotFoundError
    for a missing file and ValueError for a folder, for a column that is missing, there twice or of
    a type without sense, for a column of text, read or not, that holds other rows behind a quote,
    and for a field that breaks its rule, such as
    "rec_inter.csv, row 17, field timestamp: expected a number, got 'abc'".
    """
    path = Path(path)
    parts = scan(path, separator, quote_char)
    with readable(path, partial(_odd_line, path, separator, quote_char)):
        schemas = {part: raw.collect_schema() for part, raw in parts.items()}
        if not is_columnar(path):
            _require_line_ends(path, list(schemas[path]))
        _require_columns(path, schemas, fields, nullable)
        texts, like_rows = [], []
        if not is_columnar(path) and quote_char is not None:
            names = list(schemas[path])
            for name in names:
                if "\n" in name and separator in name:
                    raise ValueError(f"{path.name}: the name of a column {_holds_rows(name)}")
                if fields.get(name, TEXT) is TEXT and fields.keys() - {name}:
                    texts.append(name)
                    like_rows.append(_like_rows(name, names, separator))
        checked = [
            _checked(_told(path, part), raw, schemas[part], fields, nullable, as_read, like_rows)
            for part, raw in parts.items()
        ]
        if len(parts) > 1:
            checked = _of_one_type(path, checked, schemas)
        bad = pl.any_horizontal(pl.lit(False), *(_flag_of(name) for name in fields))
        # Of a line of text all fields are parsed: polars would not miss, nor mind, one too many.
        flags = pl.QueryOptFlags(projection_pushdown=is_columnar(path))
        odd = pl.any_horizontal(bad, *(pl.col(name + _LIKE_ROWS).is_not_null() for name in texts))
        with progress.passing(pl.concat(checked), path.name) as rows:
            frame = rows.with_row_index("row", offset=1).cast({"row": pl.Int64})
            kept = frame if keep is None else frame.filter(keep | odd)
            table = kept.collect(engine="streaming", optimizations=flags)
        wrong = table.filter(bad)
        if wrong.height:
            first = wrong.sort("row").row(0, named=True)
            row, field = first["row"], next(name for name in fields if first[_flag_of(name)])
            got = _value(parts, field, row)
            error = field_error(path, row, field, fields[field].expected, got)
            raise ValueError(f"{error}{_reason(path, fields[field].expected, got)}")
        for name in texts:
            _refuse_rows_within(table, name, names, fields, nullable, path, separator)
    table = table if keep is None else table.filter(keep)
    return table.select("row", *fields, *(name + _AS_READ for name in as_read))


def _told(path: Path, part: Path) -> str:
    return path.name if part == path else f"{path.name}/{part.relative_to(path)}"


def _require_columns(
    path: Path,
    schemas: Mapping[Path, pl.Schema],
    fields: Mapping[str, Rule],
    nullable: tuple[str, ...],
) -> None:
    """Raise where a column is missing, of all parts or, if it must have values, of one."""
    for name in fields:
        there = any(name in schema for schema in schemas.values())
        for part, schema in schemas.items():
            if name not in schema and not (there and name in nullable):
                names = _shown(", ".join(schema))
                raise ValueError(f"{_told(path, part)}: column {name} is missing among {names}")
            if f"{name}_duplicated_0" in schema:  # as polars renames what is there again
                raise ValueError(f"{_told(path, part)}: column {name} is there twice")


def _require_line_ends(path: Path, names: list[str]) -> None:
    """Raise where lines end in carriage returns alone: all rows would be one, that of the names."""
    for name in names:
        if re.search(r"\r(?![\r\n]|\Z)", name):
            raise ValueError(
                f"{path.name}: the name of a column holds a line's end, {_shown(name)}: lines end "
                "in \\n or \\r\\n, not in \\r alone"
            )


def _checked(
    told: str,
    raw: pl.LazyFrame,
    schema: pl.Schema,
    fields: Mapping[str, Rule],
    nullable: tuple[str, ...],
    as_read: tuple[str, ...],
    more: list[pl.Expr],
) -> pl.LazyFrame:
    """Give the fields of a file by their rules, flags where they are broken, and ``more``."""
    absent = [name for name in fields if name not in schema]
    raw = raw.with_columns(pl.lit(None).alias(name) for name in absent)
    dtypes = {name: schema.get(name, pl.Null()) for name in fields}
    typed = {name: _typed(told, name, rule, dtypes[name]) for name, rule in fields.items()}
    missing = {
        name: is_missing(pl.col(name), dtypes[name]) if name in nullable else pl.lit(False)
        for name in fields
    }
    return raw.select(
        *(value.alias(name) for name, value in typed.items()),
        *(pl.col(name).alias(name + _AS_READ) for name in as_read),
        *((typed[name].is_null() & ~missing[name]).alias(_flag_of(name)) for name in fields),
        *more,
    )


def _of_one_type(
    path: Path, checked: list[pl.LazyFrame], schemas: Mapping[Path, pl.Schema]
) -> list[pl.LazyFrame]:
    """Bring the parts of a table together, which may differ where their rules make them one."""
    first: dict[str, tuple[str, pl.DataType]] = {}
    types = []
    for frame, (part, schema) in zip(checked, schemas.items(), strict=True):
        types.append(frame.collect_schema())
        for name, dtype in types[-1].items():
            if schema.get(name, pl.Null()) != pl.Null:  # else it is of any type
                other, wanted = first.setdefault(name, (_told(path, part), dtype))
                if dtype != wanted:
                    raise ValueError(
                        f"{path.name}: column {name} is {wanted} in {other}, but {dtype} in "
                        f"{_told(path, part)}"
                    )
    wanted_types = {name: dtype for name, (_, dtype) in first.items()}
    for name in types[0]:
        if name.endswith(_AS_READ) and len({schema[name] for schema in types}) > 1:
            wanted_types[name] = pl.String()
    return [frame.cast(wanted_types) for frame in checked]  # type: ignore[arg-type]


def _value(parts: Mapping[Path, pl.LazyFrame], field: str, row: int) -> object:
    """Look up what a file, or its part, has in a row."""
    for raw in parts.values():
        n_rows = raw.select(pl.len()).collect().item()
        if row <= n_rows:
            there = field in raw.collect_schema()
            return raw.select(field).slice(row - 1, 1).collect().item() if there else None
        row -= n_rows
    return None


def _like_rows(name: str, names: list[str], separator: str) -> pl.Expr:
    """Give a text that ends one row and begins another: so many fields are in its lines."""
    place, one = names.index(name), f"[^{separator}\n]*"
    first, last = (f"(?:{each}){{{n}}}" for each, n in (
        (separator + one, len(names) - place - 1), (one + separator, place),
    ))  # fmt: skip
    held = pl.col(name).str.contains(rf"\A{one}{first}\n(?s:.*\n)?{last}{one}\z")
    return pl.when(held).then(name).alias(name + _LIKE_ROWS)


def _refuse_rows_within(
    table: pl.DataFrame,
    name: str,
    names: list[str],
    fields: Mapping[str, Rule],
    nullable: tuple[str, ...],
    path: Path,
    separator: str,
) -> None:
    """Raise where what a text holds are rows: then the fields in them keep their rules."""
    place, text = names.index(name), name + _LIKE_ROWS
    held = table.filter(pl.col(text).is_not_null())
    first, last = (
        held[text].str.extract(line).str.strip_suffix("\r").str.split(separator)
        for line in (r"\A(.*)", r"(.*)\z")
    )
    others = {each: rule for each, rule in fields.items() if each != name}
    places = {each: names.index(each) for each in others}
    within = held.select(
        "row",
        text,
        *(
            (last.list.get(n) if n < place else first.list.get(n - place)).alias(each)
            for each, n in places.items()
        ),
    )
    keep_rules = (
        rule.typed(pl.col(each), pl.String()).is_not_null()  # type: ignore[union-attr]
        | (is_missing(pl.col(each), pl.String()) if each in nullable else pl.lit(False))
        for each, rule in others.items()
    )
    wrong = within.filter(pl.all_horizontal(keep_rules)).sort("row")
    if wrong.height:
        row, got = wrong.select("row", text).row(0)
        raise ValueError(f"{path.name}, row {row}, field {name}: {_holds_rows(got)}")


def _holds_rows(text: str) -> str:
    return f"holds other rows, {_shown(text)}: a quote was probably opened and not closed"


def _reason(path: Path, expected: str, got: object) -> str:
    """Say what a time with a date, or a value with a tab or line break, comes of."""
    if expected.startswith("a time in") and re.match(r"\d{4}-\d\d-\d\d", str(got)):
        return "; times with a date are read from Parquet, as a column of datetimes"
    values = got.to_list() if isinstance(got, pl.Series) else [got]
    if not any(isinstance(value, str) and re.search(BREAK, value) for value in values):
        return ""
    quote = "" if is_columnar(path) else ": a quote was probably opened and not closed"
    return f"; it holds a tab or line break{quote}"


def _flag_of(name: str) -> str:
    return f"{name} breaks its rule"


def _typed(told: str, name: str, rule: Rule, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    # Nothing is there, of any type; or text that repeats.
    if dtype == pl.Null or isinstance(dtype, pl.Categorical | pl.Enum):
        column, dtype = column.cast(pl.String), pl.String()
    typed = rule.typed(column, dtype)
    if typed is None:
        raise ValueError(f"{told}: column {name} is {dtype}, expected {rule.expected}")
    return typed


def count_rows(path: Path) -> int:
    """Count the rows of a file without its header."""
    parts = scan(path)
    with readable(path):
        return sum(raw.select(pl.len()).collect().item() for raw in parts.values())


def columns_of(
    path: Path, separator: str = ",", quote_char: str | None = '"'
) -> dict[str, list[pl.DataType]]:
    """Name the columns of a file, and their types in its parts."""
    types: dict[str, list[pl.DataType]] = {}
    parts = scan(path, separator, quote_char)
    with readable(path):
        for raw in parts.values():
            for name, dtype in raw.collect_schema().items():
                types.setdefault(name, []).append(dtype)
    return types


def without_repeated(
    rows: pl.DataFrame, path: str | os.PathLike, keep_duplicates: bool = False
) -> tuple[pl.DataFrame, list[str]]:
    """Drop the rows that repeat an earlier one in all but their number; return a note of it.

    Values as they were read (see ``read_table``) tell rows apart, and are dropped then.
    """
    distinct = rows.unique(pl.exclude("row"), keep="first", maintain_order=True)
    kept = [name for name in rows.columns if not name.endswith(_AS_READ)]
    rows, distinct = rows.select(kept), distinct.select(kept)
    repeated = rows.height - distinct.height
    if not repeated:
        return rows, []
    done = "kept" if keep_duplicates else "dropped"
    note = f"{Path(path).name}: {done} {repeated:,} rows that repeat another exactly"
    return (rows if keep_duplicates else distinct), [note]


def field_error(
    path: str | os.PathLike, row: int, field: str, expected: str, got: object
) -> ValueError:
    """Name the file, the row (from 1, without the header) and the field that is malformed."""
    if isinstance(got, pl.Series):
        got = got.to_list()
    shown = "nothing" if got is None else _shown(got)
    return ValueError(
        f"{Path(path).name}, row {row}, field {field}: expected {expected}, got {shown}"
    )


def _shown(value: object) -> str:
    return repr(value if len(str(value)) <= 80 else f"{str(value)[:80]}...")


def check(
    frame: pl.DataFrame, valid: pl.Expr, path: str | os.PathLike, field: str, expected: str
) -> None:
    """Raise the error of the first row whose ``field`` is not ``valid``; null is not."""
    wrong = frame.filter(~valid.fill_null(False))
    if wrong.height:
        first = wrong.sort("row").row(0, named=True)
        raise field_error(path, first["row"], field, expected, first[field])


@contextlib.contextmanager
def readable(path: Path, more: Callable[[bool], str] = lambda quoted_amiss: "") -> Iterator[None]:
    """Turn what polars raises about a file into a ValueError of one sentence.

    ``more`` ends it where a text has a row of too many fields, or a quote (True) amiss.
    """
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        # A damaged Parquet file makes polars panic.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if reason.startswith(("CSV malformed", "could not parse")):
            reason += "; quotes may only enclose whole fields, and are doubled within" + more(True)
        elif reason.startswith("found more fields"):
            reason += more(False)
        raise ValueError(f"{path.name}: cannot be read: {reason}") from None


def _odd_line(path: Path, separator: str, quote_char: str | None, quoted_amiss: bool) -> str:
    """Show the first line of a text with more fields than names, or where a quote stands amiss."""
    n_names = len(columns_of(path, separator, quote_char))
    bare, q = f"[^{separator}]*", quote_char
    field = bare if q is None else f"(?:{q}(?:[^{q}]|{q}{q})*{q}|[^{q}{separator}]*)"
    lines = pl.scan_csv(
        path, separator="\x1e", quote_char=None, has_header=False, infer_schema=False,
        new_columns=["line"], truncate_ragged_lines=True, glob=False,
    )  # fmt: skip
    if quoted_amiss:
        odd = ~pl.col("line").str.contains(rf"^{field}(?:{separator}{field})*\r?$")
    else:
        odd = pl.col("line").str.contains(f"^(?:{field}{separator}){{{n_names}}}")
    numbered = lines.select("line").with_row_index("number", offset=1)
    try:
        number, line = numbered.filter(odd).head(1).collect().row(0)
    except pl.exceptions.PolarsError:  # no such line, or bytes that are no text
        return ""
    return f" (line {number}: {_shown(line)})"


def is_columnar(path: Path) -> bool:
    """Tell a Parquet file, also one named for its compression, from a delimited text."""
    return ".parquet" in path.suffixes


def require_file(path: Path) -> None:
    """Raise FileNotFoundError where nothing is there, and ValueError where a folder is.

    A ValueError too for what begins as an archive or UTF-16 does, which nothing here reads.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    with readable(path), path.open("rb") as file:
        start = file.read(8)
    for what, first in _FOREIGN.items():
        if start.startswith(first):
            raise ValueError(f"{path.name}: is {what}, expected UTF-8, as it is or as .gz")


def keep_one(files: list[Path]) -> list[Path]:
    """Return the files; ValueError where two are one, by a link or their names.

    Names are those of one but for format, packing and copy: x.json beside x.json.gz, or x.parquet
    beside "x (1).parquet".
    """
    known: dict[Path, Path] = {}
    for file in files:
        title = file.with_name(_COPY.sub("", _ENDINGS.sub("", file.name)) or file.name)
        for key, how in ((title, "by their names"), (file.resolve(), "by a link")):
            other = known.setdefault(key, file)
            if other != file:
                raise ValueError(
                    f"{file.parent} holds {other.name} and {file.name}, {how} one file twice: keep "
                    "one, or rename one"
                )
    return files


def parts_of(folder: Path) -> list[Path]:
    """List the files of a table in a folder, as Spark writes it, in the order of their names.

    What begins with _ or . is none, as Spark reads: what a killed job left behind, or a checksum.
    ValueError where no part is there, or one twice.
    """
    files = [
        Path(root, name)
        for root, _, names in os.walk(folder, followlinks=True)  # rglob passes links by
        for name in names
    ]
    parts = [
        file
        for file in files
        if not any(name.startswith(("_", ".")) for name in file.relative_to(folder).parts)
    ]
    if not parts:
        raise ValueError(f"{folder}: is a folder without Parquet files")
    return keep_one(sorted(parts))


def scan(
    path: Path, separator: str = ",", quote_char: str | None = '"'
) -> dict[Path, pl.LazyFrame]:
    """Open a Parquet file, or a delimited one with every field as text, lazily.

    A folder that is named like a Parquet file holds the parts of one table: then they are given one
    by one where their columns differ. ValueError where no part is there.
    """
    is_parts = is_columnar(path) and path.is_dir()
    if not is_parts:
        require_file(path)
    if any(0xD800 <= ord(letter) < 0xE000 for letter in str(path)):  # no text for polars
        raise ValueError(f"{path}: the locale lacks letters of this path: set a UTF-8 locale")
    with readable(path):
        if not is_columnar(path):
            return {
                path: pl.scan_csv(
                    path, separator=separator, quote_char=quote_char, infer_schema=False, glob=False
                )
            }
        files = parts_of(path) if is_parts else [path]
        raw, schemas = {}, set()
        for file in files:
            raw[file] = pl.scan_parquet(file, glob=False, hive_partitioning=False)
            with readable(file):
                schemas.add(tuple(raw[file].collect_schema().items()))
        if len(schemas) == 1:
            return {path: pl.scan_parquet(files, glob=False, hive_partitioning=False)}
        return raw
