"""The encoders: all layers of one stream (docs/fused-kernel.md)."""

from lcr_fast.kernels.encoding.ahead_of_time import variants
from lcr_fast.kernels.encoding.config import obstacle
from lcr_fast.kernels.encoding.launch import encode_bwd, encode_fwd

__all__ = ["encode_bwd", "encode_fwd", "obstacle", "variants"]
