"""Small valid folders of raw data in every reader's format, drawn at random."""

import csv
import datetime
import gzip
import itertools
import json

import polars as pl

MS = 1_700_000_000_000
X = "\x18"  # between words of JDsearch


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
    kind = rng.choice(("parquet", "parquet", "parts", "csv", "tsv", "csv.gz", "inter"))
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
        if kind == "parts":
            write_parts(folder / f"{name}.parquet", table, rng)
            continue
        lists = [c for c, dtype in table.schema.items() if isinstance(dtype, pl.List)]
        table = table.with_columns(pl.col(lists).cast(pl.List(pl.String)).list.join(" "))
        text = table.write_csv(separator="\t" if kind == "tsv" else ",")
        write_lines(path, text.splitlines())


def write_tables(folder, tables, end=".parquet"):
    """Write the tables of a log as ``frames`` reads them, as Parquet or as text."""
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        path = folder / f"{name}{end}"
        if end == ".parquet":
            table.write_parquet(path)
            continue
        lists = pl.selectors.by_dtype(pl.List(pl.Int64), pl.List(pl.String))
        flat = table.with_columns(lists.cast(pl.List(pl.String)).list.join(" "))
        text = flat.write_csv(separator="\t" if ".tsv" in end else ",").encode()
        path.write_bytes(gzip.compress(text) if end.endswith(".gz") else text)
    return folder


def write_parts(folder, table, rng):
    """Write a table in parts whose columns differ in order and types."""
    folder.mkdir()
    place = rng.randrange(table.height + 1)
    for number, part in enumerate((table[:place], table[place:])):
        for column, dtypes in {
            "user": (pl.Int16, pl.Float64, pl.Decimal(20, 0)),
            "item": (pl.UInt8, pl.Float64, pl.Decimal(20, 0)),
            "time": (pl.Datetime("ms"), pl.Float64, pl.Int64),
            "impressions": (pl.List(pl.Float64), pl.Array(pl.Int64, 2), pl.List(pl.Int64)),
        }.items():
            if column in part.columns and rng.random() < 0.5:
                part = part.cast({column: rng.choice(dtypes)})
        columns = rng.sample(part.columns, len(part.columns))
        part.select(columns).write_parquet(folder / f"part-{number}.parquet")


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
