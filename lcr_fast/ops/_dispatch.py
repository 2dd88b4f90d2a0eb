"""Which implementation serves an op: one rule for all of them."""

import functools
import logging
from collections.abc import Mapping

import torch

_LOG = logging.getLogger("lcr_fast")


@functools.cache
def say_once(notice: str) -> None:
    """Log a notice, the first time."""
    _LOG.warning(notice)


def choose_backend(
    op: str, backend: str, available: Mapping[str, str | None], expected: str | None = None
) -> str:
    """Return the implementation that serves ``op``.

    ``available`` lists the op's implementations, the preferred one first, each with None or the
    reason why it cannot serve this call. ``auto`` takes the first that can, and says once, in the
    log, why that is not the ``expected`` one; an explicit request that cannot be served raises
    ValueError and names what can.
    """
    able = [name for name, obstacle in available.items() if obstacle is None]
    if backend == "auto":
        if expected is not None and able[0] != expected and not torch.compiler.is_compiling():
            say_once(f"{op} runs on the {able[0]} backend, not {expected}: {available[expected]}")
        return able[0]
    if backend in able:
        return backend
    reason = available.get(backend) or "there is no such implementation of this op"
    raise ValueError(
        f"backend={backend!r} cannot serve {op}: {reason}; "
        f"use backend={' or '.join(map(repr, able))}"
    )
