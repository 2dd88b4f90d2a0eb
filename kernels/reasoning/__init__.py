"""Latent cross reasoning: K steps of both streams (docs/fused-kernel.md)."""

from lcr_fast.kernels.reasoning.ahead_of_time import variants
from lcr_fast.kernels.reasoning.config import obstacle
from lcr_fast.kernels.reasoning.launch import latent_reasoning_bwd, latent_reasoning_fwd

__all__ = ["latent_reasoning_bwd", "latent_reasoning_fwd", "obstacle", "variants"]
