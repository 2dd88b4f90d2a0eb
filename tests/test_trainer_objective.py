"""Objectives of the trainer: their negatives, their reference, precision and alarms."""

import logging

import numpy as np
import pytest
import torch

from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.storage import load_tensors
from lcr_fast.training import trainer as module
from lcr_fast.training.objective import OBJECTIVES, Grpo, Supervised, warn_if_sinking
from lcr_fast.training.trainer import CHECKPOINT, make_optimizer
from training_runs import CONFIG, run


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


def test_no_epoch_is_chosen_blindly(prepared):
    arrays = {
        name: array[:0] if name.startswith("valid_") else array
        for name, array in prepared.arrays.items()
    }
    blind = PreparedData(arrays, prepared.manifest)
    assert len(blind.split("train"))
    with pytest.raises(ValueError, match="the data has no validation samples, by which the best"):
        module.check_trainable(blind, CONFIG, ["supervised"])


@pytest.mark.parametrize("objective", ["grpo", "noisy"])
@pytest.mark.parametrize(
    ("noise_scale", "model", "said"),
    [
        (0.5, {"readout": 0.0}, "reads h^(0) alone"),
        (0.5, {"readout": 0.25}, None),
        (0.5, {"readout": 0.0, "steps": 0}, None),  # whose h^(K) is h^(0) with noise
        (0.0, {}, "noise_scale 0"),
    ],
)
def test_phase_2_says_where_no_trajectory_can_differ(
    prepared, make_model, tmp_path, caplog, objective, noise_scale, model, said
):
    model = make_model(prepared, **model)
    config = CONFIG.replace(noise_scale=noise_scale)
    trainer = module.Trainer(model, prepared, config, objective, tmp_path)
    warned = [record.message for record in caplog.records]
    assert len(warned) == (said is not None)
    assert said is None or said in warned[0]
    batch = trainer.objective.batch(np.arange(8), np.random.default_rng(0))
    with torch.no_grad():
        inputs = trainer.objective.inputs(model, batch)
        scores = trainer.objective.scores(model, batch, inputs, 0)
    assert torch.equal(scores[:, 0], scores[:, 1]) == (said is not None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_trajectories": 1}, "n_trajectories 1"),
        ({"reward": "0.5*hr@9+0.5*hr@12", "rl_negatives": 8}, "the same for every list of 9"),
        ({"reward": "hr@8", "rl_negatives": 8}, None),
    ],
)
def test_grpo_says_where_no_advantage_can_be(prepared, make_model, tmp_path, caplog, changes, said):
    model, config = make_model(prepared), CONFIG.replace(**changes)
    module.Trainer(model, prepared, config, "noisy", tmp_path)  # which learns from any trajectory
    assert not caplog.records
    module.Trainer(model, prepared, config, "grpo", tmp_path)
    warned = [record.message for record in caplog.records]
    assert len(warned) == (said is not None)
    assert said is None or said in warned[0]


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
    updates = objective.updates(batch, 5, {})
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
    for _ in objective.updates(batch, 5, {}):
        pass
    n_references = int(kind is Grpo)
    assert rolled.count(objective.reference) == n_references
    assert len(rolled) == 3 + n_references
    assert len(encoded) == (n or 3 + n_references)
    assert any(h[0].requires_grad for h in encoded) == (trainable == "all")


@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_low_precision_is_near_float32(prepared, make_model, kind):
    losses, gradients = {}, {}
    for precision in ("float32", "bfloat16"):
        changes = {"precision": precision, "rl_trainable": "all"}
        objective, batch = make_objective(make_model, prepared, kind, **changes)
        losses[precision] = []
        for loss, logs in objective.updates(batch, 5, objective.extras(5)):
            assert loss.dtype == torch.float32
            losses[precision].append(logs.get("kl", loss).item())
        loss.backward()
        found = [p.grad for _, p in objective.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in found)
        gradients[precision] = torch.cat([g.flatten() for g in found])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02, abs=1e-4)
    if kind is not Grpo:  # whose gradient jumps with its actions
        cosine = torch.cosine_similarity(*gradients.values(), dim=0)
        assert cosine > 0.99
        assert not torch.equal(*gradients.values())


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
    ("logs", "n"),
    [
        ({"target_cosine": 0.1, "signal": 0.5}, 0),
        ({"signal": 0.0}, 0),
        ({"target_cosine": -0.1, "signal": 0.5}, 1),
        ({"target_cosine": -0.1, "signal": 0.002}, 0),  # of one user now and then
    ],
)
@pytest.mark.parametrize("action", ["top1", "target"])
def test_warn_if_sinking(caplog, logs, n, action):
    warn_if_sinking(logs, action)
    assert len(caplog.records) == n
    if n:  # what is set already is no advice
        assert ("action=top1" in caplog.records[0].message) == (action != "top1")
