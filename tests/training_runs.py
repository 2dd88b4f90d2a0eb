"""Tiny runs of the trainer, and how two of them are compared."""

import itertools
import json

import torch

from lcr_fast.config import TrainConfig
from lcr_fast.storage import load_tensors
from lcr_fast.training.trainer import CHECKPOINT, METRICS, MODEL, Trainer

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
                del info["progress"]["seconds"], info["train"]["workers"]
                info["progress"]["history"] = without_seconds(info["progress"]["history"])
        assert my_info == their_info
    assert without_seconds(read_metrics(first)) == without_seconds(read_metrics(second))
