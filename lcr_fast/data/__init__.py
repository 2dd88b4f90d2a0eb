"""Data: one reader per raw format, the prepared format, negatives and batching.

Readers and ``prepare`` need polars, which is imported only when they are.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .log import InteractionLog

# Source name -> the module whose ``read(path, **options)`` reads it.
SOURCES = {
    "synthetic": "lcr_fast.data.synthetic",
    "trivago": "lcr_fast.data.trivago",
    "kuaisar": "lcr_fast.data.kuaisar",
    "qilin": "lcr_fast.data.qilin",
    "jdsearch": "lcr_fast.data.jdsearch",
    "synerise": "lcr_fast.data.synerise",
    "ubi": "lcr_fast.data.ubi",
    "amazon": "lcr_fast.data.amazon",
    "frames": "lcr_fast.data.frames",
}


def read(source: str, path: str | os.PathLike, **options) -> InteractionLog:
    """Read raw data of a named source.

    ``options`` go to the source's reader (see ``reader_options``). Raises ValueError for an unknown
    source or option and for malformed data, FileNotFoundError for a missing file.
    """
    reader = _reader(source)
    for name in options:
        if name not in reader_options(source):
            raise ValueError(f"the reader of {source} has no option {name}")
    return reader(path, **options)


def reader_options(source: str) -> tuple[str, ...]:
    """Name the options of a source's reader."""
    parameters = inspect.signature(_reader(source)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def _reader(source: str) -> Callable[..., InteractionLog]:
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    return importlib.import_module(SOURCES[source]).read
