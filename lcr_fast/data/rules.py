r"""What a field may hold, whatever the file: one rule each for ids, times, numbers and flags.

A rule turns a column into its one type, with null for whatever breaks the rule. Nothing is bent to
fit: 3.7 and "007" are no integers, "" and "nan" are no ids, infinity is no number. NaN is a missing
value, as null is; what databases and R write for one, \N and NA, is no id. No id and no word holds
a tab, line break or NUL: of a text file it would hold the rows behind a quote that was opened and
not closed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import polars as pl

MAX_MS = 10**14  # the year 5138; times in us or ns lie beyond it
MIN_UNIX_MS = 10**11  # unix times in seconds lie below it
_MAX_INT = 2**63 - 10**6  # of Int64, with room to round ns
_EXACT, _EXACT_32 = 2**53, 2**24  # the floats of 64 and 32 bits up to here hold every integer
NO_ID = ("", "nan", "NaN", "NaT", "None", "null", "NULL", "<NA>", "NA", r"\N")
_FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
_PER_MS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 10**6)}  # times, divided by
BREAK = r"[\t\r\n]"
_UNFIT = r"[\t\r\n\x00]"
# 7.0 and 1e+05, of a column of integers that was once of floats: another id than 7 and 100000.
_FLOAT = r"^-?[0-9]+(?:\.0+|(?:\.[0-9]+)?[eE]\+[0-9]+)$"
# A letter or digit may carry marks: accents, vowel signs. A word is a run of such; as a term, a
# Chinese character stands alone. Joiners (ZWNJ, ZWJ) are spelling within a word, as in Persian, and
# ZWJ also behind its last mark, where Malayalam makes a letter of the two.
_RUN = r"(?:\p{{M}}\u200D|{0}|[\u200C\u200D]+{0})*"
WORD = r"[\p{L}\p{N}]" + _RUN.format(r"[\p{L}\p{N}\p{M}]")
TERM = r"\p{Han}\p{M}*|[\p{L}\p{N}--\p{Han}]" + _RUN.format(r"[\p{L}\p{N}\p{M}--\p{Han}]")
_UNSEEN = "[\u00ad\u2060\ufeff]"  # says where a line may break, and where not
_DATE_TIME = r"^[1-9][0-9]{3}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-5][0-9]$"
_CODE = "(?:0|[1-9][0-9]{0,2})"  # a byte
_CODES = rf"^\[[ \n]*{_CODE}(?:[ \n,]+{_CODE})*[ \n]*\]$"


class Rule(NamedTuple):
    """A rule: how messages name what it expects, and the typed column.

    ``typed(column, dtype)`` is None where no value of that dtype can keep the rule.
    """

    expected: str
    typed: Callable[[pl.Expr, pl.DataType], pl.Expr | None]


def is_missing(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Tell where a number is not there: null, NaN, or an empty or "nan" text."""
    if dtype.is_float():
        return column.is_null() | column.is_nan()
    if dtype == pl.String:
        return column.is_null() | column.is_in(["", "nan", "NaN"])
    return column.is_null()


def is_positive(number: pl.Expr) -> pl.Expr:
    """Tell whether a count or flag is above 0; a missing one (null, NaN) is not."""
    return ((number > 0) & number.is_not_nan()).fill_null(False)


def terms(text: pl.Expr, pattern: str = TERM) -> pl.Expr:
    """Cut a text into its terms, in lower case; a letter is one however its marks are encoded."""
    # Normalised last: a lower letter may have a code of its own where the capital has none.
    lower = text.str.to_lowercase().str.replace_all(_UNSEEN, "")
    return lower.str.normalize("NFC").str.extract_all(pattern)


def _is_text(dtype: pl.DataType) -> bool:
    return dtype == pl.String or isinstance(dtype, pl.Categorical | pl.Enum)


def _text(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    if isinstance(dtype, pl.Decimal):
        return _whole(column, dtype).cast(pl.String)
    return column.cast(pl.String) if _is_text(dtype) or dtype.is_integer() else None


def _line(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    text = _text(column, dtype)
    return None if text is None else pl.when(~text.str.contains(_UNFIT)).then(text)


def _whole(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Give the integers among decimals."""
    whole = column.cast(pl.Int64, strict=False)
    return pl.when(whole.cast(dtype, strict=False) == column).then(whole)


def _integer(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    if isinstance(dtype, pl.Decimal):
        return _whole(column, dtype)
    if dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    if dtype.is_float():
        most = _EXACT_32 if dtype == pl.Float32 else _EXACT
        exact = (column == column.floor()) & (column.abs() <= most)
        return pl.when(exact).then(column).cast(pl.Int64, strict=False)
    if dtype == pl.String:
        # "007" and "+7" are told from "7": as ids they are three.
        number = column.cast(pl.Int64, strict=False)
        return pl.when(number.cast(pl.String) == column).then(number)
    return None


def _number(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    if not (dtype.is_numeric() or dtype == pl.String):
        return None
    number = column.cast(pl.Float64, strict=False)
    return pl.when(number.is_finite()).then(number)


def _id(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    if dtype == pl.UInt64:  # hashes
        return column
    if not _is_text(dtype):
        return _integer(column, dtype)
    text = column.cast(pl.String)
    valid = ~text.is_in(NO_ID) & (text.str.strip_chars() == text) & ~text.str.contains(_UNFIT)
    return pl.when(valid & ~text.str.contains(_FLOAT)).then(text)


def _flag(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    if dtype == pl.Boolean:
        return column
    if dtype == pl.String:
        flags = column.str.to_lowercase()
        return flags.replace_strict(_FLAGS, default=None, return_dtype=pl.Boolean)
    number = _number(column, dtype)
    return None if number is None else pl.when(number.is_in([0.0, 1.0])).then(number > 0)


def _listed(column: pl.Expr, dtype: pl.DataType) -> tuple[pl.Expr, pl.DataType] | None:
    """Bring a text of entries between spaces, or an array, to a list; None where it is none."""
    if dtype == pl.String:
        entries = column.str.split(" ").list.eval(pl.element().filter(pl.element() != ""))
        # "[1, 2]" is a list as Python and JSON print it: "[1," would be an entry.
        printed = column.str.starts_with("[") & column.str.ends_with("]")
        return pl.when(~printed).then(entries), pl.String()
    if isinstance(dtype, pl.Array):
        column, dtype = column.arr.to_list(), pl.List(dtype.inner)
    if not isinstance(dtype, pl.List):
        return None
    if dtype.inner == pl.Null:
        column, dtype = column.cast(pl.List(pl.String)), pl.List(pl.String)
    return column, dtype.inner  # type: ignore[return-value]  # a List's inner type is a DataType


def _words(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    listed = _listed(column, dtype)
    if listed is None or (text := _text(pl.element(), listed[1])) is None:
        return None
    words = listed[0].list.eval(text.filter(text.is_not_null() & (text != "")))
    return pl.when(~words.list.eval(pl.element().str.contains(_UNFIT)).list.any()).then(words)


def _ids(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    listed = _listed(column, dtype)
    if listed is None or (each := _id(pl.element(), listed[1])) is None:
        return None
    ids = listed[0].list.eval(each)
    return pl.when(ids.list.drop_nulls().list.len() == ids.list.len()).then(ids)


def _date_time(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    if isinstance(dtype, pl.Datetime):
        return time("ms").typed(column, dtype)
    if dtype != pl.String:
        return None
    parsed = column.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="ms")
    ms = pl.when(column.str.contains(_DATE_TIME)).then(parsed).cast(pl.Int64)
    return pl.when(ms.is_between(-MAX_MS, MAX_MS)).then(ms)


def _codes(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    if isinstance(dtype, pl.Array):
        column, dtype = column.arr.to_list(), pl.List(dtype.inner)
    if dtype == pl.String:
        column = pl.when(column.str.contains(_CODES)).then(column.str.extract_all("[0-9]+"))
    elif not (isinstance(dtype, pl.List) and dtype.inner.is_integer()):
        return None
    codes = column.cast(pl.List(pl.UInt8), strict=False)
    whole = (codes.list.len() > 0) & (codes.list.drop_nulls().list.len() == codes.list.len())
    return pl.when(whole).then(codes)


TEXT = Rule("text", _text)
LINE = Rule("text of one line", _line)
INTEGER = Rule("an integer", _integer)
NUMBER = Rule("a number", _number)
ID = Rule("an id", _id)
FLAG = Rule("true or false", _flag)
ANYTHING = Rule("anything", lambda column, dtype: column)
WORDS = Rule("a list of words", _words)
IDS = Rule("a list of ids", _ids)
DATE_TIME = Rule("a time as 2022-07-01 12:30:00", _date_time)
CODES = Rule("a list of codes 0..255", _codes)


def time(
    unit: str, *, least_ms: int = -MAX_MS, days: bool = False, expected: str | None = None
) -> Rule:
    """Make the rule of times in a unit ("s", "ms", "us", "ns"): Int64 ms, rounded, within range.

    The range is ``least_ms`` to ``MAX_MS``, so that a time in a finer unit breaks the rule. A
    Datetime column has a unit of its own; without a time zone it is UTC. A Date column is its
    midnights (UTC) where ``days`` will do. Of Float32, which holds a unix time in s to two minutes,
    there is no time.
    """
    if unit not in _PER_MS:
        raise ValueError(f"the unit of times must be one of {', '.join(_PER_MS)}, got {unit!r}")

    def typed(column: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
        times, divided = _PER_MS[unit]
        if days and dtype == pl.Date:
            column, dtype = column.cast(pl.Datetime("ms")), pl.Datetime("ms")
        if isinstance(dtype, pl.Decimal) and not dtype.scale:
            column, dtype = _whole(column, dtype), pl.Int64()
        if isinstance(dtype, pl.Datetime):
            times, divided = _PER_MS[dtype.time_unit]
            column, dtype = column.cast(pl.Int64), pl.Int64()
        if dtype == pl.Float32:
            return None
        whole = dtype.is_integer()
        number = column.cast(pl.Int64, strict=False) if whole else _number(column, dtype)
        if number is None:
            return None
        # Compared in the unit itself, where the product of a wrong time cannot wrap.
        least, most = (
            min(max(ms * divided // times, -_MAX_INT), _MAX_INT) for ms in (least_ms, MAX_MS)
        )
        number = pl.when(number.is_between(least, most)).then(number)
        if whole:
            return (number * times + divided // 2) // divided
        # A half goes up, as of whole numbers: one instant in two types is one time.
        return (number * times / divided + 0.5).floor().cast(pl.Int64)

    return Rule(expected or f"a time in {unit}", typed)


UNIX_MS = time("ms", least_ms=MIN_UNIX_MS, expected="unix milliseconds")
SECONDS = time("s", least_ms=0, expected="a time in seconds")
