"""Training steps as a CUDA graph: the host launches one thing a step and waits for no kernel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lcr_fast.batch import Batch
from lcr_fast.capture import Graph, Staged, capturing
from lcr_fast.training.inputs import StepInputs


class Logged(NamedTuple):
    """What an update logs."""

    names: tuple[str, ...]
    values: Tensor  # on the device, one a name


class CapturedStep:
    """Replays ``step``, which trains and returns what it logs, for inputs of one shape.

    The first call runs it, which compiles its kernels and makes what stays, such as the optimizer's
    moments. The second records it; so its tensors must stay where they are from then on. What is
    returned is overwritten by the next call.
    """

    def __init__(
        self,
        step: Callable[[StepInputs], list[Logged]],
        example: StepInputs,
        device: torch.device,
        graph: Graph,
    ) -> None:
        self._step, self._graph = step, graph
        self._sizes = _sizes(example)
        self._staged = Staged(self._sizes, device)
        tensors = self._staged.tensors
        of_batch = {name: tensors[name] for name in vars(example.batch)}
        extras = {name: tensors[name] for name in example.extras}
        self._inputs = StepInputs(Batch(**of_batch), tensors["seed"], extras)
        self._has_run = False
        self._logged: list[Logged] | None = None

    def fits(self, inputs: StepInputs) -> bool:
        """Tell whether inputs have the one shape."""
        return _sizes(inputs) == self._sizes

    def __call__(self, inputs: StepInputs) -> list[Logged]:
        """Make one step. Raises RuntimeError where its operations cannot be captured."""
        self._staged.fill(inputs.named())
        if not self._has_run:
            self._has_run = True
            return self._graph.run(self._record)
        if self._logged is None:
            with capturing("the training step"):
                self._logged = self._graph.capture(self._record)
        self._graph.replay()
        return self._logged

    def _record(self) -> list[Logged]:
        return self._step(self._inputs)


def _sizes(inputs: StepInputs) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in inputs.named().items()}
