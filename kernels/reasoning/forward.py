"""Latent cross reasoning, forward: all K steps of both streams in one program.

A program takes a tile of whole users (slots of one power-of-two size, see tile.py) through the
steps of step.py. h^(0) is read once, h^(K) written once; noise is added where h^(0) is read and
dropout masks are drawn where they act (lcr_fast/noise.py). Nothing else touches device memory but
the weights, the pooled vectors of TCL if asked for, in training the input of every step after the
first, and, in configurations that park, states until their next use: each h in its place in the
output, each a in a tensor of the same shape.
"""

from typing import Any, NamedTuple

import triton.language as tl

from lcr_fast.kernels.core.noise import Dropout, Noise
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.reasoning.pooling import pool
from lcr_fast.kernels.reasoning.step import (
    REC,
    SEARCH,
    after_cross,
    before_norm1,
    before_norm2,
    load_initial,
    locate_stream,
    norm,
    zero_padding,
)
from lcr_fast.kernels.reasoning.tile import key_slots, park, store_tile, tile_at, unpark

_RUNTIME_NUMBERS = [
    "n_sequences", "n_trajectories", "search_size", "rec_size", "steps", "set_stride",
    "noise_seed", "dropout_threshold", "dropout_seed",
]  # fmt: skip


class ForwardStream(NamedTuple):
    """One stream's tensors."""

    states: Any  # [B, L, D] h^(0)
    lengths: Any  # int64 [B]
    out: Any  # [B, N, L, D] h^(K), and each h while it is parked
    parked: Any  # the same shape, for each a while it is parked; not used without parking
    saved: Any  # [K-1, B, N, L, D] h^(1) .. h^(K-1)


@kernel(do_not_specialize=_RUNTIME_NUMBERS)
def latent_reasoning_fwd_kernel(
    search,  # ForwardStream
    rec,  # ForwardStream
    user_rows_ptr,  # [B]
    keys_ptr,  # [B, 2, D]
    weights,  # StepWeights
    pooled_ptr,  # [B, N, K, 2, 2, D]
    n_sequences,
    n_trajectories,
    search_size,
    rec_size,
    steps,
    set_stride,  # sets of weights from one step to the next: 0 if the steps share theirs
    noise_scale,
    noise_seed: tl.int64,
    dropout_threshold,
    dropout_scale,
    dropout_seed: tl.int64,
    SHAPE: tl.constexpr,
    SEARCH_SLOT: tl.constexpr,
    REC_SLOT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    NOISE: tl.constexpr,
    DROPOUT: tl.constexpr,
    POOL: tl.constexpr,
    SAVE: tl.constexpr,
    PARK: tl.constexpr,
):
    D: tl.constexpr = SHAPE.D
    dtype: tl.constexpr = search.states.dtype.element_ty
    M_S: tl.constexpr = SEQUENCES * SEARCH_SLOT
    M_R: tl.constexpr = SEQUENCES * REC_SLOT
    noise = Noise(noise_scale, noise_seed)
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed)

    first = tl.program_id(0).to(tl.int64) * SEQUENCES
    rows_s, gate_s, user_row_s = locate_stream(
        first, n_sequences, search.lengths, rec.lengths, user_rows_ptr, n_trajectories,
        search_size, M_S, SEARCH_SLOT, NOISE or DROPOUT,
    )  # fmt: skip
    rows_r, gate_r, user_row_r = locate_stream(
        first, n_sequences, rec.lengths, search.lengths, user_rows_ptr, n_trajectories,
        rec_size, M_R, REC_SLOT, NOISE or DROPOUT,
    )  # fmt: skip

    h_s = load_initial(
        search.states, rows_s, search_size, n_trajectories, user_row_s, SEARCH, noise, D, NOISE
    )  # [M_S, D]
    park(tile_at(search.out, rows_s, search_size, D), h_s, D, PARK > 0)
    h_r = load_initial(
        rec.states, rows_r, rec_size, n_trajectories, user_row_r, REC, noise, D, NOISE
    )  # [M_R, D]
    park(tile_at(rec.out, rows_r, rec_size, D), h_r, D, PARK > 0)

    for k in tl.range(0, steps, disable_licm=True):
        # Addresses depend on k, so that no weight is kept on chip across the steps. The bounds hold
        # anyway: they name k, so that addresses of rows do not stay in registers either.
        size_s = tl.minimum(search_size, SEARCH_SLOT + k)
        size_r = tl.minimum(rec_size, REC_SLOT + k)
        index = 2 * k * set_stride
        stride = tl.maximum(steps, k).to(tl.int64) * (4 * D)
        step_ptr = pooled_ptr + k * (4 * D)
        rows_s, gate_s, user_row_s = locate_stream(
            first, n_sequences, search.lengths, rec.lengths, user_rows_ptr, n_trajectories,
            size_s, M_S, SEARCH_SLOT, NOISE or DROPOUT,
        )  # fmt: skip
        rows_r, gate_r, user_row_r = locate_stream(
            first, n_sequences, rec.lengths, search.lengths, user_rows_ptr, n_trajectories,
            size_r, M_R, REC_SLOT, NOISE or DROPOUT,
        )  # fmt: skip
        h_at_s = tile_at(search.out, rows_s, size_s, D)
        h_at_r = tile_at(rec.out, rows_r, size_r, D)
        a_at_s = tile_at(search.parked, rows_s, size_s, D)
        a_at_r = tile_at(rec.parked, rows_r, size_r, D)
        if SAVE and k > 0:
            saved = n_sequences.to(tl.int64) * D * (k - 1)
            saved_at_s = tile_at(search.saved + saved * size_s, rows_s, size_s, D)
            store_tile(saved_at_s, unpark(h_s, h_at_s, D, PARK > 0), D)
            saved_at_r = tile_at(rec.saved + saved * size_r, rows_r, size_r, D)
            store_tile(saved_at_r, unpark(h_r, h_at_r, D, PARK > 0), D)
        h_s = unpark(h_s, h_at_s, D, PARK == 1)
        x1 = before_norm1(
            h_s, h_at_s, rows_s, user_row_s, k, index, SEARCH, weights.self_attention,
            dropout, SHAPE, SEARCH_SLOT, DROPOUT, PARK > 1,
        )  # fmt: skip
        a_s = zero_padding(norm(x1, weights.norms, index, 0, D), rows_s).to(dtype)
        park(a_at_s, a_s, D, PARK > 0)
        if POOL:
            pool(
                unpark(a_s, a_at_s, D, PARK > 1), key_slots(rows_s.length, SEARCH_SLOT),
                keys_ptr, step_ptr, stride, first, n_sequences, n_trajectories, D, SEQUENCES,
            )  # fmt: skip
        h_r = unpark(h_r, h_at_r, D, PARK == 1)
        x1 = before_norm1(
            h_r, h_at_r, rows_r, user_row_r, k, index + 1, REC, weights.self_attention,
            dropout, SHAPE, REC_SLOT, DROPOUT, PARK > 1,
        )  # fmt: skip
        a_r = zero_padding(norm(x1, weights.norms, index + 1, 0, D), rows_r).to(dtype)
        park(a_at_r, a_r, D, PARK > 0)
        if POOL:
            pool(
                unpark(a_r, a_at_r, D, PARK > 1), key_slots(rows_r.length, REC_SLOT),
                keys_ptr + D, step_ptr + D, stride,
                first, n_sequences, n_trajectories, D, SEQUENCES,
            )  # fmt: skip
        a_s = unpark(a_s, a_at_s, D, PARK == 1)
        x2 = before_norm2(
            a_s, a_at_s, a_r, a_at_r, rows_s, rows_r, gate_s, user_row_s, k, index, SEARCH,
            weights.cross_attention, dropout,
            SHAPE, SEARCH_SLOT, REC_SLOT, DROPOUT, PARK > 1,
        )  # fmt: skip
        h_s = after_cross(
            x2, h_at_s, rows_s, user_row_s, k, index, SEARCH, weights, dropout, dtype,
            SHAPE, DROPOUT, PARK > 1,
        )  # fmt: skip
        park(h_at_s, h_s, D, PARK > 0)
        if POOL:
            pool(
                unpark(h_s, h_at_s, D, PARK > 1), key_slots(rows_s.length, SEARCH_SLOT),
                keys_ptr, step_ptr + 2 * D, stride,
                first, n_sequences, n_trajectories, D, SEQUENCES,
            )  # fmt: skip
        a_r = unpark(a_r, a_at_r, D, PARK == 1)
        a_s = unpark(a_s, a_at_s, D, PARK == 1)
        x2 = before_norm2(
            a_r, a_at_r, a_s, a_at_s, rows_r, rows_s, gate_r, user_row_r, k, index + 1, REC,
            weights.cross_attention, dropout,
            SHAPE, REC_SLOT, SEARCH_SLOT, DROPOUT, PARK > 1,
        )  # fmt: skip
        h_r = after_cross(
            x2, h_at_r, rows_r, user_row_r, k, index + 1, REC, weights, dropout, dtype,
            SHAPE, DROPOUT, PARK > 1,
        )  # fmt: skip
        park(h_at_r, h_r, D, PARK > 0)
        if POOL:
            pool(
                unpark(h_r, h_at_r, D, PARK > 1), key_slots(rows_r.length, REC_SLOT),
                keys_ptr + D, step_ptr + 3 * D, stride,
                first, n_sequences, n_trajectories, D, SEQUENCES,
            )  # fmt: skip

    if PARK == 0:
        store_tile(tile_at(search.out, rows_s, search_size, D), h_s, D)
        store_tile(tile_at(rec.out, rows_r, rec_size, D), h_r, D)
