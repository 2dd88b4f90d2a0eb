"""Progress bars of reading and preparing: on a terminal, silent elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import polars as pl
from tqdm import tqdm


@contextlib.contextmanager
def passing(table: pl.LazyFrame, what: str) -> Iterator[pl.LazyFrame]:
    """Yield the table; it shows how many of its rows have streamed through."""
    if not sys.stderr.isatty():
        yield table
        return
    n_rows = table.select(pl.len()).collect().item()
    with tqdm(desc=what, total=n_rows, unit=" rows", unit_scale=True, leave=False) as bar:

        def count(rows: pl.DataFrame) -> pl.DataFrame:
            bar.update(rows.height)
            return rows

        yield table.map_batches(count, streamable=True)


@contextlib.contextmanager
def steps(what: str, n: int) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with the name of each of n steps as it begins."""
    hidden = not sys.stderr.isatty()
    with tqdm(desc=what, total=n, unit=" steps", leave=False, disable=hidden) as bar:

        def begin(step: str) -> None:
            bar.set_postfix_str(step, refresh=False)
            bar.update()
            bar.refresh()

        yield begin
