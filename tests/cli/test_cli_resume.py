"""``lcr-fast train --resume``: goes on to the same numbers, or refuses."""

import re
import resource
import shutil

import pytest
import torch

from command_line import TINY, fails, rewrite, run
from lcr_fast.experiments.comparison import VARIANTS
from lcr_fast.storage import load_tensors
from lcr_fast.training.trainer import Trainer


def test_a_finished_job_is_read_back(job, monkeypatch):
    before = (job / "run" / "results.csv").read_bytes()
    monkeypatch.setattr(Trainer, "run", None)
    text = run("train", "--data", job / "data", "--out", job / "run", "--resume", *TINY)
    assert text.count("already evaluated") == len(VARIANTS)
    assert (job / "run" / "results.csv").read_bytes() == before


def test_a_stopped_job_resumes_to_the_same_numbers(job, tmp_path, monkeypatch, capsys):
    """Stopped in phase 1 and, resumed, again in phase 2."""
    command = ["train", "--data", job / "data", "--out", tmp_path / "run", *TINY]
    original = Trainer._update
    for objective, *resume in (("supervised",), ("grpo", "--resume")):

        def stop(self, loss, objective=objective):
            if self.name == objective:
                raise KeyboardInterrupt
            original(self, loss)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_update", stop)
            with pytest.raises(SystemExit) as end:
                run(*command, *resume)
        assert end.value.code == 130
        assert "--resume continues" in capsys.readouterr().err
        assert not (tmp_path / "run" / "results.csv").exists()
    run(*command, "--resume")
    for variant in ("base", "tcl", "rl", "control"):
        mine, theirs = (
            load_tensors(folder / variant / "model.safetensors", "model")[0]
            for folder in (tmp_path / "run", job / "run")
        )
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items()), variant
    mine, theirs = (folder / "results.csv" for folder in (tmp_path / "run", job / "run"))
    assert mine.read_bytes() == theirs.read_bytes()


def test_only_what_can_be_resumed_is_said_to(job, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lcr_fast.data.prepared.PreparedData.open", stop)
    with pytest.raises(SystemExit) as end:
        run("inspect", job / "data")
    assert end.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_a_full_disk_ends_in_one_line_and_resumes(capsys, job, second, tmp_path):
    """A limit on the size of files fails as a full disk does, here at the first model."""
    argv = ["--data", job / "data", "--out", tmp_path / "run", *TINY, "--seed", "1"]
    argv += ["--variants", "base"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        line = fails(capsys, "train", *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"run/base/model\.safetensors: File too large$", line)
    assert not any((tmp_path / "run" / "base").iterdir())
    run("train", *argv, "--resume")
    mine, theirs = (folder / "base" / "model.safetensors" for folder in (tmp_path / "run", second))
    assert mine.read_bytes() == theirs.read_bytes()


def test_resume_needs_a_folder(capsys, job):
    assert "--resume needs --out" in fails(capsys, "train", "--data", job / "data", "--resume")


def test_resume_writes_among_no_other_files(capsys, job, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / ".theirs.partial").write_text("what a killed writer of a job leaves looks so")
    argv = ["train", "--data", job / "data", "--out", tmp_path, "--resume", *TINY]
    assert "is not empty, and holds no job to continue" in fails(capsys, *argv)
    assert len(list(tmp_path.iterdir())) == 2


def test_resume_refuses_another_job(capsys, job, tmp_path):
    shutil.copytree(job / "run", tmp_path / "run")
    argv = ["train", "--data", job / "data", "--out", tmp_path / "run", "--resume", *TINY]
    assert "config differs in n_layers" in fails(capsys, *argv, "--n-layers", "2")


def test_resume_goes_on_with_what_has_not_begun(job, second, tmp_path):
    """Phase 2's settings before it begins, and more epochs: as if they had been given at once."""
    out = shutil.copytree(second, tmp_path / "run")
    changes = ["--rl-negatives", "5", "--epochs", "2", "--seed", "1", "--variants", "base"]
    changes += ["--protocols", "sampled"]
    argv = ["--data", job / "data", *TINY, *changes]
    text = run("train", "--out", out, "--resume", *argv)
    assert "resuming with epochs 1 -> 2, rl_negatives 9 -> 5; kept and gone on from: base" in text
    run("train", "--out", tmp_path / "whole", *argv)
    for name in ("base/model.safetensors", "base/ranks.safetensors", "results.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    text = run("train", "--out", out, "--resume", *argv)
    assert "already evaluated" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rl-negatives", "5"], "config differs in rl_negatives"),  # phase 2 has begun
        (["--epochs", "2"], "config differs in epochs"),  # phase 2 has begun from it
        (["--rl-epochs", "0"], "config differs in rl_epochs"),  # one is done
        (["--seed", "4"], "config differs in seed"),
    ],
)
def test_resume_refuses_to_change_what_was_done(capsys, job, tmp_path, options, message):
    out = shutil.copytree(job / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    argv = ["train", "--data", job / "data", "--out", out, "--resume", *TINY, *options]
    assert message in fails(capsys, *argv)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["job.json", "base/evaluation.json", "base/ranks.safetensors"])
def test_damaged_results_are_not_read_back(capsys, job, second, tmp_path, name):
    out = shutil.copytree(second, tmp_path / "run")
    rewrite(out / name, lambda b: b.__setitem__(len(b) * 3 // 4, b[len(b) * 3 // 4] ^ 1))
    argv = ["train", "--data", job / "data", "--out", out, "--resume", *TINY, "--seed", "1"]
    assert f"{name}: " in fails(capsys, *argv, "--variants", "base")
