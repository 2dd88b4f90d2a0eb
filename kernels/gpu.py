"""What the kernels ask of a GPU, and what their launchers share."""

import functools
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
    """Say how a dtype is multiplied (see core/product.py).

    Only float32 has a choice: bf16x3 where torch allows TF32, which is less exact
    (:func:`lcr_fast.precision.allows_tf32`), else bf16x6, the default.
    """
    if dtype != torch.float32:
        return "ieee"
    return "bf16x3" if allows_tf32() else "bf16x6"


class Gpu(NamedTuple):
    """What a configuration depends on of a GPU."""

    major: int  # compute capability
    shared: int  # bytes that a program may have

    @property
    def has_tensor_memory(self) -> bool:
        """Whether Triton multiplies by tcgen05, whose sums take tensor memory."""
        return self.major in (10, 11)


# By the CUDA programming guide's table of compute capabilities.
GPUS = {
    "sm_80": Gpu(8, 163 << 10),
    "sm_89": Gpu(8, 99 << 10),
    "sm_90": Gpu(9, 227 << 10),
    "sm_100": Gpu(10, 227 << 10),
    "sm_110": Gpu(11, 227 << 10),
    "sm_120": Gpu(12, 99 << 10),
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
