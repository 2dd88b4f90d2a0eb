"""What the trainer draws and when, what it clips and how far it steps, and what selection reads."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lcr_fast.config import TrainConfig
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.training import trainer as module
from lcr_fast.training.evaluation import make_batcher, rank_targets
from lcr_fast.training.objective import OBJECTIVES
from lcr_fast.training.ranks import rank_metrics
from lcr_fast.training.scorers import model_scorer
from lcr_fast.training.trainer import Trainer

# Three steps an epoch, in either phase; no epoch is the last for want of progress.
CONFIG = TrainConfig(
    epochs=3, batch_size=100, learning_rate=1e-3, rl_epochs=3, rl_epoch_size=24, rl_batch_size=8,
    rl_learning_rate=1e-4, rl_negatives=9, n_trajectories=3, noise_scale=0.5, inner_epochs=2,
    action="sampled", patience=9, tcl_weight=0.0,
)  # fmt: skip
PHASE_2 = ["grpo", "noisy"]


class Draw(NamedTuple):
    """What one mini-batch was given."""

    epoch: int
    rows: tuple[int, ...]
    candidates: list[list[int]]
    seed: int


def draws_of(monkeypatch, make_model, data, objective, out, **changes) -> list[Draw]:
    """Train; return what every mini-batch was given, in order."""
    draws: list[Draw] = []
    original = OBJECTIVES[objective].updates

    def spied(self, batch, seed, extras):
        rows = tuple(batch.row.tolist())
        draws.append(Draw(trainer.progress.epoch, rows, batch.candidates.tolist(), seed))
        return original(self, batch, seed, extras)

    with monkeypatch.context() as patch:
        patch.setattr(OBJECTIVES[objective], "updates", spied)
        config = CONFIG.replace(**changes)
        trainer = Trainer(make_model(data), data, config, objective, out)
        trainer.run()
    return draws


@pytest.fixture(scope="module")
def drawn(prepared, make_model, tmp_path_factory):
    """Return a function that trains by an objective, once, and gives its draws."""

    @functools.cache
    def of(objective: str) -> list[Draw]:
        with pytest.MonkeyPatch.context() as patch:
            out = tmp_path_factory.mktemp(objective)
            return draws_of(patch, make_model, prepared, objective, out)

    return of


def by_epoch(draws: list[Draw]) -> list[list[int]]:
    """Rows of every epoch, in the order of their visits."""
    return [
        [row for draw in group for row in draw.rows]
        for _, group in itertools.groupby(draws, key=lambda draw: draw.epoch)
    ]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_epoch_has_an_order_of_its_own(prepared, drawn, objective):
    draws = drawn(objective)
    epochs = by_epoch(draws)
    n, size = len(prepared.split("train")), 24 if objective in PHASE_2 else None
    assert len(epochs) == 3
    assert len({tuple(rows) for rows in epochs}) == 3
    for rows in epochs:
        assert len(rows) == len(set(rows)) == (size or n)
        assert rows != sorted(rows)
    if size:  # an epoch is a sample of all, not always the same one
        assert len(set(itertools.chain(*epochs))) > 1.5 * size


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_step_has_noise_and_negatives_of_its_own(drawn, objective):
    draws = drawn(objective)
    seeds = [draw.seed for draw in draws]
    assert len(set(seeds)) == len(seeds) == 9
    columns = [np.array(draw.candidates)[:8, 1:] for draw in draws]
    assert np.mean([a == b for a, b in itertools.pairwise(columns)]) < 0.2  # chance, by popularity
    negatives = {}
    for draw in draws:
        for row, candidates in zip(draw.rows, draw.candidates, strict=True):
            negatives.setdefault(row, []).append(candidates)
    again = [drawn for drawn in negatives.values() if len(drawn) > 1]
    assert len(again) > 3
    assert all(drawn[0] != drawn[1] for drawn in again)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_draws_are_keyed_by_the_run(
    monkeypatch, prepared, make_model, tmp_path, drawn, objective
):
    first = drawn(objective)
    same, other = (
        draws_of(monkeypatch, make_model, prepared, objective, tmp_path / name, seed=seed)
        for name, seed in (("same", 0), ("other", 1))
    )
    assert first == same
    assert not {draw.seed for draw in first} & {draw.seed for draw in other}
    for mine, theirs in zip(by_epoch(first), by_epoch(other), strict=True):
        assert mine != theirs


def test_the_control_is_given_what_phase_2_is_given(drawn):
    policy, control = (drawn(name) for name in PHASE_2)
    assert policy == control


def test_the_phases_share_no_draws(monkeypatch, prepared, make_model, tmp_path):
    # As many rows a batch in either phase.
    sizes = {"rl_epoch_size": 0, "rl_batch_size": 100, "epochs": 1, "rl_epochs": 1}
    first, second = (
        draws_of(monkeypatch, make_model, prepared, name, tmp_path / name, **sizes)
        for name in ("supervised", "noisy")
    )
    assert [len(d.rows) for d in first] == [len(d.rows) for d in second]
    assert not {draw.seed for draw in first} & {draw.seed for draw in second}
    assert by_epoch(first) != by_epoch(second)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_seed_of_a_step_keys_its_noise_and_dropout(
    monkeypatch, prepared, make_model, tmp_path, objective
):
    """Dropout in phase 1 only, noise in phase 2 only; once a rollout, whatever reads it."""
    seen: list[tuple] = []
    dropout, rollout, updates = LCRSER._dropout, LCRSER.rollout, OBJECTIVES[objective].updates

    def spied_dropout(self, batch):
        drawn = dropout(self, batch)
        seen.append(("dropout", None if drawn is None else drawn.seed))
        return drawn

    def spied_rollout(self, h0, batch, n_trajectories, noise_scale, seed):
        seen.append(("noise", seed))
        return rollout(self, h0, batch, n_trajectories, noise_scale, seed)

    def spied_updates(self, batch, seed, extras):
        seen.append(("step", seed))
        return updates(self, batch, seed, extras)

    monkeypatch.setattr(LCRSER, "_dropout", spied_dropout)
    monkeypatch.setattr(LCRSER, "rollout", spied_rollout)
    monkeypatch.setattr(OBJECTIVES[objective], "updates", spied_updates)
    trainer = Trainer(
        make_model(prepared, dropout=0.1, backend="reference"),
        prepared,
        CONFIG,
        objective,
        tmp_path,
    )
    monkeypatch.setattr(module, "validation_score", lambda *_: 0.5)
    trainer.run()
    seed, steps, kinds = None, 0, {"dropout": set(), "noise": set()}
    for kind, value in seen:
        if kind == "step":
            seed, steps = value, steps + 1
        else:
            kinds[kind].add(value == seed if value is not None else None)
    assert steps == 9
    if objective == "supervised":
        assert kinds == {"dropout": {True}, "noise": set()}
    else:
        assert kinds == {"dropout": {None}, "noise": {True}}


# -- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("clip", [1e-4, 1e4, 0.0])
def test_gradients_are_clipped_to_the_largest_norm(prepared, make_model, tmp_path, objective, clip):
    """The norm is over all parameters; without a limit, or below it, nothing is changed."""
    norms: dict[float, list[torch.Tensor]] = {}
    for limit in (0.0, clip):
        config = CONFIG.replace(grad_clip=limit, epochs=1, rl_epochs=1, inner_epochs=1)
        trainer = Trainer(make_model(prepared), prepared, config, objective, tmp_path / str(limit))
        gradients = norms[limit] = []

        def note(optimizer, *_, gradients=gradients):
            flat = [
                p.grad.flatten()
                for g in optimizer.param_groups
                for p in g["params"]
                if p.grad is not None
            ]
            gradients.append(torch.cat(flat))

        trainer.optimizer.register_step_pre_hook(note)
        trainer.step(np.arange(8), np.random.default_rng(0))
    (free,), (clipped,) = norms[0.0][:1], norms[clip][:1]
    assert free.norm() > 1e-3
    if clip == 1e-4:
        assert clipped.norm().item() == pytest.approx(clip, rel=0.02)
        assert torch.cosine_similarity(free, clipped, dim=0) > 0.999
    else:
        assert torch.equal(free, clipped)


def first_step(make_model, data, objective, out, **changes) -> torch.Tensor:
    """How far the first update moves what is trained; Adam's is proportional to its rate."""
    config = CONFIG.replace(weight_decay=0.0, inner_epochs=1, **changes)
    trainer = Trainer(make_model(data), data, config, objective, out)
    before = [p.detach().clone() for _, p in trainer.objective.parameters()]
    trainer.step(np.arange(8), np.random.default_rng(0))
    after = [p.detach() for _, p in trainer.objective.parameters()]
    return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])


@pytest.mark.parametrize(
    ("objective", "own", "other"),
    [
        ("supervised", "learning_rate", "rl_learning_rate"),
        *((name, "rl_learning_rate", "learning_rate") for name in PHASE_2),
    ],
)
def test_each_phase_steps_by_its_own_learning_rate(
    prepared, make_model, tmp_path, objective, own, other
):
    rate = getattr(CONFIG, own)
    usual, doubled, unmoved = (
        first_step(make_model, prepared, objective, tmp_path / str(i), **changes)
        for i, changes in enumerate(({}, {own: 2 * rate}, {other: 0.5}))
    )
    assert usual.abs().max() <= 1.001 * rate
    assert usual.any()
    torch.testing.assert_close(doubled, 2 * usual, rtol=0, atol=2e-3 * rate)
    assert torch.equal(unmoved, usual)


# -- selection -----------------------------------------------------------------------------------


def other_samples(data: PreparedData, *splits: str) -> PreparedData:
    """Reorder the samples of some splits, with other negatives; leave the rest of the data."""
    arrays = dict(data.arrays)
    for split in splits:
        order = np.argsort(data.split(split).items, kind="stable")
        for name in ("users", "items", "times", "rec_end", "search_end", "repeat"):
            arrays[f"{split}_{name}"] = np.ascontiguousarray(arrays[f"{split}_{name}"][order])
        arrays[f"{split}_negatives"] = np.flip(arrays[f"{split}_negatives"], 0) % data.n_items + 1
    return PreparedData(arrays, data.manifest)


def scores_of(make_model, data, objective, out) -> list[float]:
    trainer = Trainer(make_model(data), data, CONFIG, objective, out)
    trainer.run()
    return [record["valid_ndcg@5"] for record in trainer.progress.history]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_selection_reads_validation_and_nothing_of_test(prepared, make_model, tmp_path, objective):
    usual = scores_of(make_model, prepared, objective, tmp_path / "usual")
    test = scores_of(make_model, other_samples(prepared, "test"), objective, tmp_path / "test")
    valid = scores_of(make_model, other_samples(prepared, "valid"), objective, tmp_path / "valid")
    assert usual == test
    assert usual != valid
    arrays = {
        name: array[:0] if name.startswith("test_") else array
        for name, array in prepared.arrays.items()
    }
    nothing = scores_of(make_model, PreparedData(arrays, {}), objective, tmp_path / "nothing")
    assert usual == nothing


def test_the_number_that_selects_is_ndcg_at_5_of_the_stored_lists(prepared, make_model, tmp_path):
    config = CONFIG.replace(epochs=2, select_readout=False)
    trainer = Trainer(make_model(prepared), prepared, config, "supervised", tmp_path)
    trainer.train()
    batcher = make_batcher(prepared, "valid", trainer.model)
    ranks = rank_targets(model_scorer(trainer.model), batcher, "sampled")
    assert len(ranks) == len(prepared.split("valid"))
    last = trainer.progress.history[-1]["valid_ndcg@5"]
    assert last == rank_metrics(ranks)["ndcg@5"].mean()
    gains = [1 / np.log2(rank + 1) if rank <= 5 else 0.0 for rank in ranks]
    assert last == pytest.approx(np.mean(gains))
