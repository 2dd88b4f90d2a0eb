"""Pairs of the training period that no target need hold: what was clicked, what came next."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .prepared import SPLITS, PreparedData


class TrainingPairs(NamedTuple):
    """Queries with the items clicked under them, and items with the next other item."""

    queries: NDArray[np.int32]  # [n]
    clicked: NDArray[np.int32]  # [n]
    items: NDArray[np.int32]  # [m]
    following: NDArray[np.int32]  # [m]


def training_pairs(data: PreparedData) -> TrainingPairs:
    """List the pairs strictly before each user's first held-out target; all of other users'.

    An item followed by itself makes no pair.
    """
    end = np.full(data.n_users + 1, np.iinfo(np.int64).max)
    for split in SPLITS[1:]:
        samples = data.split(split)
        np.minimum.at(end, samples.users, samples.times)
    every_user = np.arange(data.n_users + 1)
    searcher = np.repeat(every_user, np.diff(data.search_offsets))
    search = np.repeat(np.arange(len(searcher)), np.diff(data.click_offsets))
    known = data.click_times < end[searcher[search]]
    owner = np.repeat(every_user, np.diff(data.rec_offsets))
    # The later event of a pair is the one that must be known.
    follows = (owner[1:] == owner[:-1]) & (data.rec_items[1:] != data.rec_items[:-1])
    follows &= data.rec_times[1:] < end[owner[1:]]
    return TrainingPairs(
        data.search_queries[search[known]],
        data.click_items[known],
        data.rec_items[:-1][follows],
        data.rec_items[1:][follows],
    )
