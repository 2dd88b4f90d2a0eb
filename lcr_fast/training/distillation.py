"""Distillation: a student of fewer steps learns a trained model's lists and pooled states.

Not in the paper. The student ranks as in phase 1 and is besides held to its frozen teacher:

    L = L_phase-1 + lambda_KL t^2 KL( softmax(y_T / t) || softmax(y_S / t) )
                  + lambda_z mean_x |z_x,S(e_t) - z_x,T(e_t)|^2 / D

over a sample's candidates, z_x the aggregation of what each reads at the target.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lcr_fast.batch import Batch
from lcr_fast.config import TrainConfig
from lcr_fast.data.batching import Batcher
from lcr_fast.model import LCRSER
from lcr_fast.precision import high
from lcr_fast.reference import Streams
from lcr_fast.training.objective import Supervised
from lcr_fast.weights import REC, SEARCH


def student_of(teacher: LCRSER, steps: int) -> LCRSER:
    """Make a model of fewer steps from a teacher's weights, with steps of its first sets.

    It reads h^(K) alone, has no text vectors yet and knows the ids that the teacher knows. Raises
    ValueError for more steps than the teacher takes.
    """
    config = teacher.config
    if not 0 <= steps <= config.steps:
        raise ValueError(f"steps must be within 0..{config.steps}, the teacher's, got {steps}")
    student = LCRSER(config.replace(steps=steps, readout=1.0))
    given = teacher.state_dict()
    sizes = {name: len(tensor) for name, tensor in student.state_dict().items()}
    student.copy_state({name: given[name][:size] for name, size in sizes.items()})  # by step
    student.data_fingerprint, student.vocabulary = teacher.data_fingerprint, teacher.vocabulary
    return student


class Distilled(Supervised):
    """Phase 1 beside a frozen teacher, which has its text vectors where it reads any."""

    def __init__(
        self,
        model: LCRSER,
        batcher: Batcher,
        config: TrainConfig,
        teacher: LCRSER,
    ) -> None:
        super().__init__(model, batcher, config)
        if self.share.count > 1:
            raise ValueError("distillation runs in one process, not under torchrun")
        if config.capture and teacher.exits is not None:
            raise ValueError("capture=True needs a teacher whose users all take all steps")
        teacher.check_padding()
        self.teacher = teacher

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """List what is trained: everything, or what reads histories.

        With the latter the student shares item vectors, queries and head with its teacher.
        """
        named = super().parameters()
        if self.config.distill_trainable == "all":
            return named
        trained = ("encoder.", "reasoning.", "step_embedding", "search_position", "rec_position")
        return [(name, p) for name, p in named if name.startswith(trained)]

    def _terms(
        self, batch: Batch, streams: Streams, scores: Tensor, extras: Mapping[str, Tensor]
    ) -> dict[str, tuple[float, Tensor]]:
        """Add what holds the student to its teacher."""
        config, teacher = self.config, self.teacher.eval()
        terms = super()._terms(batch, streams, scores, extras)
        if not (config.distill_kl or config.distill_states):
            return terms
        with torch.no_grad():
            seen = teacher.final_states(batch)
            taught = high(teacher.score(seen, batch)) / config.distill_temperature
        if config.distill_kl:
            padding = batch.candidates == 0
            p = taught.log_softmax(-1).masked_fill(padding, 0.0)
            q = (scores / config.distill_temperature).log_softmax(-1).masked_fill(padding, 0.0)
            kl = (taught.softmax(-1) * (p - q)).sum(-1).mean()
            terms["distill_kl"] = (config.distill_kl * config.distill_temperature**2, kl)
        if config.distill_states:
            with torch.no_grad():
                taught_z = self._pooled(teacher, seen, batch)
            pooled = self._pooled(self.model, streams, batch)
            far = [(mine - its).square().mean() for mine, its in zip(pooled, taught_z, strict=True)]
            terms["distill_states"] = (config.distill_states, torch.stack(far).mean())
        return terms

    def _pooled(self, model: LCRSER, streams: Streams, batch: Batch) -> list[Tensor]:
        """Pool what a model reads at its own vector of the target, column 0: [B, 1, D] each."""
        target = model.item_vectors(batch.candidates[:, :1])
        lengths = batch.search_lengths, batch.rec_lengths
        return [high(model.pool(streams[x], lengths[x], target, x)[0]) for x in (SEARCH, REC)]
