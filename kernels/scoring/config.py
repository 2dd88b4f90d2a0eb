"""What the scoring kernels serve, and how they are compiled: tiles, warps, stages."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lcr_fast.kernels.gpu import GPUS, Gpu, dot_precision
from lcr_fast.kernels.scoring.tile import HeadShape, Mlp
from lcr_fast.kernels.weight_parts import for_products

DIMS = (32, 64, 128)  # widths of a vector: one tile holds whole vectors
MAX_HIDDEN = (512, 128)  # widths of the hidden layers; the second is whole in one tile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def obstacle(dim: int, dtype: torch.dtype, hidden: tuple[int, ...]) -> str | None:
    """Say in one sentence why these kernels cannot serve a call, or None.

    ``hidden`` holds the widths of the hidden layers; it is empty for the dot product.
    """
    if dtype not in DTYPES:
        return f"the states must be float32, float16 or bfloat16, not {dtype}"
    if dim not in DIMS:
        return f"the width must be one of {', '.join(map(str, DIMS))}, not {dim}"
    if len(hidden) not in (0, 2) or any(h > m for h, m in zip(hidden, MAX_HIDDEN, strict=False)):
        return (
            f"the head must have two hidden layers of at most {MAX_HIDDEN[0]} and {MAX_HIDDEN[1]} "
            f"units, or none, not {list(hidden)}"
        )
    return None


def prepare(
    target_weight: Tensor, weights: list[Tensor], biases: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Mlp]:
    """Make of the weights what the kernels read; any tensor stands for an absent one."""
    target_weight, *matrices = for_products((target_weight, *weights[:2]), dtype, set_axes=0)
    if not weights:
        return target_weight, Mlp(*[target_weight] * 6)
    (w1, w2), w3, (b1, b2, b3) = matrices, weights[2], biases
    return target_weight, Mlp(w1, b1.contiguous(), w2, b2.contiguous(), w3.contiguous(), b3)


def constants(
    dim: int, dtype: torch.dtype, user: Tensor, mlp_weights: list[Tensor], threshold: int, dot: bool
) -> dict[str, Any]:
    """Compile-time constants that describe the call, not its launch."""
    h1, h2 = (w.shape[0] for w in mlp_weights[:2]) if mlp_weights else (0, 0)
    head = HeadShape(
        H1=h1,
        H2=h2,
        H2_TILE=max(16, triton.next_power_of_2(h2)),
        DOT=dot or h1 == 0,
        HAS_USER=user.numel() > 0 and h1 > 0,
        DROPOUT=threshold > 0 and h1 > 0,
    )
    return {
        "D": dim,
        "HEAD": head,
        "PRECISION": dot_precision(dtype),
        "KEY_BLOCK": 32 if dim == 128 and dtype == torch.float32 else dim,
    }


class Tiles(NamedTuple):
    """What one program holds at a time, at most."""

    candidates: int
    events: int
    hidden: int  # units of the first hidden layer
    warps: int
    stages: int = 2  # of loops over events and hidden units


# By kernel and by how products are made, for widths 32, 64, 128. Those of score_fwd in halves at
# width 64 were timed on an H200 (docs/fused-kernel.md): tiles of 64 rows fill wgmma. The others
# follow them as far as registers and shared memory go (docs/kernel-resources.md). A second stage,
# which doubles the operands in shared memory, costs bf16x6 more than it hides.
TILES = {
    ("score_fwd", "half"): ((64, 32, 32, 4), (64, 32, 32, 4), (32, 32, 16, 4)),
    ("score_fwd", "bf16x3"): ((64, 32, 0, 4, 1), (64, 32, 0, 4, 1), (16, 32, 0, 4, 1)),
    ("score_fwd", "bf16x6"): ((64, 32, 0, 4, 1), (64, 32, 0, 4, 1), (16, 32, 0, 4, 1)),
    ("catalogue", "half"): ((64, 32, 32, 4), (64, 32, 32, 4), (32, 32, 16, 4)),
    ("catalogue", "bf16x3"): ((32, 32, 32, 4), (32, 32, 32, 4), (16, 16, 16, 4)),
    ("catalogue", "bf16x6"): ((32, 32, 32, 4, 1), (32, 32, 32, 4, 1), (16, 32, 16, 4, 1)),
    ("attention", "half"): ((64, 32, 0, 4, 1), (64, 32, 0, 4, 1), (32, 32, 0, 4)),
    ("attention", "bf16x3"): ((64, 32, 0, 4, 1), (64, 32, 0, 4, 1), (16, 32, 0, 4, 1)),
    ("attention", "bf16x6"): ((64, 32, 0, 4, 1), (64, 32, 0, 4, 1), (16, 32, 0, 4, 1)),
    ("state_bwd", "half"): ((32, 32, 0, 4), (32, 32, 0, 4), (16, 32, 0, 4)),
    ("state_bwd", "bf16x3"): ((32, 32, 0, 4), (32, 32, 0, 4), (16, 32, 0, 8)),
    ("state_bwd", "bf16x6"): ((32, 32, 0, 4), (32, 32, 0, 4), (16, 32, 0, 8, 1)),
}


# For GPUs with less shared memory than the 163 KiB of compute capability 8.0, such as 8.6 and 8.9.
_SMALL_TILES = Tiles(candidates=16, events=32, hidden=16, warps=4, stages=1)


def config(
    kernel: str,
    dim: int,
    n_candidates: int,
    n_events: int,
    dtype: torch.dtype,
    precision: str,
    gpu: Gpu,
) -> dict[str, int]:
    """Choose tiles and launch options of a kernel, by the first half of a key of the table."""
    products = precision if dtype == torch.float32 else "half"
    tiles = Tiles(*TILES[kernel, products][DIMS.index(dim)])
    if gpu.shared < GPUS["sm_80"].shared:
        tiles = _SMALL_TILES
    if gpu.major != 9 and products != "half":
        # Operands take registers, but of wgmma; of tcgen05, whose tiles have 64 rows or more, each
        # product of parts takes a sum.
        tiles = tiles._replace(candidates=min(tiles.candidates, 32))
    return {
        "CANDIDATES": block(n_candidates, tiles.candidates),
        "EVENTS": block(n_events, tiles.events),
        "H1_BLOCK": tiles.hidden,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def catalogue_config(
    dim: int, n_events: int, dtype: torch.dtype, precision: str, gpu: Gpu
) -> dict[str, int]:
    """Choose those of the kernels that read the whole catalogue."""
    n_items = 1 << 20  # a catalogue is large
    chosen = config("catalogue", dim, n_items, n_events, dtype, precision, gpu)
    if gpu.has_tensor_memory:
        # Triton 3.7 fails on this loop with tcgen05, which takes tiles from 64 rows on.
        chosen["CANDIDATES"] = min(chosen["CANDIDATES"], 32)
    return chosen


class HeadTiles(NamedTuple):
    """What a program of the head's rows holds."""

    rows: int
    block: int  # columns of a layer, at most
    depth: int  # columns of the layer before, at a time
    warps: int
    stages: int


HEAD_TILES = {
    "half": HeadTiles(128, 128, 64, 8, 3),
    "bf16x3": HeadTiles(128, 128, 32, 8, 3),
    "bf16x6": HeadTiles(128, 128, 32, 8, 2),
    "without wgmma": HeadTiles(64, 64, 32, 4, 2),  # operands take registers
}


def head_config(
    dim: int, head: HeadShape, dtype: torch.dtype, precision: str, gpu: Gpu
) -> dict[str, int]:
    """Choose tiles and launch options of the kernels of the head's rows."""
    products = precision if dtype == torch.float32 else "half"
    chosen = HEAD_TILES[products if gpu.major == 9 else "without wgmma"]
    if gpu.has_tensor_memory and products != "half":
        # tcgen05 takes tiles from 64 rows on, and a sum of each product of parts.
        chosen = chosen._replace(rows=32)
    return {
        "ROWS": chosen.rows,
        "BLOCK": block(head.H1, chosen.block),
        "BLOCK_DEPTH": min(chosen.depth, dim),
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }


# Of user_bwd_kernel, which is one program a user: it waits for memory, so much is read at a time.
USER_CONFIG = {"USER_ROWS": 32, "USER_BLOCK": 128, "num_warps": 8, "num_stages": 1}


def n_blocks(width: int, compiled: dict[str, Any]) -> int:
    """Count the blocks of columns of a layer."""
    return triton.cdiv(width, compiled["BLOCK"])


def block(size: int, largest: int) -> int:
    """Choose a power of two, at least the 16 of a product, that holds ``size`` if it may."""
    return min(max(triton.next_power_of_2(size), 16), largest)


# Programs that fill a large GPU a few times over (an H200 has 132 multiprocessors). A launch with
# fewer gives each trajectory a program of its own.
PROGRAMS = 1024
