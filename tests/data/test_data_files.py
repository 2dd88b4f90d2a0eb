"""The rules of files: what is a table, whole and once there, whichever reader asks."""

import bz2
import datetime
import gzip
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from lcr_fast.data import frames, read, rules
from lcr_fast.data.build import prepare
from lcr_fast.data.table import count_rows, read_table
from raw_folders import GENERATORS, MS, write_tables


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,x\n5,7\n", None),
        ("x,x\n5,7\n", "t.csv: column x is there twice"),
        ("y;z\n5;6\n", "t.csv: column x is missing among 'y;z'$"),
        (
            'x\n5\n6" y\n',
            r"t.csv: cannot be read: CSV malformed.*; quotes may only .*\(line 3: '6\" y'\)$",
        ),
        (
            'x\n"5" y\n',
            r"t.csv: cannot be read: could not parse.*; quotes may only .*\(line 2: '\"5\" y'\)$",
        ),
        ("x\n5\n6.5\n", "t.csv, row 2, field x: expected an integer, got '6.5'"),
        ('x,y\n5,1\n"6\n",7,8\n', "t.csv: cannot be read: found more fields than defined"),
        (
            'x,y\n"5\n",1\n6,"7,8",9\n',
            r"t.csv: cannot be read: found more fields .* \(line 4: '6,\"7,8\",9'\)$",
        ),
        ('x,y\n5,1\n6,"7', "t.csv: cannot be read: "),
        ("x\n5\n6,7\n", r"t.csv: cannot be read: found more fields .* \(line 3: '6,7'\)$"),
    ],
)
def test_tables_name_what_is_wrong(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    if message is None:  # a column named as ours is none of ours
        assert read_table(tmp_path / "t.csv", {"x": rules.INTEGER}).rows() == [(1, 7)]
    else:
        with pytest.raises(ValueError, match=f"^{message}"):
            read_table(tmp_path / "t.csv", {"x": rules.INTEGER})


UNCLOSED = "got '{}.*'; it holds a tab or line break: a quote was probably opened and not closed"


@pytest.mark.parametrize(
    ("source", "name", "text", "message"),
    [
        (
            "frames", "searches.tsv",
            f'search\tuser\ttime\tterms\n1\t1\t{MS}\tx\n2\t1\t{MS}\t"nice w18\n'
            f'3\t1\t{MS}\ta\n4\t1\t{MS}\tmonitor 27"\n',
            "row 2, field terms: expected a list of words, " + UNCLOSED.format("nice w18"),
        ),
        (
            "frames", "events.csv",
            f'item,user,time\n"i1,1,{MS}\ni2,1,{MS}\ni3",1,{MS}\n',
            "row 1, field item: expected an id, " + UNCLOSED.format("i1,1"),
        ),
        (
            "trivago", "t.csv",
            "user_id,session_id,timestamp,step,action_type,impressions,reference\n"
            'a,s,1,1,search for poi,,"Rio\na,s,2,2,search for poi,,Old"\n',
            "row 1, field reference: expected text of one line, " + UNCLOSED.format("Rio"),
        ),
        (
            "kuaisar", "src_inter.csv",
            "user_id,search_session_timestamp,keyword,item_id,click_cnt,search_session_id\n"
            f'1,{MS},[4],9,1,"7\n1,{MS},[4],3,0,7"\n',
            "row 1, field search_session_id: expected text of one line, " + UNCLOSED.format("7"),
        ),
    ],
)  # fmt: skip
def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path, source, name, text, message):
    for file, other in {
        "frames": {
            "events.csv": f"user,item,time\n1,i1,{MS}\n",
            "searches.tsv": f"search\tuser\ttime\tterms\n1\t1\t{MS}\tx\n",
            "clicks.csv": "search,item,time\n",
        },
        "kuaisar": {"rec_inter.csv": f"user_id,item_id,timestamp,click\n1,1,{MS},1\n"},
    }.get(source, {}).items():
        (tmp_path / file).write_text(other)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"\A{re.escape(name)}, {message}\Z"):
        read(source, tmp_path)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv.gz"])
def test_lines_that_end_in_carriage_returns_alone_are_not_all_names(tmp_path, name):
    """As old spreadsheets write them: all of such a file would be names, and no row."""
    path = tmp_path / name
    text = b"a,b\r1,2\r"
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with pytest.raises(ValueError, match=rf"\A{name}: the name of a column holds a line's end, 'b"):
        read_table(path, {"a": rules.TEXT})


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["user,note,item,time", '1,"nice w18,5,10', "2,x,6,11", '3,tv 27",7,12'],
            "row 1, field note: holds other rows, 'nice w18,5,10",
        ),
        (
            ["user,item,time,note", "1,5,9,", '1,5,10,"nice w18', '2,6,11,tv 27"'],
            "row 2, field note: holds other rows, 'nice w18",
        ),
        (
            ["note,user,item,time", '"nice w18,1,5,10', 'tv 27",2,6,11'],
            "row 1, field note: holds other rows, 'nice w18,1,5,10",
        ),
        (
            ["user,item,time,terms,note", '1,5,10,"nice w18,a', '2,6,11,tv 27",b'],
            "row 1, field terms: holds other rows, 'nice w18,a",
        ),
        (
            ["user,item,time,note", '1,5,10,"', '2,6,11,"""tv"""'],
            "cannot be read: .*; quotes may only enclose whole fields",
        ),
        (
            ["user,item,time,row", '1,5,10,"nice w18', '2,6,11,tv 27"'],
            "row 1, field row: holds other rows, 'nice w18",
        ),
        (['user,item,time,"note', '1,5,10,x"', "2,6,11,y"], "the name of a column holds other row"),
        (["user,item,time,note", '1,5,10,"so, a, b', 'c, d,e,f"'], None),  # e is no time
        (["note,user,item,time", '"a,b', 'c",1,5,10'], None),
        (["user,item,time,note", '1,5,10,"a,b,c,', '"'], None),
    ],
)
def test_a_quote_that_is_not_closed_in_a_column_that_is_not_read(tmp_path, lines, message, end):
    path = tmp_path / "t.csv"
    path.write_text(end.join([*lines, ""]), newline="")
    fields = {"user": rules.ID, "item": rules.ID, "time": rules.time("ms")}
    if "terms" in lines[0]:
        fields["terms"] = rules.TEXT
    if message is None:
        assert read_table(path, fields).height == 1
        # What ``keep`` drops may hold lines of any kind.
        assert read_table(path, fields, keep=pl.col("time") > 99).height == 0
    else:
        with pytest.raises(ValueError, match=rf"\At\.csv[,:] {message}[^\n]*\Z"):
            read_table(path, fields)


def test_a_file_that_is_a_folder(tmp_path):
    for source, name in {
        "frames": "events.parquet", "kuaisar": "rec_inter.csv", "ubi": "ubi_events.ndjson",
        "jdsearch": "user_behavior_data.txt", "synerise": "add_to_cart.parquet",
        "amazon": "reviews_Toys_5.json", "qilin": "recommendation_train.csv",
    }.items():  # fmt: skip
        (tmp_path / source / name).mkdir(parents=True)
        for other in ("searches", "clicks"):
            (tmp_path / source / f"{other}.parquet").touch()
        expected = " without Parquet files" if name.endswith(".parquet") else ", expected a file"
        with pytest.raises(ValueError, match=f"{name}: is a folder{expected}$"):
            read(source, tmp_path / source)


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (gzip.compress, None),
        (bz2.compress, "is packed by bzip2"),
        (lzma.compress, "is packed by xz"),
        (lambda text: b"PK\x03\x04" + text, "is a zip archive"),
        (lambda text: text.decode().encode("utf-16"), "is UTF-16"),
    ],
)
@pytest.mark.parametrize("source", ["trivago", "kuaisar", "jdsearch", "amazon", "ubi", "frames"])
def test_text_files_are_utf_8_and_packed_by_gzip(tmp_path, source, pack, message):
    """Whatever their names say."""
    GENERATORS[source](tmp_path, random.Random(23))
    plain = read(source, tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(pack(file.read_bytes()))
    if message is None:
        assert read(source, tmp_path).events.equals(plain.events)
        return
    with pytest.raises(
        ValueError, match=rf"\A\S+: {message}, expected UTF-8, as it is or as \.gz\Z"
    ):
        read(source, tmp_path)


def test_a_parquet_folder_is_one_table_of_its_parts(tmp_path):
    """As Spark writes one: rows count on from part to part, in the order of their names."""
    folder = tmp_path / "events.parquet"
    for day, users in (("day=2", [5]), ("day=1", [1, 2])):
        (folder / day).mkdir(parents=True)
        pl.DataFrame({"user": users}).write_parquet(folder / day / "part-0.snappy.parquet")
    (folder / "_SUCCESS").touch()
    assert read_table(folder, {"user": rules.ID}).rows() == [(1, 1), (2, 2), (3, 5)]
    pl.DataFrame({"user": [3.7]}).write_parquet(folder / "day=2" / "part-1.parquet")
    with pytest.raises(
        ValueError, match=r"events\.parquet, row 4, field user: expected an id, got 3"
    ):
        read_table(folder, {"user": rules.ID})
    (folder / "day=2" / "part-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"part-1\.parquet: cannot be read: "):
        read_table(folder, {"user": rules.ID})


def test_parts_behind_links_are_parts(tmp_path):
    folder, elsewhere = tmp_path / "t.parquet", tmp_path / "disk"
    for each in (folder, elsewhere):
        each.mkdir()
        pl.DataFrame({"user": [7]}).write_parquet(each / "part-0.parquet")
    (folder / "day=2").symlink_to(elsewhere)
    assert read_table(folder, {"user": rules.ID}).height == 2
    (folder / "part-1.parquet").symlink_to(folder / "part-0.parquet")
    with pytest.raises(
        ValueError, match=r"part-0.parquet and part-1.parquet, by a link one file tw"
    ):
        read_table(folder, {"user": rules.ID})
    (folder / "part-1.parquet").unlink()
    (folder / "part-1.parquet").symlink_to(folder / "gone")
    with pytest.raises(ValueError, match=r"part-1.parquet: cannot be read: No such file"):
        read_table(folder, {"user": rules.ID})


FIELDS = {
    "user": rules.ID, "time": rules.time("ms"), "shown": rules.IDS, "words": rules.WORDS,
}  # fmt: skip
PARTS = [
    pl.DataFrame({"user": [1], "time": [MS], "shown": [[7]], "words": [["a"]], "x": [1]}),
    # Of narrower integers, floats and dates; in another order; a column without a value, and none.
    pl.DataFrame({"words": [None], "time": [float(MS)], "user": [2.0], "x": ["b"]}),
    pl.DataFrame(
        {"shown": [[8]], "time": [datetime.datetime(1970, 1, 2)], "user": [3], "words": [["c"]]},
        schema_overrides={"user": pl.Int16, "shown": pl.List(pl.UInt8)},
    ),
]


def write_parts(folder, parts):
    folder.mkdir()
    for number, part in enumerate(parts):
        part.write_parquet(folder / f"part-{number}.parquet")
    return folder


def test_parts_of_a_parquet_folder_may_differ_in_their_types(tmp_path):
    folder = write_parts(tmp_path / "t.parquet", PARTS)
    table = read_table(folder, FIELDS, nullable=("shown", "words"), as_read=("time",))
    assert table.drop("time as read").rows() == [
        (1, 1, MS, [7], ["a"]),
        (2, 2, MS, None, None),
        (3, 3, 86_400_000, [8], ["c"]),
    ]
    kept = read_table(folder, {"user": rules.ID}, keep=pl.col("user") > 1)
    assert kept.rows() == [(2, 2), (3, 3)]
    assert kept.schema["user"] == pl.Int64
    assert count_rows(folder) == 3


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"user": ["4"]},
            "column user is Int64 in t.parquet/part-0.parquet, but String in t.parqu",
        ),
        (
            {"shown": [["4"]]},
            "column shown is List.Int64. in t.parquet/part-0.parquet, but List.Str",
        ),
        ({"user": [[4]]}, "/part-3.parquet: column user is List.Int64., expected an id"),
        ({"time": [True]}, "/part-3.parquet: column time is Boolean, expected a time in ms"),
        ({"user": [3.7]}, ", row 4, field user: expected an id, got 3.7"),
        ({"user": [None]}, ", row 4, field user: expected an id, got nothing"),
        ({"time": None}, "/part-3.parquet: column time is missing among 'user, shown, words, x'"),
    ],
)
def test_parts_that_are_no_table_together(tmp_path, part, message):
    columns = PARTS[0].to_dict() | part
    wrong = pl.DataFrame({name: values for name, values in columns.items() if values is not None})
    folder = write_parts(tmp_path / "t.parquet", [*PARTS, wrong])
    with pytest.raises(ValueError, match=rf"\At\.parquet(: )?{message}"):
        read_table(folder, FIELDS, nullable=("shown", "words"))


def test_what_a_parquet_folder_holds_beside_its_parts(tmp_path):
    """Parts are files of any ending; a killed job's, and checksums, are none of the table's."""
    folder = tmp_path / "events.parquet"
    table = pl.DataFrame({"user": [1]})
    parts = ("part-0.parquet", "part-1", "part-2.parquet/part-3.gz.parquet")
    for name in (*parts, "_temporary/0/part-0.parquet", ".part-0.parquet", "._part-1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table.write_parquet(folder / name)
    assert read_table(folder, {"user": rules.ID}).height == len(parts)


@pytest.mark.parametrize(
    ("source", "name", "second"),
    [
        ("ubi", "ubi_events.ndjson", "ubi_events.ndjson.gz"),
        ("ubi", "ubi_events.jsonl", "ubi_events (1).jsonl"),
        ("amazon", "reviews_Toys_5.json", "reviews_Toys_5.json.gz"),
        ("amazon", "reviews_Toys_5.json", "reviews_Toys_5 (1).json"),
        ("frames", "events.csv", "events.csv.gz"),
        ("frames", "shop.inter", "shop.inter.gz"),
        ("frames", "shop.inter", "shop (1).inter"),
        ("trivago", "t.csv", "t.csv.gz"),
        ("trivago", "t.csv", "t - Copy.csv"),
        ("qilin", "recommendation_train.csv", "recommendation_train.parquet"),
        ("qilin", "recommendation_train.csv", "recommendation_train/part-0.parquet"),
        (
            "synerise",
            "add_to_cart.parquet/part-0.parquet",
            "add_to_cart.parquet/part-0 (1).parquet",
        ),
        (
            "synerise",
            "add_to_cart.parquet/part-0.parquet",
            "add_to_cart.parquet/part-0.parquet.bak",
        ),
    ],
)
def test_a_file_that_is_there_twice_is_not_read_twice(tmp_path, source, name, second):
    for each in (name, second):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        pl.DataFrame({"x": [1]}).write_parquet(tmp_path / each)
    with pytest.raises(ValueError, match=rf"\A{tmp_path}[^\n]* holds [^\n]*\Z") as told:
        read(source, tmp_path)
    assert "keep one" in str(told.value) or "expected one: " in str(told.value)
    hidden = (tmp_path / second).with_name(f".{Path(second).name}")
    (tmp_path / second).rename(hidden)
    with pytest.raises((ValueError, FileNotFoundError)) as told:  # of the one that is left
        read(source, tmp_path)
    assert "keep one" not in str(told.value) or source == "qilin"


@pytest.mark.parametrize("end", [".csv", ".parquet"])
def test_a_name_is_no_pattern(tmp_path, end):
    for name, user in (("run[1]", 5), ("run1", 7)):
        (tmp_path / name).mkdir()
        table, path = pl.DataFrame({"user": [user]}), tmp_path / name / f"events{end}"
        (table.write_csv if end == ".csv" else table.write_parquet)(path)
    path = tmp_path / "run[1]" / f"events{end}"
    assert read_table(path, {"user": rules.ID})["user"].cast(pl.Int64).to_list() == [5]


@pytest.mark.parametrize("end", [".csv", ".csv.gz", ".tsv", ".tsv.gz"])
def test_text_tables_give_the_data_of_parquet_ones(tables, tmp_path, end):
    prints = []
    for kind in (".parquet", end):
        log = read("frames", write_tables(tmp_path / kind, tables, kind))
        prints.append(prepare(log, tmp_path / f"{kind}.out", n_negatives=2).fingerprint)
    assert prints[0] == prints[1]


@pytest.mark.parametrize("column", ["i", "u", "q", "since", "place", "row", "key", "sample", "n"])
@pytest.mark.parametrize("dtype", [pl.Int32, pl.Int64, pl.String])
def test_other_columns_are_ignored(tables, tmp_path, column, dtype):
    plain = frames.read(write_tables(tmp_path / "plain", tables))
    extra = pl.lit(1).cast(dtype).alias(column)
    more = {name: table.with_columns(extra) for name, table in tables.items()}
    log = frames.read(write_tables(tmp_path / "more", more))
    for name in tables:
        assert getattr(log, name).equals(getattr(plain, name))
    assert f"events.parquet: ignored the columns {column}" in log.notes


def test_a_recbole_file_stands_for_the_events(tmp_path):
    (tmp_path / "shop.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "7\ta\t5.0\t100.5\n7\tb\t3.0\t200\n7\tb\t3.0\t200\n8\ta\t1.0\t300\n"
    )
    log = frames.read(tmp_path)
    assert log.events.select("user", "item", "time", "order", "target").rows() == [
        (7, "a", 100_500, 1, True),
        (7, "b", 200_000, 2, True),
        (8, "a", 300_000, 4, True),
    ]
    assert log.searches.height == log.clicks.height == 0
    assert "shop.inter: dropped 1 rows that repeat another exactly" in log.notes
    assert "no searches: there is no such file" in log.notes
    assert frames.read(tmp_path / "shop.inter").events.equals(log.events)
    text = (tmp_path / "shop.inter").read_text()
    (tmp_path / "shop.inter").write_text(text.replace("100.5", "1700000000000"))
    with pytest.raises(ValueError, match="row 1, field timestamp:float: expected a time in s"):
        frames.read(tmp_path)


@pytest.mark.parametrize("column", ["Target", " target", "ORDER", "Impressions "])
def test_a_column_that_is_meant_is_not_ignored(tables, tmp_path, column):
    name = column.strip().lower()
    tables["events"] = tables["events"].rename({name: column})
    told = f"events.parquet: column {column!r} would be ignored: rename it {name!r}"
    with pytest.raises(ValueError, match=rf"\A{told}\Z"):
        frames.read(write_tables(tmp_path / "f", tables))


def test_names_that_the_locale_lacks_letters_for(tables, tmp_path):
    tables["events"] = tables["events"].with_columns(pl.lit(1).alias("Größe"))
    write_tables(tmp_path / "shop", tables)
    shutil.copytree(tmp_path / "shop", tmp_path / "Bücher")
    out = tmp_path / "out"
    code = (
        "import sys\n"
        "from lcr_fast.cli import main\n"
        "for name in ('shop', 'B\\udcc3\\udcbccher'):\n"
        "    main(['prepare', 'frames', f'{sys.argv[1]}/{name}', *sys.argv[2:]])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path, out, "--n-negatives=2", "--overwrite"],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        timeout=120,
    )
    assert "ignored the columns Größe".encode() in ended.stdout
    assert "Größe" in (out / "manifest.json").read_text(encoding="utf-8")
    assert ended.returncode == 2
    assert b"lacks letters of this path: set a UTF-8 locale" in ended.stderr
    assert ended.stderr.count(b"\n") == 1
