"""One training step, whole: loss and gradient of every objective against the oracle.

The oracle computes users, trajectories and candidates one at a time, in float64 and without
autograd; gradients are held to its central differences along random directions. Models have
dropout, batches have users without events, padding among the candidates and targets anywhere.
"""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import oracle
from lcr_fast import grpo
from lcr_fast.batch import Batch
from lcr_fast.config import TrainConfig
from lcr_fast.testing import random_batch, random_model
from lcr_fast.training.evaluation import make_batcher
from lcr_fast.training.objective import OBJECTIVES

SEED = 0x1234567_89ABCDEF
CONFIG = TrainConfig(
    rank_loss="bce", schedule="constant", align_queries=0.0, tcl_weight=0.7, tcl_margin=0.2,
    n_trajectories=4, noise_scale=1.0, reward="ndcg@5", clip=0.02, kl_weight=0.8, temperature=0.6,
    inner_epochs=3,
)  # fmt: skip
_MODEL = {
    "dim": 4, "n_heads": 2, "ffn_dim": 3, "steps": 2, "max_search_len": 2, "max_rec_len": 3,
    "max_clicks": 2, "mlp_hidden": (4, 3), "dropout": 0.3, "item_text_dim": 0, "query_text_dim": 0,
    "backend": "reference", "score": "mlp",
}  # fmt: skip


class Step:
    """An objective of a tiny float64 model, and a batch for it."""

    def __init__(self, data, make_model, name: str, n_users: int = 5, **changes) -> None:
        self.config = CONFIG.replace(**changes)
        generator = torch.Generator().manual_seed(0)
        self.model = random_model(make_model(data, **_MODEL).config, generator)
        with torch.no_grad():
            self.model.head.seen_bonus.mul_(0.1)  # or it alone would decide
        batcher = make_batcher(data, "train", self.model)
        self.objective = OBJECTIVES[name](self.model, batcher, self.config)
        self.trained = dict(self.objective.parameters())
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        batch = random_batch(self.model.config, n_users, 6, generator)
        batch.candidates[1, 4:] = 0
        batch.candidates[0, 1:4:2] = batch.rec_items[0, :3:2]
        assert batch.rec_lengths[0] == 3
        # Phase 1 pools at column 0, where the target of every batch stands.
        target = batch.target * 0 if name == "supervised" else batch.target.clamp(max=3)
        self.batch = batch.replace(target=target)
        self.generator = generator

    def updates(self, batch: Batch):
        """Yield each loss and the numbers that it logs."""
        for loss, logs in self.objective.updates(batch, SEED, self.objective.extras(SEED)):
            yield loss, {name: value.item() for name, value in logs.items()}

    def move(self, size: float) -> None:
        """Change what is trained, as an optimizer might."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter += size * self.draw(parameter)
                if "embedding.weight" in name:
                    parameter[0] = 0.0  # padding

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)

    def check(self, loss: torch.Tensor, slow) -> None:
        """Hold a loss and its gradient to ``slow(policy)`` for an :class:`oracle.Model`."""
        twin = policy_of(self.model)
        assert loss.item() == pytest.approx(slow(twin), rel=1e-6, abs=1e-7)
        gradients = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
        gradients = dict(zip(self.trained, gradients, strict=True))
        for _ in range(2):
            direction = {name: self.draw(p) for name, p in self.trained.items()}
            got = sum(
                float((g * direction[name]).sum()) for name, g in gradients.items() if g is not None
            )
            up, down = (slow(moved(twin, direction, h)) for h in (1e-6, -1e-6))
            assert got == pytest.approx((up - down) / 2e-6, rel=2e-5, abs=1e-7)
            assert abs(got) > 1e-5


def policy_of(model) -> oracle.Model:
    """Copy a model to an oracle that keeps its weights when the model moves on."""
    twin = oracle.Model(model)
    twin.tensors = {name: array.copy() for name, array in twin.tensors.items()}
    return twin


def moved(policy: oracle.Model, direction, size: float) -> oracle.Model:
    other = oracle.Model.__new__(oracle.Model)
    other.config, other.text = policy.config, policy.text
    other.tensors = dict(policy.tensors)
    for name, step in direction.items():
        other.tensors[name] = other.tensors[name] + size * step.numpy()
    return other


# -- phase 1 -------------------------------------------------------------------------------------


def slow_phase_1(policy, batch, config, negative=None):
    """L_rank + lambda L_TCL; TCL's negatives are those of the policy ``negative``, if given.

    A stream without events is at one distance before and after, of whichever policy.
    """
    losses, distances = [], []
    for b in range(len(batch)):
        pairs = []
        for each in (policy, negative or policy):
            after, before = each.reason(each.encode(batch, b, SEED), batch, b, SEED)
            target = each.item(int(batch.candidates[b, 0]))
            weight = each.head().target_weight
            pairs.append(oracle.tcl_distances(after, before, target, weight, config.tcl_distance))
        there = [
            len(h[x]) > 0 for h in before for x in (oracle.SEARCH, oracle.REC) if len(h[1 - x])
        ]
        distances += [
            (mine[0], its[1]) if is_there else (0.0, 0.0)
            for is_there, mine, its in zip(there, *pairs, strict=True)
        ]
        scores = list(policy.forward(batch, b, SEED))
        losses.append(oracle.rank_loss(scores, int(batch.target[b]), config.rank_loss))
    tcl = oracle.hinge(distances, config.tcl_margin)
    return sum(losses) / len(losses) + config.tcl_weight * tcl


def slow_alignment(left, right, left_ids, right_ids):
    """InfoNCE of pairs; those that share a side with a pair are no negatives of it."""
    total, n = 0.0, len(left)
    for i in range(n):
        logits = {
            j: math.sqrt(len(left[i])) * left[i] @ right[j]
            for j in range(n)
            if j == i or (left_ids[i] != left_ids[j] and right_ids[i] != right_ids[j])
        }
        total += math.log(sum(map(math.exp, logits.values()))) - logits[i]
    return total / n


def test_phase_1_aligns_both_kinds_of_pairs(prepared, make_model):
    step = Step(
        prepared, make_model, "supervised",
        align_queries=0.4, align_items=0.3, align_pairs=7, tcl_weight=0.0,
    )  # fmt: skip
    config, batcher, pairs = step.config, step.objective.batcher, step.objective.pairs
    rng = np.random.default_rng([SEED, 1])
    asked, followed = (rng.integers(len(p), size=7) for p in (pairs.queries, pairs.items))

    def slow(policy):
        queries, clicked = pairs.queries[asked], pairs.clicked[asked]
        items, following = pairs.items[followed], pairs.following[followed]
        vectors = [policy.query(q, batcher.terms(q[None])[0].tolist()) for q in queries]
        clicks, firsts, nexts = ([policy.item(i) for i in s] for s in (clicked, items, following))
        return (
            slow_phase_1(policy, step.batch, config)
            + config.align_queries * slow_alignment(vectors, clicks, queries, clicked)
            + config.align_items * slow_alignment(firsts, nexts, items, following)
        )

    for loss, logs in step.updates(step.batch):
        step.check(loss, slow)
        assert {"query_alignment", "item_alignment"} <= logs.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank_loss": "softmax", "tcl_distance": "cosine"},
        {"rank_loss": "bpr", "tcl_margin": 3.0},
        {"tcl_detach_negative": True},
        {"tcl_weight": 0.0},
    ],
    ids=str,
)
def test_phase_1_is_the_ranking_loss_and_tcl_under_dropout(prepared, make_model, changes):
    step = Step(prepared, make_model, "supervised", **changes)
    start = policy_of(step.model)
    negative = start if step.config.tcl_detach_negative else None
    ((loss, _),) = step.updates(step.batch)
    step.check(loss, lambda policy: slow_phase_1(policy, step.batch, step.config, negative))
    # The oracle's dropout is not idle.
    assert slow_phase_1(start, step.batch, step.config) != pytest.approx(
        slow_phase_1(without_dropout(start), step.batch, step.config)
    )


def without_dropout(policy: oracle.Model) -> oracle.Model:
    """Copy a policy, without its dropout."""
    other = moved(policy, {}, 0.0)
    other.config = policy.config.replace(dropout=0.0)
    return other


def slow_deep_phase_1(policy, batch, config):
    """Phase 1 with the ranking losses of h^(0) to h^(K-1), step by step with other masks each."""
    one = moved(policy, {}, 0.0)
    one.config = policy.config.replace(steps=1)
    K, weight = policy.config.steps, policy.head().target_weight
    shares = [1.0] * K if config.deep_weights == "uniform" else [k + 1.0 for k in range(K)]
    total, distances = 0.0, []
    for b in range(len(batch)):
        states = [policy.encode(batch, b, SEED)]
        target = policy.item(int(batch.candidates[b, 0]))
        for k in range(K):
            after, before = one.reason(states[-1], batch, b, SEED + k)
            states.append(after[-1])
            distances += oracle.tcl_distances(after, before, target, weight, config.tcl_distance)
        losses = [
            oracle.rank_loss(
                list(policy.scores(h, batch, b, SEED)), int(batch.target[b]), config.rank_loss
            )
            for h in states
        ]
        deep = sum(s * loss for s, loss in zip(shares, losses, strict=False)) / sum(shares)
        total += losses[-1] + config.deep_supervision * deep
    tcl = oracle.hinge(distances, config.tcl_margin) if config.tcl_weight else 0.0
    return total / len(batch) + config.tcl_weight * tcl


@pytest.mark.parametrize(
    "changes",
    [
        {"deep_weights": "rising"},
        {"deep_weights": "uniform", "rank_loss": "softmax"},
        {"tcl_weight": 0.0},
    ],
    ids=str,
)
def test_deep_supervision_ranks_from_every_state(prepared, make_model, changes):
    step = Step(prepared, make_model, "supervised", deep_supervision=0.6, **changes)
    ((loss, logs),) = step.updates(step.batch)
    step.check(loss, lambda policy: slow_deep_phase_1(policy, step.batch, step.config))
    assert logs["deep_loss"] > 0


def test_deep_supervision_needs_steps_that_stand_alone(prepared, make_model):
    model = make_model(prepared, cross_memory="initial")
    batcher = make_batcher(prepared, "train", model)
    with pytest.raises(ValueError, match="cross_memory=initial does not"):
        OBJECTIVES["supervised"](model, batcher, TrainConfig(deep_supervision=0.1))
    base = make_model(prepared, cross_memory="initial", steps=0)  # has none to supervise
    OBJECTIVES["supervised"](base, batcher, TrainConfig(deep_supervision=0.1))


def test_phase_1_logs_its_two_losses(prepared, make_model):
    step = Step(prepared, make_model, "supervised")
    ((loss, logs),) = step.updates(step.batch)
    assert loss.item() == pytest.approx(logs["rank_loss"] + step.config.tcl_weight * logs["tcl"])


# -- phase 2 and its control ---------------------------------------------------------------------


def slow_rollouts(policy, batch, config):
    """Scores of every trajectory's list, without dropout: [B][N] lists of C numbers."""
    lists = []
    for b in range(len(batch)):
        finals = [
            policy.rollout(batch, b, n, config.noise_scale, SEED)[0][-1]
            for n in range(config.n_trajectories)
        ]
        lists.append([policy.scores(final, batch, b).tolist() for final in finals])
    return lists


def over_temperature(lists, temperature):
    return [[[score / temperature for score in row] for row in rows] for rows in lists]


def slow_control(policy, batch, config):
    losses = [
        oracle.rank_loss(row, int(target), config.rank_loss)
        for rows, target in zip(slow_rollouts(policy, batch, config), batch.target, strict=True)
        for row in rows
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("trainable", ["reasoning", "all"])
@pytest.mark.parametrize("rank_loss", ["bce", "softmax"])
def test_the_control_is_the_ranking_loss_on_the_same_trajectories(
    prepared, make_model, trainable, rank_loss
):
    step = Step(prepared, make_model, "noisy", rl_trainable=trainable, rank_loss=rank_loss)
    step.model.train()  # must not matter
    n_updates = 0
    for loss, logs in step.updates(step.batch):
        step.check(loss, lambda policy: slow_control(policy, step.batch, step.config))
        assert logs == {"rank_loss": loss.item()}
        step.move(0.02)
        n_updates += 1
    assert n_updates == step.config.inner_epochs


class SlowGrpo:
    """J of one batch: what the reference and the first policy fix, then a loss for any policy."""

    def __init__(self, reference, first, batch, config, actions=None) -> None:
        self.batch, self.config = batch, config
        self.reference, old = self.lists(reference), self.lists(first)
        self.advantages, self.actions, self.old = [], [], []
        for b, rows in enumerate(old):
            target = int(batch.target[b])
            if config.action == "target":
                chosen = [[target] for _ in rows]
            elif config.action == "top1":
                chosen = [[int(np.argmax(row))] for row in rows]
            else:
                chosen = actions[b]
            lists = rows
            if config.action == "sampled":  # a draw is rewarded for its own order
                order = [{item: -place for place, item in enumerate(draw)} for draw in chosen]
                lists = [[own.get(i, -math.inf) for i in range(len(rows[0]))] for own in order]
                # A target that was not drawn must not tie with all that were not either.
                rewards = [
                    oracle.reward(row, target, config.reward) if target in own else 0.0
                    for row, own in zip(lists, order, strict=True)
                ]
            else:
                rewards = [oracle.reward(row, target, config.reward) for row in lists]
            self.advantages.append(oracle.advantages(rewards, config.scale_advantages))
            self.actions.append(chosen)
            self.old.append(
                [
                    oracle.list_log_probability(row, places)
                    for row, places in zip(rows, chosen, strict=True)
                ]
            )

    def lists(self, policy):
        return over_temperature(
            slow_rollouts(policy, self.batch, self.config), self.config.temperature
        )

    def __call__(self, policy):
        values = []
        self.ratios = []
        for b, rows in enumerate(self.lists(policy)):
            for n, row in enumerate(rows):
                places, reference = self.actions[b][n], self.reference[b][n]
                log_prob = oracle.list_log_probability(row, places)
                surrogate = oracle.policy_objective(
                    log_prob, self.old[b][n], self.advantages[b][n], self.config.clip
                )
                if self.config.kl == "exact":
                    kl = oracle.kl_exact(row, reference)
                else:
                    kl = oracle.kl_k3(log_prob, oracle.list_log_probability(reference, places))
                if self.config.silent_groups != "keep" and not any(self.advantages[b]):
                    kl = 0.0
                values.append(self.config.kl_weight * kl - surrogate)
                self.ratios.append(math.exp(log_prob - self.old[b][n]))
        return sum(values) / len(values)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"action": "sampled", "kl": "k3"},
        {"action": "target", "rl_trainable": "all"},
        {"reward": "hr@1", "kl_weight": 0.0, "action": "sampled"},
        {"reward": "hr@3", "silent_groups": "mask", "scale_advantages": False},
    ],
    ids=str,
)
def test_phase_2_is_the_clipped_surrogate_and_the_kl(prepared, make_model, monkeypatch, changes):
    """The model is not at its reference, and moves on between updates on one rollout."""
    step = Step(prepared, make_model, "grpo", **changes)
    config, reference = step.config, policy_of(step.model)
    step.move(0.1)
    first = policy_of(step.model)
    step.model.train()  # must not matter
    rollouts, original = [], grpo.choose_actions

    def spied(*arguments):
        rollouts.append(original(*arguments))
        return rollouts[-1]

    monkeypatch.setattr(grpo, "choose_actions", spied)
    slow, n_updates, far = None, 0, 0
    for loss, logs in step.updates(step.batch):
        slow = slow or SlowGrpo(reference, first, step.batch, config, rollouts[0].actions.tolist())
        step.check(loss, slow)
        assert loss.item() == pytest.approx(config.kl_weight * logs["kl"] - logs["surrogate"])
        slow(policy_of(step.model))
        outside = [abs(ratio - 1) > config.clip for ratio in slow.ratios]
        assert logs["clipped"] == pytest.approx(np.mean(outside))
        far += sum(outside)
        assert logs["kl"] > 0
        step.move(0.01)
        n_updates += 1
    assert n_updates == config.inner_epochs
    assert len(rollouts) == 1
    assert 0 < far < n_updates * len(slow.ratios)  # some ratios are clipped, some are not
    assert any(any(row) for row in slow.advantages)
    assert logs["signal"] == pytest.approx(np.mean([any(row) for row in slow.advantages]))
    assert logs["signal"] < 1 or config.silent_groups == "keep"


def all_users(prepared, make_model, **changes) -> tuple[Step, Batch]:
    """Make an objective and a batch as it draws them, some of whose users have no signal."""
    step = Step(prepared, make_model, "grpo", reward="hr@5", rl_negatives=9, **changes)
    return step, step.objective.batch(np.arange(0, 120, 6), np.random.default_rng(0))


def test_silent_users_are_exchanged_for_others_that_are_not(prepared, make_model, monkeypatch):
    step, batch = all_users(prepared, make_model, silent_groups="resample", inner_epochs=1)
    rolled, original = [], grpo.choose_actions

    def spied(scores, target, *arguments):
        rollout = original(scores, target, *arguments)
        signal = (rollout.rewards != rollout.rewards[:, :1]).any(1)
        rolled.append((scores.detach(), signal))
        return rollout

    monkeypatch.setattr(grpo, "choose_actions", spied)
    gathered = []
    gather = step.objective.batcher.gather

    def watched(*arguments):
        gathered.append(gather(*arguments))
        return gathered[-1]

    monkeypatch.setattr(step.objective.batcher, "gather", watched)
    ((_, logs),) = step.updates(batch)
    draws, last = [signal for _, signal in rolled[:-1]], rolled[-1][1]
    first, final = draws[0], gathered[-1]
    assert 0 < first.float().mean() < 1
    # Whoever has a signal stays, in place; others come in for those who have not.
    stays = first | ~last
    assert torch.equal(final.row[stays], batch.row[stays])
    assert torch.equal(final.candidates[stays], batch.candidates[stays])
    n_found = int(sum(signal.sum() for signal in draws))
    assert int(last.sum()) == min(n_found, len(batch))
    assert len(final.row.unique()) == len(batch)
    assert logs["signal"] == pytest.approx(last.float().mean())
    assert logs["drawn"] == pytest.approx(sum(map(len, draws)) / len(batch))
    # Each looks as it did when it was drawn: its histories, its candidates, its noise.
    seen = {}
    for drawn, (scores, _) in zip((batch, *gathered[:-1]), rolled, strict=False):
        seen |= dict(zip(drawn.row.tolist(), scores, strict=True))
    for row, scores in zip(final.row.tolist(), rolled[-1][0], strict=True):
        torch.testing.assert_close(scores, seen[row], rtol=0, atol=1e-12)


def test_a_search_for_signal_ends(prepared, make_model):
    """Without noise nobody's trajectories differ, and the batch stays as it is."""
    step, batch = all_users(
        prepared, make_model, silent_groups="resample", noise_scale=0.0, inner_epochs=1
    )
    ((loss, logs),) = step.updates(batch)
    assert loss.item() == 0
    assert logs["signal"] == 0
    assert 1 < logs["drawn"] <= 8
    assert "silent_pull" not in logs  # nothing to compare with


def test_the_pull_of_silent_users_is_that_of_their_kl(prepared, make_model):
    step, batch = all_users(prepared, make_model, kl_weight=0.5, inner_epochs=1)
    step.move(0.1)
    parameters = list(step.trained.values())

    def gradient(**changes):
        objective = copy.copy(step.objective)
        objective.config = step.config.replace(**changes)
        ((loss, logs),) = objective.updates(batch, SEED, {})
        flat = [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(
                parameters,
                torch.autograd.grad(loss, parameters, allow_unused=True),
                strict=True,
            )
        ]
        return torch.cat(flat), logs

    whole, logs = gradient()
    masked, other = gradient(silent_groups="mask")
    policy, _ = gradient(kl_weight=0.0)
    assert logs["silent_pull"] == pytest.approx(float((whole - masked).norm() / policy.norm()))
    assert logs["silent_pull"] > 0.01
    assert other["silent_pull"] == 0


# -- switches ------------------------------------------------------------------------------------

ALL, PHASE_2 = ("supervised", "noisy", "grpo"), ("noisy", "grpo")
# Every field of the config: another value, what of an objective it moves, and in which objectives.
# What moves nothing here belongs to the trainer.
SWITCHES = {
    "seed": (1, "", ()),
    "capture": (True, "", ()),
    "workers": (2, "", ()),
    "weight_decay": (0.5, "", ()),
    "grad_clip": (0.5, "", ()),
    "patience": (9, "", ()),
    "epochs": (9, "schedule", ("supervised",)),
    "min_updates": (999, "schedule", ("supervised",)),
    "schedule": ("linear", "schedule", ("supervised",)),
    "select_readout": (False, "", ()),
    "valid_metric": ("mrr", "", ()),
    "batch_size": (9, "schedule", ("supervised",)),
    "learning_rate": (0.5, "schedule", ("supervised",)),
    "rl_epochs": (9, "schedule", PHASE_2),
    "rl_epoch_size": (9, "schedule", PHASE_2),
    "rl_batch_size": (9, "schedule", PHASE_2),
    "rl_learning_rate": (0.5, "schedule", PHASE_2),
    "negatives": ("uniform", "batch", ALL),
    "n_negatives": (5, "batch", ("supervised",)),
    "rl_negatives": (5, "batch", PHASE_2),
    "tables": ("rows", "", ()),
    "precision": ("bfloat16", "updates", ALL),
    "rank_loss": ("softmax", "updates", ("supervised", "noisy")),
    "align_queries": (0.7, "updates", ("supervised",)),
    "align_items": (0.7, "updates", ("supervised",)),
    "align_pairs": (9, "updates", ("supervised",)),
    "tcl_weight": (0.3, "updates", ("supervised",)),
    "tcl_margin": (0.3, "updates", ("supervised",)),
    "tcl_distance": ("cosine", "updates", ("supervised",)),
    "tcl_detach_negative": (True, "updates", ("supervised",)),
    "deep_supervision": (0.7, "updates", ("supervised",)),
    "deep_weights": ("uniform", "updates", ("supervised",)),
    "distill_kl": (0.5, "", ()),  # what these move: tests/test_distillation.py
    "distill_states": (0.5, "", ()),
    "distill_temperature": (0.5, "", ()),
    "distill_trainable": ("histories", "", ()),
    "n_trajectories": (5, "updates", PHASE_2),
    "noise_scale": (0.4, "updates", PHASE_2),
    "inner_epochs": (2, "updates", PHASE_2),
    "rl_trainable": ("all", "updates", PHASE_2),
    "reward": ("mrr", "updates", ("grpo",)),
    "action": ("sampled", "updates", ("grpo",)),
    "scale_advantages": (False, "updates", ("grpo",)),
    "silent_groups": ("mask", "updates", ("grpo",)),
    "clip": (0.5, "updates", ("grpo",)),
    "kl": ("k3", "updates", ("grpo",)),
    "kl_weight": (0.3, "updates", ("grpo",)),
    "temperature": (2.0, "updates", ("grpo",)),
}


def outcome(data, make_model, name: str, **changes) -> dict[str, list]:
    """Collect what a config makes of an objective: schedule, batch, updates on a fixed batch."""
    model = make_model(data, dropout=0.3)
    config = CONFIG.replace(
        **{"rl_negatives": 9, "align_queries": 0.4, "deep_supervision": 0.4, **changes}
    )
    objective = OBJECTIVES[name](model, make_batcher(data, "train", model), config)
    drawn = objective.batch(np.arange(0, 120, 6), np.random.default_rng(0))
    fixed = random_batch(model.config, 6, 6, torch.Generator().manual_seed(0))
    fixed = fixed.replace(target=fixed.target * 0)
    updates = []
    for loss, _ in objective.updates(fixed, SEED, objective.extras(SEED)):
        named = objective.parameters()
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        updates.append(loss.item())
        for (_, parameter), gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                updates.append(gradient.double().sum().item())
                with torch.no_grad():
                    parameter -= 0.5 * gradient
    return {
        "schedule": [objective.schedule],
        "batch": [getattr(drawn, f.name).tolist() for f in dataclasses.fields(drawn)],
        "updates": updates,
    }


@pytest.fixture(scope="module")
def usual(prepared, make_model):
    return {name: outcome(prepared, make_model, name) for name in OBJECTIVES}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(TrainConfig)])
def test_a_switch_moves_what_it_should_and_nothing_else(prepared, make_model, usual, field):
    value, part, objectives = SWITCHES[field]
    assert value != getattr(CONFIG, field)
    for name in OBJECTIVES:
        changed = outcome(prepared, make_model, name, **{field: value})
        differs = [key for key, values in changed.items() if values != usual[name][key]]
        assert differs == ([part] if name in objectives else []), name
