"""Latent cross reasoning, forward: all K steps of both streams in one program.

A program takes a tile of whole users (slots of one power-of-two size, see tile.py) through the
steps of step.py. h^(0) is read once, h^(K) written once; noise is added where h^(0) is read and
dropout masks are drawn where they act (lcr_fast/noise.py). Nothing else touches device memory but
the weights, the pooled vectors of TCL if asked for, and in training the input of every step after
the first.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lcr_fast.kernels.core.noise import Dropout, Noise
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.reasoning.pooling import pool
from lcr_fast.kernels.reasoning.step import (
    REC,
    SEARCH,
    before_last_norm,
    before_norm1,
    before_norm2,
    choose_stream,
    load_initial,
    norm,
    zero_padding,
)
from lcr_fast.kernels.reasoning.tile import (
    load_of_user,
    locate_rows,
    memory_lengths,
    sequence_lengths,
    store_tile,
    tile_at,
)

_RUNTIME_NUMBERS = [
    "n_sequences", "n_trajectories", "search_size", "rec_size", "steps", "set_stride",
    "dropout_threshold",
]  # fmt: skip


class ForwardStream(NamedTuple):
    """One stream's tensors."""

    states: Any  # [B, L, D] h^(0)
    lengths: Any  # int64 [B]
    out: Any  # [B, N, L, D] h^(K)
    saved: Any  # [K-1, B, N, L, D] h^(1) .. h^(K-1)


class Located(NamedTuple):
    """One stream of a program's sequences."""

    saved: Any  # of its tensors
    size: Any  # its events, padding included
    rows: Any  # Rows
    user_row: Any  # [M], what noise and dropout are drawn for, if they are
    lengths: Any  # [SEQUENCES]
    own: Any  # memory_lengths of its self-attention
    other: Any  # and of its cross-attention
    gate: Any  # float32 [M], 1 where the other stream has an event, else 0


@triton.jit
def _locate(
    stream, search, rec, search_size, rec_size, first, end, user_rows_ptr, n_trajectories,
    SLOT: tl.constexpr, SEQUENCES: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = SEQUENCES * SLOT
    x, size = choose_stream(stream, search, rec, search_size, rec_size)
    memory, memory_size = choose_stream(stream, rec, search, rec_size, search_size)
    rows = locate_rows(first, end, x.lengths, n_trajectories, size, M, SLOT)
    user_row = rows.sequence
    if DRAWS:
        user_row = load_of_user(user_rows_ptr, first, end, n_trajectories, M, SLOT)
    lengths = sequence_lengths(x.lengths, first, end, n_trajectories, size, SEQUENCES)
    own = memory_lengths(x.lengths, first, end, n_trajectories, size, M, SLOT, SEQUENCES)
    other = memory_lengths(
        memory.lengths, first, end, n_trajectories, memory_size, M, SLOT, SEQUENCES
    )
    gate = load_of_user(memory.lengths, first, end, n_trajectories, M, SLOT) > 0
    return Located(x.saved, size, rows, user_row, lengths, own, other, gate.to(tl.float32))


class Step(NamedTuple):
    """What the sublayers of step k take, of either stream."""

    k: Any
    index: Any  # of the search stream's weights; the other's are behind them
    weights: Any  # StepWeights
    dropout: Any
    keys: Any  # [B, 2, D]
    pooled: Any  # [B, N, K, 2, 2, D], at the step
    pooled_stride: Any  # from one sequence to the next
    first: Any  # of the program's sequences
    n_sequences: Any
    n_trajectories: Any


@triton.jit
def _pool(state, x, stream, step, place: tl.constexpr, D: tl.constexpr, SEQUENCES: tl.constexpr):
    """Store the pooled states of the stream that ``x`` locates, a (``place`` 0) or h (1)."""
    pool(
        state, x.lengths, step.keys + stream * D, step.pooled + (2 * place + stream) * D,
        step.pooled_stride, step.first, step.n_sequences, step.n_trajectories, SEQUENCES,
    )  # fmt: skip


@triton.jit
def _self(
    h, x, stream, step,
    SHAPE: tl.constexpr, SEQUENCES: tl.constexpr, DROPOUT: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Compute a = LN1(h + m1 MSA(h)) of the stream that ``x`` locates: [M, D]."""
    index = step.index + stream
    x1 = before_norm1(
        h, x.own, x.user_row, x.rows.position, step.k, index, stream,
        step.weights.self_attention, step.dropout, SHAPE, SEQUENCES, DROPOUT,
    )  # fmt: skip
    a = norm(x1, step.weights.norms, index, 0, h.dtype, SHAPE)
    if POOL:
        _pool(a, x, stream, step, 0, SHAPE.D, SEQUENCES)
    return a


@triton.jit
def _cross(
    a, memory, x, stream, step,
    SHAPE: tl.constexpr, SEQUENCES: tl.constexpr, DROPOUT: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Compute h = LN3(c + m3 FFN(c)) of c = LN2(a + g m2 MCA(a, memory)); c if there is no FFN."""
    index = step.index + stream
    x2 = before_norm2(
        a, memory, x.other, x.gate, x.user_row, x.rows.position, step.k, index, stream,
        step.weights.cross_attention, step.dropout, SHAPE, SEQUENCES, DROPOUT,
    )  # fmt: skip
    h = norm(x2, step.weights.norms, index, 1, a.dtype, SHAPE)
    if SHAPE.F > 0:
        x3 = before_last_norm(
            h, x.user_row, x.rows.position, step.k, index, stream, step.weights.ffn, step.dropout,
            SHAPE, DROPOUT,
        )  # fmt: skip
        h = norm(x3, step.weights.norms, index, 2, a.dtype, SHAPE)
    if POOL:
        _pool(h, x, stream, step, 1, SHAPE.D, SEQUENCES)
    return h


@triton.jit
def _save(h, x, step, D: tl.constexpr):
    """Store the input of a step but the first: h^(k)."""
    place = step.n_sequences.to(tl.int64) * D * (step.k - 1) * x.size
    store_tile(tile_at(x.saved + place, x.rows, x.size, D), zero_padding(h, x.rows), D)


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
    noise_seed_ptr,  # int64 []
    dropout_threshold,
    dropout_scale,
    dropout_seed_ptr,  # int64 []
    SHAPE: tl.constexpr,
    SEARCH_SLOT: tl.constexpr,
    REC_SLOT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    NOISE: tl.constexpr,
    DROPOUT: tl.constexpr,
    POOL: tl.constexpr,
    SAVE: tl.constexpr,
    LOOPED: tl.constexpr,  # streams of one slot take turns in the same code
):
    D: tl.constexpr = SHAPE.D
    DRAWS: tl.constexpr = NOISE or DROPOUT
    noise = Noise(noise_scale, noise_seed_ptr)
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed_ptr)

    first = tl.program_id(0).to(tl.int64) * SEQUENCES
    s = _locate(
        SEARCH, search, rec, search_size, rec_size, first, n_sequences, user_rows_ptr,
        n_trajectories, SEARCH_SLOT, SEQUENCES, DRAWS,
    )  # fmt: skip
    r = _locate(
        REC, search, rec, search_size, rec_size, first, n_sequences, user_rows_ptr,
        n_trajectories, REC_SLOT, SEQUENCES, DRAWS,
    )  # fmt: skip
    h_s = load_initial(
        search.states, s.rows, search_size, n_trajectories, s.user_row, SEARCH, noise, D, NOISE
    )  # [M_S, D]
    h_r = load_initial(
        rec.states, r.rows, rec_size, n_trajectories, r.user_row, REC, noise, D, NOISE
    )  # [M_R, D]

    for k in tl.range(0, steps, disable_licm=True):
        # Addresses depend on k, so that no weight is kept on chip across the steps. The bounds hold
        # anyway: they name k, so that addresses of rows do not stay in registers either.
        size_s = tl.minimum(search_size, SEARCH_SLOT + k)
        size_r = tl.minimum(rec_size, REC_SLOT + k)
        stride = tl.maximum(steps, k).to(tl.int64) * (4 * D)
        step = Step(
            k, 2 * k * set_stride, weights, dropout, keys_ptr, pooled_ptr + k * (4 * D), stride,
            first, n_sequences, n_trajectories,
        )  # fmt: skip
        if LOOPED:
            # The streams change places, so that the one whose turn it is comes first.
            for stream in tl.range(0, 2, disable_licm=True):
                x = _locate(
                    stream, search, rec, size_s, size_r, first, n_sequences, user_rows_ptr,
                    n_trajectories, SEARCH_SLOT, SEQUENCES, DRAWS,
                )  # fmt: skip
                if SAVE and k > 0:
                    _save(h_s, x, step, D)
                a = _self(h_s, x, stream, step, SHAPE, SEQUENCES, DROPOUT, POOL)
                h_s, h_r = h_r, a
            a_s, a_r = h_s, h_r
            for stream in tl.range(0, 2, disable_licm=True):
                x = _locate(
                    stream, search, rec, size_s, size_r, first, n_sequences, user_rows_ptr,
                    n_trajectories, SEARCH_SLOT, SEQUENCES, DRAWS,
                )  # fmt: skip
                h = _cross(a_s, a_r, x, stream, step, SHAPE, SEQUENCES, DROPOUT, POOL)
                a_s, a_r = a_r, a_s
                h_s, h_r = h_r, h
        else:
            s = _locate(
                SEARCH, search, rec, size_s, size_r, first, n_sequences, user_rows_ptr,
                n_trajectories, SEARCH_SLOT, SEQUENCES, DRAWS,
            )  # fmt: skip
            r = _locate(
                REC, search, rec, size_s, size_r, first, n_sequences, user_rows_ptr,
                n_trajectories, REC_SLOT, SEQUENCES, DRAWS,
            )  # fmt: skip
            if SAVE and k > 0:
                _save(h_s, s, step, D)
                _save(h_r, r, step, D)
            a_s = _self(h_s, s, SEARCH, step, SHAPE, SEQUENCES, DROPOUT, POOL)
            a_r = _self(h_r, r, REC, step, SHAPE, SEQUENCES, DROPOUT, POOL)
            h_s = _cross(a_s, a_r, s, SEARCH, step, SHAPE, SEQUENCES, DROPOUT, POOL)
            h_r = _cross(a_r, a_s, r, REC, step, SHAPE, SEQUENCES, DROPOUT, POOL)

    store_tile(tile_at(search.out, s.rows, search_size, D), zero_padding(h_s, s.rows), D)
    store_tile(tile_at(rec.out, r.rows, rec_size, D), zero_padding(h_r, r.rows), D)
