"""What the encoders' kernels serve, and how they are compiled: as reasoning is, on one stream.

A stream's tile is that of its own slot, so that its bits do not depend on the other's padding.
"""

from typing import Any

import torch

from lcr_fast.kernels.gpu import Gpu
from lcr_fast.kernels.reasoning import config

SUBLAYERS = 2  # of a layer: self-attention and FFN


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
    if ffn_dim == 0:
        return "it needs an FFN in every layer"
    return config.obstacle(
        dim=dim, n_heads=n_heads, ffn_dim=ffn_dim, search_len=search_len, rec_len=rec_len,
        dtype=dtype, gpu=gpu,
    )  # fmt: skip


def constants(
    which: str, D: int, F: int, H: int, size: int, dtype: torch.dtype, precision: str, gpu: Gpu
) -> dict[str, Any]:
    """Compile-time arguments and launch options of a pass over streams padded to ``size``."""
    compiled = config.constants(which, D, F, H, (size, size), dtype, precision, gpu)
    slot, _ = config.slots(size, size)
    return compiled | {"SHAPE": compiled["SHAPE"]._replace(SUBLAYERS=SUBLAYERS), "SLOT": slot}
