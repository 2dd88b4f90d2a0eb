"""Readers of public logs (Synerise, UBI, Amazon) on made-up files, and on malformed ones."""

import gzip
import json
import re

import numpy as np
import polars as pl
import pytest

from lcr_fast.data import amazon, read, synerise, ubi
from lcr_fast.data.build import prepare

DAY = 86_400


def rows_of(frame, *columns):
    return frame.select(columns).rows()


def complaint(reader, path, **options) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        reader.read(path, **options)
    return str(caught.value)


# Synerise

NOON = 1_656_676_800_000  # 2022-07-01 12:00:00


def clock(minutes, seconds=0):
    return f"2022-07-01 12:{minutes:02d}:{seconds:02d}"


SYNERISE = {
    "add_to_cart": ("sku", [(7, clock(1), 50), (7, clock(1), 51), (7, clock(50), 52),
                            (7, clock(1), 50), (8, clock(2), 50)]),
    "product_buy": ("sku", [(7, clock(1), 50), (8, clock(59), 53)]),
    "remove_from_cart": ("sku", [(7, clock(3), 51)]),
    "page_visit": ("url", [(7, clock(0), 1), (9, clock(0), 2)]),
    "search_query": ("query", [(7, clock(0), "[  1 255   3]"), (7, clock(0, 30), "[4 5 6]"),
                               (9, clock(0), "[1 2 3]"), (8, clock(2, 1), "[ 1, 2, 3 ]")]),
}  # fmt: skip
NAMES = {50: "[ 1 255  3]", 51: "[1 255 4]", 99: "[9 9 9]"}


@pytest.fixture
def shop(tmp_path):
    folder = tmp_path / "synerise"
    folder.mkdir()
    for name, (last, rows) in SYNERISE.items():
        columns = ("client_id", "timestamp", last)
        pl.DataFrame(rows, schema=columns, orient="row").write_parquet(folder / f"{name}.parquet")
    properties = {"sku": list(NAMES), "category": [1, 2, 3], "price": [5, 99, 0]}
    frame = pl.DataFrame(properties | {"name": list(NAMES.values())})
    frame.write_parquet(folder / "product_properties.parquet")
    return folder


def test_synerise(shop):
    log = synerise.read(shop)
    minute = 60_000
    events = log.events.sort("time", "order")
    assert rows_of(events, "user", "item", "time", "target") == [
        (7, 50, NOON + minute, True),
        (7, 51, NOON + minute, True),
        (7, 50, NOON + minute, False),
        (8, 50, NOON + 2 * minute, True),
        (7, 52, NOON + 50 * minute, True),
        (8, 53, NOON + 59 * minute, False),
    ]
    assert rows_of(log.searches, "search", "user", "time", "terms") == [
        (1, 7, NOON, ["0:1", "1:255", "2:3"]),
        (2, 7, NOON + 30_000, ["0:4", "1:5", "2:6"]),
        (4, 8, NOON + 2 * minute + 1000, ["0:1", "1:2", "2:3"]),
    ]
    # Of the last search before it, within half an hour.
    assert rows_of(log.clicks, "search", "item", "time") == [
        (2, 50, NOON + minute),
        (2, 51, NOON + minute),
        (2, 50, NOON + minute),
    ]
    notes = "\n".join(log.notes)
    assert "add_to_cart.parquet: dropped 1 rows that repeat another" in notes
    assert "kept 3 searches; dropped 1 of users without an event" in notes
    assert "page_visit.parquet: dropped 2 rows" in notes
    assert "remove_from_cart.parquet: dropped 1 rows" in notes
    for file in shop.glob("*.parquet"):  # each a folder of one part
        file.rename(shop / "part")
        file.mkdir()
        (shop / "part").rename(file / "part-0.parquet")
    assert synerise.read(shop).notes == log.notes


def test_synerise_targets_and_optional_files(shop):
    for name in ("remove_from_cart", "page_visit", "product_properties"):
        (shop / f"{name}.parquet").unlink()
    log = synerise.read(shop, targets=["product_buy"], keep_duplicates=True)
    assert log.events["target"].sum() == 2
    assert log.events.height == 7
    assert log.item_text is None
    message = "targets of synerise must be among add_to_cart, product_buy, got 'page_visit'"
    assert complaint(synerise, shop, targets=["page_visit"]) == message
    assert complaint(synerise, shop, targets=[]).endswith("got none")


def test_synerise_vectors_count_shared_codes(shop, tmp_path):
    data = prepare(read("synerise", shop), tmp_path / "out", n_negatives=1)
    first, second = (data.item_text[data.items.find(sku)] for sku in ("50", "51"))
    assert not data.item_text[data.items.find("52")].any()  # of no name
    assert first @ first == pytest.approx(1, abs=0.5)
    same = np.random.default_rng(1).integers(256, size=(500, 16), dtype=np.uint8)
    other = np.where(np.arange(16) < 12, same, same + np.uint8(1))
    products = (synerise.code_vectors(same) * synerise.code_vectors(other)).sum(1)
    assert products.mean() == pytest.approx(12 / 16, abs=0.03)
    assert first @ second == pytest.approx(2 / 3, abs=0.4)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("add_to_cart", {"timestamp": "2022-13-01 00:00:00"}, "row 1, field timestamp: expected a"),
        ("add_to_cart", {"timestamp": "2022-07-01T00:00:00"}, "row 1, field timestamp: expected a"),
        ("product_buy", {"sku": 1.5}, "row 1, field sku: expected an integer, got 1.5"),
        ("product_buy", {"client_id": None}, "row 1, field client_id: expected an integer"),
        ("search_query", {"query": "[1 2 256]"}, "row 1, field query: expected a list of codes"),
        ("search_query", {"query": "[1 2 x]"}, "row 1, field query: expected a list of codes"),
        ("search_query", {"query": "[]"}, "row 1, field query: expected a list of codes"),
        ("search_query", {"query": "[1 2]"}, "row 2, field query: expected 2 codes, as in the"),
    ],
)
def test_synerise_malformed(shop, file, change, message):
    path = shop / f"{file}.parquet"
    frame = pl.read_parquet(path)
    for name, value in change.items():
        column = frame[name].cast(pl.Float64) if isinstance(value, float) else frame[name]
        values = pl.Series(name, [value, *column[1:]], column.dtype)
        frame = frame.with_columns(values)
    frame.write_parquet(path)
    assert complaint(synerise, shop).startswith(f"{file}.parquet, {message}")


def test_synerise_of_another_schema(shop, tmp_path):
    path = shop / "product_properties.parquet"
    properties = pl.read_parquet(path)
    properties.rename({"name": "embedding"}).write_parquet(path)
    ((keys, vectors),) = list(synerise.read(shop).item_text())
    assert keys.to_list() == [50, 51]
    assert vectors.shape == (2, 64)
    pl.concat([properties, properties[:1]]).write_parquet(path)
    with pytest.raises(ValueError, match=r"row 4, field sku: expected one row an item, got 50"):
        prepare(synerise.read(shop), tmp_path / "out", n_negatives=1)
    path = shop / "search_query.parquet"
    queries = pl.read_parquet(path)
    queries.drop("query").write_parquet(path)
    told = "search_query.parquet: column query is missing among 'client_id, timestamp'"
    assert complaint(synerise, shop) == told
    lists = queries["query"].str.extract_all("[0-9]+").cast(pl.List(pl.Int64))
    queries.with_columns(lists).write_parquet(path)
    assert synerise.read(shop).searches["terms"][0].to_list() == ["0:1", "1:255", "2:3"]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"search_query\.parquet: not found"):
        synerise.read(shop)


# User Behavior Insights

JUNE = 1_717_200_000_000  # 2024-06-01T00:00:00Z


def query(key, user, seconds, text, **more):
    at = f"2024-06-01T00:00:{seconds:02d}.000Z"
    return {"query_id": key, "client_id": user, "timestamp": at, "user_query": text, **more}


def event(action, user, seconds, item=None, key=None, **more):
    named = None if item is None else {"object": {"object_id": item, "object_id_field": "sku"}}
    return {
        "action_name": action, "client_id": user, "timestamp": JUNE + 1000 * seconds,
        "query_id": key, "event_attributes": named, "session_id": "s", **more,
    }  # fmt: skip


QUERIES = [
    query("q1", "ann", 10, "Red shoe, 42", query_response_hit_ids=["a", "b", 3]),
    query("q2", "ann", 20, "红色 shoe", query_response_object_ids=["c"]),
    query("q2", "ann", 30, "红色 shoe", query_response_object_ids=["d"]),
    query("q3", "bob", 10, ""),
    query("q4", "", 10, "nobody"),
    query(None, "bob", 11, "never joined"),
]
EVENTS = [
    event("click", "ann", 1, "z"),
    event("impression", "ann", 11, "b", "q1"),
    event("impression", "ann", 11, "a", "q1"),
    event("impression", "ann", 12, "b", "q1"),
    event("click", "ann", 9, "b", "q1"),  # the browser's clock is late
    event("purchase", "ann", 15, 3, "q1"),  # a hit whose impression was lost
    event("click", "ann", 21, "c", "q2"),
    event("add_to_cart", "ann", 25, "c", "q2"),
    event("click", "ann", 26, "y", "q2"),  # the query sticks to it
    event("click", "bob", 12, 7, "q3"),
    event("click", "bob", 13, "7"),
    event("login", "bob", 14),
    event("click", "bob", 15),
    event("click", None, 15, "7"),
]


def write_ubi(folder, queries=QUERIES, events=EVENTS):
    folder.mkdir(exist_ok=True)
    for name, documents in (("ubi_queries", queries), ("ubi_events", events)):
        text = "\n".join(json.dumps(document) for document in documents)
        (folder / f"{name}.ndjson").write_text(text + "\n", encoding="utf-8")
    return folder


def test_ubi(tmp_path):
    log = read("ubi", write_ubi(tmp_path / "logs"))

    def at(seconds):
        return JUNE + 1000 * seconds

    assert rows_of(log.events.sort("order"), "user", "item", "time", "target", "impressions") == [
        ("ann", "z", at(1), True, None),
        ("ann", "b", at(9), True, ["b", "a"]),
        ("ann", "3", at(15), False, None),
        ("ann", "c", at(21), True, ["c", "d"]),
        ("ann", "c", at(25), False, None),
        ("ann", "y", at(26), True, None),
        ("bob", "7", at(12), True, None),
        ("bob", "7", at(13), True, None),
    ]
    assert rows_of(log.searches.sort("time"), "user", "time", "terms") == [
        ("ann", at(10), ["red", "shoe", "42"]),
        ("ann", at(20), ["红", "色", "shoe"]),
    ]
    first, second = log.searches.sort("time")["search"]
    assert rows_of(log.clicks.sort("time", "item"), "search", "item", "time") == [
        (first, "b", at(10)),
        (first, "3", at(15)),
        (second, "c", at(21)),
        (second, "c", at(25)),
    ]
    notes = "\n".join(log.notes)
    assert "ubi_queries: dropped 1 documents without a client_id" in notes
    assert "kept 2 searches; dropped 1 without a word, 1 without a query_id and 1 whose" in notes
    assert "dropped 1 without an object_id and 4 of other actions" in notes
    assert "4 events under a query as clicks of its search, 1 of them dated before it" in notes
    assert "; 1 are none: their item is not among its results; 1 more have the query_id" in notes
    assert "aside" not in notes


def test_ubi_in_every_wrapping(tmp_path):
    plain = read("ubi", write_ubi(tmp_path / "plain"))
    both = {"ubi_queries": QUERIES, "ubi_events": EVENTS}
    wrapped, bulk = tmp_path / "wrapped", tmp_path / "bulk"
    for folder in (wrapped, bulk):
        folder.mkdir()
    for name, documents in both.items():
        lines = [
            json.dumps({"_index": f"{name}-0001", "_id": str(n), "_score": 1, "_source": document})
            for n, document in enumerate(documents)
        ]
        packed = gzip.compress("\n\n".join(lines).encode())
        (wrapped / f"{name}.jsonl.gz").write_bytes(packed)
    lines = [
        json.dumps(line)
        for name, documents in both.items()
        for document in documents
        for line in ({"index": {"_index": name, "_id": "x"}}, document)
    ]
    (bulk / "ubi_queries_events.ndjson").write_text("\n".join(lines))
    for folder in (wrapped, bulk):
        log = read("ubi", folder)
        for name in ("events", "searches", "clicks"):
            keys = ["order"] if name == "events" else ["search"]
            ours, theirs = (getattr(each, name).sort(keys).drop(keys) for each in (log, plain))
            assert ours.sort(ours.columns[:3]).equals(theirs.sort(ours.columns[:3])), folder


def test_ubi_leaves_internal_document_numbers_aside(tmp_path):
    """Where the hits are numbers of documents, what was done under a query is a click of it."""
    queries = [query("q", "ann", 10, "shoe", query_response_hit_ids=["3", "7"])]
    log = ubi.read(write_ubi(tmp_path, queries, [event("click", "ann", 12, "sku-9", "q")]))
    assert log.clicks["item"].to_list() == ["sku-9"]
    assert log.events["impressions"].to_list() == [None]


def test_ubi_tells_document_numbers_query_by_query(tmp_path):
    """One query whose hits are items says nothing of another."""
    queries = [
        query(f"q{n}", "ann", n, "shoe", query_response_hit_ids=hits)
        for n, hits in enumerate((["3", "7"], ["3"], ["sku-1", "sku-4"], ["sku-2"], ["5"]))
    ]
    events = [
        event("click", "ann", 10, "sku-1", "q0"),
        event("click", "ann", 11, "sku-2", "q1"),
        event("click", "ann", 12, "sku-3", "q2"),  # sku-1 is an item of the log, under q0
        event("click", "ann", 13, "sku-2", "q3"),
    ]
    log = ubi.read(write_ubi(tmp_path, queries, events))
    assert log.clicks["item"].to_list() == ["sku-1", "sku-2", "sku-2"]
    assert log.events["impressions"].to_list() == [None, None, None, ["sku-2"]]
    notes = "\n".join(log.notes)
    assert "left the hits of 2 queries aside, under which something was done" in notes
    assert (
        "kept 3 events under a query as clicks of its search, 0 of them dated before it; 1 are"
        in notes
    )


def test_ubi_clicks_on_hits_without_an_impression(tmp_path):
    """Impressions tell what scrolled into view; they may be lost, or come later than the click."""
    queries = [query("q", "ann", 10, "shoe", query_response_hit_ids=["a", "b", "c"])]
    events = [
        event("impression", "ann", 11, "b", "q"),
        event("impression", "ann", 11, "x", "q"),
        event("click", "ann", 12, "a", "q"),
        event("click", "ann", 13, "b", "q"),
        event("click", "ann", 14, "x", "q"),
        event("click", "ann", 15, "y", "q"),
    ]
    log = ubi.read(write_ubi(tmp_path, queries, events))
    assert log.clicks["item"].to_list() == ["a", "b", "x"]
    shown = [["a", "b", "c"], ["b", "x"], ["b", "x"], None]
    assert log.events["impressions"].to_list() == shown


def test_ubi_targets_of_any_name(tmp_path):
    folder = write_ubi(tmp_path, events=[event("order", "ann", 40, "c", "q2")])
    told = complaint(ubi, folder)
    assert told == (
        "ubi: no event on an item is a click or click_through (--targets); actions are order (1), "
        "and 1 of 1 events have an event_attributes.object.object_id"
    )
    assert ubi.read(folder, targets=["order"]).events["target"].to_list() == [True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object: Expecting"),
        ("[1]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "not a JSON object: a key is there twice"),
        ('{"a": NaN}', "not a JSON object: NaN is no number"),
        ('{"a": 1e400}', "not a JSON object: 1e400 is no number"),
        ("[" * 100_000, "not a JSON object"),
        ({"client_id": 1.5}, "field client_id: expected an id, got 1.5"),
        ({"client_id": " ann"}, "field client_id: expected an id, got ' ann'"),
        ({"client_id": "\ud800"}, "field client_id: expected an id"),
        ({"query_id": True}, "field query_id: expected an id, got True"),
        ({"action_name": None}, "field action_name: expected text, got nothing"),
        ({"event_attributes": "x"}, "field event_attributes.object.object_id: expected an object"),
        ({"timestamp": "2024-06-31T00:00:00Z"}, "field timestamp: expected an ISO 8601 time or"),
        ({"timestamp": "yesterday"}, "field timestamp: expected an ISO 8601 time or unix"),
        ({"timestamp": 1_717_200_000}, "field timestamp: expected an ISO 8601 time or unix"),
        ({"timestamp": JUNE * 1000}, "field timestamp: expected an ISO 8601 time or unix"),
        ({"timestamp": None}, "field timestamp: expected an ISO 8601 time or unix millisecon"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_ubi_malformed(tmp_path, line, message):
    folder = write_ubi(tmp_path)
    if isinstance(line, dict):
        line = json.dumps(event("click", "ann", 1, "z") | line)
    path = folder / "ubi_events.ndjson"
    path.write_text(json.dumps(EVENTS[0]) + "\n" + line + "\n")
    assert re.match(rf"ubi_events\.ndjson, row 2[:,] {re.escape(message)}", complaint(ubi, folder))


@pytest.mark.parametrize(
    "name", ["ubi_events_2.ndjson.zst", "ubi_events.json.1", "ubi_queries.json.part"]
)
def test_ubi_files_that_would_be_left_out(tmp_path, name):
    write_ubi(tmp_path)
    for other in ("ubi_settings.json", "ubi_events.md", ".ubi_events.ndjson.crc"):
        (tmp_path / other).touch()
    ubi.read(tmp_path)
    (tmp_path / name).touch()
    assert complaint(ubi, tmp_path).startswith(f"{tmp_path / name}: would be left out, expected a ")


def test_ubi_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ubi_queries\.ndjson: not found"):
        ubi.read(tmp_path)
    write_ubi(tmp_path)
    (tmp_path / "ubi_queries.ndjson").unlink()
    assert complaint(ubi, tmp_path).endswith("no document of ubi_queries")
    (tmp_path / "ubi_queries_events.ndjson").write_text('{"query_id": "q"}\n')
    assert "row 1: of neither ubi_queries nor ubi_events" in complaint(ubi, tmp_path)
    (tmp_path / "ubi_events.ndjson").write_bytes(b"\xff\n")
    assert complaint(ubi, tmp_path) == "ubi_events.ndjson, row 1: not UTF-8"


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2024-06-01T00:00:00", JUNE),
        ("2024-06-01 02:00:00.5+02:00", JUNE + 500),
        ("2024-05-31T21:30:00-0230", JUNE),
        ("2024-06-01T00:00:00.123456789Z", JUNE + 123),
        ("2024-06-01T00:00:00.9996Z", JUNE + 1000),
        (float(JUNE), JUNE),
    ],
)
def test_ubi_times(tmp_path, text, ms):
    click = event("click", "ann", 0, "z") | {"timestamp": text}
    assert ubi.read(write_ubi(tmp_path, events=[click])).events["time"].to_list() == [ms]


# Amazon

REVIEWS = [
    {"reviewerID": "A1", "asin": "B1", "reviewText": "nice\u2028one", "unixReviewTime": 3 * DAY},
    {"reviewerID": "A1", "asin": "B2", "unixReviewTime": 3 * DAY},
    {"reviewerID": "A2", "asin": "B1", "unixReviewTime": 1 * DAY},
    {"reviewerID": "A1", "asin": "B3", "unixReviewTime": 5 * DAY},
    {"reviewerID": "A1", "asin": "B2", "unixReviewTime": 3 * DAY},
]
QRELS = {
    "train": "A1_0 0 B1 1 \nA1_1 0 B1 1 \nA2_1 0 B1 0 \nA9_0 0 B1 1 \n",
    "test": "A1_1 0 B3 1 \n",
}


@pytest.fixture
def kindle(tmp_path):
    folder = tmp_path / "reviews_Kindle_Store_5.json.gz"  # as the repository of the qrels names it
    folder.mkdir()
    reviews = "\n".join(map(json.dumps, REVIEWS)).encode()
    (folder / "reviews_Kindle_Store_5.json.gz").write_bytes(gzip.compress(reviews))
    (folder / "query_text.txt").write_text("book kindle\nmystery\t book \n")
    for name, text in QRELS.items():
        (folder / f"{name}.qrels").write_text(text)
    return folder


def test_amazon(kindle):
    log = amazon.read(kindle)
    day = DAY * 1000
    assert rows_of(log.events, "user", "item", "time", "order", "target") == [
        ("A1", "B1", 3 * day, 1, True),
        ("A1", "B2", 3 * day, 2, True),
        ("A2", "B1", 1 * day, 3, True),
        ("A1", "B3", 5 * day, 4, True),
    ]
    searches = rows_of(log.searches, "user", "time", "terms")
    assert searches[1] == ("A1", 5 * day, ["mystery", "book"])
    assert searches[0][:2] == ("A1", 3 * day)
    assert searches[0][2] in (["book", "kindle"], ["mystery", "book"])
    assert rows_of(log.clicks, "item", "time") == [("B1", 3 * day), ("B3", 5 * day)]
    notes = "\n".join(log.notes)
    assert "dropped 1 rows that repeat another" in notes
    assert "train.qrels: 4 rows; dropped 1: label 0" in notes
    assert "kept 2 searches" in notes
    assert "dropped 1 pairs of user and item without a review" in notes


def test_amazon_searches_do_not_betray_their_own_targets(kindle, tmp_path):
    data = prepare(amazon.read(kindle), tmp_path / "out", n_negatives=0)
    for split in ("train", "valid", "test"):
        samples = data.split(split)
        for user, item, end in zip(samples.users, samples.items, samples.search_end, strict=True):
            for search in range(data.search_offsets[user], end):
                clicks = slice(*data.click_offsets[search : search + 2])
                assert item not in data.click_items[clicks]


def test_amazon_draws_queries_whatever_their_order(kindle):
    drawn = amazon.read(kindle).searches
    (kindle / "train.qrels").write_text("\n".join(QRELS["train"].splitlines()[::-1]))
    (kindle / "test.qrels").rename(kindle / "aside")
    again = amazon.read(kindle)
    assert again.searches["terms"][0].to_list() == drawn["terms"][0].to_list()
    assert "no test.qrels: there is no such file" in again.notes


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train.qrels", "A1_0 0", "A1 0", "row 1, field qrel: expected USER_QUERY 0 ITEM 0|1, got"),
        ("train.qrels", "B1 1", "B1 2", "row 1, field qrel: expected USER_QUERY 0 ITEM 0|1, got"),
        ("train.qrels", "A1_1 0", "A1_2 0", "row 2, field query: expected one of 0..1, got '2'"),
        ("reviews", '"A2"', "null", "row 3, field reviewerID: expected an id, got nothing"),
        ("reviews", str(5 * DAY), '"x"', "row 4, field unixReviewTime: expected a time in seco"),
        ("reviews", str(5 * DAY), str(5 * 10**12), "row 4, field unixReviewTime: expected a time"),
        ("reviews", '{"reviewerID": "A2"', "{'reviewerID': 'A2'", "row 3: not a JSON object"),
    ],
)
def test_amazon_malformed(kindle, file, old, new, message):
    if file == "reviews":
        path = kindle / "reviews_Kindle_Store_5.json.gz"
        text = gzip.decompress(path.read_bytes()).decode()
        path.write_bytes(gzip.compress(text.replace(old, new, 1).encode()))
    else:
        path = kindle / file
        path.write_text(path.read_text().replace(old, new, 1))
    told = complaint(amazon, kindle)
    assert re.match(rf"{re.escape(path.name)}[:,] {re.escape(message)}", told)


def test_amazon_missing_or_damaged(kindle):
    path = kindle / "reviews_Kindle_Store_5.json.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert complaint(amazon, kindle).startswith(f"{path.name}: cannot be read: ")
    (kindle / "reviews_Books_5.json").write_text("")
    assert "holds reviews_Books_5.json and reviews_Kindle_Store_5.json.gz: keep" in complaint(
        amazon, kindle
    )
    path.unlink()
    (kindle / "query_text.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"query_text\.txt: not found"):
        amazon.read(kindle)
    (kindle / "reviews_Books_5.json").rename(kindle / "Books.jsonl")
    with pytest.raises(FileNotFoundError, match=r"of 2023 \(\.jsonl\), write frames$"):
        amazon.read(kindle)
