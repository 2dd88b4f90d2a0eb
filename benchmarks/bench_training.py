"""One training step, batch assembly included: the chosen paths against the reference.

d = 64, 30 + 30 full histories. Phase 1: 4 negatives, dropout and TCL on. Phase 2: 8 trajectories,
99 negatives, GRPO. Divide the batch by the time for users/s. In bf16 states and item vectors are
halves, the weights are not.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch

import harness
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.model import LCRSER
from lcr_fast.training.models import attach_text, fit_config
from lcr_fast.training.trainer import Trainer

BATCH = {("cpu", "supervised"): 256, ("cpu", "grpo"): 16}
BATCH |= {("cuda", "supervised"): 4096, ("cuda", "grpo"): 512}
PHASES = {"supervised": "phase 1", "grpo": "phase 2"}
EXTENDED = pytest.mark.extended


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    world = synthetic.World(n_users=400, min_events=60, max_events=60, noise=0.6)
    return prepare(synthetic.generate(world), tmp_path_factory.mktemp("bench") / "data")


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("objective", PHASES)
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(0, marks=EXTENDED),
        pytest.param(1, marks=EXTENDED),
        3,
        pytest.param(5, marks=EXTENDED),
    ],
)
def test_training_step(benchmark, race, data, device, small, tmp_path, steps, objective, precision):
    users = 8 if small else BATCH[device, objective]
    options = TrainConfig(
        n_negatives=4, align_queries=0.0, precision="bfloat16" if precision == "bf16" else "float32"
    )

    def make_step(backend: str):
        torch.manual_seed(0)
        plain = LCRConfig(steps=steps, max_clicks=2, backend=backend, **harness.PLAIN_READING)
        config = fit_config(data, plain)
        model = attach_text(LCRSER(config), data).to(device)
        trainer = Trainer(model, data, options, objective, tmp_path / backend)
        rng = np.random.default_rng(0)

        def step(n_users: int) -> float:
            return trainer.step(rng.integers(len(trainer.batcher), size=n_users), rng)

        return step

    benchmark.extra_info |= {
        "case": f"{PHASES[objective]}, K = {steps}, {users} users"
        + f", {precision}" * (precision != "fp32"),
        "users": users,
        "device": device,
        "axes": {"K": steps, "B": users, "phase": PHASES[objective], "dtype": precision},
    }
    # Eager mixes halves with weights that are none, so every operation rounds as it says.
    with harness.multiplying_in("fp32" if precision == "bf16" else precision):
        ours, eager = make_step("auto"), make_step("reference")
        # Both have the same weights and random numbers as long as they take the same steps.
        losses = ours(8), eager(8)
        if precision == "fp32":
            assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)
        else:  # rounding changes the order of a list now and then, and with it its reward
            assert all(map(math.isfinite, losses))
        race(partial(ours, users), {"eager": (partial(eager, users), 1.0)}, rounds=10, seconds=4.0)
