"""Serving without launches: a model as CUDA graphs, one for each of a few batch sizes.

A request of one user costs a GPU far less than the host spends on launching its kernels. A graph
is launched as one; what it costs is that sizes are fixed. So a batch is padded with users who have
nothing, and with zeros to the most events, terms and candidates, which the model treats as padding
anyway: results have the bits of the model on the padded batch.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lcr_fast.batch import Batch
from lcr_fast.model import LCRSER, check_recommendation

_Result = TypeVar("_Result")


class Graph(Protocol):
    """What captures and replays: :class:`CudaGraph`."""

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Run ``function`` as it will be captured, which compiles its kernels."""

    def capture(self, function: Callable[[], _Result]) -> _Result:
        """Record ``function``, which is not run; return the tensors that every replay writes."""

    def replay(self) -> None:
        """Do again what was recorded."""

    @property
    def memory_bytes(self) -> int:
        """What it holds of a GPU's memory, its results among it."""


class CudaGraph:
    """A CUDA graph of ``device``, and the memory of what it computes between.

    It makes its GPU current: streams and graphs are of the current one, so that on another a
    capture would record nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Run ``function`` on a stream of its own, as a capture has one."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = function()
            torch.cuda.current_stream().wait_stream(stream)
            return result

    def capture(self, function: Callable[[], _Result]) -> _Result:
        """Record ``function``."""
        # torch's own stream for captures is of the GPU that was current at the first one.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, stream=torch.cuda.Stream()),
        ):
            return function()

    def replay(self) -> None:
        """Launch it on its GPU's current stream."""
        with torch.cuda.device(self._device):
            self._graph.replay()

    @property
    def memory_bytes(self) -> int:
        """Sum up the segments of the graph's own pool."""
        pool = tuple(self._graph.pool())
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == pool)


class Staged:
    """Integers that a graph reads: tensors that stay where they are, filled by one copy.

    ``sizes`` names them. Each begins at 16 bytes, as tensors do that have memory of their own:
    Triton compiles other kernels for those that do not.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._sizes = dict(sizes)
        n = sum(_room(size) for size in self._sizes.values())
        self._values = torch.zeros(n, dtype=torch.int64, device=device)
        self._host = torch.zeros(n, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._is_read = torch.cuda.Event() if device.type == "cuda" else None
        self._laid_out = self._views(self._host)
        self.tensors = self._views(self._values)

    def _views(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split([_room(size) for size in self._sizes.values()])
        named = zip(self._sizes.items(), parts, strict=True)
        return {name: part[: _numel(size)].view(size) for (name, size), part in named}

    def _lay_out(self, values: Mapping[str, Tensor]) -> Tensor:
        """Put values behind each other on the host, as the tensors are."""
        if self._is_read is not None:
            self._is_read.synchronize()  # the last ones may still be on their way to the GPU
        for name, into in self._laid_out.items():
            value = values[name]
            if value.shape != into.shape:
                into.zero_()
            into[tuple(slice(size) for size in value.shape)] = value
        return self._host

    @property
    def memory_bytes(self) -> int:
        return self._values.nbytes

    def padded(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the tensors would hold, on the CPU."""
        return self._views(self._lay_out(values).clone())

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Fill the tensors; zeros pad what is smaller."""
        self._values.copy_(self._lay_out(values), non_blocking=True)
        if self._is_read is not None:
            self._is_read.record(torch.cuda.current_stream(self._values.device))  # the copy's


class _Bucket:
    """One batch size: a batch that stays where it is, and what each replay makes of it."""

    def __init__(
        self,
        sizes: dict[str, tuple[int, ...]],
        device: torch.device,
        function: Callable[[Batch], Any],
        graph: Graph,
    ) -> None:
        self._staged = Staged(sizes, device)
        self.batch = Batch(**self._staged.tensors)
        self._graph = graph
        graph.run(lambda: function(self.batch))
        self._result = graph.capture(lambda: function(self.batch))

    @property
    def memory_bytes(self) -> int:
        return self._staged.memory_bytes + self._graph.memory_bytes

    def padded(self, batch: Batch) -> Batch:
        """Return the batch that is computed for ``batch``."""
        return Batch(**self._staged.padded(vars(batch)))

    def replay(self, batch: Batch) -> Any:
        """Compute for ``batch``, as ``self.batch``; the result is overwritten by the next one."""
        self._staged.fill(vars(batch))
        self._graph.replay()
        return self._result


def _numel(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


def _room(size: tuple[int, ...]) -> int:
    """Give the int64 numbers that a tensor of this size takes, in whole 16 bytes."""
    return _numel(size) + _numel(size) % 2


class _Captured:
    """One function of a batch, for each of a few batch sizes."""

    def __init__(
        self,
        model: LCRSER,
        function: Callable[[Batch], Any],
        batch_sizes: Iterable[int],
        n_candidates: int,
        max_terms: int | None,
        graph: Callable[[], Graph],
    ) -> None:
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        if not self.batch_sizes or self.batch_sizes[0] < 1:
            raise ValueError(f"batch_sizes must be positive numbers, got {self.batch_sizes}")
        if max_terms is None:
            max_terms = model.config.max_terms
        if max_terms < 0:
            raise ValueError(f"max_terms must not be negative, got {max_terms}")
        if model.training:
            raise ValueError(
                "a model in training cannot be captured, as every call drops other units: call "
                "model.eval() first"
            )
        if model.exits is not None:
            raise ValueError("a model whose users leave the reasoning early cannot be captured")
        model.check_padding()
        config, device = model.config, model.head.target_weight.device
        searches = config.max_search_len
        self._sizes: dict[str, tuple[int, ...]] = {
            "user": (), "rec_items": (config.max_rec_len,), "rec_lengths": (),
            "search_queries": (searches,), "search_terms": (searches, max_terms),
            "search_clicks": (searches, config.max_clicks), "search_lengths": (),
            "candidates": (n_candidates,), "target": (), "row": (),
        }  # fmt: skip
        with torch.no_grad():
            self._buckets = {
                n: _Bucket({k: (n, *s) for k, s in self._sizes.items()}, device, function, graph())
                for n in self.batch_sizes
            }

    @property
    def memory_bytes(self) -> int:
        """What the graphs of all batch sizes hold of the GPU's memory."""
        return sum(bucket.memory_bytes for bucket in self._buckets.values())

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

    def _pieces(self, batch: Batch) -> Iterator[slice]:
        """Cut a batch into pieces of the largest batch size."""
        most = self.batch_sizes[-1]
        return (slice(i, i + most) for i in range(0, max(len(batch), 1), most))

    def padded(self, batch: Batch) -> Batch:
        """Return what is computed for a batch that fits one bucket, on the CPU."""
        self._check(batch)
        if len(batch) > self.batch_sizes[-1]:
            raise ValueError(
                f"{len(batch)} users are more than the largest batch, {self.batch_sizes[-1]}"
            )
        return self._bucket(batch).padded(batch)


class CapturedModel(_Captured):
    """Scores of a model by replaying; see :func:`capture`."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Score the candidates of a batch, best on the CPU: [B, C], on the model's device.

        More users than the largest batch size are computed in pieces of it. Raises ValueError for
        histories, terms or candidates beyond what was captured.
        """
        self._check(batch)
        scores = []
        for rows in self._pieces(batch):
            piece = batch.rows(rows)
            whole = self._bucket(piece).replay(piece)
            scores.append(whole[: len(piece), : piece.candidates.shape[1]].clone())
        return torch.cat(scores)


class CapturedRecommender(_Captured):
    """A model's encoders and reasoning by replaying, before it ranks the catalogue.

    See :func:`capture_recommender`. The pass over the catalogue is a few long kernels, of a size
    that depends on what is excluded; so it is launched.
    """

    def __init__(
        self,
        model: LCRSER,
        batch_sizes: Iterable[int],
        max_terms: int | None,
        graph: Callable[[], Graph],
    ) -> None:
        # One candidate, which is not read: the target of no user, 0, is a column.
        super().__init__(model, model.final_states, batch_sizes, 1, max_terms, graph)
        self._model = model

    @torch.no_grad()
    def recommend(
        self, batch: Batch, k: int = 10, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the top-k items for a batch, best on the CPU: as :meth:`LCRSER.recommend`.

        More users than the largest batch size are computed in pieces of it. Raises ValueError for
        histories or terms beyond what was captured.
        """
        check_recommendation(batch, k, exclude)
        batch = batch.replace(
            candidates=batch.candidates[:, :0], target=torch.zeros_like(batch.target)
        )
        self._check(batch)
        items, scores = [], []
        for rows in self._pieces(batch):
            piece = batch.rows(rows)
            bucket = self._bucket(piece)
            states = bucket.replay(piece)
            seen = None
            if exclude is not None:
                missing = len(bucket.batch) - len(piece)
                seen = F.pad(exclude[rows].to(bucket.batch.device), (0, 0, 0, missing))
            found = self._model.best_items(states, bucket.batch, k, seen)
            items.append(found[0][: len(piece)])
            scores.append(found[1][: len(piece)])
        return torch.cat(items), torch.cat(scores)


def capture(
    model: LCRSER,
    batch_sizes: Iterable[int] = (1, 8, 64, 256),
    n_candidates: int = 100,
    max_terms: int | None = None,
    graph: Callable[[], Graph] | None = None,
) -> CapturedModel:
    """Capture ``model(batch)`` for serving, for each of ``batch_sizes``, on the model's GPU.

    ``max_terms`` is the most terms of a query, by default those of the config. Weights may change
    in place and are read anew; a model that moves must be captured again. Calls share the graphs'
    memory: they must follow each other, on one CUDA stream. The result's ``memory_bytes`` tells
    what the graphs hold. ``graph`` makes what captures, by default a :class:`CudaGraph`.

    Raises ValueError for a model that is in training, on no GPU, with exits or with a row 0 that is
    not 0, RuntimeError where its operations cannot be captured.
    """
    if n_candidates < 1:
        raise ValueError(f"n_candidates must be positive, got {n_candidates}")
    with _explained(model, graph):
        return CapturedModel(
            model, model, batch_sizes, n_candidates, max_terms, graph or _graph_of(model)
        )


def capture_recommender(
    model: LCRSER,
    batch_sizes: Iterable[int] = (1, 8, 64, 256),
    max_terms: int | None = None,
    graph: Callable[[], Graph] | None = None,
) -> CapturedRecommender:
    """Capture what ``model.recommend`` computes before the catalogue; all else as :func:`capture`.

    Its ``recommend`` gives the bits of the model's own on the padded batch.
    """
    with _explained(model, graph):
        return CapturedRecommender(model, batch_sizes, max_terms, graph or _graph_of(model))


def _graph_of(model: LCRSER) -> Callable[[], Graph]:
    return functools.partial(CudaGraph, model.head.target_weight.device)


@contextlib.contextmanager
def _explained(model: LCRSER, graph: Callable[[], Graph] | None) -> Iterator[None]:
    """Refuse a model that is on no GPU; say what could not be captured in one sentence."""
    device = model.head.target_weight.device
    if graph is None and device.type != "cuda":
        raise ValueError(f"only a model on a GPU can be captured, this one is on {device}")
    with capturing("this model"):
        yield


@contextlib.contextmanager
def capturing(what: str) -> Iterator[None]:
    """Say in one sentence why ``what`` could not be captured: RuntimeError.

    What ``torch.autocast`` keeps of weights meanwhile is not used: a graph would go on reading it.
    """
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"{what} cannot be captured: {reason}") from error
    finally:
        torch.set_autocast_cache_enabled(keeps)
