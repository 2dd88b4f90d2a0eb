"""One training step: the chosen paths against the reference.

d = 64, 30 + 30 full histories. Phase 1: 4 negatives, dropout and TCL on. Phase 2: 8 trajectories,
99 negatives, GRPO. Divide the batch by the time for users/s. In bf16 states and item vectors are
halves, the weights are not. On a CPU the step assembles its batch; on a GPU batches are assembled
ahead, as by a trainer's workers, and both paths are also replayed as CUDA graphs (captured).
"""

import itertools
import math

import numpy as np
import pytest
import torch

import harness
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.model import LCRSER
from lcr_fast.training.inputs import assemble
from lcr_fast.training.models import attach_text, fit_config
from lcr_fast.training.trainer import Trainer

# The first of a device and phase is a large batch, the second the trainer's default.
BATCH = {("cpu", "supervised"): (256,), ("cpu", "grpo"): (16,)}
BATCH |= {("cuda", "supervised"): (4096, 256), ("cuda", "grpo"): (512, 64)}
PHASES = {"supervised": "phase 1", "grpo": "phase 2"}
EXTENDED = pytest.mark.extended
N_AHEAD = 8  # batches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    world = synthetic.World(n_users=400, min_events=60, max_events=60, noise=0.6)
    return prepare(synthetic.generate(world), tmp_path_factory.mktemp("bench") / "data")


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("size", [0, 1])
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
def test_training_step(
    benchmark, race, data, device, small, tmp_path, steps, objective, size, precision
):
    sizes = BATCH[device, objective]
    if size >= len(sizes) or (size and steps != 3):
        pytest.skip("no such batch here")
    users = 8 if small else sizes[size]
    options = TrainConfig(
        n_negatives=4, align_queries=0.0, batch_size=users, rl_batch_size=users,
        precision="bfloat16" if precision == "bf16" else "float32",
    )  # fmt: skip

    def make_step(backend: str, capture: bool = False):
        torch.manual_seed(0)
        plain = LCRConfig(steps=steps, max_clicks=2, backend=backend, **harness.PLAIN_READING)
        config = fit_config(data, plain)
        model = attach_text(LCRSER(config), data).to(device)
        trainer = Trainer(
            model, data, options.replace(capture=capture), objective,
            tmp_path / f"{backend}-{capture}",
        )  # fmt: skip
        rng = np.random.default_rng(0)

        def draw(n_users: int):
            rows = rng.integers(len(trainer.batcher), size=n_users)
            return assemble(trainer.objective, rows, rng)

        first = trainer.take(draw(8))
        if device == "cpu":
            return first, lambda: trainer.take(draw(users))
        ahead = itertools.cycle([draw(users) for _ in range(N_AHEAD)])
        return first, lambda: trainer.take(next(ahead))

    benchmark.extra_info |= {
        "case": f"{PHASES[objective]}, K = {steps}, {users} users"
        + f", {precision}" * (precision != "fp32"),
        "users": users,
        "device": device,
        "axes": {"K": steps, "B": users, "phase": PHASES[objective], "dtype": precision},
    }
    # Eager mixes halves with weights that are none, so every operation rounds as it says.
    with harness.multiplying_in("fp32" if precision == "bf16" else precision):
        # Both have the same weights and random numbers as long as they take the same steps.
        (loss, ours), (expected, eager) = make_step("auto"), make_step("reference")
        if precision == "fp32":
            assert loss == pytest.approx(expected, rel=1e-3, abs=1e-5)
        else:  # rounding changes the order of a list now and then, and with it its reward
            assert math.isfinite(loss)
            assert math.isfinite(expected)
        others = {"eager": eager}
        if device == "cuda":
            others["captured"] = make_step("auto", capture=True)[1]
            others["captured eager"] = make_step("reference", capture=True)[1]
        race(ours, {name: (step, 1.0) for name, step in others.items()}, rounds=10, seconds=4.0)
