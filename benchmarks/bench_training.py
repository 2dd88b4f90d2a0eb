"""One training step of phase 1, batch assembly included: the chosen paths and the reference.

d = 64, 30 + 30 full histories, 4 negatives, dropout on; divide the batch by the time for users/s.
"""

import numpy as np
import pytest
import torch

from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.experiments.comparison import attach_text, fit_config
from lcr_fast.model import LCRSER
from lcr_fast.training.trainer import Trainer

BATCH = 256


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    world = synthetic.World(n_users=400, min_events=60, max_events=60, noise=0.6)
    return prepare(synthetic.generate(world), tmp_path_factory.mktemp("bench") / "data")


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_training_step(benchmark, race, data, tmp_path, steps):
    def make_step(backend: str):
        torch.manual_seed(0)
        config = fit_config(data, LCRConfig(steps=steps, max_clicks=2, backend=backend))
        model = attach_text(LCRSER(config), data)
        trainer = Trainer(model, data, TrainConfig(), "supervised", tmp_path / backend)
        rng = np.random.default_rng(0)

        def step() -> float:
            rows = rng.integers(len(trainer.batcher), size=BATCH)
            loss = trainer.step(rows, rng)
            return loss

        return step

    ours, reference = make_step("auto"), make_step("reference")
    assert ours() == pytest.approx(reference(), rel=1e-4)
    benchmark.extra_info |= {"case": f"K = {steps}, {BATCH} users", "users": BATCH}
    race(ours, {"reference": (reference, 1.0)}, rounds=10)
