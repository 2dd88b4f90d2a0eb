"""``lcr-fast prepare``: what it says and writes, and every bad input."""

import shutil

import polars as pl
import pytest

from command_line import WORLD, fails, is_untouched, rewrite, run
from lcr_fast.data import synthetic
from lcr_fast.data.prepared import PreparedData


def test_prepare_says_what_it_made(job, texts):
    data = PreparedData.open(job / "data")
    assert data.n_users == 24
    assert texts["prepare"].endswith(data.summary() + "\n")


@pytest.fixture
def frames(tmp_path):
    """Write a data set of the ``frames`` source without a single target; return its folder."""
    folder = tmp_path / "frames"
    folder.mkdir()
    log = synthetic.generate(WORLD)
    log.events.with_columns(target=False).write_parquet(folder / "events.parquet")
    log.searches.write_parquet(folder / "searches.parquet")
    log.clicks.write_parquet(folder / "clicks.parquet")
    return folder


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        pytest.param(lambda f: None, ", of them targets: 0)", id="no-targets"),
        pytest.param(
            lambda f: pl.read_parquet(f / "events.parquet").clear().write_parquet(
                f / "events.parquet"
            ),
            "nothing to prepare (events: 0, of them targets: 0)", id="no-events",
        ),
        pytest.param(
            lambda f: rewrite(f / "clicks.parquet", lambda b: b.__delitem__(slice(100, None))),
            "clicks.parquet: cannot be read", id="truncated-parquet",
        ),
        pytest.param(
            lambda f: (f / "events.parquet").write_text("user,item\n1,2\n"),
            "events.parquet: cannot be read", id="csv-named-parquet",
        ),
        pytest.param(
            lambda f: (f / "searches.parquet").unlink(),
            "are none, write search,user,time,terms alone", id="missing-file",
        ),
        pytest.param(
            lambda f: pl.read_parquet(f / "events.parquet").drop("time").write_parquet(
                f / "events.parquet"
            ),
            "events.parquet: column time is missing", id="missing-column",
        ),
    ],
)  # fmt: skip
def test_prepare_refuses(capsys, tmp_path, frames, break_it, message):
    break_it(frames)
    assert message in fails(capsys, "prepare", "frames", frames, tmp_path / "out")
    assert is_untouched(tmp_path / "out")


def test_prepare_hands_options_to_the_reader_and_on(tmp_path):
    header = ("query", "candidate_wid_list", "candidate_label_list", "history_qry_list",
              "history_wid_list", "history_type_list", "history_time_list")  # fmt: skip
    lines = [
        ("q", f"7{user}_8", "1.0_0.0", "-1_-1_-1", "1_2_3", "CLICK_CLICK_CLICK", "0_1_1_1")
        for user in (1, 1, 2)
    ]
    (tmp_path / "raw.txt").write_text("\n".join("\t".join(line) for line in (header, *lines)))
    plain, asked = (
        run(
            "prepare",
            "jdsearch",
            tmp_path / "raw.txt",
            tmp_path / name,
            "--n-negatives",
            "1",
            *more,
        )
        for name, more in (("plain", ()), ("asked", ("--test-query", "--keep-duplicates")))
    )
    assert "dropped 2 test queries" in plain
    assert "raw.txt: dropped 1 rows that repeat another exactly" in plain
    assert "kept the test query of 3 users as a target" in asked
    assert "raw.txt: kept 1 rows that repeat another exactly" in asked


def test_prepare_splits_by_time_and_keeps_a_core(job, tmp_path):
    text = run("prepare", "synthetic", job / "world.json", tmp_path / "out", "--split", "time",
               "--time-shares", "0.2", "0.1", "--k-core", "2", "--n-negatives", "9")  # fmt: skip
    options = PreparedData.open(tmp_path / "out").manifest["options"]
    assert options.items() >= {"split": "time", "time_shares": [0.2, 0.1], "k_core": 2}.items()
    assert "prepare: validation begins at" in text
    assert "prepare: the 2-core has" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["clicks", "-", "OUT"], "'clicks'"),
        (["trivago", "nowhere", "OUT"], "nowhere"),
        (["synthetic", "nowhere.json", "OUT"], "nowhere.json"),
        (["synthetic", "WORLD", "OUT", "--min-targets", "0"], "min_targets must be at least 1"),
        (["synthetic", "WORLD", "OUT", "--n-negatives", "500"], "negatives"),
        (["synthetic", "WORLD", "OUT", "--n-negatives", "0"], "--n-negatives must be at least 1"),
        (["synthetic", "WORLD", "OUT", "--seed", "one"], "--seed"),
        (["synthetic", "WORLD", "OUT", "--seed", "-5"], "seed must be at least 0, got -5"),
        (["synthetic", "WORLD", "OUT", "--k-core", "99"], "have 99 events each (--k-core)"),
        (
            ["synthetic", "WORLD", "OUT", "--split", "time", "--time-shares", "1", "0"],
            "time_shares",
        ),
        (
            ["synthetic", "WORLD", "OUT", "--test-query"],
            "--test-query: the reader of synthetic has",
        ),
        (["synthetic", "WORLD"], "OUT"),
    ],
)
def test_prepare_refuses_options(capsys, job, tmp_path, argv, message):
    places = {"OUT": tmp_path / "out", "WORLD": job / "world.json"}
    argv = [places.get(word, word) for word in argv]
    assert message in fails(capsys, "prepare", *argv)
    assert is_untouched(tmp_path / "out")


def test_prepare_never_replaces_unasked(capsys, job, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(job / "data", out)
    command = ["prepare", "synthetic", job / "world.json", out, "--seed", "5"]
    assert "already holds prepared data" in fails(capsys, *command)
    assert PreparedData.open(out).manifest["options"]["seed"] == 0
    run(*command, "--overwrite")
    assert PreparedData.open(out).manifest["options"]["seed"] == 5
