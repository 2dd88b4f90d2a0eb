"""What commands refuse: damaged data and models, and what is of other data."""

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path

import pytest

from command_line import TINY, WORLD, fails, is_untouched, rewrite, run
from lcr_fast.training.ranks import RANKS, Ranks


@pytest.fixture(scope="session")
def other_data(job):
    """Prepare the same log with other negatives: data of the same size."""
    run("prepare", "synthetic", job / "world.json", job / "other", "--seed", "5")
    return job / "other"


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_a_model_knows_its_data(capsys, job, other_data, command):
    argv = [command, job / "run" / "lcr" / "model.safetensors", "--data", other_data]
    assert "it is of other prepared data (--any-data" in fails(capsys, *argv)
    assert len(run(*argv, "--any-data").splitlines()) > 9


def test_a_job_knows_its_data(capsys, job, second, other_data, tmp_path):
    out = shutil.copytree(second, tmp_path / "run")
    argv = ["train", "--data", other_data, "--out", out, "--resume", *TINY, "--seed", "1"]
    argv += ["--variants", "base", "--protocols", "sampled"]
    assert "cannot resume, it is of other prepared data" in fails(capsys, *argv)
    for name in ("job.json", "base/evaluation.json"):
        (out / name).unlink()
        assert "cannot resume, it is of other prepared data" in fails(capsys, *argv)
    assert "1 target + 99" in run(*argv, "--any-data")


def test_runs_know_their_data(capsys, job, second, tmp_path):
    ranks = Ranks.load(job / "run" / "base" / RANKS)
    dataclasses.replace(ranks, data="other").save(tmp_path / "other" / RANKS)
    argv = ["compare", second / "base", tmp_path / "other"]
    assert "it is of other prepared data" in fails(capsys, *argv)
    assert run(*argv, "--any-data").count("| model ") == 4


@pytest.mark.parametrize("command", ["train", "evaluate", "recommend"])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda d: rewrite(d / "rec_items.npy", lambda b: b.__setitem__(-4, b[-4] ^ 1)),
            "checksum",
        ),
        (lambda d: rewrite(d / "rec_items.npy", lambda b: b.__delitem__(-4)), "rec_items.npy"),
        (lambda d: (d / "rec_items.npy").unlink(), "rec_items.npy: missing"),
        (lambda d: (d / "manifest.json").unlink(), "is not prepared data"),
    ],
)
def test_damaged_data_is_refused(capsys, job, tmp_path, command, break_it, message):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(job / "data", data)
    break_it(data)
    model = job / "run" / "lcr" / "model.safetensors"
    argv = ["--out", out, *TINY] if command == "train" else [model]
    assert message in fails(capsys, command, *argv, "--data", data)
    assert is_untouched(out)


@pytest.mark.parametrize(("command", "flag"), [("export", "-o"), ("evaluate", "--csv")])
def test_what_is_written_takes_no_models_place(capsys, job, command, flag):
    model = job / "run" / "lcr" / "model.safetensors"
    before = model.read_bytes()
    beside = model.parent / ".." / "lcr" / model.name
    argv = [command, model, "--data", job / "data", flag, beside]
    assert "the model that is read; name another file" in fails(capsys, *argv)
    assert model.read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "rec_items.npy"])
def test_a_file_that_may_not_be_read_is_said_to_be_there(capsys, job, monkeypatch, name):
    def refusing(original):
        def opened(path, *arguments, **options):
            if str(path).endswith(name):  # whose permissions would stop nobody who is root
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return original(path, *arguments, **options)

        return opened

    monkeypatch.setattr(Path, "open", refusing(Path.open))
    monkeypatch.setattr("builtins.open", refusing(open))  # numpy's
    model = job / "run" / "lcr" / "model.safetensors"
    line = fails(capsys, "evaluate", model, "--data", job / "data")
    assert re.search(rf"{name}: (cannot be read: )?Permission denied$", line)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_data_without_test_samples_is_refused(capsys, job, tmp_path, command):
    world = job / "world.json"
    run("prepare", "synthetic", world, tmp_path / "data", "--min-targets", "99")
    out, model = tmp_path / "out", job / "run" / "lcr" / "model.safetensors"
    argv = ["--out", out, *TINY] if command == "train" else [model, "--csv", out, "--any-data"]
    assert "no test samples" in fails(capsys, command, *argv, "--data", tmp_path / "data")
    assert is_untouched(out)


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda m: rewrite(m, lambda b: b.__delitem__(slice(-100, None))),
            "not a complete safeten",
        ),
        (lambda m: m.write_text("weights"), "not a complete safetensors file"),
        (lambda m: m.unlink(), "no such file"),
        (lambda m: (m.unlink(), m.mkdir()), "model.safetensors: a folder; expected a model file"),
        (lambda m: rewrite(m, lambda b: b.__setitem__(-9, b[-9] ^ 1)), "damaged, its content"),
        (lambda m: shutil.copy(m.parent / "checkpoint.safetensors", m), "not a model file"),
    ],
)
def test_damaged_models_are_refused(capsys, job, tmp_path, command, break_it, message):
    folder = shutil.copytree(job / "run" / "lcr", tmp_path / "lcr")
    model = folder / "model.safetensors"
    break_it(model)
    assert message in fails(capsys, command, model, "--data", job / "data")


def test_a_model_of_other_data_is_refused(capsys, job, tmp_path):
    world = dataclasses.replace(WORLD, n_topics=18)
    (tmp_path / "world.json").write_text(json.dumps(dataclasses.asdict(world)))
    run("prepare", "synthetic", tmp_path / "world.json", tmp_path / "data")
    model = job / "run" / "lcr" / "model.safetensors"
    line = fails(capsys, "evaluate", model, "--data", tmp_path / "data")
    assert re.search(r"the model knows \d+ items, the data has \d+", line)
