"""Whether the Triton kernels can serve at all: installed, on a GPU, compiled correctly."""

import os
from typing import TYPE_CHECKING

import torch

from lcr_fast.dynamo import constant
from lcr_fast.ops._dispatch import say_once

if TYPE_CHECKING:
    from lcr_fast.kernels.gpu import Gpu

# Looked up once: torch.compile cannot trace the question.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def has_gpu() -> bool:
    # The first question is cheap, and answers for every call with CUDA tensors.
    return torch.cuda.is_initialized() or torch.cuda.is_available()


@constant
def current_gpu() -> "Gpu | None":
    """Describe the current GPU; None without one. Needs Triton."""
    from lcr_fast.kernels import gpu

    return gpu.gpu_of(torch.device("cuda", torch.cuda.current_device())) if has_gpu() else None


@constant
def _gpu_obstacle() -> str | None:
    if not has_gpu():
        return None  # asked of a machine without a GPU
    from lcr_fast.kernels import gpu

    index = torch.cuda.current_device()
    if sentence := gpu.ptxas_warning(index):
        say_once(sentence)
    return gpu.obstacle(index)


def triton_obstacle(device: str) -> str | None:
    """Why no Triton kernel can serve tensors of a device (``cpu``, ``cuda``), or None.

    CPU tensors are served under Triton's interpreter. The GPU is the current one: who uses another
    of another kind calls ``torch.cuda.set_device`` first, as ``--device cuda:N`` does.
    """
    if device == "cpu" and not INTERPRETED:
        return "it needs CUDA tensors"
    try:
        import lcr_fast.kernels.gpu  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return _gpu_obstacle() if device == "cuda" else None


def ptxas_in_use() -> str | None:
    """Name the ptxas that assembles the kernels for the current GPU; None without one."""
    if not has_gpu() or triton_obstacle("cuda") is not None:
        return None
    from lcr_fast.kernels import gpu

    return str(gpu.ptxas_of(torch.cuda.current_device()))
