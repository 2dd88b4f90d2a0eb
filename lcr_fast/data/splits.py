"""Which samples train, which are held out: leave-one-out a user, or by time for all at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .prepared import SPLITS
from .segments import offsets_of

KINDS = ("user", "time")
_TRAIN, _VALID, _TEST = range(len(SPLITS))
_LEFT_OUT = -1


class Split(NamedTuple):
    """A split of samples sorted by user and time."""

    of_sample: NDArray[np.int8]  # [n] place in SPLITS, -1 for a sample in none
    times: NDArray[np.int64] | None  # [2] when validation and test begin for all users


def leave_one_out(users: NDArray, n_users: int, min_targets: int) -> Split:
    """Hold out of each user the last sample for testing, the one before it for validation.

    Users with fewer than ``min_targets`` samples only train; a validation sample needs three.
    """
    from_end, count = _places(users, n_users)
    held_out = count >= min_targets
    split = np.zeros(len(users), dtype=np.int8)
    split[held_out & (from_end == 0)] = _TEST
    split[held_out & (from_end == 1) & (count >= 3)] = _VALID
    return Split(split, None)


def by_time(
    users: NDArray,
    times: NDArray,
    n_users: int,
    min_targets: int,
    shares: tuple[float, float],
) -> Split:
    """Hold out what comes last of all samples: ``shares`` (validation, test) of them in time.

    Of each user the last sample of either period is taken, so that all count alike; the others of
    these periods are in no split, nor are those of users with fewer than ``min_targets`` samples.
    Raises ValueError where no sample is left to train.
    """
    valid, test = shares
    ordered = np.sort(times)
    first = [int(len(ordered) * (1 - share)) for share in (valid + test, test)]
    begins = ordered[np.minimum(first, len(ordered) - 1)]
    period = np.searchsorted(begins, times, side="right").astype(np.int8)
    if not (period == _TRAIN).any():
        raise ValueError(
            f"the last {valid + test:.0%} of the samples begin at the first one's time: no sample "
            "is left to train (--time-shares)"
        )
    _, count = _places(users, n_users)
    last = np.ones(len(users), dtype=bool)
    last[:-1] = (users[1:] != users[:-1]) | (period[1:] != period[:-1])
    kept = (period == _TRAIN) | (last & (count >= min_targets))
    return Split(np.where(kept, period, _LEFT_OUT).astype(np.int8), begins.astype(np.int64))


def describe(split: Split, users: NDArray, least: int) -> list[str]:
    """Say how many of the samples' users [n] are held out."""
    place = split.of_sample
    tested, validated = (len(np.unique(users[place == number])) for number in (_TEST, _VALID))
    if split.times is not None:
        notes = [
            f"prepare: validation begins at {split.times[0]}, test at {split.times[1]}, for all "
            f"users; {tested:,} users are tested and {validated:,} validated, by their last target "
            f"of either period; {int((place == _LEFT_OUT).sum()):,} other samples are left out"
        ]
        if split.times[0] == split.times[1]:
            notes.append(
                "prepare: validation and test begin at one time, so that nothing is left to "
                "validate, and nothing can be trained: times are too coarse for these --time-shares"
            )
        return notes
    return [
        f"prepare: {tested:,} users are tested and {validated:,} validated; "
        f"{len(np.unique(users)) - tested:,} only train: fewer than {least} samples"
    ]


def later_than_tests(trained: NDArray, tested: NDArray) -> list[str]:
    """Say how many training times [n] lie behind half of the test targets' [m]."""
    late = int((trained > np.median(tested)).sum()) if len(tested) else 0
    if not late:
        return []
    return [
        f"prepare: {late:,} of {len(trained):,} training samples are later than the median test "
        "target, so that a model knows what others did after it; --split time holds out what "
        "comes last of all"
    ]


def _places(users: NDArray, n_users: int) -> tuple[NDArray, NDArray]:
    """Of each sample: how many of its user follow, and how many the user has."""
    offsets = offsets_of(users, n_users + 1)
    return offsets[users + 1] - 1 - np.arange(len(users)), np.diff(offsets)[users]
