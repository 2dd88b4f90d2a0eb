"""The ops: one contract each, one reference, and faster implementations behind it."""

from lcr_fast.ops._dispatch import choose_backend
from lcr_fast.ops.noise import normal_noise
from lcr_fast.ops.reasoning import encode, latent_reasoning, rollout
from lcr_fast.ops.scoring import aggregate, score

__all__ = [
    "aggregate",
    "choose_backend",
    "encode",
    "latent_reasoning",
    "normal_noise",
    "rollout",
    "score",
]
