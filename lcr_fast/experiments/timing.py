"""Time models against each other, turn by turn, on batches of test users."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcr_fast.batch import Batch
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.training.evaluation import make_batcher, with_target
from lcr_fast.training.ranks import Interval

_WARM_UP = 2
_REQUESTS = 64  # different users asked about one at a time, as users may differ in steps
_BATCHES = 4


def forward_times(
    models: Mapping[str, LCRSER],
    data: PreparedData,
    users: Sequence[int] = (1, 256),
    turns: int = 25,
) -> list[dict[str, Any]]:
    """Time forwards over 100 candidates: rows of name, users and ``ms`` with a 95 % interval.

    The models take turns on each batch, so what disturbs one disturbs all. ``ms`` is the median
    of all times and ``mean_ms`` the mean over batches of each one's fastest turn: what users of
    different depths cost together on a machine that nobody else uses. Models on a GPU are waited
    for.
    """
    first = next(iter(models.values()))
    draw = Draws(data, first)
    rows = []
    with torch.inference_mode():
        for n in users:
            batches = [draw(n) for _ in range(_REQUESTS if n == 1 else _BATCHES)]
            times = {name: np.zeros((len(batches), turns)) for name in models}
            for i, batch in enumerate(batches):
                for turn in range(-_WARM_UP, turns):
                    for name, model in models.items():
                        seconds = forward_seconds(model.eval(), batch)
                        if turn >= 0:
                            times[name][i, turn] = 1000 * seconds
            for name, mine in times.items():
                ms = median(mine.reshape(-1))
                rows.append({
                    "model": name, "users": n, "ms": ms.mean, "low": ms.low, "high": ms.high,
                    "mean_ms": float(mine.min(1).mean()),
                })  # fmt: skip
    return rows


class Draws:
    """Batches of test users drawn at random, each with 100 candidates; the same ones every time."""

    def __init__(self, data: PreparedData, model: LCRSER) -> None:
        self._batcher = make_batcher(data, "test", model)
        self._n_items = data.n_items
        self._device = model.head.target_weight.device
        self._rng = np.random.default_rng(0)

    def __call__(self, n: int) -> Batch:
        """Draw n users, with repetition."""
        samples = self._batcher.samples
        rows = self._rng.integers(len(samples), size=n)
        negatives = self._rng.integers(1, self._n_items + 1, (n, 99))
        candidates = with_target(samples.items[rows], negatives)
        return self._batcher.gather(rows, *candidates).to(self._device)


def forward_seconds(model: LCRSER, batch: Batch) -> float:
    """Time one forward; a GPU is waited for."""
    start = time.perf_counter()
    model(batch)
    if batch.device.type == "cuda":
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - start


def median(values: NDArray) -> Interval:
    """Median of repeated times [n] with its 95 % interval: of order statistics, for any law."""
    ordered, n = np.sort(values), len(values)
    reach = 0.98 * math.sqrt(n)  # 1.96 standard deviations of the count below the median
    low, high = max(math.floor(n / 2 - reach), 0), min(math.ceil(n / 2 + reach), n - 1)
    return Interval(float(np.median(values)), float(ordered[low]), float(ordered[high]), n)
