"""What the kernels ask of a GPU, and what their launchers share."""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lcr_fast.kernels import ptxas
from lcr_fast.precision import allows_tf32


def on_device(x: Tensor) -> AbstractContextManager:
    """Make x's GPU current: Triton launches on the current device, not on the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """Say how a dtype is multiplied (see products.py).

    Only float32 has a choice: tf32 where torch allows it (:func:`lcr_fast.precision.allows_tf32`),
    else tf32x3, the default.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if allows_tf32() else "tf32x3"


# About how many rows of a float32 product one program sums up. The matrix library cuts no sum, and
# a product of 64 columns with 64 is one program's: so they took 81 of 107 ms of an H200's step.
_PART_ROWS = 512


@functools.cache
def _part_rows(rows: int, wanted: int) -> int:
    """Give the divisor of ``rows`` nearest to what is wanted, or that where none is near."""
    divisors = [n for n in range(wanted // 4, 4 * wanted + 1) if rows % n == 0]
    nearest = min(divisors, key=lambda n: abs(math.log(n / wanted)), default=wanted)
    return max(min(nearest, rows), 1)


def columns_product(dy: Tensor, x: Tensor) -> Tensor:
    """dY^T X in float32 for [..., rows, out] and [..., rows, in] of one dtype: [..., out, in].

    A weight gradient sums over all rows of a batch. torch's float32 products do that in float32; a
    tensor core truncates every partial sum, whose error grows with the rows. In float32 the sums of
    parts of the rows are added in a tree, which fills a GPU and is closer than row to row; rows
    that make no whole part are a product of their own.
    """
    if x.dtype == torch.float32:
        rows = x.shape[-2]
        n = _part_rows(rows, _PART_ROWS)
        whole = rows - rows % n
        dy_parts, x_parts = (t[..., :whole, :].unflatten(-2, (whole // n, n)) for t in (dy, x))
        product = (dy_parts.transpose(-1, -2) @ x_parts).sum(-3)
        if whole < rows:
            product += dy[..., whole:, :].transpose(-1, -2) @ x[..., whole:, :]
        return product
    dy = dy.transpose(-1, -2)
    if x.is_cuda:
        return (torch.bmm if x.ndim == 3 else torch.mm)(dy, x, out_dtype=torch.float32)
    return dy.float() @ x.float()


class Gpu(NamedTuple):
    """What a configuration depends on of a GPU."""

    major: int  # compute capability
    shared: int  # bytes that a program may have

    @property
    def has_tensor_memory(self) -> bool:
        """Whether Triton multiplies by tcgen05, whose sums take tensor memory."""
        return self.major in (10, 11)


# What is compiled ahead of time, by the CUDA programming guide's table of compute capabilities.
GPUS = {
    "sm_80": Gpu(8, 163 << 10),
    "sm_90": Gpu(9, 227 << 10),
    "sm_100": Gpu(10, 227 << 10),
}


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Describe a GPU; the interpreter has none and gets the least that is served."""
    if device.type != "cuda":
        return GPUS["sm_80"]
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(properties.major, shared)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def obstacle(index: int) -> str | None:
    """Say in one sentence why no kernel can run on a GPU, or None."""
    major, minor = _capability(index)
    if major < 8:
        return f"it needs compute capability 8.0 or more, and GPU {index} has {major}.{minor}"
    return ptxas.obstacle(10 * major + minor)


@functools.cache
def ptxas_warning(index: int) -> str | None:
    """Say in one sentence that the user chose a bad ptxas for a GPU, or None."""
    major, minor = _capability(index)
    return ptxas.warning(10 * major + minor)


def ptxas_of(index: int) -> ptxas.Ptxas:
    """Return the ptxas that assembles the kernels for a GPU; raises ``ptxas.NoPtxasError``."""
    major, minor = _capability(index)
    return ptxas.choose(10 * major + minor)
