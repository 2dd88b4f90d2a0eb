"""Recommend from prepared data: everything that is known of a user, in the data's own ids."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.training.evaluation import make_batcher, padded_seen

_END_OF_TIME = np.iinfo(np.int64).max


def recommend(
    model: LCRSER,
    data: PreparedData,
    users: Sequence[str] | None = None,
    k: int = 10,
    batch_size: int = 256,
) -> Iterator[tuple[str, int, str, float]]:
    """Yield (user, rank, item, score) with raw ids, k unseen items a user, rank from 1.

    ``users`` None means all; a user without any history gets what the model gives to nobody in
    particular. What of the data the model does not know is skipped, as ``make_batcher`` says.
    Raises ValueError, before anything is computed, for a user that the data does not know, and
    where the model knows items that it does not.
    """
    if isinstance(users, str):  # whose letters would be taken for users
        raise ValueError(f"users must be a sequence of ids, [{users!r}], got a text")
    if model.config.n_items > data.n_items:
        raise ValueError(
            f"the model knows more items than the data: {model.config.n_items}, not {data.n_items}"
        )
    if users is None:
        numbers = np.arange(1, data.n_users + 1)
    else:
        numbers = np.array([_find(data, user) for user in users], dtype=np.int64)
    return _recommend(model, data, numbers, k, batch_size)


def _recommend(
    model: LCRSER, data: PreparedData, numbers: NDArray[np.int64], k: int, batch_size: int
) -> Iterator[tuple[str, int, str, float]]:
    batcher = make_batcher(data, "test", model)
    device = model.head.target_weight.device
    for start in range(0, len(numbers), batch_size):
        some = numbers[start : start + batch_size]
        times = np.full(len(some), _END_OF_TIME)
        nothing = np.zeros((len(some), 0), dtype=np.int64)
        batch = batcher.at(some, times, nothing).to(device)
        seen = torch.from_numpy(padded_seen(data, some, times)).to(device)
        items, scores = model.recommend(batch, k, exclude=seen)
        for user, row, values in zip(some, items.tolist(), scores.tolist(), strict=True):
            for rank, (item, score) in enumerate(zip(row, values, strict=True), 1):
                if item:
                    yield data.users[int(user)], rank, data.items[item], score


def _find(data: PreparedData, user: str) -> int:
    try:
        return data.users.find(str(user))
    except KeyError:
        raise ValueError(f"user {user!r} is not in the data") from None
