"""What ids are looked up for, at both ends of a forward pass, as one launch each on a GPU.

``EMBED`` makes the vectors of the events, ``SEEN_BONUS`` adds what candidates gain by standing in
the histories. Their reference is LCRSER itself, op by op, which alone projects text vectors, and
makes sparse gradients of tables. ``triton`` spares its launches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcr_fast.ops._op import Backend, Op, kernel
from lcr_fast.ops._triton import triton_obstacle
from lcr_fast.reference import Streams


class LookupCase(NamedTuple):
    """All that decides which implementations can serve a call."""

    device: str  # cpu, cuda
    dtype: torch.dtype
    sparse: bool = False  # gradients of tables are wanted as those of the rows that are read
    text: bool = False  # items or queries have text vectors


def _obstacle(case: LookupCase) -> str | None:
    if (reason := triton_obstacle(case.device)) is not None:
        return reason
    if case.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it serves float32 and halves, not {case.dtype}"
    return None


def _embed_beyond(case: LookupCase) -> str | None:
    if case.sparse:
        return "it makes no sparse gradients"
    return "it has no text vectors" if case.text else None


class Embed(NamedTuple):
    """The arguments of the registered op, in the order of its schema; tables have one dtype."""

    terms: Tensor  # int64 [B, L_s, T]; where queries have vectors of their own, their ids, T = 1
    clicks: Tensor  # int64 [B, L_s, M]
    rec_items: Tensor  # int64 [B, L_r]
    queries: Tensor  # [rows, D], of terms or of queries
    items: Tensor  # [I + 1, D]
    search_position: Tensor  # [L_s or more, D]
    rec_position: Tensor  # [L_r or more, D]
    max_clicks: int


class SeenBonus(NamedTuple):
    """The arguments of the registered op, in the order of its schema."""

    scores: Tensor  # [B, N, C]
    candidates: Tensor  # int64 [B, C] or [1, C]
    clicks: Tensor  # int64 [B, L_s, M]
    search_lengths: Tensor  # int64 [B]
    rec_items: Tensor  # int64 [B, L_r]
    rec_lengths: Tensor  # int64 [B]
    bonus: Tensor  # [2]: of clicked items, and of events
    factor: float  # of the bonus
    max_clicks: int


def _fake_embed(call: Embed) -> Streams:
    dim = call.items.shape[1]
    return (
        call.items.new_empty(*call.terms.shape[:2], dim),
        call.items.new_empty(*call.rec_items.shape, dim),
    )


def _backends(*launchers: str) -> list[Backend]:
    passes = [kernel("lookup", launcher) for launcher in launchers]
    return [Backend("triton", "triton_", ("cuda",), _obstacle, passes)]


EMBED = Op(
    "embed",
    Embed,
    ("search", "rec"),
    _fake_embed,
    _backends("embed_fwd", "embed_bwd"),
    gradients=("queries", "items", "search_position", "rec_position"),
    beyond=_embed_beyond,
)
SEEN_BONUS = Op(
    "seen_bonus",
    SeenBonus,
    ("out",),
    lambda call: call.scores.new_empty(call.scores.shape),
    _backends("seen_bonus_fwd", "seen_bonus_bwd"),
    gradients=("scores", "bonus"),
)


def embed(backend: str, call: Embed) -> Streams:
    """Run a fused backend of ``EMBED``: [B, L_s, D], [B, L_r, D], in the tables' dtype.

    Raises ValueError where there are more events than positions.
    """
    for name, size, positions in (
        ("search", call.terms.shape[1], call.search_position),
        ("rec", call.rec_items.shape[1], call.rec_position),
    ):
        if size > positions.shape[0]:
            raise ValueError(
                f"{name} histories hold {size} events, but there are {positions.shape[0]} positions"
            )
    return EMBED(backend, call)
