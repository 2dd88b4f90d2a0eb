"""Training steps that are replayed: what is replayed and what launched, and that nothing is read.

On a GPU, the bits. Elsewhere a replay computes anew what was captured, and nothing that a step does
may wait for numbers, which a capture refuses.
"""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphs import Recorded
from lcr_fast.model import LCRSER
from lcr_fast.storage import load_tensors
from lcr_fast.training.objective import OBJECTIVES
from lcr_fast.training.trainer import CHECKPOINT, DISTILL, Trainer
from training_runs import CONFIG, assert_same_run, read_metrics

CAPTURED = CONFIG.replace(capture=True, action="top1", batch_size=16, rl_batch_size=16)
NAMES = (*OBJECTIVES, DISTILL)
# What gives the host numbers of a tensor, or takes some from it.
READING = {
    torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
    torch.ops.aten._unique2, torch.ops.aten.unique_dim, torch.ops.aten.unique_consecutive,
    torch.ops.aten.lift_fresh, torch.ops.aten.is_nonzero, torch.ops.aten.equal,
}  # fmt: skip


class ReadsNothing(TorchDispatchMode):
    """Fails where the host reads a tensor, or makes one of its own numbers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in READING, f"{function} waits for the device"
        if function.overloadpacket == torch.ops.aten.index:
            assert not any(i is not None and i.dtype == torch.bool for i in args[1])
        return function(*args, **(kwargs or {}))


class Checked(Recorded):
    """Lets nothing of the function be read while it is captured."""

    def capture(self, function):
        with ReadsNothing():
            return super().capture(function)


@pytest.fixture
def train(prepared, make_model, tmp_path, monkeypatch):
    """Return a function that makes a trainer, whose graph is ``graphs[-1]``, by a config."""
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(LCRSER, "check", lambda *_: None)  # which a GPU's batches are spared

    def make(name, config=CAPTURED, out="run", graph=Checked, **options) -> Trainer:
        def state() -> list[torch.Tensor]:
            moments = [t for s in trainer.optimizer.state.values() for t in s.values()]
            return [*trainer.model.state_dict().values(), *moments]

        model = make_model(prepared, dropout=0.2)
        if name == DISTILL:
            options["teacher"] = make_model(prepared, seed=3)
        make_graph = (lambda: graph(state)) if config.capture else None
        trainer = Trainer(
            model, prepared, config, name, tmp_path / out, graph=make_graph, **options
        )
        return trainer

    return make


def take_steps(trainer: Trainer, n: int, size: int = 16) -> list[float]:
    return [trainer.step(np.arange(i, i + size), np.random.default_rng(i)) for i in range(n)]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"deep_supervision": 0.3} if name == "supervised" else {}) for name in NAMES),
        ("grpo", {"action": "sampled", "reward": "ndcg@5"}),
    ],
    ids=str,
)
def test_replayed_steps_are_the_launched_ones(train, name, changes):
    config = CAPTURED.replace(**changes)
    captured, launched = train(name, config), train(name, config, "other")
    launched.schedule = launched.schedule._replace(batch_size=17)  # which no batch has
    losses = take_steps(captured, 5), take_steps(launched, 5)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 5
    (graph,) = Recorded.made
    # GRPO compares gradients in the first update, which the host looks into.
    assert (graph.runs, graph.replays) == ((1, 3) if name == "grpo" else (1, 4))
    theirs = launched.model.state_dict()
    for key, tensor in captured.model.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key
    assert captured.progress.sums == launched.progress.sums
    assert captured.objective.n_updates == launched.objective.n_updates


def test_its_optimizer_is_the_usual_one(train):
    """But for rounding, of a step at full lengths and one that is trimmed."""
    losses = [
        take_steps(train("supervised", CAPTURED.replace(capture=capture), str(capture)), 4)
        for capture in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_every_replay_has_masks_of_its_own(train):
    """On the same samples, with a learning rate of 0."""
    trainer = train("supervised", CAPTURED.replace(learning_rate=0.0))
    rows = np.arange(16)
    losses = [trainer.step(rows, np.random.default_rng(seed)) for seed in (0, 1, 2, 3, 2)]
    assert len(set(losses)) == 4
    assert losses[2] == losses[4]


def test_a_smaller_batch_is_launched(train):
    trainer = train("supervised")
    take_steps(trainer, 3)
    (graph,) = Recorded.made
    trainer.step(np.arange(5), np.random.default_rng(9))
    assert graph.replays == 2
    take_steps(trainer, 1)
    assert graph.replays == 3


def test_updates_that_compare_gradients_are_launched(train):
    trainer = train("grpo", CAPTURED.replace(inner_epochs=3))
    take_steps(trainer, 8)  # 24 updates, of which the 0th, 10th and 20th are compared
    (graph,) = Recorded.made
    assert graph.runs + graph.replays == 8 - 3
    assert trainer.progress.sums["target_cosine"][1] == 3
    assert trainer.progress.sums["loss"][1] == 24


@pytest.mark.parametrize("name", ["supervised", "noisy"])
def test_the_learning_rate_falls_in_replays_too(train, name):
    """It is linear in phase 1: the rate of the last step tells."""
    trainer = train(name)
    trainer.run()
    (group, _) = trainer.optimizer.param_groups
    assert isinstance(group["lr"], torch.Tensor)
    schedule = trainer.schedule
    n_steps = math.ceil((schedule.epoch_size or len(trainer.batcher)) / schedule.batch_size)
    left = 1 / (n_steps * schedule.epochs) if schedule.decay else 1.0
    assert group["lr"].item() == pytest.approx(schedule.learning_rate * left)


def test_a_loss_that_is_not_finite_leaves_the_weights(train):
    trainer = train("supervised", graph=Recorded)
    take_steps(trainer, 3)
    trainer.model.search_position.data[0, 0] = torch.nan
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"the loss is nan in epoch 1, step 1; the last"):
        take_steps(trainer, 1)
    assert Recorded.made[0].replays == 3
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["supervised", "grpo"])
def test_a_run_goes_on_with_or_without_capture(train, tmp_path, name):
    """Moments and the number of steps are read as the other kind wants them."""
    config = CAPTURED.replace(schedule="constant", select_readout=False)
    longer = config.replace(epochs=4) if name == "supervised" else config.replace(rl_epochs=4)
    for capture in (True, False):
        out = f"{name}-{capture}"
        train(name, config.replace(capture=capture), out).run()
        resumed = train(name, longer.replace(capture=not capture), out, resume=True)
        resumed.run()
        records = read_metrics(tmp_path / out)
        assert [record["epoch"] for record in records] == [0, 1, 2, 3, 4]
        tensors, _ = load_tensors(tmp_path / out / CHECKPOINT, "checkpoint")
        steps = {t.item() for key, t in tensors.items() if key.endswith(".step")}
        assert len(steps) == 1
        assert steps.pop() > 4


def test_a_captured_run_is_resumed_to_the_bit(train, tmp_path):
    config = CAPTURED.replace(schedule="constant", select_readout=False)
    train("supervised", config.replace(epochs=4), "whole").run()
    train("supervised", config, "parts").run()
    train("supervised", config.replace(epochs=4), "parts", resume=True).run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("supervised", {"tables": "rows"}, "with tables=rows the host reads which rows"),
        ("grpo", {"silent_groups": "resample"}, "with silent_groups=resample the host reads who"),
    ],
)
def test_what_cannot_be_captured_is_refused(train, name, changes, reason):
    with pytest.raises(ValueError, match=f"capture=True cannot serve {name}: {reason}"):
        train(name, CAPTURED.replace(**changes))


def test_a_cpu_has_no_graphs(prepared, make_model, tmp_path):
    with pytest.raises(ValueError, match="capture=True needs a model on a GPU, this one is on cpu"):
        Trainer(make_model(prepared), prepared, CAPTURED, "supervised", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_step_that_cannot_be_captured_says_why(train):
    class Failing(Recorded):
        def capture(self, function):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    trainer = train("supervised", graph=Failing)
    with pytest.raises(RuntimeError, match=r"step cannot be captured: operation not permitted$"):
        take_steps(trainer, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replays_what_is_launched(prepared, make_model, tmp_path, name, precision):
    losses = {}
    for is_captured in (True, False):
        shape = {"dropout": 0.2, "dim": 32, "n_heads": 2}
        models = [make_model(prepared, seed=seed, **shape).cuda() for seed in (0, 3)]
        options = {"teacher": models[1]} if name == DISTILL else {}
        out, config = tmp_path / str(is_captured), CAPTURED.replace(precision=precision)
        trainer = Trainer(models[0], prepared, config, name, out, **options)
        if not is_captured:
            trainer.schedule = trainer.schedule._replace(batch_size=17)  # which no batch has
        losses[is_captured] = take_steps(trainer, 6)
        assert len(set(losses[is_captured])) == 6
    # A library may multiply in another order while it is captured.
    assert losses[True] == pytest.approx(losses[False], rel=1e-3, abs=1e-4)
