"""Scores of given candidates.

In halves one kernel goes all the way. In float32 the head is a kernel a layer: its products, six
for one, are worth tiles that no program has room for beside the histories.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.core.noise import Dropout
from lcr_fast.kernels.gpu import on_device
from lcr_fast.kernels.launch import launch
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.scoring.call import ScoreCall, score_call, tiles
from lcr_fast.kernels.scoring.config import PROGRAMS
from lcr_fast.kernels.scoring.head import Rows, output_kernel
from lcr_fast.kernels.scoring.tile import (
    SIZES,
    attend,
    load_length,
    load_vectors,
    score_tile,
    target_keys,
)


@kernel(do_not_specialize=[*SIZES, "ids_stride", "n_run", "threshold"])
def score_fwd_kernel(
    search,  # Stream
    rec,  # Stream
    search_size,
    rec_size,
    items_ptr,  # [T, D]
    ids_ptr,  # [B or 1, C]
    user_ptr,  # [B, D]
    target_weight_ptr,  # [parts, 2, D, D]
    mlp,  # Mlp
    user_rows_ptr,  # [B]
    scores_ptr,  # [B, N, C]
    ids_stride,
    n_trajectories,
    n_candidates,
    n_run,  # trajectories of a program
    threshold,
    scale,
    seed_ptr,  # int64 []
    D: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CANDIDATES: tl.constexpr,
    EVENTS: tl.constexpr,
    H1_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    n_tiles = tl.cdiv(n_candidates, CANDIDATES)
    n_runs = tl.cdiv(n_trajectories, n_run)
    pid = tl.program_id(0).to(tl.int64)
    tile, run, b = pid % n_tiles, pid // n_tiles % n_runs, pid // n_tiles // n_runs
    c = tile.to(tl.int32) * CANDIDATES + tl.arange(0, CANDIDATES)
    DTYPE: tl.constexpr = search.states.dtype.element_ty

    search_length = load_length(search, b, search_size)
    rec_length = load_length(rec, b, rec_size)
    row = tl.zeros([CANDIDATES], tl.int64) + (tl.load(user_rows_ptr + b) if HEAD.DROPOUT else b)
    inside = c < n_candidates
    ids = tl.load(ids_ptr + b * ids_stride + c, mask=inside, other=0)
    e = load_vectors(items_ptr, ids, inside, 0, D, D, DTYPE)  # [P, D]
    keys_s = target_keys(
        items_ptr, ids, inside, target_weight_ptr, 0, D, KEY_BLOCK, DTYPE, PRECISION
    )
    keys_r = target_keys(
        items_ptr, ids, inside, target_weight_ptr, 1, D, KEY_BLOCK, DTYPE, PRECISION
    )

    for n in range(run * n_run, tl.minimum((run + 1) * n_run, n_trajectories)):
        bn = b * n_trajectories + n
        z_s, _, _ = attend(
            keys_s, search.states + bn * search_size * D, search_length, D, EVENTS, PRECISION
        )
        z_r, _, _ = attend(keys_r, rec.states + bn * rec_size * D, rec_length, D, EVENTS, PRECISION)
        y = score_tile(
            z_r, z_s, e, user_ptr + b * D, mlp, Dropout(threshold, scale, seed_ptr), row, c,
            HEAD, H1_BLOCK, PRECISION,
        )  # fmt: skip
        tl.store(
            scores_ptr + bn * n_candidates + c,
            y.to(scores_ptr.dtype.element_ty),
            mask=inside,
        )


def score_fwd(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    items: Tensor,
    ids: Tensor,
    user: Tensor,
    target_weight: Tensor,
    mlp_weights: list[Tensor],
    mlp_biases: list[Tensor],
    dropout_rows: Tensor,
    dropout_threshold: int,
    dropout_seed: Tensor,
    dot: bool,
) -> Tensor:
    """Score the items ``ids`` [B, C], or [1, C] for all users: [B, N, C] in the states' dtype.

    search [B, N, L_s, D], rec [B, N, L_r, D], lengths [B], items [T, D], user [B, D] or empty.
    Dropout, of a threshold in units of 2^-16, needs N = 1 and ``dropout_rows`` int64 [B]. ``dot``
    adds the dot product to the MLP; without an MLP it is the score anyway.
    """
    n_users, n_trajectories, _, _ = search.shape
    scores = search.new_empty(n_users, n_trajectories, ids.shape[1])
    if not scores.numel():
        return scores
    call = score_call(
        search, rec, search_lengths, rec_lengths, items, ids, user, target_weight, mlp_weights,
        mlp_biases, dropout_rows, dropout_threshold, dropout_seed, dot,
    )  # fmt: skip
    with on_device(search):
        if mlp_weights and search.dtype == torch.float32:
            _score_rows(call, scores)
        else:
            _score_tiles(call, scores)
    return scores


def _score_tiles(call: ScoreCall, scores: Tensor) -> None:
    n_users, n_trajectories, n_candidates = scores.shape
    compiled = call.configured("score_fwd")
    n_tiles = triton.cdiv(n_candidates, compiled["CANDIDATES"])
    n_run = n_trajectories if n_users * n_tiles >= PROGRAMS else 1
    launch(
        score_fwd_kernel, (n_users * n_tiles * triton.cdiv(n_trajectories, n_run),),
        call.search, call.rec, *call.sizes, call.items, call.ids, call.user, call.target_weight,
        call.mlp, call.dropout_rows, scores, call.ids_stride, n_trajectories, n_candidates, n_run,
        *call.dropout, **compiled,
    )  # fmt: skip


def _score_rows(call: ScoreCall, scores: Tensor) -> None:
    bytes_of_row = 2 * call.parts * (3 * call.items.shape[1] + call.head.H1)
    most = call.most_candidates(bytes_of_row)
    if scores.shape[2] > most and not call.head.DROPOUT:  # which is drawn by their positions
        for ids, of_ids in zip(call.ids.split(most, 1), scores.split(most, 2), strict=True):
            made = torch.empty_like(of_ids, memory_format=torch.contiguous_format)
            _score_rows(call._replace(ids=ids.contiguous()), made)
            of_ids.copy_(made)
    else:
        for rows in call.chunks(call.rows_of_user * bytes_of_row):
            _score_chunk(call, rows, scores)


def _score_chunk(call: ScoreCall, rows: Rows, scores: Tensor) -> None:
    compiled = call.of_head()
    inputs = call.pool(rows)
    hidden = call.hide(inputs, rows)
    launch(
        output_kernel, (tiles(rows, compiled),), inputs, hidden, call.mlp.w2, call.mlp,
        call.dropout_rows, scores, *rows, *call.dropout, **compiled,
    )  # fmt: skip
