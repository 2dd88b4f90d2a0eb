"""MicroBatcher: requests that arrive while others are computed, or within a short wait, together.

One thread computes, one batch after another; several batchers may share it. A request that finds it
idle waits ``max_wait`` for company, which may be nothing at all: then batches form only of what
arrived during the one before.
"""

import asyncio
import collections
import contextlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class OverloadedError(Exception):
    """The queue is full."""


class ClosedError(Exception):
    """The batcher takes no more requests."""


def one_thread() -> ThreadPoolExecutor:
    """Make a thread that batchers may share."""
    return ThreadPoolExecutor(1, thread_name_prefix="lcr_fast")


class MicroBatcher:
    """Hands requests to ``run``, which returns a result for each, in batches of ``max_batch``.

    At most ``max_queue`` requests wait. ``observe(size)`` is told the size of each batch.
    ``executor`` is the thread that computes, its own where none is given. Lives in one event loop:
    ``async with`` starts it, and at its end answers what was taken.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        max_batch: int = 64,
        max_wait: float = 0.0,
        max_queue: int = 1024,
        observe: Callable[[int], None] = lambda size: None,
        executor: ThreadPoolExecutor | None = None,
    ) -> None:
        if max_batch < 1 or max_queue < 1 or not 0 <= max_wait < math.inf:
            raise ValueError(
                "max_batch and max_queue must be at least 1 and max_wait at least 0 and finite, "
                f"got {max_batch}, {max_queue} and {max_wait}"
            )
        self._run, self._observe = run, observe
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait, max_queue
        self._queue: collections.deque[tuple[Any, asyncio.Future]] = collections.deque()
        self._arrived, self._full = asyncio.Event(), asyncio.Event()
        self._closed = False
        self._worker: asyncio.Task | None = None
        # One thread, so that torch's own threads are never asked for by two.
        self._executor = executor or one_thread()
        self._own_executor = executor is None

    async def __aenter__(self) -> "MicroBatcher":
        self._worker = asyncio.get_running_loop().create_task(self._work())
        return self

    async def __aexit__(self, *_: Any) -> None:
        assert self._worker is not None
        self._closed = True
        self._arrived.set()
        self._full.set()
        await self._worker
        if self._own_executor:
            self._executor.shutdown()

    @property
    def n_waiting(self) -> int:
        return len(self._queue)

    async def submit(self, request: Any) -> Any:
        """Return the request's result, or raise what ``run`` raised for its batch.

        Raises OverloadedError where the queue is full, ClosedError once the batcher ends.
        """
        if self._closed:
            raise ClosedError
        if len(self._queue) >= self._max_queue:
            raise OverloadedError
        answer = asyncio.get_running_loop().create_future()
        self._queue.append((request, answer))
        self._arrived.set()
        if len(self._queue) >= self._max_batch:
            self._full.set()
        return await answer

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            if not self._queue:  # nothing will arrive any more
                return
            if self._max_wait and not self._full.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self._max_wait)
            n = min(len(self._queue), self._max_batch)
            taken = [self._queue.popleft() for _ in range(n)]
            if not self._closed:
                if not self._queue:
                    self._arrived.clear()
                if len(self._queue) < self._max_batch:
                    self._full.clear()
            # Who has gone away needs no answer.
            await self._compute([one for one in taken if not one[1].done()])

    async def _compute(self, batch: list[tuple[Any, asyncio.Future]]) -> None:
        if not batch:
            return
        loop = asyncio.get_running_loop()
        try:
            self._observe(len(batch))
            results = await loop.run_in_executor(
                self._executor, self._run, [request for request, _ in batch]
            )
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} requests")
        except Exception as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), result in zip(batch, results, strict=True):
            if not answer.done():
                answer.set_result(result)
