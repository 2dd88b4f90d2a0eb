"""What the reasoning kernels serve, and how they are compiled: tiles, warps, what is parked."""

import functools
from typing import Any, NamedTuple

import torch
import triton

from lcr_fast.kernels.gpu import Gpu, dot_precision

_WIDTHS = (32, 64, 128)
_MIN_HEAD = 16  # the least depth of a tensor-core dot
_MAX_SIZE = 128  # events a stream: one slot must fit a tile
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Compute capabilities where float32 operands are read from shared memory. Elsewhere they wait in
# registers; beyond so many numbers in parts, ptxas spills ten kilobytes a thread.
READ_SHARED = (9,)
_MOST_IN_REGISTERS = 64 * 64


class Tile(NamedTuple):
    """How many sequences share a program, and the rows that each has there, a stream."""

    sequences: int
    slots: tuple[int, int]


@functools.cache  # Triton's functions cost the host as much as a launch
def slots(search_size: int, rec_size: int) -> tuple[int, int]:
    """Rows of one sequence of so many events: a power of two, at least the 16 of a product."""
    return (
        max(16, triton.next_power_of_2(search_size)),
        max(16, triton.next_power_of_2(rec_size)),
    )


def obstacle(
    *,
    dim: int,
    n_heads: int,
    ffn_dim: int,
    search_len: int,
    rec_len: int,
    dtype: torch.dtype,
    gpu: Gpu | None = None,
) -> str | None:
    """Say why the kernels cannot serve a case on a GPU, or in the interpreter, or None."""
    if dtype not in _DTYPES:
        return f"it computes float32, float16 and bfloat16, not {dtype}"
    if dim not in _WIDTHS:
        return f"it needs a width of 32, 64 or 128, got {dim}"
    if n_heads < 1 or dim % n_heads or dim // n_heads < _MIN_HEAD:
        return f"it needs heads at least {_MIN_HEAD} wide, got {n_heads} heads of width {dim}"
    if ffn_dim % 16:
        return f"it needs an FFN width that is a multiple of 16, got {ffn_dim}"
    if max(search_len, rec_len) > _MAX_SIZE:
        return f"it holds {_MAX_SIZE} events a stream, got {max(search_len, rec_len)}"
    if gpu is not None and gpu.major not in READ_SHARED and dot_precision(dtype) == "bf16x6":
        rows = max(dim, *slots(search_len, rec_len))
        if dim == 128 or rows * (dim // n_heads) > _MOST_IN_REGISTERS:
            return (
                f"on compute capability {gpu.major} the parts of float32 operands do not fit "
                f"registers at width {dim} with {n_heads} heads and {max(search_len, rec_len)} "
                "events; torch.set_float32_matmul_precision('high') or halves do"
            )
    return None


class Shape(NamedTuple):
    """What is compiled into all kernels of a pass."""

    D: int
    F: int  # width of the FFN, or 0
    H: int  # heads
    BLOCK_HEADS: int  # columns of whole heads at a time, of the attention's D
    BLOCK_F: int  # hidden units of the FFN at a time
    PRECISION: str  # of products (see core/product.py)
    SUBLAYERS: int = 3  # of a step; 2 of an encoder's layer, which has no cross-attention


class Config(NamedTuple):
    """How a kernel is compiled."""

    num_warps: int
    # Whether what backward uses more than once waits in scratch between its uses, not in registers.
    parked: bool = False
    rows: int = 64  # of a tile, which short sequences share
    block_heads: int = 32  # columns of heads at a time; at least one head's
    block_f: int = 32  # hidden units of the FFN at a time
    registers: int | None = None  # of a thread, at most; None: as many as there are
    cut: bool = False  # whether products are cut in depth, as they do not fit shared memory whole
    looped: bool = False  # whether streams of one slot share the code of a forward pass

    def heads(self, D: int, H: int) -> int:
        """Columns of heads at a time, of D with H heads."""
        return min(D, max(self.block_heads, D // H))

    def tile(self, search_size: int, rec_size: int) -> Tile:
        """Choose a tile for histories of so many events."""
        sizes = slots(search_size, rec_size)
        return Tile(max(1, self.rows // max(sizes)), sizes)


# By pass and kind of product (half, bf16x3, bf16x6), then rows of the longer slot, at most. 64 rows
# on four warps fill wgmma, eight warps repeat each other's work. What was timed, and what is chosen
# by counts of the machine code alone, is in docs/fused-kernel.md.
_DEFAULTS = {
    ("fwd", "half"): {64: Config(4, block_f=64), 128: Config(8, block_f=64)},
    ("fwd", "bf16x3"): {64: Config(4, block_f=64, looped=True), 128: Config(8, looped=True)},
    ("fwd", "bf16x6"): {64: Config(4, block_f=64, looped=True), 128: Config(8, looped=True)},
    ("bwd", "half"): {64: Config(4), 128: Config(8, parked=True)},
    ("bwd", "bf16x3"): {64: Config(4), 128: Config(8, parked=True)},
    ("bwd", "bf16x6"): {
        32: Config(4, rows=32),
        64: Config(4, parked=True),
        128: Config(8, parked=True),
    },
}
# Exceptions, by (pass or kernel, kind, D, rows of the slot, major compute capability; None: all).
_CONFIGS: dict[tuple[str, str, int, int, int | None], Config] = {
    **{
        ("fwd", kind, 64, slot, 9): Config(4, block_heads=64, block_f=64, looped=kind != "half")
        for kind in ("half", "bf16x3", "bf16x6")
        for slot in (32, 64)
    },
    ("fwd", "half", 64, 128, 9): Config(8, block_heads=64, block_f=64),
    **{("bwd", "half", 64, slot, 9): Config(4, block_heads=64, registers=168) for slot in (32, 64)},
    ("bwd", "bf16x6", 64, 32, 9): Config(4),
    ("cross_bwd", "bf16x6", 64, 32, 9): Config(4, rows=32),
    ("bwd", "bf16x6", 128, 32, None): Config(4, parked=True),
}
# Where there is tensor memory, float32 in parts, long histories, wide gradients and a forward
# pass that takes the whole width at a time (one head, or width 32) exceed it; 16 warps do without,
# and need as much shared memory as on capability 8. Not told that a thread may have 128 registers,
# ptxas 13.1 gives it 32 and spills the rest.
_WITHOUT_TENSOR_MEMORY = Config(16, parked=True, registers=128)
# Most bytes of one tile of heads, in bf16x6 of all parts, by the shared memory that a program may
# have, for which products fit it whole.
_LARGEST_HEADS = {
    "fwd": {99 << 10: 16 << 10, 163 << 10: 64 << 10},
    "bwd": {99 << 10: 8 << 10, 163 << 10: 16 << 10, 227 << 10: 32 << 10},
}


def _fits(which: str, width: int, rows: int, number_bytes: int, shared: int) -> bool:
    """Whether whole products of a tile of heads fit the shared memory of a program."""
    largest = (most for least, most in _LARGEST_HEADS[which].items() if shared >= least)
    return rows * width * number_bytes <= max(largest, default=0)


def config(
    which: str, D: int, H: int, slot: int, dtype: torch.dtype, precision: str, gpu: Gpu
) -> Config:
    """Look up a pass: ``fwd``, backward's ``recompute`` of reasoning steps, or ``bwd``.

    ``cross_bwd``, a kernel of the last, may have a configuration of its own.

    ``slot`` is the rows of the longer stream's slot, ``precision`` is that of float32 products,
    ``bf16x6`` or ``bf16x3``. Where the tile does not fit the GPU's shared memory, it has fewer
    sequences, or its products are cut, which is slow.
    """
    kind = precision if dtype == torch.float32 else "half"
    number_bytes = 6 if kind == "bf16x6" else dtype.itemsize
    if which == "recompute":
        # As forward; but a loop over heads keeps both streams' states in shared memory all along.
        chosen = config("fwd", D, H, slot, dtype, precision, gpu)
        heads = chosen.heads(D, H)
        kept = max(slot, chosen.rows) * (2 * D + heads) * number_bytes
        is_loop = heads < D
        return chosen._replace(block_heads=D, cut=True) if is_loop and kept > gpu.shared else chosen
    kernel, which = which, which.removeprefix("cross_")
    chosen = next(c for most, c in _DEFAULTS[which, kind].items() if slot <= most)
    for name in (which, kernel):
        for major in (None, gpu.major):
            chosen = _CONFIGS.get((name, kind, D, slot, major), chosen)
    shared = gpu.shared
    is_long, is_wide = slot > 64, D == 128
    if kind == "bf16x3" and which == "fwd" and is_wide and not is_long and shared < 163 << 10:
        # A loop over heads keeps both streams' states there.
        chosen = chosen._replace(block_heads=D)
    if kind == "bf16x3" and kernel == "cross_bwd" and is_wide and shared < 163 << 10:
        chosen = chosen._replace(parked=True)  # else it keeps parts of both streams' states there
    exceeds = is_long or (chosen.heads(D, H) == D if which == "fwd" else is_wide)
    if gpu.has_tensor_memory and (kind != "half" or exceeds):
        chosen, shared = _WITHOUT_TENSOR_MEMORY, min(shared, 163 << 10)
    for rows in (max(slot, chosen.rows), max(slot, 32)):
        if _fits(which, chosen.heads(D, H), rows, number_bytes, shared):
            return chosen._replace(rows=rows)
    return chosen._replace(rows=max(slot, 32), parked=True, cut=True)


def constants(
    which: str,
    D: int,
    F: int,
    H: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    gpu: Gpu,
) -> dict[str, Any]:
    """Compile-time arguments and launch options of a pass's kernels; none of them takes all.

    F is the FFN's width or 0, H the number of heads, ``sizes`` the events of both streams; the rest
    as for :func:`config`.
    """
    chosen = config(which, D, H, max(slots(*sizes)), dtype, precision, gpu)
    return {
        "SHAPE": Shape(
            D,
            F,
            H,
            BLOCK_HEADS=chosen.heads(D, H),
            BLOCK_F=min(chosen.block_f, F & -F),
            PRECISION=f"{precision} cut" if chosen.cut else precision,
        ),
        "SEQUENCES": chosen.tile(*sizes).sequences,
        "PARKED": chosen.parked,
        "LOOPED": chosen.looped and len(set(slots(*sizes))) == 1,
        "num_warps": chosen.num_warps,
        "num_stages": 1,
        "maxnreg": chosen.registers,
    }
