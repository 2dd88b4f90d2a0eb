"""Pairs of the training period that no target need hold: what was clicked, what came next."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .prepared import PreparedData
from .segments import owners


class TrainingPairs(NamedTuple):
    """Queries with the items clicked under them, and items with the next other item."""

    queries: NDArray[np.int32]  # [n]
    clicked: NDArray[np.int32]  # [n]
    items: NDArray[np.int32]  # [m]
    following: NDArray[np.int32]  # [m]


def training_pairs(data: PreparedData) -> TrainingPairs:
    """List the pairs of what training knows, strictly before ``data.train_end``.

    An item followed by itself makes no pair.
    """
    end = data.train_end
    search = owners(data.click_offsets)
    known = data.click_times < end[owners(data.search_offsets)[search]]
    owner = owners(data.rec_offsets)
    # The later event of a pair is the one that must be known.
    follows = (owner[1:] == owner[:-1]) & (data.rec_items[1:] != data.rec_items[:-1])
    follows &= data.rec_times[1:] < end[owner[1:]]
    return TrainingPairs(
        data.search_queries[search[known]],
        data.click_items[known],
        data.rec_items[:-1][follows],
        data.rec_items[1:][follows],
    )
