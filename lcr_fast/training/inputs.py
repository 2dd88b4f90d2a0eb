"""What training steps read: assembled by the trainer, or ahead of it by other processes."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lcr_fast.batch import Batch
from lcr_fast.profiling import range_
from lcr_fast.training.objective import Objective


class StepInputs(NamedTuple):
    """A mini-batch, and what :class:`Objective` draws beside it."""

    batch: Batch
    seed: int | Tensor
    extras: dict[str, Tensor]

    def to(self, device: torch.device) -> "StepInputs":
        """Move all tensors to a device."""
        extras = {name: t.to(device) for name, t in self.extras.items()}
        return StepInputs(self.batch.to(device), self.seed, extras)

    def named(self) -> dict[str, Tensor]:
        """Name all tensors, and the seed as one, int64 []."""
        return {**vars(self.batch), **self.extras, "seed": torch.as_tensor(self.seed)}


def assemble(objective: Objective, rows: NDArray, rng: np.random.Generator) -> StepInputs:
    """Assemble the samples ``rows`` and draw what goes with them, on the CPU."""
    with range_("batch"):
        batch, seed = objective.batch(rows, rng), int(rng.integers(2**63))
        return StepInputs(batch, seed, objective.extras(seed))


class Epoch(Dataset):
    """The inputs of an epoch's steps by their numbers, each drawn from a key of its own.

    ``key`` names the epoch; with 0 behind it, it is the key of the order of samples, with 1 + i of
    step i.
    """

    def __init__(self, objective: Objective, key: tuple[int, ...]) -> None:
        self._objective, self._key = objective, key
        schedule = objective.schedule
        samples = self._rng(0).permutation(len(objective.batcher))
        self._order, self._size = samples[: schedule.epoch_size or None], schedule.batch_size

    def _rng(self, place: int) -> np.random.Generator:
        return np.random.default_rng([*self._key, place])

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._size)

    def __getitem__(self, step: int) -> StepInputs:
        rows = self._order[step * self._size : (step + 1) * self._size]
        return assemble(self._objective, rows, self._rng(1 + step))

    def steps(self, first: int, workers: int) -> Iterator[StepInputs]:
        """Go through the steps from ``first``, two a worker ahead; without workers in turn."""
        steps = range(first, len(self))
        if not workers:
            return (self[step] for step in steps)
        # Forked, so that memory-mapped data is not copied to the workers.
        options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork"}
        return iter(DataLoader(self, batch_size=None, sampler=steps, collate_fn=_as_is, **options))


def _as_is(inputs: Any) -> Any:
    return inputs
