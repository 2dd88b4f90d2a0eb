"""Gradients of weights in float32: products of columns, summed over all rows of a batch.

    dW[o, i] = sum over rows of dY[row, o] X[row, i];   db[o] = sum over rows of dY[row, o]

A matrix library gives a product of 64 columns with 64 to one program, however many rows it sums,
and adds row to row. Here a program sums a tile of a product over a *part* of the rows, and torch
adds up the parts. A tensor core truncates where it adds, which in a long chain is a bias: its
chains are a chunk of rows long, and chunks are added in float32, rounded.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.core.product import load_operand, multiply, product, transposed
from lcr_fast.kernels.gpu import Gpu, dot_precision, gpu_of, on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.ptxas import kernel


class Columns(NamedTuple):
    """Where dY and X of a matrix [out, width] stand in their rows."""

    dy: int  # the first column
    out: int
    x: int  # the first column
    width: int


# As timed on sm_90 (docs/fused-kernel.md). PART_ROWS are the most.
CONFIG = {"PART_ROWS": 512, "ROWS": 32, "BLOCK": 64, "num_warps": 4, "num_stages": 3}
_PROGRAMS = 1024  # that fill a large GPU: fewer rows than make so many are cut into smaller parts


@triton.constexpr_function
def begin(matrices: tuple[Columns, ...], block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the first tile, and the first sum, of each matrix; behind the last their numbers."""
    sizes = [(out, width) for _, out, _, width in matrices]
    tiles = [triton.cdiv(out, block) * triton.cdiv(width, block) for out, width in sizes]
    sums = [out * (width + 1) for out, width in sizes]  # of dW, then of db
    first_tiles, first_sums = (tuple(itertools.accumulate(n, initial=0)) for n in (tiles, sums))
    return first_tiles, first_sums


@functools.cache  # what Triton wraps costs the host more than a launch
def _numbers(matrices: tuple[Columns, ...], block: int) -> tuple[int, int]:
    """Count the tiles and the sums of all matrices."""
    first_tiles, first_sums = begin(matrices, block)
    return first_tiles[-1], first_sums[-1]


@kernel(do_not_specialize=["n_rows", "part_rows"])
def columns_product_kernel(
    dy_ptr,  # [members, n_rows], a row every DY_STRIDE
    x_ptr,  # [members, n_rows], a row every X_STRIDE
    sums_ptr,  # [parts, members, dW and db of all matrices, one behind the other]
    n_rows,
    part_rows,  # a multiple of ROWS
    MATRICES: tl.constexpr,  # of Columns
    DY_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,  # of a chunk
    BLOCK: tl.constexpr,  # columns of a tile, of dY and of X
):
    """One program: a tile of one matrix, for a part of the rows of one member of the batch."""
    BEGIN: tl.constexpr = begin(MATRICES, BLOCK)
    FIRST_TILE: tl.constexpr = BEGIN[0]
    FIRST_SUM: tl.constexpr = BEGIN[1]
    N: tl.constexpr = len(MATRICES)
    n_tiles: tl.constexpr = FIRST_TILE[N]
    n_sums: tl.constexpr = FIRST_SUM[N]
    tile = tl.program_id(0) % n_tiles
    part = tl.program_id(0) // n_tiles
    member = tl.program_id(1).to(tl.int64)
    # Which matrix the tile is of: each is asked, as a tuple takes no index that is not constant.
    dy_column, n_out, x_column, n_in, first_tile, first_sum = 0, 0, 0, 0, 0, 0
    for i in tl.static_range(N):
        here = tile >= FIRST_TILE[i]
        dy_column = tl.where(here, MATRICES[i][0], dy_column)
        n_out = tl.where(here, MATRICES[i][1], n_out)
        x_column = tl.where(here, MATRICES[i][2], x_column)
        n_in = tl.where(here, MATRICES[i][3], n_in)
        first_tile = tl.where(here, FIRST_TILE[i], first_tile)
        first_sum = tl.where(here, FIRST_SUM[i], first_sum)
    across = tl.cdiv(n_in, BLOCK)
    out = (tile - first_tile) // across * BLOCK + tl.arange(0, BLOCK)
    first_column = (tile - first_tile) % across * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    is_out, is_column = out < n_out, column < n_in

    first = part * part_rows
    rows = tl.arange(0, ROWS)
    row = member * n_rows + first
    dy_ptrs = dy_ptr + row * DY_STRIDE + (rows[:, None] * DY_STRIDE + (dy_column + out)[None, :])
    x_ptrs = x_ptr + row * X_STRIDE + (rows[:, None] * X_STRIDE + (x_column + column)[None, :])
    dw = tl.zeros([BLOCK, BLOCK], tl.float32)
    dy_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, min(first + part_rows, n_rows), ROWS):
        is_row = start + rows < n_rows
        dy = tl.load(dy_ptrs, mask=is_row[:, None] & is_out[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=is_row[:, None] & is_column[None, :], other=0.0)
        dw = product(tl.trans(dy), x, PRECISION, dw)
        dy_sums += dy
        dy_ptrs += ROWS * DY_STRIDE
        x_ptrs += ROWS * X_STRIDE
    member_sums_ptr = sums_ptr + (part * tl.num_programs(1) + member) * n_sums + first_sum
    tl.store(
        member_sums_ptr + out[:, None] * n_in + column[None, :],
        dw,
        mask=is_out[:, None] & is_column[None, :],
    )
    is_bias = is_out & (first_column == 0)
    tl.store(member_sums_ptr + n_out * n_in + out, tl.sum(dy_sums, 0), mask=is_bias)


def constants(
    matrices: Sequence[Columns], dy_stride: int, x_stride: int, precision: str
) -> dict[str, Any]:
    """Compile-time arguments and launch options."""
    return {
        "MATRICES": tuple(matrices),
        "DY_STRIDE": dy_stride,
        "X_STRIDE": x_stride,
        "PRECISION": precision,
        **CONFIG,
    }


def _part_rows(rows: int, tiles: int) -> int:
    """Choose the rows of a part: the same on every GPU, as the sums' bits depend on it."""
    chunks = triton.cdiv(rows * tiles, _PROGRAMS * CONFIG["ROWS"])
    return min(max(chunks, 2) * CONFIG["ROWS"], CONFIG["PART_ROWS"])


def products_of_columns(dy: Tensor, x: Tensor, matrices: Sequence[Columns]) -> Tensor:
    """Sum dY X and dY over the rows, for every matrix: float32 [members, sums].

    ``dy`` and ``x`` are float32 [members, rows, columns], or one tensor; rows follow one another
    from member to member. :func:`split` tells the sums apart.
    """
    members, rows, _ = dy.shape
    tiles, sums = _numbers(tuple(matrices), CONFIG["BLOCK"])
    part_rows = _part_rows(rows, tiles * members)
    parts = triton.cdiv(rows, part_rows)
    of_parts = dy.new_empty(parts, members, sums)
    if of_parts.numel():
        with on_device(dy):
            launch(
                columns_product_kernel, (parts * tiles, members), dy, x, of_parts, rows, part_rows,
                **constants(matrices, dy.stride(1), x.stride(1), dot_precision(dy.dtype)),
            )  # fmt: skip
    return of_parts[0] if parts == 1 else of_parts.sum(0)


def split(sums: Tensor, matrices: Sequence[Columns]) -> list[tuple[Tensor, Tensor]]:
    """View [..., sums] as (dW [..., out, width], db [..., out]) of each matrix."""
    parts = iter(sums.split([n for m in matrices for n in (m.out * m.width, m.out)], -1))
    return [(next(parts).unflatten(-1, (m.out, m.width)), next(parts)) for m in matrices]


@kernel(do_not_specialize=["n_rows", "part_rows"])
def operands_product_kernel(
    dy_ptr,  # [operand's parts, n_rows, OUT]
    x_ptr,  # [operand's parts, n_rows, WIDTH]
    sums_ptr,  # [parts, OUT, WIDTH]
    n_rows,
    part_rows,  # a multiple of ROWS
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,  # of a chunk
    BLOCK_OUT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """One program: a tile of dY^T X, for a part of the rows."""
    across: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    n_tiles: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT * across
    tile = tl.program_id(0) % n_tiles
    part = tl.program_id(0) // n_tiles
    out = tile // across * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = tile % across * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_out, is_column = out < OUT, column < WIDTH

    first = part * part_rows
    rows = tl.arange(0, ROWS)
    dy_ptr += first.to(tl.int64) * OUT
    x_ptr += first.to(tl.int64) * WIDTH
    dy_part, x_part = n_rows.to(tl.int64) * OUT, n_rows.to(tl.int64) * WIDTH
    dy_offsets = rows[:, None] * OUT + out[None, :]
    x_offsets = rows[:, None] * WIDTH + column[None, :]
    dw = tl.zeros([BLOCK_OUT, BLOCK_WIDTH], tl.float32)
    for start in range(first, min(first + part_rows, n_rows), ROWS):
        is_row = (start + rows < n_rows)[:, None]
        dy = load_operand(dy_ptr, dy_offsets, is_row & is_out[None, :], dy_part, PRECISION)
        x = load_operand(x_ptr, x_offsets, is_row & is_column[None, :], x_part, PRECISION)
        dw = multiply(transposed(dy, PRECISION), x, PRECISION, dw)
        dy_ptr += ROWS * OUT
        x_ptr += ROWS * WIDTH
    offsets = (part * OUT + out).to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(sums_ptr + offsets, dw, mask=is_out[:, None] & is_column[None, :])


def operands_config(gpu: Gpu) -> dict[str, int]:
    """Choose tiles and launch options of :func:`operands_product_kernel`."""
    # Where there is tensor memory, tiles of 64 columns of dY take a sum of each product of parts.
    out = 32 if gpu.has_tensor_memory else 64
    return {"ROWS": 32, "BLOCK_OUT": out, "BLOCK_WIDTH": 128, "num_warps": 4, "num_stages": 2}


def product_of_operands(dy: Tensor, x: Tensor) -> Tensor:
    """Sum dY X over the rows of operands [parts, rows, out] and [parts, rows, width], in float32.

    Halves, of one part, are left to the matrix library.
    """
    if dy.dtype != torch.float32 and len(dy) == 1:
        return half_product(dy[0], x[0])
    rows, out, width = dy.shape[1], dy.shape[2], x.shape[2]
    config = operands_config(gpu_of(dy.device))
    tiles = triton.cdiv(out, config["BLOCK_OUT"]) * triton.cdiv(width, config["BLOCK_WIDTH"])
    part_rows = _part_rows(rows, tiles)
    of_parts = dy.new_empty(triton.cdiv(rows, part_rows), out, width, dtype=torch.float32)
    if of_parts.numel():
        with on_device(dy):
            launch(
                operands_product_kernel, (len(of_parts) * tiles,), dy, x, of_parts, rows, part_rows,
                OUT=out, WIDTH=width, PRECISION=dot_precision(torch.float32), **config,
            )  # fmt: skip
    return of_parts.sum(0)


def product_of_rows(dy: Tensor, x: Tensor) -> Tensor:
    """Sum dY X over [rows, out] and [rows, width] of one dtype, whose columns are contiguous."""
    if dy.dtype != torch.float32:
        return half_product(dy, x)
    whole = Columns(0, dy.shape[1], 0, x.shape[1])
    ((dw, _),) = split(products_of_columns(dy[None], x[None], [whole])[0], [whole])
    return dw


def half_product(dy: Tensor, x: Tensor) -> Tensor:
    """dY^T X in float32 for halves [..., rows, out] and [..., rows, in]: [..., out, in]."""
    dy = dy.transpose(-1, -2)
    if x.is_cuda:
        return (torch.bmm if x.ndim == 3 else torch.mm)(dy, x, out_dtype=torch.float32)
    return dy.float() @ x.float()
