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
import datetime
import gzip
import itertools
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
from slow_readers import RefusedError, Told

MS = 1_700_000_000_000
X = "\x18"
VALUES = (
    *(
        "",
        " ",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "1e400",
        "None",
        "null",
        "3.7",
        "7.0",
        "7",
        "007",
        "+7",
    ),
    *("-1", "0", "1", "2", "1e3", "true", "False", " 7", "7 ", "1_0", "0x1", "9223372036854775807"),
    *("9223372036854775808", "99999999999999999999", "1700000000000", "1700000000", "1.7e15", "[]"),
    *(
        "1700000000000.6",
        "[1, 2]",
        "[1 2]",
        "7||9|",
        "7|8",
        "7_8",
        "1_",
        "_",
        "-1_-1",
        "ü",
        "红色 x",
    ),
    *(
        "\x1f",
        X,
        '"',
        '""',
        "'",
        "a b",
        "a  b",
        "٣",
        "clickout item",
        "search for poi",
        "-0",
        "1e-9",
    ),
)
# Columns that a reader might use within itself.
NAMES = (
    "i",
    "q",
    "u",
    "since",
    "place",
    "row",
    "key",
    "sample",
    "search",
    "time",
    "number",
    "order",
)


# -- valid folders -------------------------------------------------------------------------------


def happenings(rng):
    """Draw (user, item, time) events and (user, time, words, item or None) searches."""
    events, searches = [], []
    for user in range(1, 5):
        time = MS + rng.randrange(10**6)
        for _ in range(rng.randrange(3, 7)):
            time += rng.choice((0, 1000, 1000, 60_000))
            if rng.random() < 0.4:
                words = [str(rng.randrange(20)) for _ in range(rng.randrange(1, 4))]
                item = rng.randrange(1, 30) if rng.random() < 0.6 else None
                searches.append((user, time, words, item))
                time += 1000
            events.append((user, rng.randrange(1, 30), time))
    return events, searches


def write_lines(path, lines):
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")


def kuaisar(folder, rng):
    events, searches = happenings(rng)
    lines = ["user_id,item_id,click,timestamp"]
    lines += [f"{u},{i},{rng.choice((1, 1, 1.0, 0))},{t}.0" for u, i, t in events]
    write_lines(folder / "rec_inter.csv", lines)
    lines = ["user_id,item_id,search_session_id,search_session_timestamp,click_cnt,keyword,type"]
    for key, (user, time, words, item) in enumerate(searches):
        for shown in {item or 1, rng.randrange(1, 30)}:
            clicks = int(shown == item)
            lines.append(f'{user},{shown},{key},{time}.0,{clicks},"[{", ".join(words)}]",a')
    write_lines(folder / "src_inter.csv", lines)


def trivago(folder, rng):
    events, searches = happenings(rng)
    rows = [(u, t, "clickout item", str(i), f"{i}|{i % 29 + 1}") for u, i, t in events]
    rows += [(u, t, "search for poi", " ".join(words), "") for u, t, words, _ in searches]
    rows += [(u, t - 500, "interaction item image", str(i), "") for u, i, t in events[::3]]
    rows.sort(key=lambda row: (row[0], row[1]))
    lines = ["user_id,session_id,timestamp,step,action_type,reference,city,impressions"]
    for step, (user, time, action, reference, shown) in enumerate(rows):
        session = f"S{user}{rng.choice('ab')}"
        line = f'U{user},{session},{time // 1000},{step},{action},{reference},"Rio, BR",{shown}'
        lines.append(line)
    write_lines(folder / "t.csv", lines)
    if rng.random() < 0.3:
        pl.read_csv(folder / "t.csv").write_parquet(folder / "t.parquet")
        (folder / "t.csv").unlink()


def jdsearch(folder, rng):
    events, searches = happenings(rng)
    fields = (
        *("query", "candidate_wid_list", "candidate_label_list", "history_qry_list"),
        *("history_wid_list", "history_type_list", "history_time_list"),
    )
    lines = ["\t".join(fields)]
    for user in sorted({event[0] for event in events}):
        mine = [(t, "-1", i) for u, i, t in events if u == user]
        mine += [(t, X.join(words), item or 3) for u, t, words, item in searches if u == user]
        mine.sort()
        seconds = [time // 1000 for time, _, _ in mine]
        gaps = [0, *(b - a for a, b in itertools.pairwise(seconds)), 5]
        lists = ([query for _, query, _ in mine], [item for _, _, item in mine])
        joined = ["_".join(map(str, entries)) for entries in (*lists, ["CLICK"] * len(mine), gaps)]
        lines.append("\t".join([f"1{X}2", "70_71", "0.0_1.0", *joined]))
    write_lines(folder / "user_behavior_data.txt", lines)


def qilin(folder, rng):
    events, searches = happenings(rng)
    nothing = rng.choice((0.0, None, float("nan")))
    requests = [
        (user, None, [(item, 1.0, float(time)), (item % 29 + 1, nothing, time + 3.0)])
        for user, item, time in events
    ]
    asked = [
        (user, " ".join(words), [(item or 1, 1.0 if item else nothing, time // 1000 + 0.0)])
        for user, time, words, item in searches
    ]
    parquet = rng.random() < 0.5
    for stream, prefix, rows, stamp in (
        ("recommendation", "rec", requests, "request_timestamp"),
        ("search", "search", asked, "search_timestamp"),
    ):
        details = f"{prefix}_result_details_with_idx"
        structs = [
            [{"note_idx": n, "click": c, stamp: t, "note_id": "x"} for n, c, t in row[2]]
            for row in rows
        ]
        columns = {"user_idx": [row[0] for row in rows]}
        if prefix == "search":
            columns["query"] = [row[1] for row in rows]
        if parquet:
            types = {"note_idx": pl.Int64, "click": pl.Float64, stamp: pl.Float64}
            dtype = pl.List(pl.Struct(types | {"note_id": pl.String}))
            frame = pl.DataFrame(columns | {details: pl.Series(structs, dtype=dtype, strict=False)})
            frame.write_parquet(folder / f"{stream}_train.parquet")
            continue
        columns[details] = ["[" + "\n ".join(map(str, cell)) + "]" for cell in structs]
        with open(folder / f"{stream}_train.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def frames(folder, rng):
    events, searches = happenings(rng)
    kind = rng.choice(("parquet", "parquet", "csv", "tsv", "csv.gz", "inter"))
    shown = [[i, i % 29 + 1] if rng.random() < 0.7 else None for _, i, _ in events]
    if kind == "inter":
        lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
        lines += [f"{u}\t{i}\t5.0\t{t / 1000}" for u, i, t in events]
        write_lines(folder / "shop.inter", lines)
        return
    tables = {
        "events": pl.DataFrame(events, schema=["user", "item", "time"], orient="row").with_columns(
            order=pl.int_range(pl.len()), target=pl.lit(True),
            impressions=pl.Series(shown, dtype=pl.List(pl.Int64)),
        ),
        "searches": pl.DataFrame(
            [(k, u, t, words) for k, (u, t, words, _) in enumerate(searches)], orient="row",
            schema={"search": pl.Int64, "user": pl.Int64, "time": pl.Int64,
                    "terms": pl.List(pl.String)},
        ),
        "clicks": pl.DataFrame(
            [(k, i, t + 1) for k, (_, t, _, i) in enumerate(searches) if i], orient="row",
            schema={"search": pl.Int64, "item": pl.Int64, "time": pl.Int64},
        ),
    }  # fmt: skip
    for name, table in tables.items():
        path = folder / f"{name}.{kind}"
        if kind == "parquet":
            table.write_parquet(path)
            continue
        lists = [c for c, dtype in table.schema.items() if isinstance(dtype, pl.List)]
        table = table.with_columns(pl.col(lists).cast(pl.List(pl.String)).list.join(" "))
        text = table.write_csv(separator="\t" if kind == "tsv" else ",")
        write_lines(path, text.splitlines())


def dated(ms):
    return datetime.datetime.fromtimestamp(ms // 1000, datetime.timezone.utc)


def synerise(folder, rng):
    events, searches = happenings(rng)

    def table(rows, last):
        columns = ("client_id", "timestamp", last)
        times = [dated(row[1]).strftime("%Y-%m-%d %H:%M:%S") for row in rows]
        values = [[row[0] for row in rows], times, [row[2] for row in rows]]
        return pl.DataFrame(dict(zip(columns, values, strict=True)))

    carts = [(user, time, item) for user, item, time in events]
    queries = [
        (
            user,
            time,
            "[" + " ".join(f"{(int(words[0]) * place) % 256:3d}" for place in range(4)) + "]",
        )
        for user, time, words, _ in searches
    ] + [(99, MS, "[ 1 2 3 4]")]
    table(carts, "sku").write_parquet(folder / "add_to_cart.parquet")
    table(carts[::2], "sku").write_parquet(folder / "product_buy.parquet")
    table(queries, "query").write_parquet(folder / "search_query.parquet")


def ubi(folder, rng):
    events, searches = happenings(rng)
    queries, actions = [], []

    def at(ms):
        if rng.random() < 0.2:
            return ms
        zone = rng.choice(("Z", "", "+00:00", "+0000"))
        return (
            dated(ms).strftime("%Y-%m-%dT%H:%M:%S") + rng.choice(("", f".{ms % 1000:03d}")) + zone
        )

    def action(name, user, time, item, query=None):
        attributes = None if item is None else {"object": {"object_id": item}, "position": None}
        actions.append({
            "action_name": name, "client_id": f"c{user}", "timestamp": at(time),
            "query_id": query, "event_attributes": attributes,
        })  # fmt: skip

    for key, (user, time, words, item) in enumerate(searches):
        hits = [str(item or 1), str(rng.randrange(1, 30))]
        name = rng.choice(("query_response_hit_ids", "query_response_object_ids"))
        queries.append({
            "query_id": f"q{key}", "client_id": f"c{user}", "timestamp": at(time),
            "user_query": rng.choice((" ".join(words), "")), name: hits,
        })  # fmt: skip
        if rng.random() < 0.5:
            action("impression", user, time, hits[0], f"q{key}")
        if item:
            action("click", user, time + rng.choice((500, -500)), item, f"q{key}")
            action("purchase", user, time + 900, rng.choice((item, 29)), f"q{key}")
    for user, item, time in events:
        action(rng.choice(("click", "view", "login")), user, time, rng.choice((item, str(item))))
    action("click", 1, MS + 10**7, 5)
    kind = rng.choice(("plain", "source", "bulk", "both"))
    lines = {"ubi_queries": [], "ubi_events": []}
    for index, documents in (("ubi_queries", queries), ("ubi_events", actions)):
        for number, document in enumerate(documents):
            if kind == "source":
                document = {"_index": index, "_id": f"{index}{number}", "_source": document}
            elif kind in ("bulk", "both"):
                lines[index].append(json.dumps({"index": {"_index": index, "_id": str(number)}}))
            lines[index].append(json.dumps(document, ensure_ascii=rng.random() < 0.5))
    if kind == "both":
        write_lines(
            folder / "ubi_queries_events.ndjson", [*lines["ubi_queries"], *lines["ubi_events"]]
        )
        return
    for index, those in lines.items():
        write_lines(folder / f"{index}{rng.choice(('.ndjson', '.jsonl.gz'))}", those)


def amazon(folder, rng):
    events, searches = happenings(rng)
    reviews = [
        {
            "reviewerID": f"A{u}",
            "asin": f"B{i}",
            "overall": 5.0,
            "unixReviewTime": t // 60_000 * 60,
        }
        for u, i, t in events
    ]
    end = rng.choice((".json", ".json.gz"))
    write_lines(folder / f"reviews_Toys_5{end}", [json.dumps(review) for review in reviews])
    texts = [" ".join(words) for _, _, words, _ in searches] or ["none"]
    write_lines(folder / "query_text.txt", texts)
    pairs = [
        f"A{u}_{rng.randrange(len(texts))} 0 B{i} {int(rng.random() < 0.8)} "
        for u, i, _ in events
        for _ in range(rng.choice((0, 1, 2)))
    ]
    write_lines(folder / "train.qrels", pairs[::2])
    write_lines(folder / "test.qrels", pairs[1::2])


GENERATORS = {
    "kuaisar": kuaisar, "trivago": trivago, "jdsearch": jdsearch, "qilin": qilin, "frames": frames,
    "synerise": synerise, "ubi": ubi, "amazon": amazon,
}  # fmt: skip


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
        pl.List(pl.Float64), pl.Binary, pl.Decimal(20, 2), pl.Null,
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
            mutate(rng.choice(sorted(folder.iterdir())), rng)
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
