"""Trainer: early stopping, schedules, what is trained, what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch

from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.storage import load_tensors
from lcr_fast.training import trainer as module
from lcr_fast.training.evaluation import rank_model
from lcr_fast.training.objective import OBJECTIVES
from lcr_fast.training.trainer import CHECKPOINT, MODEL, Trainer, make_optimizer
from training_runs import CONFIG, N_UPDATES, KilledError, assert_same_run, die_at, run


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

    def poisoned(self, batch, seed, extras):
        for loss, logs in original(self, batch, seed, extras):
            yield (loss * float("nan") if next(counter) > n else loss), logs

    monkeypatch.setattr(OBJECTIVES[objective], "updates", poisoned)
    with pytest.raises(FloatingPointError, match=r"the loss is nan in epoch 2, step 1"):
        run(make_model, prepared, objective, tmp_path)
    _, info = load_tensors(tmp_path / CHECKPOINT, "checkpoint")
    assert (info["progress"]["epoch"], info["progress"]["step"]) == (1, 0)
    LCRSER.load(tmp_path / MODEL)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weight", [math.nan, 3e38])  # of the latter products overflow
def test_weights_that_diverged_are_named(
    prepared, make_model, tmp_path, monkeypatch, objective, weight
):
    n, original = N_UPDATES[objective], OBJECTIVES[objective].updates
    counter = itertools.count(1)

    def poisoned(self, batch, seed, extras):
        for update in original(self, batch, seed, extras):
            yield update
            if next(counter) == n:  # what the update leaves behind, its own loss being finite
                with torch.no_grad():
                    self.model.head.target_weight.fill_(weight)

    monkeypatch.setattr(OBJECTIVES[objective], "updates", poisoned)
    with pytest.raises(FloatingPointError, match="training diverged after 1 epochs and 0 steps: "):
        run(make_model, prepared, objective, tmp_path)
    _, info = load_tensors(tmp_path / CHECKPOINT, "checkpoint")
    assert (info["progress"]["epoch"], info["progress"]["step"]) == (0, 0)
    assert LCRSER.load(tmp_path / MODEL).head.target_weight.abs().max() < 1e9


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


@pytest.mark.parametrize("objective", ["supervised", "grpo"])
def test_what_is_given_frozen_stays_so(prepared, make_model, tmp_path, objective):
    """Resumed too, bit for bit; another choice is refused."""
    frozen = ("reasoning.", "item_embedding", "head.target_weight")
    config = CONFIG.replace(rl_trainable="all", epochs=1, rl_epochs=1)
    given = make_model(prepared)
    before = {name: p.detach().clone() for name, p in given.named_parameters()}

    def make(frozen=frozen) -> LCRSER:
        model = make_model(prepared)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        return model

    model = make()
    run(make_model, prepared, objective, tmp_path / "whole", config=config, model=model)
    after = load_tensors(tmp_path / "whole" / CHECKPOINT, "checkpoint")[0]
    for name, parameter in model.named_parameters():
        kept = name.startswith(frozen)
        assert parameter.requires_grad != kept, name
        if kept or name == "head.seen_bonus":
            assert kept == torch.equal(after[f"model.{name}"], before[name]), name
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, 2)
        broken = make()
        with pytest.raises(KilledError):
            run(make_model, prepared, objective, tmp_path / "cut", config=config, model=broken)
    assert not broken.reasoning.norm_bias.requires_grad
    assert broken.head.seen_bonus.requires_grad
    run(make_model, prepared, objective, tmp_path / "cut", config=config, model=make(), resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"cannot resume, .*reasoning\.norm_bias.* did not require"
    ):
        run(
            make_model, prepared, objective, tmp_path / "cut", config=config, resume=True,
            model=make(("item_embedding", "head.target_weight")),
        )  # fmt: skip


def test_nothing_left_to_train_is_refused(prepared, make_model, tmp_path):
    model = make_model(prepared)
    for part in (model.reasoning, model.head):
        part.requires_grad_(False)
    config = CONFIG.replace(rl_trainable="reasoning")
    with pytest.raises(ValueError, match="no parameter that grpo trains requires a gradient"):
        Trainer(model, prepared, config, "grpo", tmp_path)


@pytest.mark.parametrize("of", ["model", "teacher"])
def test_a_padding_row_that_is_not_zero_is_refused(prepared, make_model, tmp_path, of):
    models = {name: make_model(prepared) for name in ("model", "teacher")}
    torch.nn.init.ones_(models[of].item_embedding.weight)
    with pytest.raises(ValueError, match=r"row 0 of item_embedding\.weight stands for padding"):
        Trainer(models["model"], prepared, CONFIG, "distill", tmp_path, teacher=models["teacher"])
