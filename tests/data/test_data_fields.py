"""The rules of fields, and that every reader keeps them."""

import datetime
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from lcr_fast.data import frames, read, reader_options, rules
from lcr_fast.data.build import prepare
from raw_folders import MS, write_tables

NAN = float("nan")


def typed(rule, values):
    column = values if isinstance(values, pl.Series) else pl.Series("x", values, strict=False)
    expression = rule.typed(pl.col("x"), column.dtype)
    return None if expression is None else column.to_frame().select(expression)["x"].to_list()


def single(values):
    return pl.Series("x", values, dtype=pl.Float32)


def decimals(scale, values):
    texts = [None if value is None else str(value) for value in values]
    return pl.Series("x", texts).cast(pl.Decimal(38, scale))


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        (rules.INTEGER, [3, -1], [3, -1]),
        (rules.INTEGER, [3.0, 3.7, NAN, float("inf"), 2.0**60], [3, None, None, None, None]),
        (rules.INTEGER, ["7", "007", "+7", " 7", "7.0", "1e3", ""], [7] + [None] * 6),
        (rules.INTEGER, ["9223372036854775807", "9223372036854775808"], [2**63 - 1, None]),
        (rules.INTEGER, ["٣", "-0", "nan"], [None] * 3),
        (rules.INTEGER, [True], None),
        (rules.INTEGER, [datetime.date(2020, 1, 1)], None),
        (rules.NUMBER, ["1.5", "1e400", "inf", "nan", "-2"], [1.5, None, None, None, -2.0]),
        (rules.NUMBER, [1.5, NAN, float("-inf")], [1.5, None, None]),
        (rules.NUMBER, [[1]], None),
        (rules.ID, ["a b", "", "nan", "None", " a", "7.0"], ["a b"] + [None] * 5),
        (rules.ID, ["3.14", "007", "1e5"], ["3.14", "007", "1e5"]),
        (rules.ID, ["1e+05", "-1.5E+10", "a\0"], [None] * 3),  # as R writes 100000
        (rules.ID, [5.0, 3.7, NAN], [5, None, None]),
        (rules.ID, [False], None),
        (rules.ID, ["NA", r"\N", "NAN"], [None, None, "NAN"]),
        (rules.ID, single([2**24, 2**24 + 2]), [2**24, None]),
        (rules.FLAG, ["True", "0", "1.0", "yes", ""], [True, False, True, None, None]),
        (rules.FLAG, [1.0, 0.0, 2.0, NAN], [True, False, None, None]),
        (rules.FLAG, [True, None], [True, None]),
        (rules.WORDS, ["a  b", "", "[1, 2]"], [["a", "b"], [], None]),
        (rules.WORDS, ["[sale] shoes", "[1]"], [["[sale]", "shoes"], None]),
        (rules.WORDS, ["a\nb"], [None]),
        (rules.WORDS, [["c", "a\tb"], ["c"]], [None, ["c"]]),
        (rules.ID, ["a\tb", "a\nb", "a\rb"], [None] * 3),
        (rules.IDS, [["a\tb"], ["a"]], [None, ["a"]]),
        (rules.LINE, ["a b", "a\nb"], ["a b", None]),
        (rules.WORDS, [["a", None, ""], None], [["a"], None]),
        (rules.WORDS, [[1, 2]], [["1", "2"]]),
        (rules.WORDS, [[1.5]], None),
        (rules.IDS, [[1, 2], [None], None], [[1, 2], None, None]),
        (rules.IDS, [[1.0], [1.5]], [[1], None]),
        (rules.IDS, ["7 8", "7 nan", "[7]"], [["7", "8"], None, None]),
        (rules.IDS, [3], None),
        (rules.UNIX_MS, ["1700000000000.6", "1700000000", "1e400", "nan"], [MS + 1] + [None] * 3),
        (rules.SECONDS, ["0", "-1", "1700000000000", "9223372036854775807"], [0] + [None] * 3),
        (rules.time("us"), [MS * 1000 + 500, 10**17 + 1], [MS + 1, None]),
        (rules.time("us"), [MS * 1000.0 + 500, 10.0**17 + 100], [MS + 1, None]),
        (rules.time("s"), ["1700000000.0005", "-0.0005"], [MS + 1, 0]),
        (rules.time("ns"), [MS * 10**6, 2**63 - 1], [MS, None]),
        (rules.time("s"), [1.5, 2.0**63, NAN], [1500, None, None]),
        (rules.time("s"), [datetime.datetime(1970, 1, 2)], [86_400_000]),
        (rules.time("ms"), [True], None),
        (rules.INTEGER, decimals(0, [7, -3, 2**63, None]), [7, -3, None, None]),
        (rules.INTEGER, decimals(2, ["7.00", "7.50"]), [7, None]),
        (rules.ID, decimals(0, [2**62 + 1]), [2**62 + 1]),
        (rules.NUMBER, decimals(1, ["2.5", None]), [2.5, None]),
        (rules.FLAG, decimals(0, [1, 0, 2]), [True, False, None]),
        (rules.LINE, decimals(0, [7]), ["7"]),
        (rules.IDS, decimals(0, [7]).implode(), [[7]]),
        (rules.WORDS, decimals(0, [7]).implode(), [["7"]]),
        (rules.time("ns"), decimals(0, [MS * 10**6 + 1, 10**20 + 1]), [MS, None]),
        (rules.time("s"), decimals(3, ["1700000000.001"]), [MS + 1]),
        (rules.time("ms", days=True), [datetime.date(1970, 1, 2)], [86_400_000]),
        (rules.SECONDS, [datetime.date(1970, 1, 2)], None),
        (rules.DATE_TIME, [datetime.date(1970, 1, 2)], None),
        (rules.CODES, pl.Series("x", [[1, 255]], dtype=pl.Array(pl.UInt8, 2)), [[1, 255]]),
        (rules.time("s"), single([1_700_000_000, 7]), None),
    ],
)
def test_a_rule_keeps_values_and_drops_what_would_change(rule, values, expected):
    assert typed(rule, values) == expected


def test_a_missing_click_is_none():
    clicks = pl.Series("x", [1.0, 0.0, NAN, None, -1.0]).to_frame()
    assert clicks.select(rules.is_positive(pl.col("x")))["x"].to_list() == [
        True,
        False,
        False,
        False,
        False,
    ]


TYPED = {
    "किताब घर": ["किताब", "घर"],
    "ภาษาไทย ดีมาก": ["ภาษาไทย", "ดีมาก"],
    "Cafe\u0301 CAF\u00c9": ["caf\u00e9", "caf\u00e9"],
    "J\u030c": ["\u01f0"],  # the small one alone has a code of its own
    "1. a-b \u0301": ["1", "a", "b"],
    # Persian "I write", and a joiner left behind; Marathi "of the valley", Hindi in half forms.
    "می\u200cنویسم کتب\u200c \u200cدل": ["می\u200cنویسم", "کتب", "دل"],
    "दर्\u200dयाचे क्\u200cष": ["दर्\u200dयाचे", "क्\u200cष"],
    "അവന്\u200d വാക്ക്\u200c": ["അവന്\u200d", "വാക്ക്"],  # Malayalam: ZWJ makes the last letter
    "a\u200d \u200d": ["a"],
    "Groß\u00adhandel wo\u2060rd": ["großhandel", "word"],
}
WRITTEN = {
    "红色shoe": ["红", "色", "shoe"],
    "红\u200c色a\u200c红": ["红", "色", "a", "红"],
    "か\u3099红\U000e0100x": ["が", "红\U000e0100", "x"],
}


@pytest.mark.parametrize("source", ["trivago", "qilin", "ubi"])
def test_letters_keep_their_marks_in_terms(tmp_path, source):
    queries = list(TYPED if source == "trivago" else TYPED | WRITTEN)
    if source == "trivago":
        rows = [f"a,s,{n},{n},search for poi,{text}," for n, text in enumerate(queries)]
        header = "user_id,session_id,timestamp,step,action_type,reference,impressions"
        (tmp_path / "t.csv").write_text("\n".join([header, *rows, "a,s,99,9,clickout item,7,"]))
    elif source == "qilin":
        for name, prefix, time in (("recommendation", "rec", "request"), ("search",) * 3):
            details = [f"[{{'note_idx': 7, 'click': 1, '{time}_timestamp': {MS // 1000}}}]"]
            columns = {f"{prefix}_result_details_with_idx": details * len(queries)}
            frame = pl.DataFrame({"user_idx": [1] * len(queries), "query": queries} | columns)
            frame.write_csv(tmp_path / f"{name}_train.csv")
    else:
        about = {"client_id": "a", "timestamp": MS}
        asked = [{"query_id": n, "user_query": text} | about for n, text in enumerate(queries)]
        click = {"action_name": "click", "event_attributes": {"object": {"object_id": 7}}}
        for name, documents in (("ubi_queries", asked), ("ubi_events", [click])):
            lines = [json.dumps(document | about) for document in documents]
            (tmp_path / f"{name}.ndjson").write_text("\n".join(lines))
    found = read(source, tmp_path).searches.sort("search")["terms"].to_list()
    assert found == [(TYPED | WRITTEN)[text] for text in queries]


def test_unknown_units_are_refused():
    with pytest.raises(ValueError, match="one of s, ms, us, ns, got 'min'"):
        rules.time("min")


# NaN, infinity and odd ids, in every reader

NUMBERS = {"note_idx": pl.Float64, "click": pl.Float64, "stamp": pl.Float64}


@pytest.fixture
def qilin_folder(tmp_path):
    """Write two requests and a search as Parquet, with one value changed."""

    def write(note=5.0, click=0.0, stamp=MS + 2.0):
        for name, prefix, stamp_name in (
            ("recommendation", "rec", "request_timestamp"),
            ("search", "search", "search_timestamp"),
        ):
            cells = [[(4.0, 1.0, MS + 0.0), (note, click, stamp)], [(6.0, 1.0, MS + 9e6)]]
            keys = ("note_idx", "click", stamp_name)
            structs = [[dict(zip(keys, row, strict=True)) for row in cell] for cell in cells]
            pl.DataFrame(
                {
                    "user_idx": [1, 1],
                    "query": ["q", "q"],
                    f"{prefix}_result_details_with_idx": pl.Series(
                        structs, dtype=pl.List(pl.Struct(dict.fromkeys(keys, pl.Float64)))
                    ),
                }
            ).write_parquet(tmp_path / f"{name}_train.parquet")
        return tmp_path

    return write


@pytest.mark.parametrize("nothing", [0.0, NAN, None])
def test_a_qilin_click_that_is_nan_or_null_is_none(qilin_folder, nothing):
    log = read("qilin", qilin_folder(click=nothing))
    assert log.events.select("item", "impressions").rows() == [(4, [5, 4]), (6, None)]
    assert log.clicks["item"].to_list() == [4, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"click": float("inf")}, "row 1, field click: expected a number, got inf"),
        ({"note": 3.7}, r"row 1, field note_idx: expected an integer, got 3\.7"),
        ({"note": NAN}, "row 1, field note_idx: expected an integer, got nan"),
        ({"stamp": float("inf")}, "row 1, field request_timestamp: expected a number, got inf"),
        ({"stamp": 1.7e15}, "field request_timestamp: expected a unix time in s or ms, got 17000"),
        ({"stamp": -1.0}, r"field request_timestamp: expected a unix time in s or ms, got -1\.0"),
    ],
)
def test_qilin_values_that_are_none(qilin_folder, changes, message):
    with pytest.raises(ValueError, match=rf"^recommendation_train\.parquet, .*{message}"):
        read("qilin", qilin_folder(**changes))


def test_a_qilin_vector_that_is_not_finite_is_found_when_prepared(qilin_folder, tmp_path):
    folder = qilin_folder()
    notes = pl.DataFrame({"note_idx": [4, 6], "note_embedding": [[1.0, 2.0], [NAN, 2.0]]})
    notes.write_parquet(folder / "notes.parquet")
    log = read("qilin", folder)
    with pytest.raises(ValueError, match=r"notes\.parquet, row 2, field note_embedding: expected"):
        prepare(log, tmp_path / "out", n_negatives=0)


@pytest.mark.parametrize(
    ("shown", "kept"),
    [("7|8", ["7", "8"]), ("", None), ("7||9|", None), ("[7, 8, 9]", None), ("7.0|8.0", None)],
)
def test_trivago_impressions(tmp_path, shown, kept):
    (tmp_path / "t.csv").write_text(
        "user_id,session_id,timestamp,step,action_type,reference,impressions\n"
        f'a,s,1,1,clickout item,7,"{shown}"\n'
    )
    if kept or not shown:
        assert read("trivago", tmp_path).events["impressions"].to_list() == [kept or []]
    else:
        with pytest.raises(ValueError, match=r"row 1, field impressions: expected item ids"):
            read("trivago", tmp_path)


def test_trivago_times_do_not_wrap(tmp_path):
    (tmp_path / "t.csv").write_text(
        "user_id,session_id,timestamp,step,action_type,reference,impressions\n"
        "a,s,9223372036854775807,1,clickout item,7,\n"
    )
    with pytest.raises(ValueError, match="row 1, field timestamp: expected a time in seconds"):
        read("trivago", tmp_path)


def jdsearch_line(products="10_11", times="0_5_1", queries="-1_-1", labels="0.0_1.0"):
    fields = ("q", "70_71", labels, queries, products, "CLICK_CLICK", times)
    return "\t".join(fields) + "\n"


JDSEARCH_HEADER = (
    "query\tcandidate_wid_list\tcandidate_label_list\thistory_qry_list\thistory_wid_list\t"
    "history_type_list\thistory_time_list\n"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": f"0_{2**62}_{2**62}"}, "history_time_list: expected intervals in seconds"),
        ({"products": "10_"}, "history_wid_list: expected product ids"),
        ({"products": "10_٣"}, "history_wid_list: expected product ids"),
        ({"queries": "_-1"}, "history_qry_list: expected queries"),
        ({"queries": "5\x18_-1"}, "history_qry_list: expected queries"),
        ({"queries": "5_-1.0"}, "history_qry_list: expected queries, or -1 for none"),
        ({"queries": "5_ -1"}, "history_qry_list: expected queries, or -1 for none"),
        ({"labels": "nan_1.0"}, "candidate_label_list: expected numbers"),
        ({"labels": "1e400_1.0"}, "candidate_label_list: expected numbers"),
    ],
)
def test_jdsearch_values_that_are_none(tmp_path, changes, message):
    path = tmp_path / "user_behavior_data.txt"
    path.write_text(JDSEARCH_HEADER + jdsearch_line(**changes))
    with pytest.raises(ValueError, match=f"row 1, field {message}"):
        read("jdsearch", path, test_query=True)


# duplicates and ties


def test_rows_that_repeat_another_are_dropped_and_counted(tmp_path):
    path = tmp_path / "user_behavior_data.txt"
    path.write_text(JDSEARCH_HEADER + jdsearch_line() * 3 + jdsearch_line("12_13"))
    log = read("jdsearch", path)
    assert log.events["user"].unique().sort().to_list() == [1, 4]
    assert f"{path.name}: dropped 2 rows that repeat another exactly" in log.notes
    kept = read("jdsearch", path, keep_duplicates=True)
    assert kept.events["user"].n_unique() == 4
    assert f"{path.name}: kept 2 rows that repeat another exactly" in kept.notes


def test_qilin_rows_that_are_in_train_and_in_test_are_one(qilin_folder):
    folder = qilin_folder()
    plain = read("qilin", folder)
    for stream in ("recommendation", "search"):
        shutil.copy(folder / f"{stream}_train.parquet", folder / f"{stream}_test.parquet")
    log = read("qilin", folder)
    assert log.events.equals(plain.events)
    assert log.searches.equals(plain.searches)
    assert log.clicks.equals(plain.clicks)
    assert "search: dropped 2 rows that repeat another exactly" in log.notes
    assert read("qilin", folder, keep_duplicates=True).events.height == 2 * log.events.height


def test_every_reader_of_files_can_keep_duplicates():
    for source in ("trivago", "kuaisar", "qilin", "jdsearch", "frames"):
        assert "keep_duplicates" in reader_options(source)
    with pytest.raises(ValueError, match="the reader of synthetic has no option keep_duplicates"):
        read("synthetic", "-", keep_duplicates=True)


def test_kuaisar_clicks_stand_in_the_order_of_the_file(tmp_path):
    (tmp_path / "rec_inter.csv").write_text(
        f"user_id,item_id,timestamp,click\n1,1,{MS},1\n1,2,{MS + 9},1\n1,1,{MS},1\n1,3,{MS + 9},nan"
    )
    rows = [
        f'1,7,{MS + 1},"[4]",{item},{clicks}' for item, clicks in ((9, 1), (3, 0), (5, 2), (3, 1))
    ]
    header = "user_id,search_session_id,search_session_timestamp,keyword,item_id,click_cnt"
    (tmp_path / "src_inter.csv").write_text("\n".join([header, *rows]))
    with pytest.raises(ValueError, match=r"rec_inter\.csv, row 4, field click: expected a number"):
        read("kuaisar", tmp_path)
    text = (tmp_path / "rec_inter.csv").read_text()
    (tmp_path / "rec_inter.csv").write_text(text.replace("nan", "0"))
    log = read("kuaisar", tmp_path)
    data = prepare(log, tmp_path / "out", n_negatives=0)
    assert [data.items[int(item)] for item in data.click_items] == ["9", "5", "3"]
    assert data.rec_items.tolist() == [data.items.find("1"), data.items.find("2")]
    assert "rec_inter.csv: dropped 1 rows that repeat another exactly" in log.notes


# frames


def with_text_items(folder, items, impressions=None):
    columns = {"user": 1, "item": items, "time": [MS, MS + 1]}
    folder.mkdir(exist_ok=True)
    events = pl.DataFrame(columns | ({"impressions": impressions} if impressions else {}))
    events.write_csv(folder / "events.csv")
    (folder / "searches.csv").write_text(f"search,user,time,terms\n1,1,{MS},a\n")
    (folder / "clicks.csv").write_text(f"search,item,time\n1,7,{MS}\n")
    return folder


@pytest.mark.parametrize(
    ("items", "impressions", "message"),
    [
        (
            ["a", "b"],
            ["a c", "c|b|d"],
            "row 2, field impressions: expected ids between spaces, ",
        ),
        (["a", "b"], ["a, c", None], "row 1, field impressions: expected ids between spaces, "),
        (["a", "b"], ["c", "c;b"], "row 2, field impressions: expected ids between spaces, "),
        (["a b", "c"], [None, "c d"], "row 1, field item: expected an id without a space, as impr"),
        (["a|b", "c"], ["a|b d", "d,e"], None),
        (["a b", "c"], None, None),
    ],
)
def test_lists_of_text_ids_stand_between_spaces(tmp_path, items, impressions, message):
    folder = with_text_items(tmp_path, items, impressions)
    if message is None:
        assert frames.read(folder).events["item"].to_list() == items
        return
    with pytest.raises(ValueError, match=rf"\Aevents\.csv, {message}[^\n]*\Z"):
        frames.read(folder)


def test_ids_that_are_numbers_in_one_file_alone_are_told(tmp_path):
    log = frames.read(with_text_items(tmp_path, ["a", "b"]))
    told = "item: all ids are numbers in clicks.csv, but not in events.csv: read as text"
    assert told in log.notes
    log = frames.read(with_text_items(tmp_path, [1, 2]))
    assert not any("read as text" in note for note in log.notes)


@pytest.mark.parametrize("dtype", [pl.Null, pl.String, pl.Float64])
def test_a_table_without_a_row_has_the_ids_of_the_other(tables, tmp_path, dtype):
    tables["clicks"] = tables["clicks"].clear().cast({"item": dtype, "search": dtype})
    tables["searches"] = tables["searches"].clear().cast({"user": dtype})
    log = frames.read(write_tables(tmp_path / "parquet", tables))
    assert log.events.equals(tables["events"])
    assert log.clicks.schema["item"] == log.searches.schema["user"] == pl.Int64
    tables["events"].drop("impressions").write_csv(tmp_path / "parquet" / "events.csv")
    (tmp_path / "parquet" / "events.parquet").unlink()
    assert frames.read(tmp_path / "parquet").events["item"].equals(tables["events"]["item"])


@pytest.mark.parametrize("shown", [None, [], pl.Series([[]] * 14, dtype=pl.List(pl.String))])
def test_impressions_without_an_entry_are_of_any_type(tables, tmp_path, shown):
    tables["events"] = tables["events"].with_columns(impressions=pl.lit(shown))
    log = frames.read(write_tables(tmp_path / "f", tables))
    assert log.events.schema["impressions"] == pl.List(pl.Int64)


def test_text_that_repeats_is_text(tables, tmp_path):
    plain = tables["searches"].with_columns(pl.col("terms").list.join(" "))
    flags = tables["events"].with_columns(pl.col("target").cast(pl.String))
    read_back = []
    for dtype in (pl.String, pl.Categorical):
        tables["searches"] = plain.with_columns(pl.col("terms").cast(dtype))
        tables["events"] = flags.with_columns(pl.col("target").cast(dtype))
        read_back.append(frames.read(write_tables(tmp_path / str(dtype), tables)))
    assert read_back[0].searches.equals(read_back[1].searches)
    assert read_back[0].events.equals(read_back[1].events)


def test_times_in_another_unit(tables, tmp_path):
    micro = {name: table.with_columns(pl.col("time") * 1000) for name, table in tables.items()}
    log = frames.read(write_tables(tmp_path / "us", micro), time_unit="us")
    assert log.events["time"].equals(tables["events"]["time"])
    dated = {
        name: table.with_columns(pl.col("time").cast(pl.Datetime("ms")))
        for name, table in tables.items()
    }
    assert (
        frames.read(write_tables(tmp_path / "d", dated)).events["time"].equals(log.events["time"])
    )


def test_ids_that_are_decimals_and_times_that_are_days(tables, tmp_path):
    """As Spark writes Oracle's NUMBER, and a date without a clock."""
    plain = frames.read(write_tables(tmp_path / "plain", tables))
    decimal = {
        name: table.cast({pl.selectors.integer(): pl.Decimal(20, 0)})
        for name, table in tables.items()
    }
    log = frames.read(write_tables(tmp_path / "decimal", decimal))
    for name in tables:
        assert getattr(log, name).equals(getattr(plain, name))
    day = pl.lit(datetime.date(2024, 6, 1))
    dated = {name: table.with_columns(time=day) for name, table in tables.items()}
    log = frames.read(write_tables(tmp_path / "dated", dated))
    assert log.clicks["time"].unique().to_list() == [1_717_200_000_000]
    assert "events.parquet: time is a day: what a user does on it ties, and is not" in "".join(
        log.notes
    )
    hour = pl.lit(datetime.datetime(2024, 6, 1, 1))
    dated["searches"] = dated["searches"].with_columns(time=hour)
    with pytest.raises(ValueError, match=r"clicks\.parquet, row 1, field time: .* not before its"):
        frames.read(write_tables(tmp_path / "mixed", dated))
    at = {name: table.with_columns(time=hour) for name, table in tables.items()}
    at["clicks"] = at["clicks"].cast({"time": pl.Datetime("us", "Europe/Paris")})
    notes = frames.read(write_tables(tmp_path / "zones", at)).notes
    assert [note for note in notes if "zone" in note] == [
        f"{name}.parquet: time names no time zone: read as UTC" for name in ("events", "searches")
    ]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "events",
            {"target": pl.lit("maybe")},
            "events.parquet, row 1, field target: expected true",
        ),
        ("events", {"item": pl.lit(True)}, "column item is Boolean, expected an id"),
        ("events", {"item": pl.lit(NAN)}, "row 1, field item: expected an id, got nan"),
        ("events", {"item": pl.lit(3.7)}, r"row 1, field item: expected an id, got 3\.7"),
        ("events", {"item": pl.lit("")}, "row 1, field item: expected an id, got ''"),
        ("events", {"user": pl.lit("a")}, "user is String in events, but Int64 in searches"),
        ("events", {"time": pl.lit(2**63, pl.UInt64)}, "row 1, field time: expected a time in ms"),
        (
            "events",
            {"impressions": pl.lit(3)},
            "column impressions is Int32, expected a list of ids",
        ),
        (
            "events",
            {"impressions": pl.lit(["x"])},
            "impressions must be a column of lists of Int64",
        ),
        ("searches", {"terms": pl.lit([1.5])}, r"column terms is List\(Float64\), expected a list"),
        ("searches", {"relevant": pl.lit("yes")}, "row 1, field relevant: expected an integer"),
        ("searches", {"relevant": pl.lit(300)}, r"relevant must be integers in -1\.\.1"),
        (
            "searches",
            {"search": pl.lit(1)},
            "row 2, field search: expected a key of its own, got '1'",
        ),
        ("clicks", {"search": pl.lit("x")}, "row 1, field search: expected the key of a search"),
        (
            "clicks",
            {"time": pl.col("time") // 1000},
            "clicks.parquet, row 1, field time: expected a time in ms, not before its search's",
        ),
        ("clicks", {"time": pl.lit(None)}, "row 1, field time: expected a time in ms, got nothing"),
        (
            "events",
            {"time": pl.lit("2023-11-16 22:39:43")},
            "got '2023-11-16 22:39:43'; times with a date are read from Parquet, as a column of",
        ),
    ],
)
def test_frames_of_wrong_types_are_one_sentence(tables, tmp_path, name, change, message):
    tables[name] = tables[name].with_columns(**change)
    with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        frames.read(write_tables(tmp_path / "f", tables))


@pytest.mark.parametrize(
    ("events", "searches", "message"),
    [
        (1_700_000_000, MS, "the streams do not overlap in time: .* of two magnitudes, so one"),
        (MS, 1_700_000_000, "the streams do not overlap in time: .* of two magnitudes, so one"),
        (MS, MS, None),
        (100, 5_000, None),
    ],
)
def test_streams_in_two_units_are_refused(make_log, tmp_path, events, searches, message):
    def log():
        seen = [(1, item, events + item, True) for item in range(5)]
        return make_log(seen, [(1, searches + 9, ["a"], [])])

    if message:
        with pytest.raises(ValueError, match=message):
            log()
        return
    data = prepare(log(), tmp_path / "out", n_negatives=0)
    assert "prepare: the streams do not overlap in time: events from" in data.summary()
    assert "0.0% with searches before them (0.0 each)" in data.summary()


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([MS // 1000, MS, MS + 5], f"events.time holds {MS // 1000} as well as {MS}, and nothing"),
        ([0, MS, MS + 5], f"made up: events.time holds 0 as well as {MS}, and nothing between"),
        ([-1, MS, MS + 5], f"events.time holds -1 as well as {MS}"),
        ([0, 1, 5, MS], f"events.time holds 5 as well as {MS}"),
        ([0, MS // 1000, MS], f"events.time holds {MS // 1000} as well as {MS}"),
        ([-5, 0, 5, 10**6], None),
        ([day * 86_400_000 for day in range(2000)], None),  # a clock of its own, for years
    ],
)
def test_times_of_two_magnitudes_in_one_stream_are_refused(make_log, times, message):
    events = [(1, item + 1, time, True) for item, time in enumerate(times)]
    searches = [(1, time, ["a"], []) for time in times]
    if message is None:
        make_log(events, searches)
        return
    with pytest.raises(ValueError, match=message):
        make_log(events, [])
    with pytest.raises(ValueError, match=message.replace("events", "searches")):
        make_log([(1, 1, MS, True)], searches)
    log = make_log([(1, 1, MS, True)], [])
    frame = pl.DataFrame(events, schema=["user", "item", "time", "target"], orient="row")
    # Where each user has a clock of his own, 0 is where it starts.
    replace(log, events=frame.with_columns(order=1), common_clock=False)


def test_seconds_are_not_taken_for_ms(tables, tmp_path):
    seconds = {
        name: table.with_columns(time=pl.col("time") + MS // 1000) for name, table in tables.items()
    }
    folder = write_tables(tmp_path / "s", seconds)
    told = f"{folder}: all times are like 1700000100, as unix seconds are: pass --time-unit s, or"
    with pytest.raises(ValueError, match=rf"\A{re.escape(told)} ms if they are meant\Z"):
        frames.read(folder)
    assert frames.read(folder, time_unit="ms").events["time"][0] == MS // 1000 + 100
    assert frames.read(folder, time_unit="s").events["time"][0] == MS + 100_000
    seconds["clicks"] = seconds["clicks"].with_columns(time=pl.lit(2_500_000_001))
    frames.read(write_tables(tmp_path / "later", seconds))
    (tmp_path / "shop.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\n7\ta\t1700000000\n"
    )
    assert frames.read(tmp_path / "shop.inter").events["time"].to_list() == [MS]


@pytest.mark.parametrize(
    ("unit", "given", "message"),
    [
        (
            "s",
            {},
            "like 1700000100, as unix seconds are: pass --time-unit s, or ms if they are meant",
        ),
        (
            "ms",
            {"time_unit": "us"},
            "like 1700000100000, as unix milliseconds are: pass --time-unit ms",
        ),
        ("us", {"time_unit": "ns"}, "like 1700000100000000, as unix microseconds .*--time-unit us"),
    ],
)
def test_times_in_a_unit_too_coarse(tables, tmp_path, unit, given, message):
    """Also where one of them is 0, for unknown."""
    times = {"s": 1, "ms": 1000, "us": 10**6}[unit]
    at = {name: table.with_columns(time=(pl.col("time") + MS // 1000) * times)
          for name, table in tables.items()}  # fmt: skip
    unknown = pl.int_range(pl.len()) == 2
    at["events"] = at["events"].with_columns(time=pl.when(unknown).then(0).otherwise("time"))
    with pytest.raises(ValueError, match=rf"all times are {message}\Z"):
        frames.read(write_tables(tmp_path / "f", at), **given)


def test_searches_for_what_stands_for_nothing_are_told(tables, tmp_path):
    words = [["nan"], ["nan"], ["NULL", "pointer"], [r"\N"]]
    tables["searches"] = tables["searches"].with_columns(terms=pl.Series(words))
    notes = frames.read(write_tables(tmp_path / "f", tables, ".csv")).notes
    told = [
        note.partition(" alone, read as a word: if it says that none was typed") for note in notes
    ]
    assert [begin for begin, middle, _ in told if middle] == [
        r"searches: 1 are for '\\N'",
        "searches: 2 are for 'nan'",
    ]


@pytest.mark.parametrize("end", [".parquet", ".csv"])
def test_rows_repeat_another_as_the_file_has_them(tables, tmp_path, end):
    """What rounding to ms makes equal was not."""
    times = [MS * 1000 + us for us in (0, 100, 200, 200)]
    events = pl.DataFrame({"user": 1, "item": 1, "time": times})
    micro = {name: table.with_columns(pl.col("time") * 1000) for name, table in tables.items()}
    folder = write_tables(tmp_path / "us", micro | {"events": events}, end)
    log = frames.read(folder, time_unit="us")
    assert log.events["time"].to_list() == [MS] * 3
    assert f"events{end}: dropped 1 rows that repeat another exactly" in log.notes


def test_vectors_that_are_not_finite_or_of_two_widths(shop, tmp_path):
    for block, message in (
        (np.array([[1, NAN]], np.float32), "item_text: the vector of 12 is not finite"),
        (np.ones((1, 3), np.float32), "item_text: vectors of 2 and 3 numbers"),
    ):
        shop.item_text = lambda block=block: iter(
            [(pl.Series([11]), np.ones((1, 2), np.float32)), (pl.Series([12]), block)]
        )
        try:
            with pytest.raises(ValueError, match=message):
                prepare(shop, tmp_path / "out", n_negatives=2)
        finally:
            shop.item_text = None
    assert not list(tmp_path.iterdir())
