"""Vectors of the events of both streams: the kernel and its launch."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.gpu import on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.ptxas import kernel


class Events(NamedTuple):
    """One stream: what its events are made of, and where their vectors go."""

    terms: Any  # int64 [B, L, n_terms]; where that is 0 any tensor stands for them
    clicks: Any  # int64 [B, L, click_stride], of which n_clicks are read
    positions: Any  # [L or more, D]
    out: Any  # [B, L, D]


# Sizes change from batch to batch: a kernel that was compiled for some would be compiled again.
SIZES = ["n_searches", "n_terms", "n_clicks", "click_stride"]


@triton.jit
def _mean(table_ptr, ids_ptr, n_ids, D: tl.constexpr, D_TILE: tl.constexpr, IDS: tl.constexpr):
    """Average the rows [*, D] that ids [n_ids] name, of which 0 is none: float32 [D_TILE].

    Blocks have one size however many ids there are: more padding changes no bit.
    """
    axis = tl.arange(0, D_TILE)
    total = tl.zeros([D_TILE], tl.float32)
    n_named = 0
    for first in range(0, n_ids, IDS):
        place = first + tl.arange(0, IDS)
        ids = tl.load(ids_ptr + place, mask=place < n_ids, other=0)
        named = ids > 0
        rows = tl.load(
            table_ptr + ids[:, None] * D + axis[None, :],
            mask=named[:, None] & (axis < D)[None, :],
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32), 0)
        n_named += tl.sum(named.to(tl.int32), 0)
    return tl.div_rn(total, tl.maximum(n_named, 1).to(tl.float32))


@triton.jit
def _embed(
    events,  # Events
    event,  # which of B L
    size,  # L
    n_terms,
    n_clicks,
    click_stride,
    items_ptr,
    queries_ptr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    IDS: tl.constexpr,
):
    axis = tl.arange(0, D_TILE)
    query = _mean(queries_ptr, events.terms + event * n_terms, n_terms, D, D_TILE, IDS)
    items = _mean(items_ptr, events.clicks + event * click_stride, n_clicks, D, D_TILE, IDS)
    position = tl.load(events.positions + event % size * D + axis, mask=axis < D, other=0.0)
    vector = query + items + position.to(tl.float32)
    tl.store(events.out + event * D + axis, vector.to(events.out.dtype.element_ty), mask=axis < D)


@kernel(do_not_specialize=["search_size", "rec_size", *SIZES])
def embed_kernel(
    search,  # Events
    rec,  # Events
    items_ptr,  # [I + 1, D]
    queries_ptr,  # [rows, D]
    search_size,  # L_s
    rec_size,  # L_r
    n_searches,  # B L_s
    n_terms,
    n_clicks,
    click_stride,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    IDS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if pid < n_searches:
        _embed(
            search, pid, search_size, n_terms, n_clicks, click_stride,
            items_ptr, queries_ptr, D, D_TILE, IDS,
        )  # fmt: skip
    else:
        _embed(rec, pid - n_searches, rec_size, 0, 1, 1, items_ptr, queries_ptr, D, D_TILE, IDS)


def config(dim: int) -> dict[str, int]:
    """Choose tiles and launch options: a warp holds 16 rows of 64 numbers in 32 registers."""
    tile = triton.next_power_of_2(dim)
    return {"D": dim, "D_TILE": tile, "IDS": 16, "num_warps": min(max(tile // 64, 1), 8)}


def sizes(terms: Tensor, clicks: Tensor, max_clicks: int) -> list[int]:
    """Give the SIZES of a call."""
    n_users, size, n_terms = terms.shape
    stride = clicks.shape[2]
    return [n_users * size, n_terms, min(max_clicks, stride), stride]


def embed_fwd(
    terms: Tensor,
    clicks: Tensor,
    rec_items: Tensor,
    queries: Tensor,
    items: Tensor,
    search_position: Tensor,
    rec_position: Tensor,
    max_clicks: int,
) -> tuple[Tensor, Tensor]:
    """Launch one program an event of either stream: [B, L_s, D] and [B, L_r, D].

    A search is the mean of its terms' vectors and that of its first ``max_clicks`` clicks' vectors,
    a recommendation event one click without terms.
    """
    dim = items.shape[1]
    search = items.new_empty(*terms.shape[:2], dim)
    rec = items.new_empty(*rec_items.shape, dim)
    if n_programs := terms.shape[0] * terms.shape[1] + rec_items.numel():
        terms, clicks, rec_items = terms.contiguous(), clicks.contiguous(), rec_items.contiguous()
        with on_device(items):
            launch(
                embed_kernel, (n_programs,),
                Events(terms, clicks, search_position.contiguous(), search),
                Events(rec_items, rec_items, rec_position.contiguous(), rec),
                items.contiguous(), queries.contiguous(),
                terms.shape[1], rec_items.shape[1], *sizes(terms, clicks, max_clicks),
                **config(dim),
            )  # fmt: skip
    return search, rec
