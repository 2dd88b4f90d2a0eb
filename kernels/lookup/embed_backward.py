"""Gradients of the tables that events' vectors are made of: the kernels and their launch.

An *entry* is one id of one event: a term, a click, or the item of a recommendation event. A row of
a table has the sum over its entries of their events' gradients. Entries are sorted by row; a row's
entries are then a *run*, which is summed in a fixed order, without atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.gpu import on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.lookup.embed import SIZES, sizes
from lcr_fast.kernels.ptxas import kernel


class Entries(NamedTuple):
    """What the entries are of, all terms first, then all clicks, then all recommendation events."""

    terms: Any  # int64 [B, L_s, n_terms]
    clicks: Any  # int64 [B, L_s, click_stride], of which n_clicks are read
    rec_items: Any  # int64 [B, L_r]


class Gradients(NamedTuple):
    """Of the events, what comes, and of the tables, what is made."""

    search: Any  # [B, L_s, D]
    rec: Any  # [B, L_r, D]
    queries: Any  # [rows, D]
    items: Any  # [I + 1, D]


@triton.jit
def _number(ids_ptr, n_ids, offset, keys_ptr, IDS: tl.constexpr):
    """Write the keys of an event's ids [n_ids]: id + offset, or 0 at padding. Return 1 / named."""
    n_named = 0
    for first in range(0, n_ids, IDS):
        place = first + tl.arange(0, IDS)
        ids = tl.load(ids_ptr + place, mask=place < n_ids, other=0)
        keys = tl.where(ids > 0, ids + offset, 0).to(tl.int32)
        tl.store(keys_ptr + place, keys, mask=place < n_ids)
        n_named += tl.sum((ids > 0).to(tl.int32), 0)
    return tl.div_rn(1.0, tl.maximum(n_named, 1).to(tl.float32))


@kernel(do_not_specialize=[*SIZES, "n_query_rows"])
def number_entries_kernel(
    entries,  # Entries
    keys_ptr,  # int32 [entries]: rows of the queries' table, then of the items'; 0 is padding
    shares_ptr,  # float32 [B L_s, 2]: what a term, and a click, has of its event's gradient
    n_searches,  # B L_s
    n_terms,
    n_clicks,
    click_stride,
    n_query_rows,
    IDS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)  # of events of either stream
    n_of_terms = n_searches.to(tl.int64) * n_terms
    n_of_searches = n_of_terms + n_searches.to(tl.int64) * n_clicks
    if pid < n_searches:
        of_term = _number(
            entries.terms + pid * n_terms, n_terms, 0, keys_ptr + pid * n_terms, IDS
        )  # fmt: skip
        of_click = _number(
            entries.clicks + pid * click_stride, n_clicks, n_query_rows,
            keys_ptr + n_of_terms + pid * n_clicks, IDS,
        )  # fmt: skip
        tl.store(shares_ptr + 2 * pid, of_term)
        tl.store(shares_ptr + 2 * pid + 1, of_click)
    else:
        event = pid - n_searches
        _number(entries.rec_items + event, 1, n_query_rows, keys_ptr + n_of_searches + event, IDS)


@triton.jit
def _axis(D_TILE: tl.constexpr):
    """Give the columns [D_TILE] of this program: the second axis of the grid cuts wide rows."""
    return tl.program_id(1) * D_TILE + tl.arange(0, D_TILE)


@triton.jit
def _store_rows(gradients, keys, n_query_rows, axis, values, mask, D: tl.constexpr):
    """Store rows [M, D_TILE] where ``mask`` [M] says so, to the tables that keys [M] name."""
    axis = axis[None, :]
    values = values.to(gradients.items.dtype.element_ty)
    row = keys.to(tl.int64)
    of_query = mask & (keys < n_query_rows)
    of_item = mask & (keys >= n_query_rows)
    to_query = gradients.queries + row[:, None] * D + axis
    to_item = gradients.items + (row - n_query_rows)[:, None] * D + axis
    tl.store(to_query, values, mask=of_query[:, None] & (axis < D))
    tl.store(to_item, values, mask=of_item[:, None] & (axis < D))


@triton.jit
def _first_bits(x):
    """Keep the 11 bits of a float32's significand that TF32 has."""
    return (x.to(tl.int32, bitcast=True) & -(1 << 13)).to(tl.float32, bitcast=True)


@triton.jit
def _sums(alike, rows):
    """Multiply 0s and 1s [M, M] with rows [M, N], in float32.

    The 24 bits of each number are cut into three TF32 numbers of its sign. Tensor cores multiply
    these exactly and round, by truncation, only where they add: a row that is alone comes out as it
    is. tf32x3 has as many products, but loses two of the bits.
    """
    big = _first_bits(rows)
    rest = rows - big
    middle = _first_bits(rest)
    sums = tl.dot(alike, rest - middle, input_precision="tf32")
    sums = tl.dot(alike, middle, sums, input_precision="tf32")
    return tl.dot(alike, big, sums, input_precision="tf32")


@kernel(do_not_specialize=[*SIZES[:3], "n_query_rows", "n_entries"])
def sum_runs_kernel(
    gradients,  # Gradients
    keys_ptr,  # int32 [entries], sorted
    order_ptr,  # int64 [entries]: which entry stands there
    shares_ptr,  # float32 [B L_s, 2]
    ends_ptr,  # float32 [blocks, 2, D]: what the first and the last run have in a block
    n_searches,
    n_terms,
    n_clicks,
    n_query_rows,
    n_entries,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Sum and store runs within blocks of ENTRIES; those at the ends may go on in other blocks."""
    block = tl.program_id(0).to(tl.int64)
    columns = _axis(D_TILE)
    axis = columns[None, :]
    slot = tl.arange(0, ENTRIES)
    place = block * ENTRIES + slot
    exists = place < n_entries
    keys = tl.load(keys_ptr + place, mask=exists, other=-1)  # [ENTRIES]
    after = tl.load(keys_ptr + place + 1, mask=place + 1 < n_entries, other=-1)

    entry = tl.load(order_ptr + place, mask=exists, other=0)
    n_of_terms = n_searches.to(tl.int64) * n_terms
    n_of_searches = n_of_terms + n_searches.to(tl.int64) * n_clicks
    named = exists & (keys > 0)
    of_rec = entry >= n_of_searches
    of_click = (entry >= n_of_terms) & (entry < n_of_searches)
    search = tl.where(
        of_click, (entry - n_of_terms) // tl.maximum(n_clicks, 1), entry // tl.maximum(n_terms, 1)
    )
    in_search = named & (entry < n_of_searches)
    share = tl.load(shares_ptr + 2 * search + of_click.to(tl.int32), mask=in_search, other=0.0)
    rows = tl.load(
        gradients.search + search[:, None] * D + axis,
        mask=in_search[:, None] & (axis < D), other=0.0,
    ).to(tl.float32) * share[:, None]  # fmt: skip
    rows += tl.load(
        gradients.rec + (entry - n_of_searches)[:, None] * D + axis,
        mask=(named & of_rec)[:, None] & (axis < D), other=0.0,
    ).to(tl.float32)  # fmt: skip

    # Row i: the sum of all entries of the block that have its key.
    alike = (keys[:, None] == keys[None, :]).to(tl.float32)
    sums = _sums(alike, rows)  # [ENTRIES, D_TILE]

    last = tl.minimum(n_entries - block * ENTRIES, ENTRIES) - 1
    for end in tl.static_range(2):
        of_end = tl.sum(tl.where((slot == (last if end else 0))[:, None], sums, 0.0), 0)
        tl.store(ends_ptr + (2 * block + end) * D + columns, of_end, mask=columns < D)
    # What goes on in another block is stored too, and then overwritten by join_runs_kernel.
    ends_here = named & ((after != keys) | (slot == last))
    _store_rows(gradients, keys, n_query_rows, columns, sums, ends_here, D)


@kernel(do_not_specialize=["n_query_rows", "n_entries"])
def join_runs_kernel(
    gradients,  # Gradients
    keys_ptr,  # int32 [entries], sorted
    ends_ptr,  # float32 [blocks, 2, D]
    n_query_rows,
    n_entries,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Sum the run that begins in this program's block and ends in another."""
    block = tl.program_id(0).to(tl.int64)
    first, behind = block * ENTRIES, (block + 1) * ENTRIES
    if behind < n_entries:
        key = tl.load(keys_ptr + behind - 1)
        before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
        begins = (tl.load(keys_ptr + first) != key) | (before != key)
        goes_on = tl.load(keys_ptr + behind) == key
        if begins & goes_on & (key > 0):
            axis = _axis(D_TILE)
            total = tl.load(ends_ptr + (2 * block + 1) * D + axis, mask=axis < D, other=0.0)
            other = block + 1
            while goes_on:
                blocks = other + tl.arange(0, BLOCKS)
                heads = tl.load(
                    keys_ptr + blocks * ENTRIES, mask=blocks * ENTRIES < n_entries, other=-1
                )
                mine = heads == key  # the first of them, as keys are sorted
                parts = tl.load(
                    ends_ptr + 2 * blocks[:, None] * D + axis[None, :],
                    mask=mine[:, None] & (axis < D)[None, :], other=0.0,
                )  # fmt: skip
                total += tl.sum(parts, 0)
                other += BLOCKS
                goes_on = tl.min(mine.to(tl.int32), 0) > 0
            keys = tl.full([1], 0, tl.int32) + key
            _store_rows(gradients, keys, n_query_rows, axis, total[None, :], keys > 0, D)


NUMBER_CONFIG = {"IDS": 16, "num_warps": 1}


def config(dim: int) -> dict[str, int]:
    """Choose tiles and launch options of the kernels that sum."""
    tile = min(max(triton.next_power_of_2(dim), 16), 64)  # a product takes 16 at least
    return {"D": dim, "D_TILE": tile, "ENTRIES": 32, "BLOCKS": 32, "num_warps": 4}


def embed_bwd(
    dsearch: Tensor,
    drec: Tensor,
    terms: Tensor,
    clicks: Tensor,
    rec_items: Tensor,
    queries: Tensor,
    items: Tensor,
    search_position: Tensor,
    rec_position: Tensor,
    max_clicks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of the queries, the items, and both streams' positions, as the tables."""
    tables = (queries, items, search_position, rec_position)
    dqueries, ditems, *dpositions = (table.new_zeros(table.shape) for table in tables)
    for dposition, dstream in zip(dpositions, (dsearch, drec), strict=True):
        torch.sum(dstream, 0, out=dposition[: dstream.shape[1]])
    n_searches, n_terms, n_clicks, click_stride = sizes(terms, clicks, max_clicks)
    n_entries = n_searches * (n_terms + n_clicks) + rec_items.numel()
    if n_entries:
        n_query_rows = queries.shape[0]  # with those of items far fewer than int32 counts
        keys = rec_items.new_empty(n_entries, dtype=torch.int32)
        shares = items.new_empty(n_searches, 2, dtype=torch.float32)
        entries = Entries(terms.contiguous(), clicks.contiguous(), rec_items.contiguous())
        gradients = Gradients(dsearch.contiguous(), drec.contiguous(), dqueries, ditems)
        compiled = config(items.shape[1])
        n_blocks = triton.cdiv(n_entries, compiled["ENTRIES"])
        grid = (n_blocks, triton.cdiv(compiled["D"], compiled["D_TILE"]))
        ends = items.new_empty(n_blocks, 2, items.shape[1], dtype=torch.float32)
        with on_device(items):
            launch(
                number_entries_kernel, (n_searches + rec_items.numel(),),
                entries, keys, shares, n_searches, n_terms, n_clicks, click_stride, n_query_rows,
                **NUMBER_CONFIG,
            )  # fmt: skip
            keys, order = torch.sort(keys, stable=True)
            launch(
                sum_runs_kernel, grid,
                gradients, keys, order, shares, ends, n_searches, n_terms, n_clicks, n_query_rows,
                n_entries, **compiled,
            )  # fmt: skip
            launch(
                join_runs_kernel, grid,
                gradients, keys, ends, n_query_rows, n_entries, **compiled,
            )  # fmt: skip
    return dqueries, ditems, dpositions[0], dpositions[1]
