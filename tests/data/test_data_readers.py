"""Readers on made-up files in each format, on malformed ones, and on real ones where present."""

import re

import numpy as np
import polars as pl
import pytest

from lcr_fast.data import SOURCES, jdsearch, kuaisar, qilin, read, trivago
from lcr_fast.data import frames as frames_reader
from lcr_fast.data.build import prepare

MS = 1_700_000_000_000  # the first millisecond of the made-up logs


def rows_of(frame, *columns):
    return frame.select(columns).rows()


def complaint(reader, path, **options) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        reader.read(path, **options)
    return str(caught.value)


def test_the_registry_reads_by_name(tmp_path):
    write_trivago(tmp_path / "t.csv")
    assert read("trivago", tmp_path / "t.csv").source == "trivago"
    with pytest.raises(ValueError, match=r"source must be one of .*trivago, kuaisar"):
        read("movielens", tmp_path)
    for source in SOURCES:
        with pytest.raises((FileNotFoundError, ValueError), match=r"absent"):
            read(source, tmp_path / "absent")


def test_frames(shop, tmp_path):
    for name in ("events", "searches", "clicks"):
        with pytest.raises(FileNotFoundError, match=f"{name}.parquet: not found"):
            frames_reader.read(tmp_path)
        getattr(shop, name).write_parquet(tmp_path / f"{name}.parquet")
    log = frames_reader.read(tmp_path)
    assert log.events.equals(shop.events)
    assert log.notes == ["kept 14 events, 4 searches, 7 clicks"]
    (tmp_path / "clicks.parquet").write_bytes(b"no")
    assert complaint(frames_reader, tmp_path).startswith("clicks.parquet: cannot be read: ")


# trivago

TRIVAGO = """\
user_id,session_id,timestamp,step,action_type,reference,platform,city,impressions,prices
ann,s1,100,1,search for destination,"São Paulo, Brazil",BR,x,,
ann,s1,110,2,interaction item image,7,BR,x,,
ann,s1,120,3,filter selection,Hotel,BR,x,,
ann,s1,130,4,search for poi,Old Bridge 2,BR,x,,
ann,s1,130,5,interaction item image,9,BR,x,,
ann,s1,130,6,clickout item,8,BR,x,7|8|9,50|60|70
ann,s1,90,1,clickout item,5,BR,x,5|6,50|60
ann,s1,95,2,interaction item image,6,BR,x,,
ann,s2,140,1,search for item,4,BR,x,,
bob,s3,100,2,interaction item info,unknown,BR,x,,
bob,s3,101,3,search for poi,!!,BR,x,,
bob,s3,102,4,clickout item,1,BR,x,,
"""


def write_trivago(path, text=TRIVAGO):
    path.write_text(text)


def test_trivago(tmp_path):
    write_trivago(tmp_path / "t.csv")
    pl.read_csv(tmp_path / "t.csv").write_parquet(tmp_path / "t.parquet.snappy")
    log = trivago.read(tmp_path / "t.csv")
    columnar = trivago.read(tmp_path / "t.parquet.snappy")
    assert log.events.equals(columnar.events)
    # The second visit under the same session id comes first in time.
    assert rows_of(log.events, "user", "item", "time", "target", "impressions") == [
        ("ann", "5", 90_000, True, ["5", "6"]),
        ("ann", "6", 95_000, False, None),
        ("ann", "7", 110_000, False, None),
        ("ann", "9", 130_000, False, None),
        ("ann", "8", 130_000, True, ["7", "8", "9"]),
        ("ann", "4", 140_000, False, None),
        ("bob", "1", 102_000, True, None),
    ]
    assert log.events["order"].is_sorted()
    assert rows_of(log.searches, "user", "time", "terms") == [
        ("ann", 100_000, ["são", "paulo", "brazil"]),
        ("ann", 130_000, ["old", "bridge", "2"]),
    ]
    first, second = log.searches["search"]
    assert rows_of(log.clicks, "search", "item", "time") == [
        (first, "7", 110_000),
        (second, "9", 130_000),
        (second, "8", 130_000),
    ]
    notes = "\n".join(log.notes)
    assert "12 rows, 2 users, 3 sessions" in notes
    assert "dropped 1 whose reference is no item id" in notes
    assert "dropped 1 without a word" in notes
    assert "dropped 1 other actions" in notes


def test_trivago_malformed(tmp_path):
    path = tmp_path / "t.csv"
    write_trivago(path, TRIVAGO.replace("ann,s1,120,3", "ann,s1,noon,3"))
    expected = "t.csv, row 3, field timestamp: expected a time in seconds, got 'noon'"
    assert complaint(trivago, path) == expected
    write_trivago(path, TRIVAGO.replace("ann,s1,120,3", ",s1,120,3"))
    assert complaint(trivago, path) == "t.csv, row 3, field user_id: expected an id, got nothing"
    write_trivago(path, TRIVAGO.replace("ann,s1,120,3", "ann,s1,-120,3"))
    assert "row 3, field timestamp: expected a time in seconds, got '-120'" in complaint(
        trivago, path
    )
    write_trivago(path, TRIVAGO.replace("impressions", "shown"))
    assert complaint(trivago, path).startswith(
        "t.csv: column impressions is missing among 'user_id, session_id, "
    )
    path.write_text("")
    assert complaint(trivago, path).startswith("t.csv: cannot be read: ")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    assert "broken.parquet: cannot be read" in complaint(trivago, tmp_path / "broken.parquet")
    assert "holds 2 .parquet or .csv files" in complaint(trivago, tmp_path)


def test_real_trivago(real_data, tmp_path):
    log = read("trivago", real_data("trivago"))
    assert "100,003 rows, 6,593 users, 7,612 sessions" in log.notes[0]
    assert int(log.events["target"].sum()) == 13_597
    # By action_type, less the four actions whose reference is no item id.
    assert log.events.height == 68_538 + 13_597 + 1_829 + 1_445 + 1_159 + 1_044 - 4
    assert log.searches.height == 3_060 + 1_080
    data = prepare(log, tmp_path / "out")
    for split in ("valid", "test"):
        samples = data.split(split)
        assert samples.negatives.shape == (len(samples), 99)
        users, times = samples.users[:, None], samples.times[:, None]
        assert not data.seen.has(users, samples.negatives, times).any()
        assert 0.4 < samples.repeat.mean() < 0.6
    for split in ("train", "valid", "test"):
        samples = data.split(split)
        some = samples.rec_end > data.rec_offsets[samples.users]
        assert (data.rec_times[samples.rec_end[some] - 1] < samples.times[some]).all()


# KuaiSAR

KUAISAR_REC = f"""\
click,user_id,item_id,duration_ms,timestamp,search
1,1,10,5,{MS}.0,0
0,1,11,5,{MS + 1}.0,0
1.0,1,12,5,{MS + 1}.0,0
1,1,13,5,{MS + 1}.0,1
1,2,10,5,{MS + 9}.0,0
"""
KUAISAR_SRC = f"""\
keyword,item_id,click_cnt,search_session_id,item_type,user_id,search_session_timestamp
"[20, 34]",50,0,7,A,1,{MS + 5}.0
"[20, 34]",51,3,7,A,2,{MS + 5}.0
"[20, 34]",52,1,7,A,1,{MS + 5}.0
"[9]",53,0,7,A,1,{MS + 5}.0
"[20, 34]",50,2,7,A,1,{MS + 5}.0
"[20, 34]",52,0,7,A,1,{MS + 5}.0
"[]",54,0,7,A,1,{MS + 6}.0
"""


@pytest.fixture
def kuai(tmp_path):
    folder = tmp_path / "KuaiSAR_v2"
    folder.mkdir()
    (folder / "rec_inter.csv").write_text(KUAISAR_REC)
    (folder / "src_inter.csv").write_text(KUAISAR_SRC)
    return folder


def test_kuaisar(kuai):
    log = kuaisar.read(kuai)
    assert log.events.equals(kuaisar.read(kuai.parent).events)
    assert rows_of(log.events, "user", "item", "time", "order", "target") == [
        (1, 10, MS, 1, True),
        (1, 12, MS + 1, 3, True),
        (1, 13, MS + 1, 4, True),
        (2, 10, MS + 9, 5, True),
    ]
    assert rows_of(log.searches.sort("search"), "search", "user", "time", "terms") == [
        (1, 1, MS + 5, ["20", "34"]),
        (2, 2, MS + 5, ["20", "34"]),
        (4, 1, MS + 5, ["9"]),
        (7, 1, MS + 6, []),
    ]
    assert rows_of(log.clicks.sort("search", "item"), "search", "item", "time") == [
        (1, 50, MS + 5),
        (1, 52, MS + 5),
        (2, 51, MS + 5),
    ]
    notes = "\n".join(log.notes)
    assert "kept 4 clicks of 2 users; dropped 1 of 5 rows" in notes
    assert "7 rows in 4 search sessions of 2 users, 2 with a click" in notes
    assert "2 of them listed both clicked and not" in notes


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "rec",
            f"{MS + 1}.0,1",
            "abc,1",
            "row 4, field timestamp: expected unix milliseconds, got 'abc'",
        ),
        ("rec", f"0,1,11,5,{MS + 1}.0", "0,1,11,5,nan", "row 2, field timestamp: expected unix m"),
        ("rec", f"0,1,11,5,{MS + 1}.0", "0,1,11", "row 2, field timestamp: expected unix milli"),
        ("rec", f"{MS}.0", "1700000000.0", "row 1, field timestamp: expected unix milliseconds"),
        ("rec", "item_id", "item", "rec_inter.csv: column item_id is missing"),
        ("src", '"[9]"', '"[9, x]"', "row 4, field keyword: expected a list of word ids"),
        ("src", '"[9]",53', '"[9]",1e', "row 4, field item_id: expected an integer, got '1e'"),
        ("src", f"{MS + 6}.0", "5", "row 7, field search_session_timestamp: expected unix mill"),
    ],
)
def test_kuaisar_malformed(kuai, file, old, new, message):
    path = kuai / f"{file}_inter.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    told = complaint(kuaisar, kuai)
    assert message in told
    assert told.startswith(path.name)


def test_kuaisar_missing_files(kuai):
    (kuai / "src_inter.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"src_inter\.csv: not found"):
        kuaisar.read(kuai)
    (kuai.parent / "KuaiSAR_final").mkdir()
    assert "KuaiSAR_v2 and KuaiSAR_final: name one" in complaint(kuaisar, kuai.parent)


# Qilin

SECONDS = MS // 1000
DETAILS = "rec_result_details_with_idx"


def result(note, click, time, stamp):
    return {
        "click": click,
        "note_id": "67{0}",
        "note_idx": note,
        "page_time": None,
        "position": 1,
        stamp: time,
    }


def shown(*results):
    """Results of a request as (note, click, ms)."""
    return [result(*r, "request_timestamp") for r in results]


def found(*results):
    """Results of a search as (note, click, s)."""
    return [result(*r, "search_timestamp") for r in results]


REQUESTS = {
    "recommendation_train": [
        # Not sorted by time; 5 and 6 come into view together, 5 again an hour later.
        (1, shown(
            (5, 1, MS + 3), (6, 1, MS + 1), (7, 0, MS), (8, 0, MS + 2), (5, 1, MS + 3_600_000)
        )),
        (2, shown((9, 0, MS))),
        (2, []),
    ],
    "recommendation_test": [(1, shown((9, 1, MS + 7_200_000), (6, 0, MS + 7_200_001)))],
    "search_train": [
        (1, "红色 Schuhe42", found(
            (20, 1.0, SECONDS + 9.0), (21, 0.0, SECONDS), (22, 1.0, SECONDS)
        )),
        (2, None, found((20, None, SECONDS + 1))),
        (2, "x", found((20, 1.0, None))),
    ],
    "search_test": [(1, "再", [])],
}  # fmt: skip


def frames():
    for name, rows in REQUESTS.items():
        recommended = name.startswith("rec")
        details = DETAILS if recommended else DETAILS.replace("rec", "search")
        frame = pl.DataFrame({"user_idx": [row[0] for row in rows]})
        if not recommended:
            frame = frame.with_columns(query=pl.Series([row[1] for row in rows], dtype=pl.String))
        vectors = [[float(n), 0.5] for n in range(len(rows))]
        yield (
            name,
            details,
            [row[-1] for row in rows],
            frame.with_columns(question_embedding=pl.Series(vectors, dtype=pl.List(pl.Float32))),
        )


def printed(results):
    """Print structs as NumPy does."""
    texts = [str(r).replace("None", "nan").replace("{0}", "") for r in results]
    return "[" + "\n ".join(texts) + "]"


NOTES = pl.DataFrame(
    {"note_idx": [5, 99], "note_embedding": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "title": ["a", "b"]}
)


@pytest.fixture(params=["parquet", "csv"])
def qilin_folder(request, tmp_path):
    def listed(column):
        return pl.Series([f"[ {' '.join(map(str, v))}]" for v in column.to_list()])

    folder = tmp_path / "qilin"
    folder.mkdir()
    for name, details, results, frame in frames():
        if request.param == "csv":
            frame = frame.with_columns(
                pl.Series(details, [printed(r) for r in results]),
                question_embedding=listed(frame["question_embedding"]),
            )
            frame.write_csv(folder / f"{name}.csv")
        else:
            (folder / name).mkdir()
            stamp = "request_timestamp" if details == DETAILS else "search_timestamp"
            numbers = dict.fromkeys(("click", "page_time", "position", stamp), pl.Float64)
            dtype = pl.List(pl.Struct({"note_id": pl.String, "note_idx": pl.Int64, **numbers}))
            frame = frame.with_columns(pl.Series(details, results, dtype, strict=False))
            frame[:1].write_parquet(folder / name / "0000.parquet")
            frame[1:].write_parquet(folder / name / "0001.parquet")
    if request.param == "csv":
        NOTES.with_columns(note_embedding=listed(NOTES["note_embedding"])).write_csv(
            folder / "notes.csv"
        )
    else:
        NOTES.write_parquet(folder / "notes.parquet")
    return folder


def test_qilin(qilin_folder, tmp_path):
    log = qilin.read(qilin_folder)
    assert rows_of(log.events, "user", "item", "time", "impressions") == [
        (1, 6, MS, [7, 8, 6]),
        (1, 5, MS, [7, 8, 5]),
        (1, 5, MS + 3_600_000, [7, 8, 5]),
        (1, 9, MS + 7_200_000, [6, 9]),
    ]
    assert rows_of(log.searches, "user", "time", "terms") == [
        (1, MS, ["红", "色", "schuhe42"]),
        (2, MS + 1000, []),
    ]
    assert rows_of(log.clicks.sort("time"), "search", "item", "time") == [
        (0, 22, MS),
        (0, 20, MS + 9000),
    ]
    notes = "\n".join(log.notes)
    assert "4 requests with 8 results; kept 4 clicks, dropped 0" in notes
    assert "kept 2 of 4 searches and 2 clicks; dropped 2" in notes
    data = prepare(log, tmp_path / "out", n_negatives=1)
    assert data.item_text[data.items.find("5")].tolist() == [1, 2, 3]
    assert np.count_nonzero(data.item_text.any(1)) == 1
    assert data.query_text[int(data.search_queries[0])].tolist() == [0, 0.5]


def test_qilin_without_vectors_and_without_test_parts(qilin_folder):
    for path in qilin_folder.glob("notes*"):
        path.unlink()
    for name in ("recommendation_test", "search_test"):
        for path in qilin_folder.glob(f"{name}*"):
            path.rename(path.with_name(f"no_{path.name}"))
    log = qilin.read(qilin_folder)
    assert "3 requests with 6 results" in log.notes[0]
    assert log.item_text is None
    assert "text vectors of notes: none" in log.notes


def test_qilin_missing_part(tmp_path):
    with pytest.raises(FileNotFoundError, match="recommendation_train"):
        qilin.read(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("}]", "", f"row 1, field {DETAILS}: expected a list of structs"),
        ("'note_idx': 5", "'note_idx': five", "row 1, field note_idx: expected an integer, got "),
        ("'note_idx': 5", "'note_idx': nan", "row 1, field note_idx: expected an integer"),
        ("'note_idx': 5", "'note': 5", f"row 1, field {DETAILS}: expected a struct with note_idx"),
        ("'click': 1,", "'click': exec('x'),", f"row 1, field {DETAILS}: expected 'name': value"),
        ("user_idx", "user", "column user_idx is missing"),
    ],
)
@pytest.mark.parametrize("qilin_folder", ["csv"], indirect=True)
def test_qilin_malformed(qilin_folder, old, new, message):
    path = qilin_folder / "recommendation_train.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    told = complaint(qilin, qilin_folder)
    assert told.startswith("recommendation_train.csv")
    assert message in told


@pytest.mark.parametrize("qilin_folder", ["csv"], indirect=True)
def test_qilin_malformed_vector(qilin_folder, tmp_path):
    path = qilin_folder / "notes.csv"
    path.write_text(path.read_text().replace("2.0", "..."))
    log = qilin.read(qilin_folder)
    with pytest.raises(
        ValueError, match=r"notes\.csv, row 1, field note_embedding: expected a vec"
    ):
        prepare(log, tmp_path / "out", n_negatives=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("qilin_folder", ["parquet"], indirect=True)
def test_qilin_parquet_of_another_schema(qilin_folder):
    path = qilin_folder / "recommendation_train" / "0000.parquet"
    frame = pl.read_parquet(path)
    frame.with_columns(pl.lit("[]").alias(DETAILS)).write_parquet(path)
    assert "must be a list of structs, got String" in complaint(qilin, qilin_folder)
    without = [{"note_idx": 1, "click": 1}]
    frame.with_columns(pl.Series(DETAILS, [without])).write_parquet(path)
    assert "lacks the field request_timestamp" in complaint(qilin, qilin_folder)


def test_real_qilin(real_data):
    log = read("qilin", real_data("qilin_toy"))
    assert "recommendation: 20 requests" in log.notes[0]
    assert log.searches.height == 20
    # Both clocks became milliseconds: the two streams of the toy lie in the same days.
    assert abs(log.events["time"].median() - log.searches["time"].median()) < 10 * 86_400_000


# JDsearch

X = "\x18"
JDSEARCH = (
    "query\tcandidate_wid_list\tcandidate_label_list\thistory_qry_list\thistory_wid_list\t"
    "history_type_list\thistory_time_list\n"
    f"1{X}2\t70_71_72_73\t0.0_1.0_3.0_0.0\t-1_5{X}6_5{X}6_-1_5{X}6\t10_11_12_13_14\t"
    "ORD_CLICK_CART_FLW_CLICK\t0_0_7_1_2_30\n"
    f"3\t70_71\t0.0_0.0\t5{X}6_-1\t15_16\tCLICK_CLICK\t0_4_9\n"
)


@pytest.fixture
def jd(tmp_path):
    path = tmp_path / "user_behavior_data.txt"
    path.write_text(JDSEARCH)
    return path


def test_jdsearch(jd):
    log = jdsearch.read(jd.parent)
    assert rows_of(log.events, "user", "item", "time", "target") == [
        (1, "10", 0, True),
        (1, "13", 8_000, True),
        (2, "16", 4_000, True),
    ]
    assert rows_of(log.searches, "search", "user", "time", "terms") == [
        (1, 1, 0, ["5", "6"]),
        (4, 1, 10_000, ["5", "6"]),
        (5, 2, 0, ["5", "6"]),
    ]
    assert rows_of(log.clicks, "search", "item", "time") == [
        (1, "11", 0),
        (1, "12", 7_000),
        (4, "14", 10_000),
        (5, "15", 0),
    ]
    assert "dropped 2 test queries" in log.notes[-1]


def test_jdsearch_test_query_as_target(jd):
    log = jdsearch.read(jd, test_query=True)
    assert rows_of(log.events[-1:], "user", "item", "time", "target", "impressions") == [
        (1, "72", 40_000, True, ["70", "73", "72"])
    ]
    assert "of 1 users as a target; dropped 1 without" in log.notes[-1]
    assert log.searches.height == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "10_11_12_13_14",
            "10_11_12_13",
            "row 1, field history_wid_list: expected as many entries",
        ),
        ("CLICK_CLICK\t", "CLICK\t", "row 2, field history_type_list: expected as many entries"),
        ("0_4_9", "0_4", "row 2, field history_time_list: expected one entry more"),
        ("0_4_9", "0_x_9", "row 2, field history_time_list: expected intervals in seconds"),
        ("0_4_9", "0_-4_9", "row 2, field history_time_list: expected intervals in seconds"),
        ("15_16", "15_b", "row 2, field history_wid_list: expected product ids"),
        ("0.0_0.0\t", "0.0\t", "row 2, field candidate_label_list: expected as many entries"),
        ("0.0_0.0\t", "0.0_?\t", "row 2, field candidate_label_list: expected numbers"),
        ("history_qry_list", "queries", "column history_qry_list is missing"),
    ],
)
def test_jdsearch_malformed(jd, old, new, message):
    jd.write_text(JDSEARCH.replace(old, new, 1))
    told = complaint(jdsearch, jd, test_query=True)
    assert re.match(rf"user_behavior_data\.txt[:,] {re.escape(message)}", told)


def test_real_jdsearch(real_data):
    log = read("jdsearch", real_data("jdsearch_sample"))
    assert "3 users, 230 behaviours" in log.notes[0]
    assert log.events.height + log.clicks.height == 230


# The full releases, as documented: every column, of which the readers need a few.


def test_kuaisar_with_every_documented_column(tmp_path):
    folder = tmp_path / "KuaiSAR_final"
    folder.mkdir()
    huge = (
        "[" + ", ".join(["4711"] * 60_000) + "]"
    )  # captions are lists of word ids, some of 400 kB
    (folder / "rec_inter.csv").write_text(
        "user_id,item_id,duration_ms,playing_time,timestamp,forward,like,follow,"
        "search_item_related,search,click,time\n"
        f'0,5,3000,1200,{MS}.0,0,1,0,1,0,1,"2023-05-22, 10:00"\n'
        f"0,6,3000,0,{MS}.0,0,0,0,0,0,0,2023-05-22\n"
        f"0,6,,,{MS + 5000}.0,,,,,,1,\n"
    )
    (folder / "src_inter.csv").write_text(
        "keyword,item_id,click_cnt,search_session_id,item_type,user_id,search_session_timestamp,"
        "search_source,search_session_time\n"
        f'"[20, 34, 3]",7,2,0,NORMAL,0,{MS + 1000}.0,USER_INPUT,2023-05-22 10:00:01\n'
    )
    (folder / "user_features.csv").write_text(
        "user_id,search_active_level,reco_active_level\n0,1,2"
    )
    (folder / "item_features.csv").write_text(f'item_id,caption,author_id\n5,"{huge}",1\n')
    (folder / "social_network.csv").write_text('user_id,user_follow_id\n0,"[1, 2]"\n')
    log = kuaisar.read(tmp_path)
    assert rows_of(log.events, "user", "item", "time") == [(0, 5, MS), (0, 6, MS + 5000)]
    assert rows_of(log.searches, "user", "time", "terms") == [(0, MS + 1000, ["20", "34", "3"])]
    assert rows_of(log.clicks, "item", "time") == [(7, MS + 1000)]


def test_qilin_with_every_documented_column(tmp_path):
    """Of the configurations on Hugging Face: shards in folders, nested lists, extra result sets."""
    struct = {"position": 1, "like": 0.0, "collect": 0.0, "comment": 0.0, "share": 0.0,
              "page_time": None}  # fmt: skip
    more = {"query": ["q"], "recent_clicked_note_idxs": [[1, 2]], "session_idx": [3]}
    for part in ("train", "test"):
        shown = [{"note_idx": 5, "click": 1.0, "request_timestamp": MS + 0.5, **struct}]
        found = [{"note_idx": 6, "click": 1.0, "search_timestamp": MS / 1000, **struct}]
        frames = {
            "recommendation": {"rec_result_details_with_idx": [shown], "request_idx": [0]},
            "search": {
                "search_result_details_with_idx": [found],
                "search_idx": [0],
                "query_from_type": [1],
                "dpr_results": [[[5, 0.3], [6, 0.1]]],
            },
        }
        if part == "test":
            frames["recommendation"]["rec_results"] = [[5, 6]]
            frames["search"] |= {"bm25_results": [[5, 6]], "search_results": [[6]]}
        for name, columns in frames.items():
            folder = tmp_path / f"{name}_{part}"
            folder.mkdir()
            user = {"user_idx": [9 + (part == "test")]}
            frame = pl.DataFrame(user | more | columns, strict=False)
            frame.write_parquet(folder / "train-00000-of-00001.parquet")
    (tmp_path / "dqa").mkdir()
    (tmp_path / "user_feat").mkdir()
    log = qilin.read(tmp_path)
    assert rows_of(log.events, "user", "item", "time") == [(9, 5, MS), (10, 5, MS)]
    assert rows_of(log.searches, "user", "time", "terms") == [(9, MS, ["q"]), (10, MS, ["q"])]
    assert log.clicks["item"].to_list() == [6, 6]
