"""Read the named fields of JSON documents, one a line, and say exactly where one is malformed.

Line by line, so that a file need not fit into memory: only the fields that are read are kept.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from . import rules
from .table import check, field_error, require_file

_CHUNK = 1 << 16  # rows that are held as Python's objects at a time
_EXACT = 2**53
_SURROGATE = re.compile("[\ud800-\udfff]")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_ISO = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?", re.ASCII
)


class Kind(NamedTuple):
    """What a JSON value may be: how messages name it, its column, and the value in it.

    ``typed(value)`` is None where the value breaks the rule; it is never asked about null. What it
    gives keeps ``rule`` besides, which is looked at a column at a time.
    """

    expected: str
    dtype: pl.DataType
    typed: Callable[[Any], Any]
    rule: rules.Rule | None = None


class Field(NamedTuple):
    """A field of a document: the keys that lead to it, what it may be, and whether it must be.

    Where it need not be, "" is none, as in every other format.
    """

    path: tuple[str, ...]
    kind: Kind
    nullable: bool = False


def _text(value: Any) -> str | None:
    # JSON can spell half of a surrogate pair, which no column holds.
    whole = isinstance(value, str) and not _SURROGATE.search(value)
    return value if whole else None


def _whole(value: Any) -> int | None:
    if type(value) is float and value.is_integer() and abs(value) <= _EXACT:
        value = int(value)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def _id(value: Any) -> str | None:
    """Give an id as text: 7 and "7" are one, as they are for a search engine."""
    return str(value) if type(value) is int else _text(value)


def _ids(value: Any) -> list[str] | None:
    ids = [_id(each) for each in value] if isinstance(value, list) else [None]
    return None if None in ids else ids  # type: ignore[return-value]


def _seconds(value: Any) -> int | None:
    seconds = _whole(value)
    return seconds * 1000 if seconds is not None and 0 <= seconds <= rules.MAX_MS // 1000 else None


def _instant(value: Any) -> int | None:
    """Give an ISO 8601 time or unix milliseconds in ms; without a time zone it is UTC."""
    if not isinstance(value, str):
        ms = _whole(value)
        return ms if ms is not None and rules.MIN_UNIX_MS <= ms <= rules.MAX_MS else None
    if (found := _ISO.fullmatch(value)) is None:
        return None
    *parts, fraction, zone = found.groups()
    try:
        at = datetime(*map(int, parts), tzinfo=timezone.utc)  # type: ignore[misc,arg-type]
        if zone and zone != "Z":
            at -= (-1 if zone[0] == "-" else 1) * _offset(zone[1:].replace(":", ""))
    except (ValueError, OverflowError):
        return None
    nanoseconds = int((fraction or "0").ljust(9, "0"))
    ms = (at - _EPOCH) // timedelta(milliseconds=1) + (nanoseconds + 500_000) // 10**6
    return ms if 0 <= ms <= rules.MAX_MS else None


def _offset(zone: str) -> timedelta:
    hours, minutes = int(zone[:2]), int(zone[2:])
    if hours > 23 or minutes > 59:
        raise ValueError(zone)
    return timedelta(hours=hours, minutes=minutes)


TEXT = Kind("text", pl.String(), _text)
ID = Kind("an id", pl.String(), _id, rules.ID)
IDS = Kind("a list of ids", pl.List(pl.String), _ids, rules.IDS)
SECONDS = Kind("a time in seconds", pl.Int64(), _seconds)
INSTANT = Kind("an ISO 8601 time or unix milliseconds", pl.Int64(), _instant)


def documents(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of every line that is not blank, from 1, and the object on it.

    What is gzipped is decompressed. Raises FileNotFoundError for a missing file and ValueError for
    a line that is no JSON object, such as "ubi_events.ndjson, row 3: not a JSON object: ...".
    """
    path = Path(path)
    for row, line in lines(path):
        if line.isspace():
            continue
        try:
            document = json.loads(
                line, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite
            )
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path.name}, row {row}: not a JSON object: {reason}") from None
        if not isinstance(document, dict):
            raise ValueError(f"{path.name}, row {row}: not a JSON object")
        yield row, document


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a UTF-8 text, from 1; what is gzipped is decompressed.

    Raises FileNotFoundError for a missing file and ValueError where it cannot be read or is no
    UTF-8, and for a folder.
    """
    require_file(path)
    row = 0
    try:
        with path.open("rb") as raw:
            is_packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_packed or path.suffix == ".gz" else path.open("rb") as file:
            for row, line in enumerate(file, 1):
                yield row, line.removeprefix(b"\xef\xbb\xbf" if row == 1 else b"").decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path.name}, row {row}: not UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name}: cannot be read: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key is there twice")
    return document


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is no number")
    return value


class Columns:
    """Gather fields of a file's documents into a frame: ``row`` and every field by its name."""

    def __init__(self, path: Path, fields: Mapping[str, Field]) -> None:
        self.path, self.fields = path, fields
        self._schema = {"row": pl.Int64(), **{n: f.kind.dtype for n, f in fields.items()}}
        self._rows: list[list[Any]] = []
        self._frames = [pl.DataFrame(schema=self._schema)]

    def add(self, row: int, document: Mapping[str, Any]) -> None:
        """Take the fields of the document in a row.

        Raises ValueError naming file, row and field where one is missing or breaks its rule.
        """
        values: list[Any] = [row]
        for name, field in self.fields.items():
            value: Any = document
            for key in field.path:
                if value is not None and not isinstance(value, dict):
                    raise field_error(self.path, row, self._name(name), "an object", value)
                value = None if value is None else value.get(key)
            if field.nullable and value == "":
                value = None
            typed = None if value is None else field.kind.typed(value)
            if typed is None and not (field.nullable and value is None):
                raise field_error(self.path, row, self._name(name), field.kind.expected, value)
            values.append(typed)
        self._rows.append(values)
        if len(self._rows) == _CHUNK:
            self._flush()

    def frame(self) -> pl.DataFrame:
        """Give what was added; ValueError where a value breaks the rule of its column."""
        self._flush()
        return pl.concat(self._frames)

    def _name(self, name: str) -> str:
        return ".".join(self.fields[name].path)

    def _flush(self) -> None:
        frame = pl.DataFrame(self._rows, schema=self._schema, orient="row")
        self._rows = []
        for name, field in self.fields.items():
            if field.kind.rule is None:
                continue
            typed = field.kind.rule.typed(pl.col(name), field.kind.dtype)
            assert typed is not None  # a kind's rule is one of its type
            told = frame.rename({name: self._name(name)})
            valid = frame.select(typed.is_not_null() | pl.col(name).is_null()).to_series()
            check(told, pl.lit(valid), self.path, self._name(name), field.kind.expected)
        self._frames.append(frame)


def read_documents(path: str | os.PathLike, fields: Mapping[str, Field]) -> pl.DataFrame:
    """Read ``fields`` of all documents of a file, and the row: see :class:`Columns`."""
    columns = Columns(Path(path), fields)
    for row, document in documents(path):
        columns.add(row, document)
    return columns.frame()
