"""Several processes as one: each computes its share of a batch's users, all make the same step.

Every process draws the whole batch (ids alone, keyed by seed and step), computes what its own rows
cost, and collects the others' scores; so losses that couple users, actions and logs are those of
the whole batch everywhere. Gradients are then summed over the processes. The numbers are those of
one process, to rounding. Of files the first process is the only writer.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from lcr_fast.batch import Batch
from lcr_fast.storage import discarding
from lcr_fast.training.rows import merged

_ENDED = "lcr_fast/ended"  # counts the processes that know why the job ends
_STOPPED = (
    "the job was stopped, or another of its processes ended; --resume continues from the last "
    "checkpoint"
)
Rows = TypeVar("Rows", Batch, Tensor)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Share:
    """The part of every batch that is this process's: all of it where it is alone."""

    rank: int = 0
    count: int = 1

    def deal(self, whole: Rows) -> Rows:
        """Take this process's rows of a batch, or of a tensor [B, ...].

        Every share has as many; where too few are left, the last one again.
        """
        if self.count == 1:
            return whole
        start, size = self._place(len(whole))
        rows = torch.arange(start, start + size, device=whole.device).clamp(max=len(whole) - 1)
        return whole.rows(rows) if isinstance(whole, Batch) else whole[rows]

    def collect(self, part: Tensor, n: int) -> Tensor:
        """Join what was computed of all dealt rows: [b, ...] of each process -> [n, ...].

        The gradient of the result, the same in every process, goes back to each one's own rows.
        """
        return part if self.count == 1 else _Collect.apply(part, self, n)

    def total(self, gradient: Tensor | None) -> Tensor | None:
        """Sum a gradient, sparse ones too, over the processes; None where there is none."""
        if self.count == 1 or gradient is None:
            return gradient
        if gradient.is_sparse:
            return self._sparse_total(gradient)
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every parameter the gradient of the whole batch."""
        if self.count == 1:
            return
        dense = []
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = self._sparse_total(parameter.grad)
            elif parameter.grad is not None:
                dense.append(parameter.grad)
        joined = torch.cat([gradient.flatten() for gradient in dense])
        dist.all_reduce(joined)
        for gradient, part in zip(dense, joined.split([g.numel() for g in dense]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def blocks(self, n: int, size: int) -> range:
        """List where this process's blocks of n rows start: the blocks go round the processes."""
        return range(self.rank * size, n, self.count * size)

    def united(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sum an array over the processes, each of which has filled in its rows and left others 0.

        In the CPU's memory.
        """
        if self.count > 1:
            dist.all_reduce(torch.from_numpy(values))
        return values

    def rounds(self, own: Iterable[Result]) -> Iterator[Result]:
        """Yield what all processes yield, in turn, for as long as this one does.

        Each must yield as often as the others.
        """
        for value in own:
            found: list[Any] = [value]
            if self.count > 1:
                found = [None] * self.count
                dist.all_gather_object(found, value)
            yield from found

    def by_first(self, function: Callable[[], Result]) -> Result:
        """Call a function in the first process; every one gets what it returned."""
        found = [function() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(found)
        return found[0]  # type: ignore[return-value]  # the first process's

    def _place(self, n: int) -> tuple[int, int]:
        size = -(-n // self.count)
        return self.rank * size, size

    def _gathered(self, part: Tensor) -> list[Tensor]:
        found = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(found, part.contiguous())
        return found

    def _sparse_total(self, gradient: Tensor) -> Tensor:
        own = merged(gradient)
        rows, values = own.indices()[0], own.values()
        counts = [int(n) for n in self._gathered(torch.tensor([len(rows)], device=rows.device))]
        missing = max(counts) - len(rows)
        rows = torch.cat((rows, rows.new_zeros(missing)))
        values = torch.cat((values, values.new_zeros(missing, *values.shape[1:])))
        parts = [
            (some_rows[:n], some[:n])
            for n, some_rows, some in zip(
                counts, self._gathered(rows), self._gathered(values), strict=True
            )
        ]
        every, all_values = (torch.cat(each) for each in zip(*parts, strict=True))
        return torch.sparse_coo_tensor(
            every.unsqueeze(0), all_values, gradient.shape, check_invariants=False
        )


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, share: Share, n: int) -> Tensor:
        ctx.share, ctx.n = share, n
        return torch.cat(share._gathered(part))[:n]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        start, size = ctx.share._place(ctx.n)
        own = gradient[start : start + size]
        # Rows that were dealt again are not read.
        padding = own.new_zeros(size - len(own), *own.shape[1:])
        return torch.cat((own, padding)), None, None


_current = Share()


def current() -> Share:
    """Return the share of this process in the job that it has joined: by default, everything."""
    return _current


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the other processes of torchrun; yield the device of this one.

    Meanwhile all but the first are silent and write nothing. Whatever ends one of them ends them
    all, and is said once: by the process that knows it, or as a ConnectionError by the first that
    misses another.
    """
    global _current
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://"))
    on_gpu = False
    if device.startswith("cuda"):
        local = int(os.environ["LOCAL_RANK"])
        device, on_gpu = f"cuda:{local}", local < torch.cuda.device_count()
        if on_gpu:  # or the command will say that there is no such GPU
            torch.cuda.set_device(local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=count
    )
    before = signal.signal(signal.SIGTERM, _stop)
    _current = Share(rank, count)
    try:
        with _silent() if rank else contextlib.nullcontext():
            yield device
            dist.barrier()
    except BaseException as error:
        if not _is_first_to_end(store):
            raise SystemExit(1) from None
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError(_STOPPED) from None
        raise
    else:
        dist.destroy_process_group()
    finally:
        _current = Share()
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: Any) -> None:
    raise ConnectionError(_STOPPED)


def _is_first_to_end(store: dist.Store) -> bool:
    try:
        return store.add(_ENDED, 1) == 1
    except RuntimeError:  # it ended with the process that held it
        return True


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            open(os.devnull, "w") as nothing,
            contextlib.redirect_stdout(nothing),
            contextlib.redirect_stderr(nothing),
            discarding(),
        ):
            yield
    finally:
        logging.disable(disabled)
