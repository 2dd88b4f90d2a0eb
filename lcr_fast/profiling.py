"""Named ranges around the stages of a model and of its training, for profilers.

They are off unless asked for, by ``LCR_FAST_PROFILE=1``, :func:`enable` or :func:`enabled`. On, a
range shows in ``torch.profiler`` and, once CUDA is in use, in Nsight Systems (NVTX). Off, a range
is one look at a flag; in code that torch.compile traces there are none.

Ranges: ``batch`` (assembly), ``embed`` and ``encode`` (which contains it), ``reason`` with
``reason step k`` inside where the reference runs single steps, ``rollout`` likewise, ``score``,
``reward``, ``loss``, ``backward``, ``optimizer``.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

_on = os.environ.get("LCR_FAST_PROFILE") == "1"
_NOTHING = contextlib.nullcontext()


def enable(on: bool = True) -> None:
    """Switch all ranges on, or off."""
    global _on
    _on = on


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Switch all ranges on for a ``with`` block."""
    before = _on
    enable()
    try:
        yield
    finally:
        enable(before)


def range_(name: str) -> contextlib.AbstractContextManager:
    """Name what runs in a ``with`` block."""
    if not _on or torch.compiler.is_compiling():
        return _NOTHING
    return _named(name)


def ranged(name: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Name what a function does: ``range_`` around every call."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if not _on:
                return function(*args, **kwargs)
            with range_(name):
                return function(*args, **kwargs)

        return call

    return decorate


def ranged_steps(name: str, n: int) -> Iterable[int]:
    """Count to ``n`` as ``range`` does, each turn of the loop in a range "``name`` 1", ..."""
    if not _on or torch.compiler.is_compiling():
        return range(n)

    def steps() -> Iterator[int]:
        for k in range(n):
            with _named(f"{name} {k + 1}"):
                yield k

    return steps()


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.profiler.record_function(name))
        if torch.cuda.is_initialized():
            stack.enter_context(torch.cuda.nvtx.range(name))
        yield
