"""Weights as products take them, made once a call: halves cast, float32 split into its parts."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from lcr_fast.kernels.core.product import n_parts, store_operand
from lcr_fast.kernels.gpu import dot_precision, on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.ptxas import kernel


@triton.jit
def _make_block(
    matrix_ptr, made_ptr, first, SIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr
):
    at = first + tl.arange(0, BLOCK)
    mask = None if SIZE % BLOCK == 0 else at < SIZE
    x = tl.load(matrix_ptr + at, mask=mask)
    store_operand(made_ptr, at, x, mask, SIZE, PRECISION)


@kernel()
def weight_parts_kernel(
    matrices,  # pointers, [sets, SIZES[i]]
    made_ptr,  # [sets, parts, SIZES[i]] of each matrix, one behind the other
    SIZES: tl.constexpr,
    BEGIN: tl.constexpr,  # the first block of each matrix
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK numbers of one set of weights, whichever matrix they are of."""
    PARTS: tl.constexpr = n_parts(PRECISION)
    block, member = tl.program_id(0), tl.program_id(1)
    begin = 0  # of the matrix, in numbers of a set
    for i in tl.static_range(len(SIZES)):
        if (block >= BEGIN[i]) & (block < BEGIN[i + 1]):
            _make_block(
                matrices[i] + member * SIZES[i],
                made_ptr + PARTS * (begin * tl.num_programs(1) + member * SIZES[i]),
                (block - BEGIN[i]) * BLOCK, SIZES[i], PRECISION, BLOCK,
            )  # fmt: skip
        begin += SIZES[i]


def constants(sizes: tuple[int, ...], precision: str) -> dict[str, Any]:
    """Compile-time arguments and launch options for matrices of so many numbers."""
    block = 512
    begin = itertools.accumulate((triton.cdiv(size, block) for size in sizes), initial=0)
    return {
        "SIZES": sizes, "BEGIN": tuple(begin), "PRECISION": precision, "BLOCK": block,
        "num_warps": 4,
    }  # fmt: skip


def for_products(matrices: Sequence[Tensor], dtype: torch.dtype, set_axes: int = 2) -> list[Tensor]:
    """Make of matrices [sets ..., out, in] what products take, once for all programs of a call.

    Halves are cast: a cast in a program takes it twice the registers. float32 is split into its
    parts, [sets ..., parts, out, in]. What is made is left flat, and what needs no making as it
    is: a view costs the host more than a kernel's argument. ``set_axes`` says how many axes count
    sets.
    """
    precision = dot_precision(dtype)
    n = n_parts.fn(precision)
    matrices = [matrix.contiguous() for matrix in matrices]
    if n == 1 and all(matrix.dtype == dtype for matrix in matrices):
        return matrices
    if n == 1 and knobs.runtime.interpret and dtype == torch.bfloat16:  # it would truncate
        return [matrix.to(dtype) for matrix in matrices]
    if n > 1:
        matrices = [matrix.float() for matrix in matrices]
    sets = matrices[0].shape[:set_axes].numel()
    sizes = tuple(m.shape[set_axes:].numel() for m in matrices)
    made_dtype = torch.bfloat16 if n > 1 else dtype
    made = matrices[0].new_empty(n * sets * sum(sizes), dtype=made_dtype)
    compiled = constants(sizes, precision)
    with on_device(made):
        launch(
            weight_parts_kernel, (compiled["BEGIN"][-1], sets), tuple(matrices), made, **compiled
        )
    return list(made.split([n * sets * size for size in sizes]))
