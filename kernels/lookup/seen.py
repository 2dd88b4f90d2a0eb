"""What scores gain where candidates stand in the histories: the kernel and its launch."""

import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.gpu import on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.ptxas import kernel

CONFIG = {"CANDIDATES": 32, "ITEMS": 64, "num_warps": 4}


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


@kernel(do_not_specialize=["max_clicks"])
def seen_bonus_kernel(
    scores_ptr,  # [B, N, C]
    candidates_ptr,  # [B or 1, C]
    clicks_ptr,  # [B, L_s, M]
    search_lengths_ptr,  # [B]
    rec_items_ptr,  # [B, L_r]
    rec_lengths_ptr,  # [B]
    bonus_ptr,  # [2]
    out_ptr,  # [B, N, C]
    candidates_stride,
    n_trajectories,
    n_candidates,
    n_searches,
    n_clicks,
    n_events,
    max_clicks,
    factor,
    CANDIDATES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    n_tiles = tl.cdiv(n_candidates, CANDIDATES)
    pid = tl.program_id(0).to(tl.int64)
    tile, b = pid % n_tiles, pid // n_tiles
    c = tile * CANDIDATES + tl.arange(0, CANDIDATES)
    inside = c < n_candidates
    ids = tl.load(candidates_ptr + b * candidates_stride + c, mask=inside, other=0)

    searches = tl.minimum(tl.load(search_lengths_ptr + b), n_searches).to(tl.int32)
    clicks_ptr += b * n_searches * n_clicks
    clicked = _is_among(ids, clicks_ptr, searches * n_clicks, n_clicks, max_clicks, ITEMS)
    events = tl.minimum(tl.load(rec_lengths_ptr + b), n_events).to(tl.int32)
    happened = _is_among(ids, rec_items_ptr + b * n_events, events, 1, 1, ITEMS)
    gain = tl.where(clicked, tl.load(bonus_ptr).to(tl.float32) * factor, 0.0)
    gain += tl.where(happened, tl.load(bonus_ptr + 1).to(tl.float32) * factor, 0.0)

    for n in range(n_trajectories):
        row = (b * n_trajectories + n) * n_candidates
        scores = tl.load(scores_ptr + row + c, mask=inside, other=0.0).to(tl.float32) + gain
        scores = tl.where(ids == 0, float("-inf"), scores)
        tl.store(out_ptr + row + c, scores.to(out_ptr.dtype.element_ty), mask=inside)


def seen_bonus(
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
    n_users, n_trajectories, n_candidates = scores.shape
    if out.numel():
        with on_device(scores):
            launch(
                seen_bonus_kernel, (n_users * triton.cdiv(n_candidates, CONFIG["CANDIDATES"]),),
                scores.contiguous(), candidates.contiguous(), clicks.contiguous(),
                search_lengths.contiguous(), rec_items.contiguous(), rec_lengths.contiguous(),
                bonus.contiguous(), out, n_candidates if candidates.shape[0] > 1 else 0,
                n_trajectories, n_candidates, *clicks.shape[1:], rec_items.shape[1], max_clicks,
                factor, **CONFIG,
            )  # fmt: skip
    return out
