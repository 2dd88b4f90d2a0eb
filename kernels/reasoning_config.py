"""How the reasoning kernels are compiled: tiles, warps, and what waits in memory."""

from typing import Any, NamedTuple

import torch
import triton

from lcr_fast.kernels._launch import GPUS, Gpu


class Tile(NamedTuple):
    """How many sequences share a program, and the rows that each has there, a stream."""

    users: int
    slots: tuple[int, int]

    @property
    def rows(self) -> int:
        """Rows of the longer stream's tile."""
        return self.users * max(self.slots)


def tile(search_size: int, rec_size: int) -> Tile:
    """Choose a tile for histories of so many events: short ones share it."""
    slot_s, slot_r = (max(16, triton.next_power_of_2(size)) for size in (search_size, rec_size))
    return Tile(max(1, 32 // max(slot_s, slot_r)), (slot_s, slot_r))


class Config(NamedTuple):
    """How a kernel is compiled."""

    num_warps: int
    # What is kept in memory between its uses, not in registers: 0 nothing, 1 (forward) the states
    # of the stream that is not at work, 2 every operand that a sublayer uses more than once.
    park: int = 0
    # Of a product in one piece; 0: whole. What is cut is multiplied as IEEE, if it is float32.
    depth: int = 0
    block_f: int = 32  # hidden units of the FFN at a time


# By pass and kind of product (half, tf32, ieee), then rows of a tile, at most. A warp takes 16 rows
# of a chain of tensor-core products: more than rows / 16 of them would repeat each other's work.
# All is chosen for the fewest spilled bytes by ahead-of-time compilation with Triton 3.7.1
# (docs/kernel-resources.md), and of equals for the least traffic; none was timed on a GPU.
_DEFAULTS = {
    ("fwd", "half"): {32: Config(4), 64: Config(4, 1), 128: Config(8, 1)},
    ("fwd", "tf32"): {32: Config(4, 1), 64: Config(4, 2), 128: Config(8, 2)},
    ("fwd", "ieee"): {32: Config(8, 2, 32), 64: Config(8, 2, 16), 128: Config(16, 2, 16)},
    ("recompute", "half"): {64: Config(4), 128: Config(8)},
    ("recompute", "tf32"): {64: Config(4), 128: Config(8, 2)},
    ("recompute", "ieee"): {32: Config(8, 2, 32), 64: Config(8, 2, 16), 128: Config(16, 2, 16)},
    ("bwd", "half"): {64: Config(4), 128: Config(8, 2)},
    ("bwd", "tf32"): {64: Config(4), 128: Config(8, 2)},
    ("bwd", "ieee"): {32: Config(8, 2, 32), 64: Config(8, 2, 32, 16), 128: Config(16, 2, 16)},
}
# Exceptions, by (pass, kind, D, rows, major compute capability or None for all).
_CONFIGS = {
    ("fwd", "half", 32, 32, None): Config(4, 1),
    ("fwd", "half", 128, 64, None): Config(8, 2),
    ("fwd", "half", 128, 128, None): Config(8, 2),
    ("fwd", "tf32", 32, 32, None): Config(4),
    ("fwd", "ieee", 32, 32, None): Config(8, 2, 16),
    ("recompute", "half", 64, 32, 8): Config(4, 2),
    ("recompute", "half", 128, 64, None): Config(8),
    ("recompute", "half", 128, 64, 8): Config(8, 2),
    ("recompute", "half", 128, 128, None): Config(8, 2),
    ("recompute", "tf32", 32, 32, 9): Config(4, 2),
    ("recompute", "ieee", 32, 32, None): Config(8, 2, 16),
    ("bwd", "half", 128, 64, None): Config(8, 2),
    ("bwd", "ieee", 32, 32, None): Config(8, 0, 32),
}
# Most bytes of one head's tile [rows, D/H], by the shared memory that a program may have, for which
# products fit it whole. Beyond, they are cut: slow (TF32 is then computed as IEEE), but it runs.
_LARGEST_HEAD = {
    "fwd": {99 << 10: 16 << 10, 163 << 10: 64 << 10},
    "recompute": {99 << 10: 16 << 10, 163 << 10: 64 << 10},
    "bwd": {99 << 10: 8 << 10, 163 << 10: 16 << 10, 227 << 10: 32 << 10},
}
_CUT = Config(16, 2, 16)
# On compute capability 10 the tiles of long histories exceed tensor memory. 16 warps do without, as
# on capability 8, and need as much shared memory as there.
_WITHOUT_TENSOR_MEMORY = Config(16, 2)


def config(
    which: str, D: int, H: int, rows: int, dtype: torch.dtype, precision: str, gpu: Gpu
) -> Config:
    """Look up a pass: ``fwd``, ``recompute`` (the forward part of backward) or ``bwd``.

    ``rows`` are those of the longer stream's tile, ``precision`` is that of float32 products,
    ``tf32`` or ``ieee``.
    """
    kind = precision if dtype == torch.float32 else "half"
    is_long = gpu.major == 10 and rows > 64 and kind != "ieee" and (D == 128 or which == "bwd")
    shared = min(gpu.shared, GPUS["sm_80"].shared) if is_long else gpu.shared
    head = rows * (D // H) * dtype.itemsize
    fitting = (most for least, most in _LARGEST_HEAD[which].items() if shared >= least)
    if kind != "ieee" and head > max(fitting, default=0):
        return _CUT
    if is_long:
        return _WITHOUT_TENSOR_MEMORY
    for major in (gpu.major, None):
        if exception := _CONFIGS.get((which, kind, D, rows, major)):
            return exception
    return next(c for most, c in _DEFAULTS[which, kind].items() if rows <= most)


def constants(
    which: str,
    D: int,
    F: int,
    H: int,
    tile: Tile,
    dtype: torch.dtype,
    precision: str,
    gpu: Gpu,
) -> dict[str, Any]:
    """Compile-time arguments and launch options of a pass's kernels; none of them takes all.

    F is the FFN's width or 0, H the number of heads; the rest as for :func:`config`.
    """
    chosen = config(which, D, H, tile.rows, dtype, precision, gpu)
    return {
        "D": D,
        "F": F,
        "H": H,
        "USERS": tile.users,
        "PARK": chosen.park,
        "RELOAD": chosen.park == 2,
        "BLOCK_F": min(chosen.block_f, 32 if F % 32 == 0 else 16),
        "PRECISION": f"ieee{chosen.depth}" if chosen.depth else precision,
        "num_warps": chosen.num_warps,
        "num_stages": 1,
    }
