"""Tiles of sequences: which row holds what, where they stand in memory.

A program holds whole sequences. A stream's tile has M rows of width D, cut into slots of SLOT rows;
a slot holds one sequence (one user, one trajectory), its events first. SLOT is a power of two of at
least 16, so that every sum over rows meets a sequence's numbers in the same grouping whatever slot
it stands in: a result does not depend on the batch around it.

A place is (start, offset, exists): the address of a tile's first row, the other rows' offsets from
there, int32 [M, 1], and which of them exist, bool [M, 1]. Only the first needs 64 bits, and that is
one number: 64-bit offsets of all rows would take twice the registers.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """What stands in each row of a tile, [M] each, and where."""

    sequence: Any
    position: Any  # in its sequence
    length: Any  # events of its sequence
    stored: Any  # whether tensors [sequences, size, ...] have the row
    first: Any  # sequence of the tile, int64, one number
    place: Any  # after the start of that sequence in such tensors, int32


@triton.jit
def sequence_at(first, slot):
    """Sequence in a slot of the tile: int32. There are no 2^31, and 64 bits divide slowly."""
    return first.to(tl.int32) + slot


@triton.jit
def load_of_user(ptr, first, end, n_trajectories, M: tl.constexpr, SLOT: tl.constexpr):
    """Element of each row's user in a tensor [B], 0 beyond the last sequence: [M]."""
    if M == SLOT:  # one sequence: a number for all rows, not a register for each
        sequence = sequence_at(first, 0)
        value = tl.load(ptr + sequence // n_trajectories, mask=sequence < end, other=0)
        values = tl.zeros([M], value.dtype) + value
    else:
        sequence = sequence_at(first, tl.arange(0, M) // SLOT)
        values = tl.load(ptr + sequence // n_trajectories, mask=sequence < end, other=0)
    return values


@triton.jit
def locate_rows(first, end, lengths_ptr, n_trajectories, size, M: tl.constexpr, SLOT: tl.constexpr):
    """Say what stands in each row of a tile.

    Sequence b N + n is trajectory n of user b; the slots hold ``first``, ``first`` + 1 and so on up
    to ``end``, where the length is 0. A row is stored if tensors [sequences, size, D] have it.
    """
    row = tl.arange(0, M)
    position = row % SLOT
    sequence = sequence_at(first, row // SLOT)
    length = load_of_user(lengths_ptr, first, end, n_trajectories, M, SLOT)
    length = tl.minimum(length, size).to(tl.int32)
    stored = (sequence < end) & (position < size)
    return Rows(sequence, position, length, stored, first, row // SLOT * size + position)


# Rows of queries that a warp multiplies with the keys of one sequence: no slot has fewer.
GROUP = tl.constexpr(16)


@triton.jit
def memory_lengths(
    lengths_ptr, first, end, n_trajectories, size,
    M: tl.constexpr, SLOT: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Events of the memory that each group of GROUP queries reads: int32 [M / GROUP].

    Where one sequence fills the tile all queries are one group: [1].
    """
    GROUPS: tl.constexpr = 1 if SEQUENCES == 1 else M // GROUP
    sequence = sequence_at(first, tl.arange(0, GROUPS) * GROUP // SLOT)
    length = tl.load(lengths_ptr + sequence // n_trajectories, mask=sequence < end, other=0)
    return tl.minimum(length, size).to(tl.int32)


@triton.jit
def sequence_lengths(lengths_ptr, first, end, n_trajectories, size, SEQUENCES: tl.constexpr):
    """Events of each slot's sequence: int32 [SEQUENCES]."""
    sequence = sequence_at(first, tl.arange(0, SEQUENCES))
    length = tl.load(lengths_ptr + sequence // n_trajectories, mask=sequence < end, other=0)
    return tl.minimum(length, size).to(tl.int32)


@triton.jit
def by_sequence(x, SEQUENCES: tl.constexpr):
    """Cut the rows of a tile [M, D] into those of each slot: [SEQUENCES, SLOT, D]."""
    return x.reshape(SEQUENCES, x.shape[0] // SEQUENCES, x.shape[1])


@triton.jit
def row_slots(M: tl.constexpr, SLOT: tl.constexpr):
    """Slot of each row, [M]."""
    return tl.arange(0, M) // SLOT


@triton.jit
def key_slots(length, SLOT: tl.constexpr):
    """Slot of each row as a key, [M]; -1 where there is no event, so that no query matches."""
    row = tl.arange(0, length.shape[0])
    return tl.where(row % SLOT < length, row // SLOT, -1)


@triton.jit
def tile_at(ptr, rows, size, WIDTH: tl.constexpr):
    """Place of a tile's rows in a contiguous tensor [sequences, size, WIDTH]."""
    return ptr + rows.first * size * WIDTH, (rows.place * WIDTH)[:, None], rows.stored[:, None]


@triton.jit
def columns(at, first):
    """Move to another column of the same rows."""
    start, offset, exists = at
    return start + first, offset, exists


@triton.jit
def load_tile(at, D: tl.constexpr):
    """D columns of a tile's rows, 0 in rows that do not exist: [M, D]."""
    start, offset, exists = at
    return tl.load(start + offset + tl.arange(0, D)[None, :], mask=exists, other=0.0)


@triton.jit
def store_tile(at, x, D: tl.constexpr):
    """Store x [M, D] in D columns of a tile's rows, in the tensor's dtype."""
    start, offset, exists = at
    x = x.to(start.dtype.element_ty)
    tl.store(start + offset + tl.arange(0, D)[None, :], x, mask=exists)


@triton.jit
def unpark(x, at, D: tl.constexpr, PARKED: tl.constexpr):
    """x, or if PARKED its copy in memory, so that x need not wait in registers until here."""
    if PARKED:
        # Without the barrier this load would be merged with an earlier one, and kept till here.
        tl.debug_barrier()
        x = load_tile(at, D)
    return x
