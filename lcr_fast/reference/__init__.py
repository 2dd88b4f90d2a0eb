"""LCR-SER in plain PyTorch: the definition of every op, and the oracle of every test.

Read it beside the paper (arXiv 2508.04152): :mod:`transformer`, :mod:`reasoning`, :mod:`exits`,
:mod:`scoring`, :mod:`ranking`, each from the top. Halves are computed in float32 and rounded once
at the end of an op; float64 stays float64 and gives the exact answer. Histories are right-padded,
so a length is a mask; what stands behind it is not read, and is 0 in every result. A leading
``...`` is B users, or B users x N trajectories.

Dropout masks are arguments (0 or 1 / (1 - p), see :mod:`lcr_fast.noise`), so that every function
here is deterministic; None means no dropout.

"Paper" marks what the paper states; where it is silent, the choice is ours ("our reading").
"""

from lcr_fast.reference.exits import Exits, exit_features, exit_scores, steps_taken
from lcr_fast.reference.ranking import catalogue_metrics, ranking_metrics
from lcr_fast.reference.reasoning import States, Steps, latent_reasoning, pool_steps
from lcr_fast.reference.scoring import aggregate, score, score_rank, score_topk, seen_bonus
from lcr_fast.reference.transformer import (
    Streams,
    attention,
    attention_probabilities,
    encode,
    length_mask,
)

__all__ = [
    "Exits",
    "States",
    "Steps",
    "Streams",
    "aggregate",
    "attention",
    "attention_probabilities",
    "catalogue_metrics",
    "encode",
    "exit_features",
    "exit_scores",
    "latent_reasoning",
    "length_mask",
    "pool_steps",
    "ranking_metrics",
    "score",
    "score_rank",
    "score_topk",
    "seen_bonus",
    "steps_taken",
]
