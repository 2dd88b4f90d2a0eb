"""Trainer: exact resume, early stopping, what is trained, what is logged, what is refused."""

import dataclasses
import itertools
import json
import logging
import signal

import numpy as np
import pytest
import torch

from lcr_fast.config import TrainConfig
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.storage import load_tensors
from lcr_fast.training import trainer as module
from lcr_fast.training.evaluation import rank_model, rank_targets
from lcr_fast.training.objective import OBJECTIVES, Grpo, Supervised, warn_if_sinking
from lcr_fast.training.scorers import model_scorer
from lcr_fast.training.trainer import CHECKPOINT, METRICS, MODEL, Trainer, make_optimizer

# Three steps an epoch, in either phase.
CONFIG = TrainConfig(
    epochs=2, batch_size=100, learning_rate=1e-2, schedule="linear", align_queries=0.2,
    align_items=0.3, align_pairs=30, rl_epochs=2, rl_epoch_size=24, rl_batch_size=8,
    rl_learning_rate=1e-3, rl_negatives=9, n_trajectories=4, noise_scale=0.5, inner_epochs=2,
    action="sampled",
)  # fmt: skip
N_UPDATES = {"supervised": 3, "grpo": 6, "noisy": 6}  # in an epoch


class KilledError(Exception):
    """Stands for the end of the process."""


def run(make_model, data, objective, out, *, seed=0, config=CONFIG, model=None, **options):
    """Train a tiny model and return the trainer."""
    trainer = Trainer(model or make_model(data, seed=seed), data, config, objective, out, **options)
    trainer.run()
    return trainer


def die_at(monkeypatch, update: int) -> None:
    """Let the trainer die in its n-th update, counted from 1."""
    counter, original = itertools.count(1), Trainer._update

    def dying(self, loss):
        if next(counter) == update:
            raise KilledError
        original(self, loss)

    monkeypatch.setattr(Trainer, "_update", dying)


def without_seconds(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def read_metrics(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def assert_same_run(first, second) -> None:
    """Compare two runs' folders, all but their clocks, bit for bit."""
    for name, kind in ((CHECKPOINT, "checkpoint"), (MODEL, "model")):
        (mine, my_info), (theirs, their_info) = (
            load_tensors(out / name, kind) for out in (first, second)
        )
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, theirs[key]), key
        if kind == "checkpoint":
            for info in (my_info, their_info):
                del info["progress"]["seconds"]
                info["progress"]["history"] = without_seconds(info["progress"]["history"])
        assert my_info == their_info
    assert without_seconds(read_metrics(first)) == without_seconds(read_metrics(second))


@pytest.fixture(scope="module")
def whole(prepared, make_model, tmp_path_factory):
    """Folders of uninterrupted runs, by objective."""
    root = tmp_path_factory.mktemp("whole")
    for objective in OBJECTIVES:
        run(make_model, prepared, objective, root / objective)
    return root


# -- resume --------------------------------------------------------------------------------------


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


# -- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "patience", "best"),
    [
        pytest.param([0.3, 0.5, 0.45, 0.5], 2, 1, id="a-tie-is-no-better"),
        pytest.param([0.9, 0.1, 0.2], 2, 0, id="the-start-counts"),
        pytest.param([0.3, 0.5, 0.3], 0, 1, id="no-patience"),
        pytest.param([0.3, 0.3, 0.5, 0.3, 0.3], 2, 2, id="patience-starts-again"),
        pytest.param([0.0, 0.03, 0.0, 0.0, 0.5, 0.3, 0.3], 2, 4, id="a-plateau-at-chance-is-free"),
    ],
)
def test_early_stopping_restores_the_best(
    prepared, make_model, tmp_path, monkeypatch, scores, patience, best
):
    weights, coming = [], iter(scores)

    def scripted(model, *_):
        weights.append({name: t.clone() for name, t in model.state_dict().items()})
        return next(coming)

    monkeypatch.setattr(module, "validation_score", scripted)
    config = CONFIG.replace(epochs=20, patience=patience, select_readout=False)
    trainer = run(make_model, prepared, "supervised", tmp_path, config=config)
    assert next(coming, None) is None
    assert trainer.progress.best == scores[best]
    saved = LCRSER.load(tmp_path / MODEL).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, weights[best][name]), name
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize(
    ("scores", "reason", "warning"),
    [
        ([0.3, 0.5, 0.4, 0.4], "after epoch 3: validation is no better since 2 epochs", None),
        ([0.3, 0.5, 0.4, 0.6], "after epoch 3: the limit of 3 epochs", "was still rising"),
        ([0.3, 0.4, 0.6, 0.5], "after epoch 3: the limit of 3 epochs", None),
        ([0.0, 0.0, 0.01, 0.0], "after epoch 3: the limit of 3 epochs", "never rose above chance"),
    ],
)
def test_the_end_has_a_reason(
    prepared, make_model, tmp_path, monkeypatch, caplog, scores, reason, warning
):
    coming, lines = iter(scores), []
    monkeypatch.setattr(module, "validation_score", lambda *_: next(coming))
    config = CONFIG.replace(epochs=3, patience=2, select_readout=False)
    run(make_model, prepared, "supervised", tmp_path, config=config, report=lines.append)
    assert lines[-1] == f"  supervised stopped {reason}"
    assert [warning in record.message for record in caplog.records] == [True] * bool(warning)


@pytest.mark.parametrize(
    ("objective", "select", "steps", "chosen"),
    [
        ("supervised", True, 2, 0.5),  # of equal scores the larger share
        ("supervised", False, 2, 1.0),
        ("supervised", True, 0, 1.0),
        ("noisy", True, 2, 1.0),
    ],
)
def test_validation_chooses_the_readout(
    prepared, make_model, tmp_path, monkeypatch, objective, select, steps, chosen
):
    scores = {0.0: 0.1, 0.25: 0.3, 0.5: 0.3, 0.75: 0.2, 1.0: 0.25}
    monkeypatch.setattr(module, "validation_score", lambda model, *_: scores[model.config.readout])
    config = CONFIG.replace(epochs=1, rl_epochs=1, select_readout=select)
    model = make_model(prepared, steps=steps)
    trainer = run(make_model, prepared, objective, tmp_path, config=config, model=model)
    assert trainer.model.config.readout == chosen
    assert LCRSER.load(tmp_path / MODEL).config.readout == chosen


def test_a_linear_schedule_ends_near_zero(prepared, make_model, tmp_path, monkeypatch):
    rates, original = [], Trainer._update

    def recorded(self, loss):
        rates.append([group["lr"] for group in self.optimizer.param_groups])
        original(self, loss)

    monkeypatch.setattr(Trainer, "_update", recorded)
    run(make_model, prepared, "supervised", tmp_path, config=CONFIG)
    expected = [CONFIG.learning_rate * (6 - i) / 6 for i in range(6)]
    assert rates == [pytest.approx([rate] * 2) for rate in expected]


def test_small_data_gets_more_epochs(prepared, make_model, tmp_path):
    """Three updates make an epoch; zero epochs stay zero unless updates are asked for."""
    for epochs, updates, expected in ((2, 0, 2), (2, 6, 2), (2, 7, 3), (0, 4, 2), (0, 0, 0)):
        config = CONFIG.replace(epochs=epochs, min_updates=updates)
        trainer = Trainer(make_model(prepared), prepared, config, "supervised", tmp_path)
        assert trainer.schedule.epochs == expected


@pytest.mark.parametrize("kind", ["query", "item"])
def test_alignment_brings_pairs_together(prepared, make_model, tmp_path, kind):
    weights = {"align_queries": 10.0 * (kind == "query"), "align_items": 10.0 * (kind == "item")}
    config = CONFIG.replace(epochs=6, schedule="constant", **weights)
    trainer = run(make_model, prepared, "supervised", tmp_path, config=config)
    losses = [record[f"{kind}_alignment"] for record in trainer.progress.history[1:]]
    assert losses[-1] < losses[0] - 0.1
    other = {"query": "item", "item": "query"}[kind]
    assert f"{other}_alignment" not in trainer.progress.history[1]


def test_the_loss_falls(prepared, make_model, tmp_path):
    config = CONFIG.replace(epochs=6, patience=6, rank_loss="softmax", batch_size=50)
    model = make_model(prepared, dropout=0.0)
    trainer = run(make_model, prepared, "supervised", tmp_path, config=config, model=model)
    history = trainer.progress.history
    assert history[-1]["loss"] < 0.9 * history[1]["loss"]
    for record in history[1:]:
        parts = record["rank_loss"] + 0.1 * record["tcl"]
        parts += 0.2 * record["query_alignment"] + 0.3 * record["item_alignment"]
        assert record["loss"] == pytest.approx(parts)


def losses(make_model, data, out, objective, n_steps, n_users, **changes) -> list[float]:
    """Train from one seed; return the last loss of each mini-batch."""
    config = CONFIG.replace(action="top1", learning_rate=1e-3)
    trainer = Trainer(make_model(data, **changes), data, config, objective, out)
    rng = np.random.default_rng(0)
    return [
        trainer.step(rng.integers(len(trainer.batcher), size=n_users), rng) for _ in range(n_steps)
    ]


@pytest.mark.parametrize(
    ("backend", "objective", "n_steps", "n_users"),
    [
        *(("cpp", objective, 10, 8) for objective in OBJECTIVES),
        ("triton", "supervised", 2, 2),  # interpreted, so small
    ],
)
def test_a_fused_backend_gives_the_reference_its_curve(
    prepared, make_model, tmp_path, backend, objective, n_steps, n_users
):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the model of this test lives on the CPU, which needs the interpreter")
    # A small MLP before training has dead units: scores tie but for rounding, which picks actions.
    shape = {"dim": 32, "ffn_dim": 32, "n_heads": 2, "score": "dot", "seen_bonus": False}
    fused, eager = (
        losses(
            make_model,
            prepared,
            tmp_path / name,
            objective,
            n_steps,
            n_users,
            backend=name,
            **shape,
        )
        for name in (backend, "reference")
    )
    assert fused == pytest.approx(eager, rel=1e-3, abs=1e-5)
    assert len(set(eager)) == n_steps  # the weights, and so the losses, do move


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    prepared, make_model, tmp_path, monkeypatch, objective
):
    n, original = N_UPDATES[objective], OBJECTIVES[objective].updates
    counter = itertools.count(1)

    def poisoned(self, batch, seed):
        for loss, logs in original(self, batch, seed):
            yield (loss * float("nan") if next(counter) > n else loss), logs

    monkeypatch.setattr(OBJECTIVES[objective], "updates", poisoned)
    with pytest.raises(FloatingPointError, match=r"the loss is nan in epoch 2, step 1"):
        run(make_model, prepared, objective, tmp_path)
    _, info = load_tensors(tmp_path / CHECKPOINT, "checkpoint")
    assert (info["progress"]["epoch"], info["progress"]["step"]) == (1, 0)
    LCRSER.load(tmp_path / MODEL)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_metrics_agree_with_the_checkpoint(whole, objective):
    _, info = load_tensors(whole / objective / CHECKPOINT, "checkpoint")
    records = read_metrics(whole / objective)
    assert records == info["progress"]["history"]
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert max(record["valid_ndcg@5"] for record in records) == info["progress"]["best"]


def test_every_user_needs_enough_unseen_items(prepared):
    """The fewest unseen items of a training sample, target apart, are the most negatives."""
    samples = prepared.split("train")
    left = min(
        prepared.n_items - len(seen_by(prepared, u, t) | {int(i)})
        for u, i, t in zip(samples.users, samples.items, samples.times, strict=True)
    )
    module.check_trainable(prepared, CONFIG.replace(rl_negatives=left), OBJECTIVES)
    with pytest.raises(ValueError, match=f"rl_negatives must be at most {left} for this data"):
        module.check_trainable(prepared, CONFIG.replace(rl_negatives=left + 1), OBJECTIVES)
    module.check_trainable(prepared, CONFIG.replace(rl_negatives=left + 1), ["supervised"])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_no_negatives_are_refused(prepared, make_model, tmp_path, split):
    """One candidate would be ranked first by every model."""
    name = f"{split}_negatives"
    none = PreparedData(prepared.arrays | {name: prepared.arrays[name][:, :0]}, prepared.manifest)
    refused = {
        "valid": lambda: run(make_model, none, "supervised", tmp_path / "run"),
        "test": lambda: rank_model(make_model(none), none),
    }[split]
    with pytest.raises(ValueError, match="no evaluation negatives, among which every model"):
        refused()
    assert not (tmp_path / "run").exists()
    assert "sampled" not in rank_model(make_model(none), none, protocols=["catalogue"]).by_protocol


def test_nothing_to_train_on(prepared, make_model, tmp_path):
    arrays = {
        name: array[:0] if name.startswith("train_") and name != "train_target_count" else array
        for name, array in prepared.arrays.items()
    }
    with pytest.raises(ValueError, match="no training samples"):
        run(make_model, PreparedData(arrays, {}), "supervised", tmp_path)


# -- what is trained -----------------------------------------------------------------------------


def test_weight_decay_touches_dense_weights_only(prepared, make_model, tmp_path):
    """The first update's gradient knows nothing of decay, so only decayed weights may differ."""
    config = CONFIG.replace(epochs=1, batch_size=10_000, tcl_weight=0.0)
    states = {}
    for decay in (0.0, 0.5):
        out = tmp_path / str(decay)
        model = make_model(prepared)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.fill_(0.1)  # decay of 0 shows nothing
        decayed = config.replace(weight_decay=decay)
        run(make_model, prepared, "supervised", out, config=decayed, model=model)
        states[decay] = load_tensors(out / CHECKPOINT, "checkpoint")[0]
    for name, _ in make_model(prepared).named_parameters():
        spared = any(part in name for part in ("embedding", "position", "bias", "norm", "bonus"))
        same = torch.equal(*(state[f"model.{name}"] for state in states.values()))
        assert same == spared, name


def test_embedding_rows_that_no_batch_touches_stay(prepared, make_model, tmp_path):
    sizes = {"n_items": prepared.n_items, "n_users": prepared.n_users, "n_terms": prepared.n_terms}
    model = make_model(
        prepared, item_text_dim=0, query_text_dim=0, **{k: n + 3 for k, n in sizes.items()}
    )
    tables = {"item": sizes["n_items"], "user": sizes["n_users"], "query": sizes["n_terms"]}
    before = {name: getattr(model, f"{name}_embedding").weight.clone() for name in tables}
    run(make_model, prepared, "supervised", tmp_path, model=model,
        config=CONFIG.replace(weight_decay=0.5))  # fmt: skip
    after = load_tensors(tmp_path / CHECKPOINT, "checkpoint")[0]
    for name, n in tables.items():
        trained = after[f"model.{name}_embedding.weight"]
        assert torch.equal(trained[n + 1 :], before[name][n + 1 :]), name
        assert not torch.equal(trained[1 : n + 1], before[name][1 : n + 1]), name
        assert not trained[0].any(), name


def test_the_optimizer_numbers_parameters_as_it_names_them(prepared, make_model):
    model = make_model(prepared)
    optimizer, names = make_optimizer(list(model.named_parameters()), 0.1, 0.2)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    named = dict(model.named_parameters())
    assert sorted(names) == sorted(named)
    assert all(named[name] is p for name, p in zip(names, held, strict=True))


@pytest.mark.parametrize("objective", ["grpo", "noisy"])
@pytest.mark.parametrize("trainable", ["reasoning", "all"])
def test_phase_2_trains_what_it_is_told_to(prepared, make_model, tmp_path, objective, trainable):
    config = CONFIG.replace(rl_trainable=trainable, rl_epochs=1)
    model = make_model(prepared, step_embedding=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(make_model, prepared, objective, tmp_path, config=config, model=model)
    after = load_tensors(tmp_path / CHECKPOINT, "checkpoint")[0]
    for name, parameter in model.named_parameters():
        if trainable == "all" or name.startswith(("reasoning.", "step_embedding", "head.")):
            assert not torch.equal(after[f"model.{name}"], before[name]), name
        else:
            assert torch.equal(after[f"model.{name}"], before[name]), name
            assert parameter.grad is None, name
        assert parameter.requires_grad, name


# -- objectives ----------------------------------------------------------------------------------


def make_objective(make_model, data, kind, **changes):
    model = make_model(data)
    batcher = module.make_batcher(data, "train", model)
    objective = kind(model, batcher, CONFIG.replace(**changes))
    return objective, objective.batch(np.arange(0, 288, 6), np.random.default_rng(0))


def test_in_batch_negatives_are_the_unseen_targets_of_others(prepared, make_model):
    objective, batch = make_objective(make_model, prepared, Supervised, negatives="in_batch")
    samples = objective.batcher.samples
    rows = batch.row.tolist()
    targets = [int(samples.items[row]) for row in rows]
    assert batch.candidates[:, 0].tolist() == targets
    assert batch.target.tolist() == [0] * len(rows)
    hidden = 0
    for row, candidates in zip(rows, batch.candidates[:, 1:].tolist(), strict=True):
        user, time = samples.users[row], samples.times[row]
        seen = seen_by(prepared, user, time) | {int(samples.items[row])}
        assert candidates == [0 if item in seen else item for item in targets]
        hidden += candidates.count(0) - 1
    assert hidden > len(rows)  # the test has seen items to hide


def seen_by(data, user, time) -> set[int]:
    """Walk through a user's events and clicks before a time."""
    seen = {
        int(data.rec_items[i])
        for i in range(data.rec_offsets[user], data.rec_offsets[user + 1])
        if data.rec_times[i] < time
    }
    for search in range(data.search_offsets[user], data.search_offsets[user + 1]):
        for i in range(data.click_offsets[search], data.click_offsets[search + 1]):
            if data.click_times[i] < time:
                seen.add(int(data.click_items[i]))
    return seen


@pytest.mark.parametrize("negatives", ["popularity", "uniform", "in_batch"])
@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_negatives_are_unseen(prepared, make_model, kind, negatives):
    objective, batch = make_objective(make_model, prepared, kind, negatives=negatives)
    samples = objective.batcher.samples
    for row, candidates in zip(batch.row.tolist(), batch.candidates.tolist(), strict=True):
        seen = seen_by(prepared, samples.users[row], samples.times[row])
        assert not seen.intersection(candidates[1:])
        assert samples.items[row] not in candidates[1:]
        if kind is not Supervised:
            assert len(set(candidates)) == len(candidates) == 10


@pytest.mark.parametrize("kl", ["exact", "k3"])
@pytest.mark.parametrize("action", ["top1", "sampled", "target"])
def test_grpo_starts_at_the_reference(prepared, make_model, action, kl):
    objective, batch = make_objective(
        make_model, prepared, Grpo, action=action, kl=kl, rl_learning_rate=0.1
    )
    optimizer, _ = make_optimizer(objective.parameters(), 0.1, 0.0)
    updates = objective.updates(batch, 5)
    loss, logs = next(updates)
    assert set(logs) == {
        "reward", "signal", "kl", "surrogate", "entropy", "clipped", "target_cosine", "silent_pull",
    }  # fmt: skip
    assert logs["kl"] == logs["clipped"] == 0
    assert 0 < logs["entropy"] < np.log(10)
    assert 0 < logs["reward"] < 1
    assert 0 < logs["signal"] <= 1
    assert abs(logs["target_cosine"]) <= 1.0001
    loss.backward()
    optimizer.step()
    _, logs = next(updates)
    assert logs["kl"] > 0
    assert 0 <= logs["clipped"] <= 1
    assert "target_cosine" not in logs
    assert next(updates, None) is None


@pytest.mark.parametrize("trainable", ["reasoning", "all"])
def test_grpo_leaves_its_reference_alone(prepared, make_model, tmp_path, trainable):
    model = make_model(prepared)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    config = CONFIG.replace(rl_trainable=trainable)
    run(make_model, prepared, "grpo", tmp_path, model=model, config=config)
    after = load_tensors(tmp_path / CHECKPOINT, "checkpoint")[0]
    kept = {n.removeprefix("reference."): t for n, t in after.items() if "reference." in n}
    own = [n for n in before if trainable == "all" or n.startswith(("reasoning.", "head."))]
    assert sorted(kept) == sorted(own)
    assert all(torch.equal(t, before[name]) for name, t in kept.items())


@pytest.mark.parametrize("trainable", ["reasoning", "all"])
def test_the_reference_shares_what_is_not_trained(prepared, make_model, trainable):
    objective, _ = make_objective(make_model, prepared, Grpo, rl_trainable=trainable)
    theirs = dict(objective.reference.named_parameters())
    trained = {name for name, _ in objective.parameters()}
    for name, parameter in objective.model.named_parameters():
        assert (theirs[name] is parameter) == (name not in trained), name
    assert objective.model.item_text is not None
    assert objective.reference.item_text is objective.model.item_text


@pytest.mark.parametrize("kind", [Grpo, OBJECTIVES["noisy"]])
@pytest.mark.parametrize(("trainable", "n"), [("reasoning", 1), ("all", None)])
def test_a_frozen_encoder_runs_once_a_batch(prepared, make_model, monkeypatch, kind, trainable, n):
    """Policy, old and reference policies share h^(0) and item vectors, out of the graph."""
    objective, batch = make_objective(
        make_model, prepared, kind, rl_trainable=trainable, inner_epochs=3
    )
    encoded, rolled = [], []
    encode, rollout = LCRSER.encode, LCRSER.rollout

    def counted_encode(self, batch):
        encoded.append(encode(self, batch))
        return encoded[-1]

    def counted_rollout(self, h0, *args):
        rolled.append(self)
        assert self is objective.model or not any(x.requires_grad for x in h0)
        return rollout(self, h0, *args)

    monkeypatch.setattr(LCRSER, "encode", counted_encode)
    monkeypatch.setattr(LCRSER, "rollout", counted_rollout)
    for _ in objective.updates(batch, 5):
        pass
    n_references = int(kind is Grpo)
    assert rolled.count(objective.reference) == n_references
    assert len(rolled) == 3 + n_references
    assert len(encoded) == (n or 3 + n_references)
    assert any(h[0].requires_grad for h in encoded) == (trainable == "all")


# -- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_low_precision_is_near_float32(prepared, make_model, kind):
    losses, gradients = {}, {}
    for precision in ("float32", "bfloat16"):
        changes = {"precision": precision, "rl_trainable": "all"}
        objective, batch = make_objective(make_model, prepared, kind, **changes)
        losses[precision] = []
        for loss, logs in objective.updates(batch, 5):
            assert loss.dtype == torch.float32
            losses[precision].append(logs.get("kl", loss.item()))
        loss.backward()
        found = [p.grad for _, p in objective.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in found)
        gradients[precision] = torch.cat([g.flatten() for g in found])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02, abs=1e-4)
    if kind is not Grpo:  # whose gradient jumps with its actions
        cosine = torch.cosine_similarity(*gradients.values(), dim=0)
        assert cosine > 0.99
        assert not torch.equal(*gradients.values())


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


@pytest.mark.parametrize(
    ("action", "sinks"), [("target", True), ("top1", False), ("sampled", False)]
)
def test_the_alarm_tells_a_target_that_sinks(prepared, make_model, tmp_path, caplog, action, sinks):
    config = CONFIG.replace(
        action=action, rl_epochs=1, inner_epochs=1, rl_epoch_size=96, rl_batch_size=96,
        noise_scale=1.0, rl_negatives=4, n_trajectories=8,
    )  # fmt: skip
    caplog.set_level(logging.WARNING, logger="lcr_fast")
    history = run(make_model, prepared, "grpo", tmp_path, config=config).progress.history
    assert (history[1]["target_cosine"] < -0.1) == sinks
    warned = [r for r in caplog.records if "lowers the target's probability" in r.message]
    assert len(warned) == sinks


@pytest.mark.parametrize(
    ("logs", "n"), [({"target_cosine": 0.1}, 0), ({}, 0), ({"target_cosine": -0.1}, 1)]
)
def test_warn_if_sinking(caplog, logs, n):
    warn_if_sinking(logs)
    assert len(caplog.records) == n
