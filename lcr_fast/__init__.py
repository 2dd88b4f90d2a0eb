"""lcr_fast: latent cross reasoning for search-aware recommendation (LCR-SER), fast.

``import lcr_fast`` needs neither Triton nor a GPU nor the compiled extension.
"""

import importlib.metadata
import warnings

from lcr_fast.batch import Batch
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.model import LCRSER
from lcr_fast.ops import (
    Dropout,
    Noise,
    Reasoned,
    catalogue_metrics,
    catalogue_rank,
    group_advantages,
    latent_reasoning,
    ranking_metrics,
    score,
    score_rank,
    score_topk,
    target_rank,
)
from lcr_fast.ops._extension import extension_error
from lcr_fast.reference import Steps
from lcr_fast.weights import EncoderWeights, ReasoningWeights, ScoringWeights

__version__ = importlib.metadata.version("lcr-fast")

if extension_error() is not None:
    warnings.warn(
        f"lcr_fast._C is not there ({extension_error()}), so the slower reference serves. "
        "Build it with: pip install --no-build-isolation --no-deps -e .",
        stacklevel=2,
    )

__all__ = [
    "LCRSER",
    "Batch",
    "Dropout",
    "EncoderWeights",
    "LCRConfig",
    "Noise",
    "Reasoned",
    "ReasoningWeights",
    "ScoringWeights",
    "Steps",
    "TrainConfig",
    "__version__",
    "catalogue_metrics",
    "catalogue_rank",
    "group_advantages",
    "latent_reasoning",
    "ranking_metrics",
    "score",
    "score_rank",
    "score_topk",
    "target_rank",
]
