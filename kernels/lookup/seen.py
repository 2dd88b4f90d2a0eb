"""What scores gain where candidates stand in the histories: the kernels and their launches."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.gpu import on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.ptxas import kernel

CONFIG = {"CANDIDATES": 32, "ITEMS": 64, "num_warps": 4}


class Seen(NamedTuple):
    """Candidates, and the histories that they are looked up in."""

    candidates: Any  # [B or 1, C]
    clicks: Any  # [B, L_s, M]
    search_lengths: Any  # [B]
    rec_items: Any  # [B, L_r]
    rec_lengths: Any  # [B]


# Sizes change from batch to batch: a kernel that was compiled for some would be compiled again.
_SIZES = [
    "candidates_stride", "n_candidates", "n_searches", "n_clicks", "n_events", "max_clicks",
]  # fmt: skip


@triton.jit
def _is_among(ids, items_ptr, n_items, n_columns, n_read, ITEMS: tl.constexpr):
    """Say which ids [P] are among items [n_items], of whose every n_columns n_read count."""
    found = tl.zeros([ids.shape[0], ITEMS], tl.int1)
    for first in range(0, n_items, ITEMS):
        place = first + tl.arange(0, ITEMS)
        read = (place < n_items) & (place % n_columns < n_read)
        items = tl.load(items_ptr + place, mask=read, other=0)
        found |= ids[:, None] == items[None, :]
    return tl.max(found.to(tl.int32), 1) > 0


@triton.jit
def _look_up(
    seen, candidates_stride, n_candidates, n_searches, n_clicks, n_events, max_clicks,
    CANDIDATES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Read this program's tile of a user's candidates, and where they stand in the histories.

    Returns the user, and of each candidate [P] its column, its id, whether it was clicked, and
    whether it is an event.
    """
    n_tiles = tl.cdiv(n_candidates, CANDIDATES)
    pid = tl.program_id(0).to(tl.int64)
    tile, b = pid % n_tiles, pid // n_tiles
    c = tile * CANDIDATES + tl.arange(0, CANDIDATES)
    ids_ptr = seen.candidates + b * candidates_stride
    ids = tl.load(ids_ptr + c, mask=c < n_candidates, other=0)
    searches = tl.minimum(tl.load(seen.search_lengths + b), n_searches).to(tl.int32)
    clicked = _is_among(
        ids, seen.clicks + b * n_searches * n_clicks, searches * n_clicks,
        n_clicks, max_clicks, ITEMS,
    )  # fmt: skip
    events = tl.minimum(tl.load(seen.rec_lengths + b), n_events).to(tl.int32)
    happened = _is_among(ids, seen.rec_items + b * n_events, events, 1, 1, ITEMS)
    return b, c, ids, clicked, happened


@kernel(do_not_specialize=_SIZES)
def seen_bonus_fwd_kernel(
    scores_ptr,  # [B, N, C]
    seen,  # Seen
    bonus_ptr,  # [2]
    out_ptr,  # [B, N, C]
    candidates_stride,  # C, or 0 where all users share them
    n_candidates,  # C
    n_searches,  # L_s
    n_clicks,  # M
    n_events,  # L_r
    max_clicks,  # of the M, read
    n_trajectories,
    factor,
    CANDIDATES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    b, c, ids, clicked, happened = _look_up(
        seen, candidates_stride, n_candidates, n_searches, n_clicks, n_events, max_clicks,
        CANDIDATES, ITEMS,
    )  # fmt: skip
    inside = c < n_candidates
    gain = tl.where(clicked, tl.load(bonus_ptr).to(tl.float32) * factor, 0.0)
    gain += tl.where(happened, tl.load(bonus_ptr + 1).to(tl.float32) * factor, 0.0)
    for n in range(n_trajectories):
        row = (b * n_trajectories + n) * n_candidates
        scores = tl.load(scores_ptr + row + c, mask=inside, other=0.0).to(tl.float32) + gain
        scores = tl.where(ids == 0, float("-inf"), scores)
        tl.store(out_ptr + row + c, scores.to(out_ptr.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=_SIZES)
def seen_bonus_bwd_kernel(
    dout_ptr,  # [B, N, C]
    seen,  # Seen
    dscores_ptr,  # [B, N, C]
    dbonus_ptr,  # float32 [programs, 2]
    candidates_stride,  # C, or 0 where all users share them
    n_candidates,  # C
    n_searches,  # L_s
    n_clicks,  # M
    n_events,  # L_r
    max_clicks,  # of the M, read
    n_trajectories,
    factor,
    CANDIDATES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    b, c, ids, clicked, happened = _look_up(
        seen, candidates_stride, n_candidates, n_searches, n_clicks, n_events, max_clicks,
        CANDIDATES, ITEMS,
    )  # fmt: skip
    inside = c < n_candidates
    total = tl.zeros([CANDIDATES], tl.float32)
    for n in range(n_trajectories):
        row = (b * n_trajectories + n) * n_candidates
        dscores = tl.load(dout_ptr + row + c, mask=inside, other=0.0)
        dscores = tl.where(ids == 0, 0.0, dscores)
        tl.store(dscores_ptr + row + c, dscores, mask=inside)
        total += dscores.to(tl.float32)
    total *= factor
    dbonus_ptr += 2 * tl.program_id(0).to(tl.int64)
    tl.store(dbonus_ptr, tl.sum(tl.where(clicked, total, 0.0), 0))
    tl.store(dbonus_ptr + 1, tl.sum(tl.where(happened, total, 0.0), 0))


def _arguments(
    candidates: Tensor,
    clicks: Tensor,
    search_lengths: Tensor,
    rec_items: Tensor,
    rec_lengths: Tensor,
    max_clicks: int,
) -> tuple[Seen, list[int]]:
    """Give what both kernels take of the histories: tensors and _SIZES."""
    seen = Seen(
        *(t.contiguous() for t in (candidates, clicks, search_lengths, rec_items, rec_lengths))
    )
    n_candidates = candidates.shape[1]
    stride = n_candidates if candidates.shape[0] > 1 else 0
    return seen, [stride, n_candidates, *clicks.shape[1:], rec_items.shape[1], max_clicks]


def seen_bonus_fwd(
    scores: Tensor,
    candidates: Tensor,
    clicks: Tensor,
    search_lengths: Tensor,
    rec_items: Tensor,
    rec_lengths: Tensor,
    bonus: Tensor,
    factor: float,
    max_clicks: int,
) -> Tensor:
    """Launch one program a tile of a user's candidates, for all trajectories: [B, N, C]."""
    out = scores.new_empty(scores.shape)
    seen, sizes = _arguments(candidates, clicks, search_lengths, rec_items, rec_lengths, max_clicks)
    n_users, n_trajectories, n_candidates = scores.shape
    if out.numel():
        with on_device(scores):
            launch(
                seen_bonus_fwd_kernel, (n_users * triton.cdiv(n_candidates, CONFIG["CANDIDATES"]),),
                scores.contiguous(), seen, bonus.contiguous(), out, *sizes, n_trajectories, factor,
                **CONFIG,
            )  # fmt: skip
    return out


def seen_bonus_bwd(
    dout: Tensor,
    scores: Tensor,
    candidates: Tensor,
    clicks: Tensor,
    search_lengths: Tensor,
    rec_items: Tensor,
    rec_lengths: Tensor,
    bonus: Tensor,
    factor: float,
    max_clicks: int,
) -> tuple[Tensor, Tensor]:
    """Give the gradients of the scores [B, N, C] and of the bonus [2].

    The histories are looked through again. A program leaves its sum, which torch adds up.
    """
    dscores = scores.new_empty(scores.shape)
    n_users, n_trajectories, n_candidates = scores.shape
    if dscores.numel() == 0:
        return dscores, torch.zeros_like(bonus)
    seen, sizes = _arguments(candidates, clicks, search_lengths, rec_items, rec_lengths, max_clicks)
    programs = n_users * triton.cdiv(n_candidates, CONFIG["CANDIDATES"])
    dbonus = scores.new_empty(programs, 2, dtype=torch.float32)
    with on_device(scores):
        launch(
            seen_bonus_bwd_kernel, (programs,),
            dout.contiguous(), seen, dscores, dbonus, *sizes, n_trajectories, factor, **CONFIG,
        )  # fmt: skip
    return dscores, dbonus.sum(0).to(bonus.dtype)
