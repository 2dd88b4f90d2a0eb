"""Named ranges: all of them appear when switched on, none when off, and none in compiled code."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lcr_fast import profiling
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.testing import random_batch, random_model
from lcr_fast.training.trainer import Trainer

PHASES = {
    "supervised": {"batch", "embed", "encode", "reason", "score", "loss", "backward", "optimizer"},
    "grpo": {
        "batch", "embed", "encode", "rollout", "score", "reward", "loss", "backward", "optimizer",
    },
}  # fmt: skip
STEPS = {"reason step 1", "reason step 2"}


@pytest.fixture
def step(prepared, make_model, tmp_path):
    """Return a function that takes one training step of a phase on the reference."""

    def take(objective: str) -> None:
        model = make_model(prepared, backend="reference")
        config = TrainConfig(rl_negatives=9, n_trajectories=2)
        trainer = Trainer(model, prepared, config, objective, tmp_path / objective)
        trainer.step(np.arange(4), np.random.default_rng(0))

    return take


def names_of(function) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return [event.name for event in profiler.events()]


@pytest.mark.parametrize("objective", PHASES)
def test_every_stage_has_its_range(step, objective):
    with profiling.enabled():
        names = set(names_of(lambda: step(objective)))
    assert PHASES[objective] | STEPS <= names


def test_off_there_is_none(step):
    assert not (PHASES["grpo"] | STEPS) & set(names_of(lambda: step("grpo")))


def test_the_switch_goes_back():
    with pytest.raises(KeyError), profiling.enabled():
        raise KeyError
    assert profiling.range_("x") is profiling.range_("y")  # nothing is made while off


def test_ranges_leave_what_is_compiled_whole():
    generator = torch.Generator().manual_seed(0)
    config = LCRConfig(n_items=9, n_terms=9, dim=8, steps=2, max_search_len=3, max_rec_len=3)
    model = random_model(config, generator, torch.float32)
    batch = random_batch(config, 2, 4, generator)
    compiled = torch.compile(model.embed, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model.embed(batch)
        assert all(map(torch.equal, compiled(batch), expected))
        with profiling.enabled():
            assert "embed" in names_of(lambda: model.embed(batch))
            assert all(map(torch.equal, compiled(batch), expected))
            assert "embed" not in names_of(lambda: compiled(batch))
