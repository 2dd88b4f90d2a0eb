"""``lcr-fast recommend``: its lists, and where they go."""

import csv
import io

import polars as pl
import pytest

from command_line import WORLD, fails, run
from lcr_fast import cli
from lcr_fast.data import synthetic
from lcr_fast.data.prepared import PreparedData


@pytest.mark.parametrize("users", [None, ["7", "0", "23"]])
@pytest.mark.parametrize("k", [1, 5])
def test_recommendations(job, users, k):
    model = job / "run" / "lcr" / "model.safetensors"
    chosen = ["--users", *users] if users else []
    text = run("recommend", model, "--data", job / "data", "-k", k, *chosen)
    assert text.splitlines()[0] == "user,rank,item,score"
    log = synthetic.generate(WORLD)
    known = {str(item) for item in log.events["item"]} | {str(i) for i in log.clicks["item"]}
    by_user: dict[str, list] = {}
    for row in csv.DictReader(text.splitlines()):
        by_user.setdefault(row["user"], []).append(row)
    assert list(by_user) == users if users else len(by_user) == WORLD.n_users
    for user, rows in by_user.items():
        assert [int(row["rank"]) for row in rows] == list(range(1, k + 1))
        scores = [float(row["score"]) for row in rows]
        assert scores == sorted(scores, reverse=True)
        items = {row["item"] for row in rows}
        assert len(items) == k
        assert items <= known
        searches = log.searches.filter(pl.col("user") == int(user))["search"].implode()
        clicked = log.clicks.filter(pl.col("search").is_in(searches))["item"]
        events = log.events.filter(pl.col("user") == int(user))["item"]
        assert items.isdisjoint(map(str, [*events, *clicked]))


def test_recommendations_stop_quietly_with_their_reader(job, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    errors = io.StringIO()
    monkeypatch.setattr("sys.stdout", Closed())
    monkeypatch.setattr("sys.stderr", errors)
    model = job / "run" / "lcr" / "model.safetensors"
    cli.main(["recommend", str(model), "--data", str(job / "data")])
    assert errors.closed


def test_a_locale_does_not_change_what_is_written(job, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr(PreparedData, "items", {i: f"ä{i}" for i in range(999)})
    model = job / "run" / "lcr" / "model.safetensors"
    cli.main(["recommend", str(model), "--data", str(job / "data"), "-k", "1"])
    assert "ä".encode() in stream.buffer.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--users", "7", "nobody"], "user 'nobody' is not in the data"),
        (["-k", "0"], "k must be at least 1, got 0"),
    ],
)
def test_recommend_refuses(capsys, job, options, message):
    model = job / "run" / "lcr" / "model.safetensors"
    assert message in fails(capsys, "recommend", model, "--data", job / "data", *options)
