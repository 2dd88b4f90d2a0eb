"""Ragged rows as NumPy arrays: offsets and values, gathered and searched without a Python loop.

Row r of a ragged array is ``values[offsets[r]:offsets[r + 1]]``.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray


def offsets_of(rows: Array, n_rows: int) -> Array:
    """Turn sorted row numbers (one a value) into int64 offsets [n_rows + 1]."""
    counts = np.bincount(rows, minlength=n_rows) if len(rows) else np.zeros(n_rows, np.int64)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def owners(offsets: Array) -> Array:
    """Give the row of every value: the inverse of :func:`offsets_of`."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def ranges(start: Array, length: Array) -> Array:
    """Concatenate ``arange(start[i], start[i] + length[i])`` for all i: int64 [sum of lengths]."""
    total = int(length.sum())
    before = np.cumsum(length) - length
    return np.arange(total) + np.repeat(start - before, length)


def padded(values: Array, start: Array, length: Array, width: int) -> tuple[Array, Array]:
    """Take ``values[start:start + length]`` of every row into one right-padded array.

    ``start`` and ``length`` have any shape [...]; at most ``width`` values of a row are taken.
    Returns the int64 values [..., width], 0 behind the length, and the mask of real values.
    """
    mask = np.arange(width) < length[..., None]
    taken = np.zeros(mask.shape, np.int64)
    index = ranges(start.ravel(), np.minimum(length, width).ravel())
    taken[mask] = values[index]
    return taken, mask


def lower_bound(values: Array, start: Array, end: Array, wanted: Array) -> Array:
    """Find in each sorted range ``values[start:end]`` the first place not below ``wanted``.

    ``np.searchsorted(side="left")`` with a range of its own for every query; all shapes broadcast.
    Returns absolute int64 places between start and end.
    """
    shape = np.broadcast_shapes(np.shape(start), np.shape(end), np.shape(wanted))
    low = np.array(np.broadcast_to(start, shape), dtype=np.int64)
    high = np.array(np.broadcast_to(end, shape), dtype=np.int64)
    if not len(values):
        return low
    while (open_ := low < high).any():
        middle = (low + high) >> 1
        below = values[np.where(open_, middle, 0)] < wanted
        low = np.where(open_ & below, middle + 1, low)
        high = np.where(open_ & ~below, middle, high)
    return low
