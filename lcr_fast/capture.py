"""Serving without launches: a model's scores as CUDA graphs, one for each of a few batch sizes.

A request of one user costs a GPU far less than the host spends on launching its kernels. A graph
is launched as one; what it costs is that sizes are fixed. So a batch is padded with users who have
nothing, and with zeros to the most events, terms and candidates, which the model treats as padding
anyway: scores have the bits of the model on :meth:`CapturedModel.padded`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from lcr_fast.batch import Batch
from lcr_fast.model import LCRSER


class Graph(Protocol):
    """What captures and replays: :class:`CudaGraph`."""

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Record ``function``; return the tensor that every replay writes."""

    def replay(self) -> None:
        """Do again what was recorded."""


class CudaGraph:
    """A CUDA graph, and the memory of what it computes between."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Run ``function`` once, which compiles its kernels, and once more to record it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph):
            return function()

    def replay(self) -> None:
        """Launch it on the current stream."""
        self._graph.replay()


class _Bucket:
    """One batch size: a batch that stays where it is, and the scores of each replay."""

    def __init__(
        self, sizes: dict[str, tuple[int, ...]], device: torch.device, model: LCRSER, graph: Graph
    ) -> None:
        n = sum(map(_numel, sizes.values()))
        self._values = torch.zeros(n, dtype=torch.int64, device=device)
        self._staged = torch.zeros(n, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._sizes = sizes
        self._is_read = torch.cuda.Event() if device.type == "cuda" else None
        batch = Batch(**self._views(self._values))
        self._graph = graph
        self._scores = graph.capture(lambda: model(batch))

    def _views(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split([*map(_numel, self._sizes.values())])
        named = zip(self._sizes.items(), parts, strict=True)
        return {name: part.view(size) for (name, size), part in named}

    def stage(self, batch: Batch) -> Tensor:
        """Lay out a batch on the host: the tensors of the captured one, one behind the other."""
        if self._is_read is not None:
            self._is_read.synchronize()  # the last one may still be on its way to the GPU
        self._staged.zero_()
        for name, into in self._views(self._staged).items():
            value = getattr(batch, name)
            into[tuple(slice(size) for size in value.shape)] = value
        return self._staged

    def padded(self, batch: Batch) -> Batch:
        """Return the batch that is computed for ``batch``."""
        return Batch(**self._views(self.stage(batch).clone()))

    def __call__(self, batch: Batch) -> Tensor:
        self._values.copy_(self.stage(batch), non_blocking=True)
        if self._is_read is not None:
            self._is_read.record()
        self._graph.replay()
        return self._scores[: len(batch), : batch.candidates.shape[1]].clone()


def _numel(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


class CapturedModel:
    """Scores of a model by replaying; see :func:`capture`."""

    def __init__(
        self,
        model: LCRSER,
        batch_sizes: Iterable[int],
        n_candidates: int,
        max_terms: int,
        graph: Callable[[], Graph],
    ) -> None:
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        if not self.batch_sizes or self.batch_sizes[0] < 1:
            raise ValueError(f"batch_sizes must be positive numbers, got {self.batch_sizes}")
        if n_candidates < 1 or max_terms < 0:
            raise ValueError(
                f"n_candidates must be positive and max_terms not negative, got {n_candidates} and "
                f"{max_terms}"
            )
        if model.training:
            raise ValueError(
                "a model in training cannot be captured, as every call drops other units: call "
                "model.eval() first"
            )
        config, device = model.config, model.head.target_weight.device
        searches = config.max_search_len
        self._sizes: dict[str, tuple[int, ...]] = {
            "user": (), "rec_items": (config.max_rec_len,), "rec_lengths": (),
            "search_queries": (searches,), "search_terms": (searches, max_terms),
            "search_clicks": (searches, config.max_clicks), "search_lengths": (),
            "candidates": (n_candidates,), "target": (), "row": (),
        }  # fmt: skip
        before = _reserved(device)
        with torch.no_grad():
            self._buckets = {
                n: _Bucket({k: (n, *s) for k, s in self._sizes.items()}, device, model, graph())
                for n in self.batch_sizes
            }
        self.memory_bytes = _reserved(device) - before  # of the GPU, for all batch sizes

    def _bucket(self, batch: Batch) -> _Bucket:
        return self._buckets[next(n for n in self.batch_sizes if n >= len(batch))]

    def _check(self, batch: Batch) -> None:
        for name, most in self._sizes.items():
            size = tuple(getattr(batch, name).shape[1:])
            if any(n > m for n, m in zip(size, most, strict=True)):
                raise ValueError(
                    f"{name} has shape [B, {', '.join(map(str, size))}], but at most "
                    f"[B, {', '.join(map(str, most))}] was captured"
                )

    def padded(self, batch: Batch) -> Batch:
        """Return what is computed for a batch that fits one bucket, on the CPU."""
        self._check(batch)
        if len(batch) > self.batch_sizes[-1]:
            raise ValueError(
                f"{len(batch)} users are more than the largest batch, {self.batch_sizes[-1]}"
            )
        return self._bucket(batch).padded(batch)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Score the candidates of a batch, best on the CPU: [B, C], on the model's device.

        More users than the largest batch size are computed in pieces of it. Raises ValueError for
        histories, terms or candidates beyond what was captured.
        """
        self._check(batch)
        most = self.batch_sizes[-1]
        pieces = [batch.rows(slice(i, i + most)) for i in range(0, max(len(batch), 1), most)]
        return torch.cat([self._bucket(piece)(piece) for piece in pieces])


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def capture(
    model: LCRSER,
    batch_sizes: Iterable[int] = (1, 8, 64, 256),
    n_candidates: int = 100,
    max_terms: int = 16,
    graph: Callable[[], Graph] | None = None,
) -> CapturedModel:
    """Capture ``model(batch)`` for serving, for each of ``batch_sizes``, on the model's GPU.

    ``max_terms`` is the most terms of a query, 16 being a batcher's own limit. Weights may change
    in place and are read anew; a model that moves must be captured again. The result's
    ``memory_bytes`` tells what the graphs hold. ``graph`` makes what captures, by default a
    :class:`CudaGraph`.

    Raises ValueError for a model that is in training or on no GPU, RuntimeError where its
    operations cannot be captured.
    """
    device: Any = model.head.target_weight.device
    if graph is None:
        if device.type != "cuda":
            raise ValueError(f"only a model on a GPU can be captured, this one is on {device}")
        graph = CudaGraph
    try:
        return CapturedModel(model, batch_sizes, n_candidates, max_terms, graph)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"this model cannot be captured: {reason}") from error
