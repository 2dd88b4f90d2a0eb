"""Runs that were killed, stopped or finished: they go on bit for bit, or are refused."""

import dataclasses
import itertools
import shutil
import signal

import pytest
import torch

from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.storage import load_tensors, save_tensors
from lcr_fast.training import trainer as module
from lcr_fast.training.evaluation import rank_targets
from lcr_fast.training.objective import OBJECTIVES
from lcr_fast.training.scorers import model_scorer
from lcr_fast.training.trainer import CHECKPOINT, METRICS, MODEL, Trainer
from training_runs import CONFIG, N_UPDATES, KilledError, assert_same_run, die_at, read_metrics, run


@pytest.fixture(scope="module")
def whole(prepared, make_model, tmp_path_factory):
    """Folders of uninterrupted runs, by objective."""
    root = tmp_path_factory.mktemp("whole")
    for objective in OBJECTIVES:
        run(make_model, prepared, objective, root / objective)
    return root


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("epochs", "update", "seconds"),
    [
        pytest.param(0, 1, -1.0, id="first-step"),
        pytest.param(0, 3, -1.0, id="mid-epoch"),
        pytest.param(0, 3, 1e9, id="mid-epoch-without-a-checkpoint-in-it"),
        pytest.param(1, 1, 1e9, id="between-epochs"),
        pytest.param(1, 2, -1.0, id="second-epoch"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(
    prepared, make_model, whole, tmp_path, monkeypatch, objective, epochs, update, seconds
):
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", seconds)
    with monkeypatch.context() as patch:
        die_at(patch, epochs * N_UPDATES[objective] + update)
        with pytest.raises(KilledError):
            run(make_model, prepared, objective, tmp_path)
    # Another starting model: all that counts must come from the checkpoint.
    run(make_model, prepared, objective, tmp_path, seed=9, resume=True)
    assert_same_run(tmp_path, whole / objective)


@pytest.mark.parametrize("objective", ["supervised", "grpo"])
def test_workers_assemble_the_same_batches(
    prepared, make_model, whole, tmp_path, monkeypatch, objective
):
    """A run may begin without and go on with some."""
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(KilledError):
            run(make_model, prepared, objective, tmp_path)
    with monkeypatch.context() as patch:
        die_at(patch, N_UPDATES[objective])
        config = CONFIG.replace(workers=2)
        with pytest.raises(KilledError):
            run(make_model, prepared, objective, tmp_path, resume=True, config=config)
    config = CONFIG.replace(workers=1)
    run(make_model, prepared, objective, tmp_path, resume=True, config=config)
    assert_same_run(tmp_path, whole / objective)


@pytest.mark.parametrize("name", [CHECKPOINT, MODEL, METRICS])
@pytest.mark.parametrize("validation", [1, 3])
def test_a_run_killed_between_two_files_resumes(
    prepared, make_model, whole, tmp_path, monkeypatch, name, validation
):
    counter, original = itertools.count(1), module.Path.replace

    def dying(self, target):
        if target.name == name and next(counter) == validation:
            raise KilledError
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.Path, "replace", dying)
        try:
            run(make_model, prepared, "supervised", tmp_path)
        except KilledError:
            pass
        else:
            assert name == MODEL  # written at a new best only
    run(make_model, prepared, "supervised", tmp_path, resume=True)
    assert_same_run(tmp_path, whole / "supervised")


_CHILD = """
import os, signal
from pathlib import Path

import torch
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data.prepared import PreparedData
from lcr_fast.training.models import attach_text
from lcr_fast.model import LCRSER
from lcr_fast.storage import load_tensors
from lcr_fast.training import trainer

torch.set_num_threads(1)  # as in the run it is compared with: sums depend on the threads
data, start, config, out = {arguments}
data = PreparedData.open(data)
model = attach_text(LCRSER.load(start), data)
trainer._CHECKPOINT_SECONDS = -1.0
writes, original = [], Path.replace

def dying(self, target):
    writes.append(target.name)
    if writes.count("checkpoint.safetensors") == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, target)

Path.replace = dying
trainer.Trainer(model, data, TrainConfig.from_json(config), "supervised", out).run()
"""


def test_sigkill_leaves_files_that_load_and_resume(
    run_code, prepared, prepared_folder, make_model, whole, tmp_path
):
    start, out = tmp_path / "start.safetensors", tmp_path / "run"
    make_model(prepared).save(start)
    arguments = [str(prepared_folder), str(start), CONFIG.to_json(), str(out)]
    done = run_code(_CHILD.format(arguments=arguments))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert isinstance(LCRSER.load(out / MODEL), LCRSER)
    _, info = load_tensors(out / CHECKPOINT, "checkpoint")
    assert (info["progress"]["epoch"], info["progress"]["step"]) == (0, 1)
    run(make_model, prepared, "supervised", out, seed=9, resume=True)
    assert_same_run(out, whole / "supervised")


def test_a_finished_run_is_read_back(prepared, make_model, whole, monkeypatch):
    monkeypatch.setattr(Trainer, "_update", None)
    monkeypatch.setattr(module, "validation_score", None)
    trainer = run(make_model, prepared, "supervised", whole / "supervised", seed=9, resume=True)
    best, _ = load_tensors(whole / "supervised" / MODEL, "model")
    assert all(torch.equal(t, best[name]) for name, t in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("objective", "train", "model", "message"),
    [
        ("noisy", {}, {}, "cannot resume noisy, the checkpoint is of supervised"),
        ("supervised", {"tcl_weight": 0.5, "seed": 3}, {}, "train config differs in seed, tcl_we"),
        ("supervised", {}, {"n_heads": 1}, "model config differs in n_heads"),
    ],
)
def test_resume_refuses_another_run(prepared, make_model, whole, objective, train, model, message):
    config = CONFIG.replace(**train)
    with pytest.raises(ValueError, match=message):
        Trainer(
            make_model(prepared, **model),
            prepared,
            config,
            objective,
            whole / "supervised",
            resume=True,
        )


def test_a_run_from_before_a_field_was_there_resumes(prepared, make_model, whole, tmp_path):
    """It is as if the field had had its default."""
    out = tmp_path / "run"
    shutil.copytree(whole / "supervised", out)
    tensors, info = load_tensors(out / CHECKPOINT, "checkpoint")
    for section, field in (("model", "max_terms"), ("train", "silent_groups")):
        del info[section][field]
    save_tensors(out / CHECKPOINT, "checkpoint", tensors, info)
    run(make_model, prepared, "supervised", out, seed=9, resume=True)
    with pytest.raises(ValueError, match="model config differs in max_terms"):
        Trainer(make_model(prepared, max_terms=3), prepared, CONFIG, "supervised", out, resume=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_finished_run_goes_on_when_it_may(prepared, make_model, tmp_path, objective):
    """More epochs later are more epochs at once, bit for bit, where no learning rate falls."""
    config = CONFIG.replace(schedule="constant", patience=9)
    short = config.replace(**{"epochs" if objective == "supervised" else "rl_epochs": 1})
    run(make_model, prepared, objective, tmp_path / "run", config=short)
    again = {"seed": 9, "config": config, "resume": True}
    run(make_model, prepared, objective, tmp_path / "run", **again)
    run(make_model, prepared, objective, tmp_path / "whole", config=config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_more_patience_lets_a_stopped_run_go_on(prepared, make_model, tmp_path, monkeypatch):
    scores = [0.9, *[0.5] * 9]
    config = CONFIG.replace(epochs=5, patience=2, schedule="constant", select_readout=False)
    for patience, n_epochs in ((2, 2), (3, 3), (1, 3)):
        monkeypatch.setattr(module, "validation_score", lambda *_: scores.pop(0))
        changed = config.replace(patience=patience)
        trainer = run(make_model, prepared, "supervised", tmp_path, config=changed, resume=True)
        assert trainer.progress.epoch == n_epochs


@pytest.mark.parametrize(
    ("objective", "saved", "changes", "conflicts"),
    [
        ("supervised", {}, {"rl_negatives": 5, "reward": "mrr"}, []),
        ("supervised", {}, {"epochs": 9, "patience": 9}, []),
        ("supervised", {}, {"epochs": 2}, []),
        ("supervised", {}, {"epochs": 1}, ["epochs"]),  # the second has begun
        ("supervised", {"schedule": "linear"}, {"epochs": 9, "patience": 1}, ["epochs"]),
        ("supervised", {}, {"seed": 7, "valid_metric": "mrr"}, ["seed", "valid_metric"]),
        ("grpo", {}, {"rl_epochs": 3}, []),
        ("grpo", {}, {"rl_epochs": 1, "rl_negatives": 5}, ["rl_negatives", "rl_epochs"]),
    ],
)
def test_only_what_lies_ahead_may_change(objective, saved, changes, conflicts):
    train = CONFIG.replace(schedule="constant").replace(**saved).to_dict()
    progress = dataclasses.asdict(module.Progress(epoch=1, step=2))
    info = {"objective": objective, "train": train, "progress": progress}
    assert module.resume_conflicts(info, {**train, **changes}) == conflicts


def test_a_checkpoint_knows_its_data(prepared, make_model, whole):
    other = PreparedData(prepared.arrays, {**prepared.manifest, "fingerprint": "other"})
    options = {"resume": True, "config": CONFIG}
    with pytest.raises(ValueError, match=r"it is of other prepared data \(--any-data"):
        run(make_model, other, "supervised", whole / "supervised", **options)
    run(make_model, other, "supervised", whole / "supervised", **options, any_data=True)


def test_any_metric_may_choose(prepared, make_model, tmp_path):
    config = CONFIG.replace(valid_metric="0.5*hr@3+mrr")
    trainer = run(make_model, prepared, "supervised", tmp_path, config=config)
    ranks = rank_targets(model_scorer(trainer.model), trainer.validation, "sampled")
    expected = (0.5 * (ranks <= 3) + 1 / ranks).mean()
    assert trainer.progress.best == pytest.approx(expected)
    scores = [record["valid_0.5*hr@3+mrr"] for record in trainer.progress.history]
    assert max(scores) == trainer.progress.best


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_seed_names_a_run(prepared, make_model, whole, tmp_path, objective):
    run(make_model, prepared, objective, tmp_path / "same")
    assert_same_run(tmp_path / "same", whole / objective)
    run(make_model, prepared, objective, tmp_path / "other", config=CONFIG.replace(seed=1))
    mine, theirs = (
        load_tensors(out / CHECKPOINT, "checkpoint")[0]
        for out in (tmp_path / "other", whole / objective)
    )
    name = "model.head.mlp_weights.0"
    assert not torch.equal(mine[name], theirs[name])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_metrics_agree_with_the_checkpoint(whole, objective):
    _, info = load_tensors(whole / objective / CHECKPOINT, "checkpoint")
    records = read_metrics(whole / objective)
    assert records == info["progress"]["history"]
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert max(record["valid_ndcg@5"] for record in records) == info["progress"]["best"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_low_precision_run_keeps_float32_weights_and_resumes(
    prepared, make_model, tmp_path, monkeypatch, objective
):
    config = CONFIG.replace(precision="bfloat16")
    run(make_model, prepared, objective, tmp_path / "whole", config=config)
    tensors, _ = load_tensors(tmp_path / "whole" / CHECKPOINT, "checkpoint")
    assert all(t.dtype == torch.float32 for t in tensors.values())
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        die_at(patch, N_UPDATES[objective] + 2)
        with pytest.raises(KilledError):
            run(make_model, prepared, objective, tmp_path / "killed", config=config)
    run(make_model, prepared, objective, tmp_path / "killed", seed=9, config=config, resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
