"""Mutated raw files and prepared folders: one clear sentence, or what a slow reading says.

    python tests/fuzz_readers.py --count 10000

makes small valid folders in every reader's format, changes bytes, fields, columns and rows, and
reads them. A refusal is a ValueError (or FileNotFoundError) of one line. What is accepted must be
what ``slow_readers.py`` makes of the same files, in the reader's log and again in the data prepared
from it. A mutated prepared folder must be refused or hold the arrays it held. Prints the counts;
every finding is printed with the number that makes it again (``--only SOURCE:NUMBER``);
Ctrl-C ends it with the counts so far.
"""

import argparse
import contextlib
import csv
import gzip
import json
import random
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).parent))

import slow_readers
from lcr_fast.data import folder as folders
from lcr_fast.data import read
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from raw_folders import GENERATORS, X, qilin, write_lines
from slow_readers import RefusedError, Told

VALUES = (
    "", " ", "nan", "NaN", "inf", "-inf", "1e400", "None", "null", "3.7", "7.0", "7", "007", "+7",
    "-1", "0", "1", "2", "1e3", "true", "False", " 7", "7 ", "1_0", "0x1", "9223372036854775807",
    "9223372036854775808", "99999999999999999999", "1700000000000", "1700000000", "1.7e15", "[]",
    "1700000000000.6", "[1, 2]", "[1 2]", "7||9|", "7|8", "7_8", "1_", "_", "-1_-1", "ü", "红色 x",
    "\x1f", X, '"', '""', "'", "a b", "a  b", "٣", "clickout item", "search for poi", "-0",
    "1e-9", "1e+05", "a\0b", "[1] 2", "a\tb", "a\u200cb c\u0301\u200d d\u00ade",
)  # fmt: skip
# Columns that a reader might use within itself.
NAMES = (
    "i", "q", "u", "since", "place", "row", "key", "sample", "search", "time", "number", "order",
)  # fmt: skip


# -- mutations -----------------------------------------------------------------------------------


def mutate(path, rng):
    """Change a file a little, as files go wrong."""
    if rng.random() < 0.25:
        mutate_bytes(path, rng)
    elif path.suffix == ".parquet":
        mutate_frame(path, rng)
    elif {".json", ".ndjson", ".jsonl"} & set(path.suffixes) and rng.random() < 0.7:
        mutate_json(path, rng)
    else:
        mutate_text(path, rng)


def mutate_bytes(path, rng):
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content) + 1)
    end = min(len(content), place + rng.choice((1, 1, 2, 8)))
    change = rng.randrange(5)
    if change == 0:
        content[place:end] = rng.randbytes(end - place)
    elif change == 1:
        del content[place:end]
    elif change == 2:
        content[place:place] = rng.choice((b"\x00", b"\xff", b"\n", b"\r", b'"', b",", b"\t", b"9"))
    elif change == 3:
        del content[place:]
    elif place < len(content):
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def mutate_json(path, rng):
    """Change a value, a key or an object in a file of JSON lines."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        objects = [json.loads(line) for line in raw.decode("utf-8").splitlines()]
        holder = rng.choice(objects)
        while isinstance(inner := rng.choice(list(holder.values())), dict) and inner:
            holder = inner
        key = rng.choice(list(holder))
    except (OSError, EOFError, ValueError, zlib.error, IndexError, AttributeError):
        return mutate_bytes(path, rng)  # mutated before
    change = rng.randrange(6)
    if change <= 1:
        odd = (None, True, 0, -1, 7, 7.0, 3.7, 1e18, 10**30, [], [7, None], {}, {"a": 1}, "\ud800")
        dates = (
            *("2024-02-30T00:00:00Z", "2024-06-01T00:00:00.9999Z", "2024-06-01 00:00:00-23:59"),
            *("2024-06-01T24:00:00", "0001-01-01T00:00:00+01:00", "2024-06-01", "1717200000000"),
            *("1969-12-31T23:59:59.9999Z", "2024-06-01T00:00:60Z", "2024-6-1T00:00:00Z"),
        )
        holder[key] = rng.choice(rng.choice((odd, dates, VALUES)))
    elif change == 2:
        del holder[key]
    elif change == 3:
        holder[rng.choice(("query_id", "_source", "_index", "index", "x"))] = holder[key]
    elif change == 4:
        objects.insert(rng.randrange(len(objects)), rng.choice((*objects, 7, None, {}, [{}])))
    else:
        objects.remove(rng.choice(objects))
    write_lines(path, [json.dumps(each) for each in objects])


def mutate_text(path, rng):
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error):  # mutated before
        return mutate_bytes(path, rng)
    separator = "," if ".csv" in path.suffixes else "\t"
    with_quotes = separator == "," or ".tsv" in path.suffixes
    lines = text.splitlines()
    if with_quotes:
        table = list(csv.reader(lines, delimiter=separator))
    else:
        table = [line.split(separator) for line in lines]
    mutate_table(table, rng, lambda row, column: rng.choice(VALUES))

    def cell(value):
        special = any(letter in value for letter in f'{separator}"\n\r')
        return '"' + value.replace('"', '""') + '"' if with_quotes and special else value

    write_lines(path, [separator.join(map(cell, row)) for row in table])


def mutate_table(table, rng, value):
    """Change cells, columns or rows of a table whose first row is the header, in place."""
    row, other = (rng.randrange(1, len(table)) if len(table) > 1 else 0 for _ in range(2))
    column, second = (rng.randrange(len(table[0])) for _ in range(2))
    change = rng.randrange(12)
    if change <= 3 and table[row]:
        cell = column % len(table[row])
        table[row][cell] = value(row, cell)
    elif change == 4:
        table.insert(other, list(table[row]))
    elif change == 5:
        table[row], table[other] = table[other], table[row]
    elif change == 6 and len(table) > 1:
        del table[row]
    elif change == 7:
        for line in table:
            del line[column : column + 1]
    elif change == 8:
        name = rng.choice((*NAMES, *table[0]))
        for number, line in enumerate(table):
            line.insert(second, name if number == 0 else rng.choice(("1", "2")))
    elif change == 9:
        table[0][column] = rng.choice((*NAMES, table[0][second]))
    elif change == 10:
        for line in table[1:]:
            if column < len(line):
                line[column] = value(0, column)
    else:
        for line in table:
            if max(column, second) < len(line):
                line[column], line[second] = line[second], line[column]


def mutate_frame(path, rng):
    try:
        frame = pl.read_parquet(path)
    except BaseException:  # mutated before; polars panics too
        return mutate_bytes(path, rng)
    name = rng.choice(frame.columns)
    column = pl.col(name)
    dtypes = (
        pl.Float64, pl.Int32, pl.String, pl.Boolean, pl.UInt64, pl.Categorical, pl.Float32,
        pl.Datetime("ms"), pl.Datetime("ns"), pl.Date, pl.List(pl.Int32), pl.List(pl.String),
        pl.List(pl.Float64), pl.Binary, pl.Decimal(20, 2), pl.Decimal(20, 0), pl.Null,
    )  # fmt: skip
    row = rng.randrange(max(frame.height, 1))
    here = pl.int_range(pl.len()) == row
    change = rng.randrange(9)
    try:
        if change <= 1:
            frame = frame.with_columns(column.cast(rng.choice(dtypes), strict=False))
        elif change == 2:
            odd = rng.choice((None, float("nan"), float("inf"), 3.7, 7.0, -1.0, 1e18, 2.0**60))
            if rng.random() < 0.5 or not frame.schema[name].is_numeric():
                odd = None
            dtype = pl.Float64 if isinstance(odd, float) else frame.schema[name]
            value = pl.lit(odd, dtype)
            frame = frame.with_columns(pl.when(here).then(value).otherwise(column.cast(dtype)))
        elif change == 3:
            added = frame.get_column(name).rename(rng.choice(NAMES))
            frame = frame.with_columns(added if rng.random() < 0.5 else pl.lit(1).alias(added.name))
        elif change == 4:
            frame = frame.drop(name) if rng.random() < 0.5 else frame.rename({name: "other"})
        elif change == 5:
            frame = pl.concat([frame, frame[row : row + 2]])
        elif change == 6:
            frame = frame.sample(fraction=1, shuffle=True, seed=rng.randrange(2**32))
        elif change == 7:
            frame = frame[: rng.choice((0, 1, frame.height // 2))]
        else:
            odd = rng.choice(VALUES)
            text = pl.when(here).then(pl.lit(odd)).otherwise(column.cast(pl.String))
            frame = frame.with_columns(text.alias(name))
        frame.write_parquet(path)
    except pl.exceptions.PolarsError:
        mutate_bytes(path, rng)  # there is no such frame


# -- what came of it -----------------------------------------------------------------------------


def told_by(log) -> Told:
    """Bring a reader's log into the form of the slow readings."""
    told = Told()
    shown = "impressions" in log.events.columns
    for row in log.events.to_dicts():
        told.event(
            row["user"],
            row["item"],
            row["time"],
            row["order"],
            row["target"],
            row["impressions"] if shown else None,
        )
    for row in log.searches.to_dicts():
        told.search(row["search"], row["user"], row["time"], row["terms"] or [])
    for row in log.clicks.to_dicts():
        told.click(row["search"], row["item"], row["time"])
    return told.done()


def kept_of(data: PreparedData):
    """Read off prepared data what it keeps of every user: events and searches."""
    kept = {}
    for user in range(1, data.n_users + 1):
        events = slice(*data.rec_offsets[user : user + 2])
        items = [data.items[int(i)] for i in data.rec_items[events]]
        searches = []
        for place in range(*data.search_offsets[user : user + 2]):
            clicks = slice(*data.click_offsets[place : place + 2])
            query = int(data.search_queries[place])
            terms = data.query_terms[slice(*data.query_term_offsets[query : query + 2])]
            clicked = [data.items[int(i)] for i in data.click_items[clicks]]
            searches.append(
                (
                    int(data.search_times[place]),
                    [data.terms[int(t)] for t in terms],
                    list(zip(clicked, data.click_times[clicks].tolist(), strict=True)),
                )
            )
        kept[data.users[user]] = (
            list(zip(items, data.rec_times[events].tolist(), strict=True)),
            searches,
        )
    return kept


def should_keep(told):
    """Say what preparing keeps of what was told: the users with something before a target."""
    kept = {}
    for user, events in told.events.items():
        searches = told.searches.get(user, [])
        first = min(time for _, time, *_ in [*events, *((0, s[0]) for s in searches)])
        if any(target and time > first for _, time, target, _ in events):
            kept[user] = ([(item, time) for item, time, *_ in events], searches)
    return kept


def is_sentence(error) -> bool:
    return isinstance(error, ValueError | FileNotFoundError) and "\n" not in str(error).strip()


def try_reader(source, folder, options):
    """Read a raw folder and prepare it; return what came of it, "!" first where it is wrong."""
    try:
        log = read(source, folder, **options)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "refused" if is_sentence(error) else f"!raised {type(error).__name__}: {error}"
    try:
        expected = slow_readers.READERS[source](folder, **options)
    except RefusedError as error:
        return f"!accepted what is to be refused: {error}"
    told = told_by(log)
    if (told.events, told.searches) != (expected.events, expected.searches):
        got, wanted = (slow_readers.dumps(t).splitlines() for t in (told, expected))
        first = next((pair for pair in zip(got, wanted, strict=False) if pair[0] != pair[1]), "")
        return f"!read otherwise: {first}"
    out = folder.with_name("prepared")
    try:
        data = prepare(log, out, n_negatives=1, overwrite=True)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        told_so = "refused to prepare"
        return told_so if is_sentence(error) else f"!prepare raised {type(error).__name__}: {error}"
    return "accepted" if kept_of(data) == should_keep(expected) else "!prepared otherwise"


def fuzz_reader(source, number, seed=0):
    """Make, mutate and read one raw folder."""
    rng = random.Random(f"{source} {number} {seed}")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "raw")
        folder.mkdir()
        GENERATORS[source](folder, rng)
        options = {"test_query": True} if source == "jdsearch" and rng.random() < 0.5 else {}
        for _ in range(number % 3 and rng.choice((1, 1, 2))):  # a third is left as it is
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            mutate(rng.choice(files), rng)
        return try_reader(source, folder, options)


def fuzz_prepared(original: Path, number, seed=0):
    """Mutate one file of a copy of a prepared folder and open it."""
    rng = random.Random(f"prepared {number} {seed}")
    data = PreparedData.open(original)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(shutil.copytree(original, Path(root, "data")))
        path = rng.choice(sorted(folder.iterdir()))
        mutate_bytes(path, rng) if path.stat().st_size else path.write_bytes(b"\x00")
        for verify in (False, True):  # without, the values may have changed, no more
            try:
                opened = PreparedData.open(folder, verify=verify)
            except BaseException as error:
                if not is_sentence(error):
                    return f"!raised {type(error).__name__}: {error}"
                if verify:
                    return "refused"
                continue
            if verify:
                same = opened.arrays.keys() == data.arrays.keys() and all(
                    np.array_equal(array, data.arrays[name], equal_nan=array.dtype.kind == "f")
                    for name, array in opened.arrays.items()
                )
                same &= opened.fingerprint == data.fingerprint
                return "accepted" if same else "!opened with other arrays"
    raise AssertionError("unreachable")


def make_prepared(folder: Path) -> Path:
    """Prepare a valid folder, for its files to be mutated."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    qilin(raw, random.Random(5))
    prepare(read("qilin", raw), folder / "data", n_negatives=2)
    return folder / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="SOURCE:NUMBER", help="one input, as it was printed")
    arguments = parser.parse_args()
    folders._fsync = lambda path: None  # nothing here is to outlive a power cut
    sources = (*GENERATORS, "prepared")
    each = [(name, n) for n in range(-(-arguments.count // len(sources))) for name in sources]
    if arguments.only:
        name, number = arguments.only.split(":")
        each = [(name, int(number))]
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as root, contextlib.suppress(KeyboardInterrupt):
        original = make_prepared(Path(root))
        for name, number in each[: arguments.count]:
            if name == "prepared":
                outcome = fuzz_prepared(original, number, arguments.seed)
            else:
                outcome = fuzz_reader(name, number, arguments.seed)
            if outcome.startswith("!"):
                print(f"{name}:{number} {outcome[1:]}", flush=True)
                outcome = "wrong"
            counts[name, outcome] += 1
    wrong = sum(n for (_, outcome), n in counts.items() if outcome == "wrong")
    print(json.dumps({f"{name} {what}": n for (name, what), n in sorted(counts.items())}, indent=1))
    print(f"{sum(counts.values()):,} inputs, {wrong} wrong")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
