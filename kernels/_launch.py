"""Launch helpers shared by the kernel modules."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager:
    """Make x's GPU current: Triton launches on the current device, not on the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """Say how ``tl.dot`` multiplies this dtype; only float32 has a choice."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact or dtype != torch.float32 else "tf32"


class Gpu(NamedTuple):
    """What a configuration depends on of a GPU."""

    major: int  # compute capability
    shared: int  # bytes that a program may have


# What is compiled ahead of time, by the CUDA programming guide's table of compute capabilities.
GPUS = {
    "sm_80": Gpu(8, 163 << 10),
    "sm_90": Gpu(9, 227 << 10),
    "sm_100": Gpu(10, 227 << 10),
}


def gpu_of(device: torch.device) -> Gpu:
    """Describe a GPU; the interpreter has none and gets the least that is served.

    Raises ValueError for a GPU that Triton does not compile for.
    """
    if device.type != "cuda":
        return GPUS["sm_80"]
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        raise ValueError(
            f"the Triton kernels need a GPU of compute capability 8.0 or more, {device} has "
            f"{properties.major}.{properties.minor}; use backend='reference'"
        )
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(properties.major, shared)
