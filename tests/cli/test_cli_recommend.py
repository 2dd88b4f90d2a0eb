"""``lcr-fast recommend``: its lists, and where they go."""

import csv
import io
from types import SimpleNamespace

import polars as pl
import pytest
import torch

from command_line import WORLD, run
from graphs import Recorded
from lcr_fast import cli
from lcr_fast.capture import capture_recommender
from lcr_fast.cli.arguments import captured
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


def test_captured_recommendations_are_those_of_plain_calls(job, monkeypatch):
    def replaying(arguments, model, largest):
        assert arguments.capture
        return capture_recommender(model, (3, 9), graph=Recorded)

    arguments = ("recommend", job / "run" / "lcr" / "model.safetensors", "--data", job / "data")
    plain = list(csv.reader(run(*arguments).splitlines()))
    monkeypatch.setattr("lcr_fast.cli.recommend.captured", replaying)
    found = list(csv.reader(run(*arguments).splitlines()))
    assert [row[:3] for row in found] == [row[:3] for row in plain]
    scores = [[float(row[3]) for row in rows[1:]] for rows in (found, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.fixture
def on_gpu(monkeypatch):
    """Something that says it is a model on a GPU, and what is captured of it."""
    sizes = []

    def capture(model, batch_sizes):
        sizes.append(list(batch_sizes))
        return SimpleNamespace(memory_bytes=12_345_678)

    monkeypatch.setattr("lcr_fast.capture.capture_recommender", capture)
    weight = SimpleNamespace(device=torch.device("cuda"))
    return SimpleNamespace(exits=None, head=SimpleNamespace(target_weight=weight)), sizes


def test_a_model_on_a_gpu_is_captured_unless_told_otherwise(on_gpu, capsys):
    model, sizes = on_gpu
    asked, told = SimpleNamespace(capture=True), SimpleNamespace(capture=False)
    assert captured(asked, model, 256).memory_bytes == 12_345_678
    assert captured(asked, model, 8) is not None
    assert sizes == [[1, 8, 64, 256], [1, 8]]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "captured batches of 1, 8, 64, 256: 12 MB of GPU memory"
    assert captured(told, model, 256) is None
    model.exits = object()
    assert captured(asked, model, 256) is None
    model.exits, model.head.target_weight.device = None, torch.device("cpu")
    assert captured(asked, model, 256) is None
    assert len(sizes) == 2


def test_what_cannot_be_captured_names_the_way_out(on_gpu, monkeypatch):
    def capture(model, batch_sizes):
        raise RuntimeError("this model cannot be captured: no")

    monkeypatch.setattr("lcr_fast.capture.capture_recommender", capture)
    with pytest.raises(ValueError, match="cannot be captured: no; --no-capture does without"):
        captured(SimpleNamespace(capture=True), on_gpu[0], 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--users", "7", "nobody"], "user 'nobody' is not in the data"),
        (["-k", "0"], "k must be at least 1, got 0"),
        (["-k", str(2**64)], f"k must be at most {2**31 - 1}, got {2**64}"),
        (["--threads", "100000"], "--threads must be in 1..4096, got 100000"),
    ],
)
def test_recommend_refuses(capsys, job, options, message):
    model = job / "run" / "lcr" / "model.safetensors"
    with pytest.raises(SystemExit) as end:
        cli.main(["recommend", str(model), "--data", str(job / "data"), *options])
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert message in err
    assert not out  # not even the names of the columns


def test_lists_longer_than_the_catalogue_take_no_memory(job):
    argv = ["recommend", job / "run" / "lcr" / "model.safetensors", "--data", job / "data"]
    argv += ["--users", "7", "-k"]
    assert run(*argv, 2**31 - 1) == run(*argv, 1000)
    assert run(*argv, 2**31 - 1, "--budget-ms", "1e9") == run(*argv, 1000)


def test_scores_that_are_no_numbers_leave_no_file_of_names_alone(capsys, job, monkeypatch):
    def fail(*arguments):
        raise ValueError("user 0 of the batch has a NaN score")

    monkeypatch.setattr("lcr_fast.model.LCRSER.best_items", fail)
    model = job / "run" / "lcr" / "model.safetensors"
    with pytest.raises(SystemExit):
        cli.main(["recommend", str(model), "--data", str(job / "data")])
    assert not capsys.readouterr().out
