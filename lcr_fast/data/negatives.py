"""Negative items: never one the user has seen before the target's time, never the target."""

import numpy as np
from numpy.typing import NDArray

from .prepared import PreparedData

KINDS = ("popularity", "uniform")
_ROUNDS = 20  # rejections leave few rows after that; those are drawn from their own list


class NegativeSampler:
    """Draw items by popularity or uniformly, outside the users' past.

    Popularity is ``item_count + smoothing``. With 1, the default, an item that no training event
    holds is drawn too: were it never a negative, a candidate without training would betray the
    target. ``smoothing=0`` never draws such an item.
    """

    def __init__(self, data: PreparedData, kind: str = "popularity", smoothing: int = 1) -> None:
        if kind not in KINDS:
            raise ValueError(f"negatives must be one of {', '.join(KINDS)}, got {kind!r}")
        self.data, self.seen = data, data.seen
        weights = np.array(data.item_count, dtype=np.int64) + smoothing
        if kind == "uniform":
            weights[:] = 1
        weights[0] = 0
        self.weights = weights
        self.cumulative = np.cumsum(weights)

    def draw(
        self,
        rng: np.random.Generator,
        users: NDArray,
        times: NDArray,
        targets: NDArray,
        n: int,
        distinct: bool = False,
    ) -> NDArray[np.int64]:
        """Draw n negatives for each of B (user, time, target): int64 [B, n].

        ``distinct`` makes those of a row differ. Raises ValueError where a user has seen so much
        that a row cannot be filled.
        """
        users, times, targets = (np.asarray(values) for values in (users, times, targets))
        out = np.zeros((len(users), n), dtype=np.int64)
        bad = np.ones_like(out, dtype=bool)
        rows = np.arange(len(users))
        for _ in range(_ROUNDS if self.cumulative[-1] else 0):
            # Numbers are drawn for the places that stand too, but only new items are looked up.
            drawn = rng.integers(self.cumulative[-1], size=bad.shape)[bad]
            items = np.searchsorted(self.cumulative, drawn, side="right")
            places = np.nonzero(bad)
            of_items = rows[places[0]]
            out[of_items, places[1]] = items
            taken = self.seen.has(users[of_items], items, times[of_items])
            bad[places] = taken | (items == targets[of_items])
            if distinct:
                bad |= _repeated(out[rows])
            kept = bad.any(1)
            rows, bad = rows[kept], bad[kept]
            if not len(rows):
                return out
        for row, wrong in zip(rows, bad, strict=True):
            fixed = out[row, ~wrong] if distinct else out[row, :0]
            allowed = self._allowed(users[row], times[row], targets[row], fixed)
            out[row, wrong] = self._exactly(rng, allowed, wrong.sum(), distinct, users[row], n)
        return out

    def _allowed(self, user: int, time: int, target: int, fixed: NDArray) -> NDArray:
        free = self.weights > 0
        _, seen = self.seen.before(np.array([user]), np.array([time]))
        free[seen] = False
        free[target] = False
        free[fixed] = False
        return np.flatnonzero(free)

    def _exactly(
        self,
        rng: np.random.Generator,
        allowed: NDArray,
        wanted: int,
        distinct: bool,
        user: int,
        n: int,
    ) -> NDArray[np.int64]:
        if len(allowed) < (wanted if distinct else min(wanted, 1)):
            kind = "distinct negatives" if distinct else "negatives"
            left = n - wanted + len(allowed) if distinct else 0
            raise ValueError(
                f"user {self.data.users[int(user)]!r} has seen all but too few of the "
                f"{len(self.weights) - 1} items: {n} {kind} are wanted, {left} are left"
            )
        share = self.weights[allowed] / self.weights[allowed].sum()
        return rng.choice(allowed, size=wanted, replace=not distinct, p=share)


def _repeated(block: NDArray) -> NDArray[np.bool_]:
    """Mark what already stands further left in its row: [B, n]."""
    # Sorting numbers that name their places is several times as fast as an argsort.
    n = max(block.shape[1], 1)
    ordered, order = np.divmod(np.sort(block * n + np.arange(block.shape[1]), axis=1), n)
    marks = np.zeros(block.shape, dtype=bool)
    again = ordered[:, 1:] == ordered[:, :-1]
    np.put_along_axis(marks, order[:, 1:], again, axis=1)
    return marks
