"""The ops: one contract each, one reference, and faster implementations behind it."""

from lcr_fast.ops._dispatch import choose_backend
from lcr_fast.ops.adaptive import Adapted, adaptive_reasoning
from lcr_fast.ops.noise import Dropout, Noise, dropout_masks, normal_noise
from lcr_fast.ops.ranking import (
    catalogue_metrics,
    catalogue_rank,
    group_advantages,
    ranking_metrics,
    target_rank,
)
from lcr_fast.ops.reasoning import (
    Reasoned,
    encode,
    latent_reasoning,
    latent_states,
)
from lcr_fast.ops.scoring import score, score_rank, score_topk

__all__ = [
    "Adapted",
    "Dropout",
    "Noise",
    "Reasoned",
    "adaptive_reasoning",
    "catalogue_metrics",
    "catalogue_rank",
    "choose_backend",
    "dropout_masks",
    "encode",
    "group_advantages",
    "latent_reasoning",
    "latent_states",
    "normal_noise",
    "ranking_metrics",
    "score",
    "score_rank",
    "score_topk",
    "target_rank",
]
