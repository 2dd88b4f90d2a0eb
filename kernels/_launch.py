"""Launch helpers shared by the kernel modules."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager:
    """Make x's GPU current: Triton launches on the current device, not on the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """Say how ``tl.dot`` multiplies this dtype; only float32 has a choice."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact or dtype != torch.float32 else "tf32"
