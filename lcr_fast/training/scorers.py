"""What ranks: anything that reads a batch's histories once and then scores any candidates."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from lcr_fast.batch import Batch
from lcr_fast.model import LCRSER

# Scores of candidates [B, C], or [1, C] shared by the batch: [B, C].
Score = Callable[[Tensor], Tensor]


@runtime_checkable
class CatalogueScore(Protocol):
    """A score that can rank a target in the catalogue without giving every item's."""

    def __call__(self, ids: Tensor, /) -> Tensor: ...

    def target_rank(self, target: Tensor, exclude: Tensor, /) -> Tensor:
        """Rank ``target`` [B] among all items but ``exclude`` [B, X], ties before it: [B]."""
        ...


class Scorer(Protocol):
    """Anything that ranks: reads a batch's histories once, then scores any candidates."""

    def __call__(self, batch: Batch, /) -> Score: ...


class _ModelScore:
    """A model's scores for one batch; ranks the catalogue without storing them."""

    def __init__(self, model: LCRSER, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.h = model.final_states(batch)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.model.score(self.h, self.batch, ids)

    def target_rank(self, target: Tensor, exclude: Tensor) -> Tensor:
        return self.model.target_rank(self.h, self.batch, target, exclude)


def model_scorer(model: LCRSER) -> Scorer:
    """Score with a model, in evaluation mode."""
    return lambda batch: _ModelScore(model, batch)
