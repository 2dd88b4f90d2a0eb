"""Stands for a CUDA graph where there is none."""

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(result) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


class Recorded:
    """Computes again what it was made of, and writes it where the first results are, as a replay.

    What a capture computes does not happen: it leaves ``state()`` as it was.
    """

    memory_bytes = 1000
    made: ClassVar[list["Recorded"]] = []

    def __init__(self, state: Callable[[], Iterable[Tensor]] = list) -> None:
        self._state = state
        self.runs, self.replays = 0, 0
        self.made.append(self)

    def run(self, function):
        self.runs += 1
        return function()

    def capture(self, function):
        kept = [(t, t.clone()) for t in self._state()]
        self._function, self._result = function, function()
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        return self._result

    def replay(self) -> None:
        self.replays += 1
        again = self._function()
        for out, value in zip(tensors_in(self._result), tensors_in(again), strict=True):
            out.copy_(value)
