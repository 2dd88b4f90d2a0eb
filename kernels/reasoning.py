"""Latent cross reasoning: K steps of both streams in one program, and their backward.

In forward one program takes a tile of whole users (slots of one power-of-two size, see blocks.py)
through all K steps. For each stream x with the other stream x', g = 1 if x' has an event, else 0,
and dropout masks m:

    x1 = h_x + m1 MSA_x(h_x)                    a_x = LN1(x1)
    x2 = a_x + g m2 MCA_x(Q = a_x, K = V = a_x')   c_x = LN2(x2)
    x3 = c_x + m3 FFN_x(c_x)                    h_x <- LN3(x3)

h^(0) is read once, h^(K) written once; noise is added where h^(0) is read and dropout masks are
drawn where they act (lcr_fast/noise.py). Nothing else touches device memory but the weights, the
pooled vectors of TCL if asked for, in training the input of every step after the first, and, in
configurations that park, the state of the stream that is not at work, in its place in the output.

Backward recomputes each step from its input and then differentiates it, in a kernel a sublayer and
stream (docs/fused-kernel.md). No atomics: a program owns what it writes.

States between sublayers have the tensors' dtype, which is also that of the dots' operands; dots
accumulate in float32, softmax, LayerNorm and all sums are float32.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels._launch import dot_precision, on_device
from lcr_fast.kernels.blocks import (
    attention,
    attention_bwd,
    dropout_keep,
    ffn,
    ffn_bwd,
    key_slots,
    layer_norm,
    layer_norm_bwd,
    load_of_user,
    locate_rows,
    normal_noise,
    pool,
    pool_bwd,
    tile_pointers,
)
from lcr_fast.kernels.variant import Variant

# Dropout sites, as in lcr_fast/ops/noise.py: step k has three a stream.
_REASONING_SITES = tl.constexpr(1 << 13)
_STREAM_SITES = tl.constexpr(1 << 12)

_SEARCH = tl.constexpr(0)
_REC = tl.constexpr(1)

# -- pieces of a step -----------------------------------------------------------------------------


@triton.jit
def _self_weights(weights, index, D: tl.constexpr):
    """Pointers to the self-attention of one stream and step; ``index`` = 2 set + stream."""
    return (
        weights[0] + index * (3 * D * D), weights[1] + index * (3 * D),
        weights[2] + index * (D * D), weights[3] + index * D,
    )  # fmt: skip


@triton.jit
def _cross_weights(weights, index, D: tl.constexpr):
    return (
        weights[4] + index * (3 * D * D), weights[5] + index * (3 * D),
        weights[6] + index * (D * D), weights[7] + index * D,
    )  # fmt: skip


@triton.jit
def _ffn_weights(weights, index, D: tl.constexpr, F: tl.constexpr):
    return (
        weights[8] + index * (F * D), weights[9] + index * F,
        weights[10] + index * (D * F), weights[11] + index * D,
    )  # fmt: skip


@triton.jit
def _norm_weights(weights, index, which: tl.constexpr, D: tl.constexpr):
    offset = (index * 3 + which) * D
    return weights[12] + offset, weights[13] + offset


@triton.jit
def _apply_dropout(
    update, user_row, position, k, stream: tl.constexpr, place: tl.constexpr, dropout,
    D: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Drop from a sublayer's output; ``place`` is 0 for MSA, 1 for MCA, 2 for FFN."""
    if DROPOUT:
        threshold, seed, scale = dropout
        site = _REASONING_SITES + stream * _STREAM_SITES + 3 * k + place
        keep = dropout_keep(user_row, position, site, threshold, seed, D)
        update = tl.where(keep, update * scale, 0.0)
    return update


@triton.jit
def _locate_stream(
    first, end, lengths_ptr, memory_lengths_ptr, rows_ptr, n_trajectories, size,
    M: tl.constexpr, SLOT: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """Rows of a stream's tile, which of them have the other stream to read, and their users' rows.

    The last are what noise and dropout are drawn for, if ``DRAWS``.
    """
    rows = locate_rows(first, end, lengths_ptr, n_trajectories, size, M, SLOT)
    gate = load_of_user(memory_lengths_ptr, first, end, n_trajectories, M, SLOT) > 0
    user_row = rows[0]
    if DRAWS:
        user_row = load_of_user(rows_ptr, first, end, n_trajectories, M, SLOT)
    return rows, gate, user_row


@triton.jit
def _load_initial(
    x_ptr, rows, size, n_trajectories, user_row, stream: tl.constexpr, noise,
    D: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """h^(0) + noise_scale eps on valid positions, 0 elsewhere, in the tensor's dtype: [M, D]."""
    sequence, position, length, _, _, _ = rows
    valid = (position < length)[:, None]
    user = sequence // n_trajectories
    offsets = (user * size + position)[:, None] * D + tl.arange(0, D)[None, :]
    h = tl.load(x_ptr + offsets, mask=valid, other=0.0)
    if NOISE:
        scale, seed = noise
        trajectory_stream = 2 * (sequence % n_trajectories) + stream
        eps = normal_noise(user_row, position, trajectory_stream, seed, D)
        h = tl.where(valid, h.to(tl.float32) + scale * eps, 0.0)
    return h.to(x_ptr.dtype.element_ty)


@triton.jit
def _store_state(out_ptr, state, rows, size, D: tl.constexpr):
    pointers = tile_pointers(out_ptr, rows, size, D, D)
    tl.store(pointers, state.to(out_ptr.dtype.element_ty), mask=rows[3][:, None])


@triton.jit
def _residual(x, DROPOUT: tl.constexpr):
    """Start a sublayer's sum from x itself, or from 0 if dropout comes between them."""
    return tl.zeros(x.shape, tl.float32) if DROPOUT else x.to(tl.float32)


@triton.jit
def _add_update(
    y, x, user_row, position, k, stream: tl.constexpr, place: tl.constexpr, dropout,
    D: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Compute x + m update from a sum that started at :func:`_residual`: float32 [M, D]."""
    if DROPOUT:
        y = _apply_dropout(y, user_row, position, k, stream, place, dropout, D, DROPOUT)
        y += x.to(tl.float32)
    return y


@triton.jit
def _set_aside(out_ptr, state, rows, size, D: tl.constexpr, PARK: tl.constexpr):
    """Keep a state in its place in the output while the other stream is at work."""
    if PARK:
        tl.debug_barrier()  # other threads may still read what stands there
        _store_state(out_ptr, state, rows, size, D)
        tl.debug_barrier()


@triton.jit
def _take_up(out_ptr, state, rows, size, D: tl.constexpr, PARK: tl.constexpr):
    """Take a state back that was set aside, [M, D]."""
    if PARK:
        tl.debug_barrier()  # a load like an earlier one would be merged with it, and kept till here
        pointers = tile_pointers(out_ptr, rows, size, D, D)
        state = tl.load(pointers, mask=rows[3][:, None], other=0.0)
    return state


@triton.jit
def _before_norm1(
    h, parked, rows, user_row, k, index, stream: tl.constexpr, weights, dropout,
    D: tl.constexpr, H: tl.constexpr, SLOT: tl.constexpr, DROPOUT: tl.constexpr,
    PARK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x1 = h + m1 MSA(h): float32 [M, D]; with PARK, ``parked`` says where h stands too."""
    _, position, length, _, _, _ = rows
    y = attention(
        h, h, length, _residual(h, DROPOUT), position < length,
        _self_weights(weights, index, D), D, H, SLOT, SLOT, PRECISION,
    )  # fmt: skip
    if DROPOUT:
        h = _take_up(parked[0], h, rows, parked[1], D, PARK)
    return _add_update(y, h, user_row, position, k, stream, 0, dropout, D, DROPOUT)


@triton.jit
def _before_norm2(
    a, parked, memory, rows, memory_rows, gate, user_row, k, index, stream: tl.constexpr, weights,
    dropout,
    D: tl.constexpr, H: tl.constexpr, SLOT: tl.constexpr, MEMORY_SLOT: tl.constexpr,
    DROPOUT: tl.constexpr, PARK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x2 = a + g m2 MCA(a, memory): float32 [M, D]; ``gate`` is bool [M], ``parked`` as above."""
    _, position, _, _, _, _ = rows
    _, _, memory_length, _, _, _ = memory_rows
    y = attention(
        a, memory, memory_length, _residual(a, DROPOUT), gate,
        _cross_weights(weights, index, D), D, H, SLOT, MEMORY_SLOT, PRECISION,
    )  # fmt: skip
    if DROPOUT:
        a = _take_up(parked[0], a, rows, parked[1], D, PARK)
    return _add_update(y, a, user_row, position, k, stream, 1, dropout, D, DROPOUT)


@triton.jit
def _before_norm3(
    c, rows, user_row, k, index, stream: tl.constexpr, weights, dropout,
    D: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x3 = c + m3 FFN(c): float32 [M, D]."""
    _, position, _, _, _, _ = rows
    y = ffn(c, _residual(c, DROPOUT), _ffn_weights(weights, index, D, F), D, F, BLOCK_F, PRECISION)
    return _add_update(y, c, user_row, position, k, stream, 2, dropout, D, DROPOUT)


@triton.jit
def _norm(x, weights, index, which: tl.constexpr, D: tl.constexpr):
    weight_ptr, bias_ptr = _norm_weights(weights, index, which, D)
    return layer_norm(x, weight_ptr, bias_ptr, D)


@triton.jit
def _zero_padding(x, rows):
    _, position, length, _, _, _ = rows
    return tl.where((position < length)[:, None], x, 0.0)


@triton.jit
def _after_cross(
    x2, rows, user_row, k, index, stream: tl.constexpr, weights, dropout, dtype: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute h = LN3(c + m3 FFN(c)) of c = LN2(x2), 0 at padding: [M, D]."""
    c = _norm(x2, weights, index, 1, D)
    if F > 0:
        x3 = _before_norm3(
            c.to(dtype), rows, user_row, k, index, stream, weights, dropout,
            D, F, BLOCK_F, DROPOUT, PRECISION,
        )  # fmt: skip
        c = _norm(x3, weights, index, 2, D)
    return _zero_padding(c, rows).to(dtype)


# -- forward --------------------------------------------------------------------------------------

_RUNTIME_SIZES = [
    "n_sequences", "n_trajectories", "search_size", "rec_size", "steps", "set_stride",
    "noise_seed", "dropout_threshold", "dropout_seed",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def _latent_reasoning_fwd_kernel(
    search_ptr, rec_ptr,  # [B, L_s, D], [B, L_r, D]
    search_lengths_ptr, rec_lengths_ptr, rows_ptr,  # [B]
    keys_ptr,  # [B, 2, D]
    self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
    cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
    ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
    norm_weight_ptr, norm_bias_ptr,
    search_out_ptr, rec_out_ptr,  # [B, N, L_s, D], [B, N, L_r, D]
    pooled_ptr,  # [B, N, K, 2, 2, D]
    saved_search_ptr, saved_rec_ptr,  # [K-1, B, N, L_s, D], [K-1, B, N, L_r, D]
    n_sequences, n_trajectories, search_size, rec_size, steps,
    set_stride,  # sets of weights from one step to the next: 0 if the steps share theirs
    noise_scale, noise_seed: tl.int64,
    dropout_threshold, dropout_scale, dropout_seed: tl.int64,
    D: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    SEARCH_SLOT: tl.constexpr, REC_SLOT: tl.constexpr, USERS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    NOISE: tl.constexpr, DROPOUT: tl.constexpr, POOL: tl.constexpr, SAVE: tl.constexpr,
    PARK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = search_ptr.dtype.element_ty
    M_S: tl.constexpr = USERS * SEARCH_SLOT
    M_R: tl.constexpr = USERS * REC_SLOT
    weights = (
        self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
        cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
        ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
        norm_weight_ptr, norm_bias_ptr,
    )  # fmt: skip
    noise = (noise_scale, noise_seed)
    dropout = (dropout_threshold, dropout_seed, dropout_scale)

    first = tl.program_id(0).to(tl.int64) * USERS
    rows_s, gate_s, user_row_s = _locate_stream(
        first, n_sequences, search_lengths_ptr, rec_lengths_ptr, rows_ptr, n_trajectories,
        search_size, M_S, SEARCH_SLOT, NOISE or DROPOUT,
    )  # fmt: skip
    rows_r, gate_r, user_row_r = _locate_stream(
        first, n_sequences, rec_lengths_ptr, search_lengths_ptr, rows_ptr, n_trajectories,
        rec_size, M_R, REC_SLOT, NOISE or DROPOUT,
    )  # fmt: skip

    h_s = _load_initial(
        search_ptr, rows_s, search_size, n_trajectories, user_row_s, _SEARCH, noise, D, NOISE
    )  # [M_S, D]
    h_r = _load_initial(
        rec_ptr, rows_r, rec_size, n_trajectories, user_row_r, _REC, noise, D, NOISE
    )  # [M_R, D]

    stride = steps.to(tl.int64) * (4 * D)
    _set_aside(search_out_ptr, h_s, rows_s, search_size, D, PARK)
    _set_aside(rec_out_ptr, h_r, rows_r, rec_size, D, PARK)
    parked_s, parked_r = (search_out_ptr, search_size), (rec_out_ptr, rec_size)
    for k in tl.range(0, steps, disable_licm=True):
        # Addresses depend on k, so that no weight is kept on chip across the steps; rows are
        # located anew, so that nothing made of them is.
        index = 2 * k * set_stride
        step_ptr = pooled_ptr + k * (4 * D)
        rows_s, gate_s, user_row_s = _locate_stream(
            first, n_sequences, search_lengths_ptr, rec_lengths_ptr, rows_ptr, n_trajectories,
            search_size, M_S, SEARCH_SLOT, NOISE or DROPOUT,
        )  # fmt: skip
        rows_r, gate_r, user_row_r = _locate_stream(
            first, n_sequences, rec_lengths_ptr, search_lengths_ptr, rows_ptr, n_trajectories,
            rec_size, M_R, REC_SLOT, NOISE or DROPOUT,
        )  # fmt: skip
        h_s = _take_up(search_out_ptr, h_s, rows_s, search_size, D, PARK)
        x1 = _before_norm1(
            h_s, parked_s, rows_s, user_row_s, k, index, _SEARCH, weights, dropout,
            D, H, SEARCH_SLOT, DROPOUT, PARK, PRECISION,
        )  # fmt: skip
        a_s = _zero_padding(_norm(x1, weights, index, 0, D), rows_s).to(dtype)
        if POOL:
            pool(
                a_s, key_slots(rows_s[2], SEARCH_SLOT), keys_ptr, step_ptr, stride,
                first, n_sequences, n_trajectories, D, USERS,
            )  # fmt: skip
        _set_aside(search_out_ptr, a_s, rows_s, search_size, D, PARK)
        h_r = _take_up(rec_out_ptr, h_r, rows_r, rec_size, D, PARK)
        x1 = _before_norm1(
            h_r, parked_r, rows_r, user_row_r, k, index + 1, _REC, weights, dropout,
            D, H, REC_SLOT, DROPOUT, PARK, PRECISION,
        )  # fmt: skip
        a_r = _zero_padding(_norm(x1, weights, index + 1, 0, D), rows_r).to(dtype)
        if POOL:
            pool(
                a_r, key_slots(rows_r[2], REC_SLOT), keys_ptr + D, step_ptr + D, stride,
                first, n_sequences, n_trajectories, D, USERS,
            )  # fmt: skip
        _set_aside(rec_out_ptr, a_r, rows_r, rec_size, D, PARK)
        a_s = _take_up(search_out_ptr, a_s, rows_s, search_size, D, PARK)
        x2 = _before_norm2(
            a_s, parked_s, a_r, rows_s, rows_r, gate_s, user_row_s, k, index, _SEARCH, weights,
            dropout, D, H, SEARCH_SLOT, REC_SLOT, DROPOUT, PARK, PRECISION,
        )  # fmt: skip
        h_s = _after_cross(
            x2, rows_s, user_row_s, k, index, _SEARCH, weights, dropout, dtype,
            D, F, BLOCK_F, DROPOUT, PRECISION,
        )  # fmt: skip
        if POOL:
            pool(
                h_s, key_slots(rows_s[2], SEARCH_SLOT), keys_ptr, step_ptr + 2 * D, stride,
                first, n_sequences, n_trajectories, D, USERS,
            )  # fmt: skip
        rows_s, gate_s, user_row_s = _locate_stream(
            first, n_sequences, search_lengths_ptr, rec_lengths_ptr, rows_ptr, n_trajectories,
            search_size, M_S, SEARCH_SLOT, NOISE or DROPOUT,
        )  # fmt: skip
        rows_r, gate_r, user_row_r = _locate_stream(
            first, n_sequences, rec_lengths_ptr, search_lengths_ptr, rows_ptr, n_trajectories,
            rec_size, M_R, REC_SLOT, NOISE or DROPOUT,
        )  # fmt: skip
        a_r = _take_up(rec_out_ptr, a_r, rows_r, rec_size, D, PARK)
        a_s = _take_up(search_out_ptr, a_s, rows_s, search_size, D, PARK)
        _set_aside(search_out_ptr, h_s, rows_s, search_size, D, PARK)
        x2 = _before_norm2(
            a_r, parked_r, a_s, rows_r, rows_s, gate_r, user_row_r, k, index + 1, _REC, weights,
            dropout, D, H, REC_SLOT, SEARCH_SLOT, DROPOUT, PARK, PRECISION,
        )  # fmt: skip
        h_r = _after_cross(
            x2, rows_r, user_row_r, k, index + 1, _REC, weights, dropout, dtype,
            D, F, BLOCK_F, DROPOUT, PRECISION,
        )  # fmt: skip
        if POOL:
            pool(
                h_r, key_slots(rows_r[2], REC_SLOT), keys_ptr + D, step_ptr + 3 * D, stride,
                first, n_sequences, n_trajectories, D, USERS,
            )  # fmt: skip
        _set_aside(rec_out_ptr, h_r, rows_r, rec_size, D, PARK)
        if SAVE and k + 1 < steps:
            h_s = _take_up(search_out_ptr, h_s, rows_s, search_size, D, PARK)
            saved_s = n_sequences.to(tl.int64) * search_size * D * k
            saved_r = n_sequences.to(tl.int64) * rec_size * D * k
            _store_state(saved_search_ptr + saved_s, h_s, rows_s, search_size, D)
            _store_state(saved_rec_ptr + saved_r, h_r, rows_r, rec_size, D)

    if not PARK:
        _store_state(search_out_ptr, h_s, rows_s, search_size, D)
        _store_state(rec_out_ptr, h_r, rows_r, rec_size, D)


# -- backward -------------------------------------------------------------------------------------
#
# Each step leaves a row of scratch for every row of its states, in these columns:
#
#   X    h | self heads | a | cross heads | c | FFN hidden                                5 D + F
#   dY   self dq, dk, dv | self dy | cross dq | dk, dv as memory | cross dy | FFN dy | dhidden
#                                                                                         9 D + F
#   x1 | x2                                                                               2 D
#
# The host multiplies columns of dY with columns of X, which gives the gradients of all matrices.


def _scratch_columns(D: int, F: int) -> int:
    return 16 * D + 2 * F


@triton.jit
def _place(rows, size, D: tl.constexpr, F: tl.constexpr):
    """Where a tile's rows are in a step's scratch, and which of them exist.

    That is the start of the tile, int64, and the rows' offsets from there, int32 [M, 1].
    """
    WIDTH: tl.constexpr = 16 * D + 2 * F
    return rows[4] * size * WIDTH, (rows[5] * WIDTH)[:, None], rows[3][:, None]


@triton.jit
def _park(ptr, place, x, D: tl.constexpr):
    """Store a tile in D columns of scratch."""
    start, offset, stored = place
    tl.store(
        ptr + start + offset + tl.arange(0, D)[None, :], x.to(ptr.dtype.element_ty), mask=stored
    )


@triton.jit
def _unpark(ptr, place, D: tl.constexpr):
    start, offset, stored = place
    return tl.load(ptr + start + offset + tl.arange(0, D)[None, :], mask=stored, other=0.0)


@triton.jit
def _load_step_input(
    x_ptr, saved_ptr, rows, size, saved_sequences, n_trajectories, user_row, k,
    stream: tl.constexpr, noise, D: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """h^(k): the saved one, or for k = 0 the noisy input as the forward pass read it."""
    if k == 0:
        h = _load_initial(x_ptr, rows, size, n_trajectories, user_row, stream, noise, D, NOISE)
    else:
        step = saved_sequences.to(tl.int64) * size * D * (k - 1)
        pointers = tile_pointers(saved_ptr + step, rows, size, D, D)
        h = tl.load(pointers, mask=rows[3][:, None], other=0.0)
    return h


_STREAM_SIZES = [
    "n_sequences", "n_trajectories", "size", "memory_size", "k", "steps", "set_stride", "stream",
    "saved_sequences", "noise_seed", "dropout_threshold", "dropout_seed",
]  # fmt: skip


@triton.jit(do_not_specialize=_STREAM_SIZES)
def _recompute_self_kernel(
    x_ptr,  # [B, L, D]
    lengths_ptr, rows_ptr,  # [B]
    self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
    cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
    ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
    norm_weight_ptr, norm_bias_ptr,
    saved_ptr,  # [K-1, saved_sequences, L, D], at the first sequence of this launch
    scratch_ptr,  # [K, sequences, L, 16 D + 2 F]
    n_sequences, n_trajectories, size, set_stride, stream, saved_sequences,
    noise_scale, noise_seed: tl.int64,
    dropout_threshold, dropout_scale, dropout_seed: tl.int64,
    D: tl.constexpr, F: tl.constexpr, H: tl.constexpr, SLOT: tl.constexpr, USERS: tl.constexpr,
    NOISE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Leave h, x1 and a of one stream in scratch; one program a tile and step."""
    weights = (
        self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
        cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
        ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
        norm_weight_ptr, norm_bias_ptr,
    )  # fmt: skip
    noise = (noise_scale, noise_seed)
    dropout = (dropout_threshold, dropout_seed, dropout_scale)
    first = tl.program_id(0).to(tl.int64) * USERS
    k = tl.program_id(1)
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, lengths_ptr, n_trajectories, size, USERS * SLOT, SLOT)
    place = _place(rows, size, D, F)
    scratch_ptr += k.to(tl.int64) * n_sequences * size * (16 * D + 2 * F)
    user_row = rows[0]
    if NOISE or DROPOUT:
        user_row = load_of_user(rows_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT)
    h = _load_step_input(
        x_ptr, saved_ptr, rows, size, saved_sequences, n_trajectories, user_row, k, stream,
        noise, D, NOISE,
    )  # fmt: skip
    _park(scratch_ptr, place, h, D)
    x1 = _before_norm1(
        h, (scratch_ptr, size), rows, user_row, k, index, stream, weights, dropout,
        D, H, SLOT, DROPOUT, False, PRECISION,
    )  # fmt: skip
    _park(scratch_ptr + 14 * D + 2 * F, place, x1, D)
    a = _zero_padding(_norm(x1, weights, index, 0, D), rows)
    _park(scratch_ptr + 2 * D, place, a, D)


@triton.jit(do_not_specialize=_STREAM_SIZES)
def _recompute_cross_kernel(
    lengths_ptr, memory_lengths_ptr, rows_ptr,  # [B]
    self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
    cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
    ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
    norm_weight_ptr, norm_bias_ptr,
    scratch_ptr, memory_scratch_ptr,  # [K, sequences, L or L', 16 D + 2 F]
    n_sequences, n_trajectories, size, memory_size, set_stride, stream,
    dropout_threshold, dropout_scale, dropout_seed: tl.int64,
    D: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    SLOT: tl.constexpr, MEMORY_SLOT: tl.constexpr, USERS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Leave x2 of one stream in scratch, where a is; one program a tile and step."""
    weights = (
        self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
        cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
        ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
        norm_weight_ptr, norm_bias_ptr,
    )  # fmt: skip
    dropout = (dropout_threshold, dropout_seed, dropout_scale)
    first = tl.program_id(0).to(tl.int64) * USERS
    k = tl.program_id(1)
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, lengths_ptr, n_trajectories, size, USERS * SLOT, SLOT)
    memory_rows = locate_rows(
        first, n_sequences, memory_lengths_ptr, n_trajectories, memory_size,
        USERS * MEMORY_SLOT, MEMORY_SLOT,
    )  # fmt: skip
    place = _place(rows, size, D, F)
    step = k.to(tl.int64) * n_sequences * (16 * D + 2 * F)
    scratch_ptr += step * size
    memory_scratch_ptr += step * memory_size
    gate = (
        load_of_user(memory_lengths_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT) > 0
    )
    user_row = rows[0]
    if DROPOUT:
        user_row = load_of_user(rows_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT)
    a = _unpark(scratch_ptr + 2 * D, place, D)
    memory = _unpark(memory_scratch_ptr + 2 * D, _place(memory_rows, memory_size, D, F), D)
    x2 = _before_norm2(
        a, (scratch_ptr, size), memory, rows, memory_rows, gate, user_row, k, index, stream,
        weights, dropout, D, H, SLOT, MEMORY_SLOT, DROPOUT, False, PRECISION,
    )  # fmt: skip
    _park(scratch_ptr + 15 * D + 2 * F, place, x2, D)


@triton.jit(do_not_specialize=_STREAM_SIZES)
def _ffn_bwd_kernel(
    dout_ptr,  # [B, N, L, D] upstream gradient of h^(K)
    dpooled_ptr,  # [B, N, K, 2, 2, D]
    dh_ptr,  # float32 [B, N, L, D] gradient of h^(k+1), if that is not h^(K)
    dx2_ptr,  # float32 [B, N, L, D]
    lengths_ptr, memory_lengths_ptr, rows_ptr,  # [B]
    keys_ptr,  # [B, 2, D]
    self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
    cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
    ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
    norm_weight_ptr, norm_bias_ptr,
    scratch_ptr,  # [sequences, L, 16 D + 2 F] of this step
    dkeys_ptr,  # float32 [B, N, K, 2, 2, D]
    dnorm_ptr,  # float32 [programs, K, 2, 3, 2, D] weight and bias of each norm
    n_sequences, n_trajectories, size, k, steps, set_stride, stream,
    dropout_threshold, dropout_scale, dropout_seed: tl.int64,
    D: tl.constexpr, F: tl.constexpr, SLOT: tl.constexpr, USERS: tl.constexpr,
    BLOCK_F: tl.constexpr, DROPOUT: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one stream and step, backward of h = LN3(c + m3 FFN(c)), c = LN2(x2), pooling included.

    Leaves dx2, and in scratch the gradient of the cross-attention's output.
    """
    dtype: tl.constexpr = scratch_ptr.dtype.element_ty
    DY: tl.constexpr = 5 * D + F
    X2: tl.constexpr = 15 * D + 2 * F
    weights = (
        self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
        cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
        ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
        norm_weight_ptr, norm_bias_ptr,
    )  # fmt: skip
    dropout = (dropout_threshold, dropout_seed, dropout_scale)
    program = tl.program_id(0).to(tl.int64)
    first = program * USERS
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, lengths_ptr, n_trajectories, size, USERS * SLOT, SLOT)
    sequence, position, length, _, _, _ = rows
    place = _place(rows, size, D, F)
    user_row = sequence
    if DROPOUT:
        user_row = load_of_user(rows_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT)
    dnorm = dnorm_ptr + ((program * steps + k) * 2 + stream) * (6 * D)
    pooled_stride = steps.to(tl.int64) * (4 * D)
    at_h = (4 * k + 2 + stream) * D  # in [K, 2, 2, D]

    x2 = _unpark(scratch_ptr + X2, place, D).to(tl.float32)
    c = _norm(x2, weights, index, 1, D).to(dtype)
    x3 = c.to(tl.float32)
    if F > 0:
        _park(scratch_ptr + 4 * D, place, c, D)
        x3 = _before_norm3(
            c, rows, user_row, k, index, stream, weights, dropout, D, F, BLOCK_F, DROPOUT, PRECISION
        )  # fmt: skip
    if k == steps - 1:  # padding carries no gradient, whatever the upstream tensor holds there
        valid = (position < length)[:, None]
        dh = tl.load(tile_pointers(dout_ptr, rows, size, D, D), mask=valid, other=0.0)
        dh = dh.to(tl.float32)
    else:
        dh = tl.load(tile_pointers(dh_ptr, rows, size, D, D), mask=place[2], other=0.0)
    if POOL:
        h = x3
        if F > 0:
            h = _norm(x3, weights, index, 2, D)
        dh = pool_bwd(
            dh, _zero_padding(h, rows).to(dtype), key_slots(length, SLOT), keys_ptr + stream * D,
            dpooled_ptr + at_h, dkeys_ptr + at_h, pooled_stride,
            first, n_sequences, n_trajectories, D, USERS,
        )  # fmt: skip
    if F > 0:
        norm_weight_ptr, _ = _norm_weights(weights, index, 2, D)
        dc = layer_norm_bwd(dh, x3, norm_weight_ptr, dnorm + 4 * D, D)
        dy = _apply_dropout(dc, user_row, position, k, stream, 2, dropout, D, DROPOUT).to(dtype)
        _park(scratch_ptr + DY + 8 * D, place, dy, D)
        dh = ffn_bwd(
            dy, c, dc, scratch_ptr + 5 * D, scratch_ptr + DY + 9 * D, place,
            _ffn_weights(weights, index, D, F), D, F, BLOCK_F, PRECISION,
        )  # fmt: skip

    norm_weight_ptr, _ = _norm_weights(weights, index, 1, D)
    x2 = _unpark(scratch_ptr + X2, place, D).to(tl.float32)
    dx2 = layer_norm_bwd(dh, x2, norm_weight_ptr, dnorm + 2 * D, D)
    tl.store(tile_pointers(dx2_ptr, rows, size, D, D), dx2, mask=place[2])
    dy = _apply_dropout(dx2, user_row, position, k, stream, 1, dropout, D, DROPOUT)
    gate = (
        load_of_user(memory_lengths_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT) > 0
    )
    _park(scratch_ptr + DY + 7 * D, place, tl.where(gate[:, None], dy, 0.0), D)


@triton.jit(do_not_specialize=_STREAM_SIZES)
def _cross_bwd_kernel(
    dx2_ptr,  # float32 [B, N, L, D]
    da_ptr,  # float32 [B, N, L, D]
    dmemory_ptr,  # float32 [B, N, L', D]
    lengths_ptr, memory_lengths_ptr,  # [B]
    self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
    cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
    ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
    norm_weight_ptr, norm_bias_ptr,
    scratch_ptr, memory_scratch_ptr,  # [sequences, L, 16 D + 2 F], [sequences, L', 16 D + 2 F]
    n_sequences, n_trajectories, size, memory_size, k, set_stride, stream,
    D: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    SLOT: tl.constexpr, MEMORY_SLOT: tl.constexpr, USERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one stream and step, backward of x2 = a + g m2 MCA(a, memory): da and dmemory."""
    DY: tl.constexpr = 5 * D + F
    weights = (
        self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
        cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
        ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
        norm_weight_ptr, norm_bias_ptr,
    )  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * USERS
    rows = locate_rows(first, n_sequences, lengths_ptr, n_trajectories, size, USERS * SLOT, SLOT)
    memory_rows = locate_rows(
        first, n_sequences, memory_lengths_ptr, n_trajectories, memory_size,
        USERS * MEMORY_SLOT, MEMORY_SLOT,
    )  # fmt: skip
    place = _place(rows, size, D, F)
    memory_place = _place(memory_rows, memory_size, D, F)
    da, dmemory = attention_bwd(
        _unpark(scratch_ptr + DY + 7 * D, place, D),
        _unpark(scratch_ptr + 2 * D, place, D),
        _unpark(memory_scratch_ptr + 2 * D, memory_place, D),
        memory_rows[2],
        tl.load(tile_pointers(dx2_ptr, rows, size, D, D), mask=place[2], other=0.0),
        tl.zeros([USERS * MEMORY_SLOT, D], tl.float32),
        scratch_ptr + 3 * D, scratch_ptr + DY + 4 * D, memory_scratch_ptr + DY + 5 * D,
        place, memory_place, _cross_weights(weights, 2 * k * set_stride + stream, D),
        D, H, SLOT, MEMORY_SLOT, False, PRECISION,
    )  # fmt: skip
    tl.store(tile_pointers(da_ptr, rows, size, D, D), da, mask=place[2])
    pointers = tile_pointers(dmemory_ptr, memory_rows, memory_size, D, D)
    tl.store(pointers, dmemory, mask=memory_place[2])


@triton.jit(do_not_specialize=_STREAM_SIZES)
def _self_bwd_kernel(
    da_ptr, dmemory_ptr,  # float32 [B, N, L, D], from both cross-attentions
    dpooled_ptr,  # [B, N, K, 2, 2, D]
    dh_ptr,  # float32 [B, N, L, D] gradient of h^(k)
    lengths_ptr, rows_ptr,  # [B]
    keys_ptr,  # [B, 2, D]
    self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
    cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
    ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
    norm_weight_ptr, norm_bias_ptr,
    scratch_ptr,  # [sequences, L, 16 D + 2 F] of this step
    dkeys_ptr,  # float32 [B, N, K, 2, 2, D]
    dnorm_ptr,  # float32 [programs, K, 2, 3, 2, D]
    n_sequences, n_trajectories, size, k, steps, set_stride, stream,
    dropout_threshold, dropout_scale, dropout_seed: tl.int64,
    D: tl.constexpr, F: tl.constexpr, H: tl.constexpr, SLOT: tl.constexpr, USERS: tl.constexpr,
    DROPOUT: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one stream and step, backward of a = LN1(x1), x1 = h + m1 MSA(h), pooling included."""
    dtype: tl.constexpr = scratch_ptr.dtype.element_ty
    DY: tl.constexpr = 5 * D + F
    X1: tl.constexpr = 14 * D + 2 * F
    weights = (
        self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
        cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
        ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
        norm_weight_ptr, norm_bias_ptr,
    )  # fmt: skip
    dropout = (dropout_threshold, dropout_seed, dropout_scale)
    program = tl.program_id(0).to(tl.int64)
    first = program * USERS
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, lengths_ptr, n_trajectories, size, USERS * SLOT, SLOT)
    sequence, position, length, _, _, _ = rows
    place = _place(rows, size, D, F)
    user_row = sequence
    if DROPOUT:
        user_row = load_of_user(rows_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT)
    dnorm = dnorm_ptr + ((program * steps + k) * 2 + stream) * (6 * D)
    pooled_stride = steps.to(tl.int64) * (4 * D)
    at_a = (4 * k + stream) * D  # in [K, 2, 2, D]

    da = tl.load(tile_pointers(da_ptr, rows, size, D, D), mask=place[2], other=0.0)
    da += tl.load(tile_pointers(dmemory_ptr, rows, size, D, D), mask=place[2], other=0.0)
    if POOL:
        da = pool_bwd(
            da, _unpark(scratch_ptr + 2 * D, place, D), key_slots(length, SLOT),
            keys_ptr + stream * D, dpooled_ptr + at_a, dkeys_ptr + at_a, pooled_stride,
            first, n_sequences, n_trajectories, D, USERS,
        )  # fmt: skip
    x1 = _unpark(scratch_ptr + X1, place, D).to(tl.float32)
    norm_weight_ptr, _ = _norm_weights(weights, index, 0, D)
    dx1 = layer_norm_bwd(da, x1, norm_weight_ptr, dnorm, D)
    dy = _apply_dropout(dx1, user_row, position, k, stream, 0, dropout, D, DROPOUT).to(dtype)
    _park(scratch_ptr + DY + 3 * D, place, dy, D)
    h = _unpark(scratch_ptr, place, D)
    dh, _ = attention_bwd(
        dy, h, h, length, dx1, dx1, scratch_ptr + D, scratch_ptr + DY, scratch_ptr + DY + D,
        place, place, _self_weights(weights, index, D), D, H, SLOT, SLOT, True, PRECISION,
    )  # fmt: skip
    tl.store(tile_pointers(dh_ptr, rows, size, D, D), dh, mask=place[2])


# -- configuration --------------------------------------------------------------------------------

_WIDTHS = (32, 64, 128)
_MIN_HEAD = 16  # the least depth of a tensor-core dot
_MAX_SIZE = 128  # events a stream: one slot must fit a tile
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def obstacle(
    *, dim: int, n_heads: int, ffn_dim: int, search_len: int, rec_len: int, dtype: torch.dtype
) -> str | None:
    """Say why the kernels cannot serve a case, or None."""
    if dtype not in _DTYPES:
        return f"it computes float32, float16 and bfloat16, not {dtype}"
    if dim not in _WIDTHS:
        return f"it needs a width of 32, 64 or 128, got {dim}"
    if n_heads < 1 or dim % n_heads or dim // n_heads < _MIN_HEAD:
        return f"it needs heads at least {_MIN_HEAD} wide, got {n_heads} heads of width {dim}"
    if ffn_dim % 16:
        return f"it needs an FFN width that is a multiple of 16, got {ffn_dim}"
    if max(search_len, rec_len) > _MAX_SIZE:
        return f"it holds {_MAX_SIZE} events a stream, got {max(search_len, rec_len)}"
    return None


def _slot(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


class _Config(NamedTuple):
    """How one kernel is compiled."""

    num_warps: int
    park: bool = False  # forward: set the idle stream's state aside


# By pass, then rows of a tile, at most: what serves a width, kind of product (half, tf32, ieee) and
# compute capability that _CONFIGS does not name. A warp takes 16 rows of a chain of dots, so that
# more than rows / 16 of them repeat each other's work.
_DEFAULTS = {
    "fwd": {32: _Config(4), 64: _Config(4, park=True), 128: _Config(8, park=True)},
    "bwd": {32: _Config(4), 64: _Config(4), 128: _Config(8)},
}
# Exceptions, by (pass, D, rows, kind, major compute capability). Chosen, like the defaults, for the
# fewest spilled bytes by ahead-of-time compilation with Triton 3.7.1 (docs/kernel-resources.md);
# none was timed on a GPU.
_CONFIGS = {
    ("fwd", 32, 32, "half", 8): _Config(4, park=True),
    ("fwd", 32, 32, "half", 9): _Config(4, park=True),
    ("fwd", 64, 32, "half", 9): _Config(4, park=True),
    ("fwd", 64, 64, "tf32", 8): _Config(8, park=True),
    ("fwd", 64, 64, "tf32", 9): _Config(8, park=True),
    ("fwd", 128, 64, "half", 8): _Config(8, park=True),
    ("fwd", 128, 64, "half", 9): _Config(8, park=True),
    ("bwd", 64, 64, "tf32", 8): _Config(8),
    ("bwd", 128, 64, "half", 8): _Config(8),
    ("bwd", 128, 64, "half", 9): _Config(8),
}


def _config(
    which: str, D: int, rows: int, dtype: torch.dtype, precision: str, major: int
) -> _Config:
    """Look a pass up; ``rows`` are those of the longer stream's tile."""
    kind = precision if dtype == torch.float32 else "half"
    default = next(c for most, c in _DEFAULTS[which].items() if rows <= most)
    if kind == "ieee":  # no tensor cores: products spread over all warps
        default = default._replace(num_warps=8)
    return _CONFIGS.get((which, D, rows, kind, major), default)


def _users(slot_s: int, slot_r: int) -> int:
    """Sequences of a tile: short ones share it."""
    return max(1, 32 // max(slot_s, slot_r))


def _block_f(F: int) -> int:
    return 32 if F % 32 == 0 else 16


def _major(device: torch.device) -> int:
    """Major compute capability; the interpreter has none and gets the least that is served."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def _matrices_to(dtype: torch.dtype, weights: Sequence[Tensor]) -> list[Tensor]:
    """Cast matrices, as the dots want them, once: not in every program, in twice the registers."""
    return [w.to(dtype) if i < 12 and i % 2 == 0 else w for i, w in enumerate(weights)]


def latent_reasoning_fwd(
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    rows: Tensor,
    target_keys: Tensor,
    weights: Sequence[Tensor],
    steps: int,
    n_heads: int,
    n_trajectories: int,
    noise_scale: float,
    noise_seed: int,
    dropout_threshold: int,
    dropout_seed: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel.

    Returns h^(K) of both streams [B, N, L, D], the pooled vectors [B, N, K, 2, 2, D] (or [0]) and
    h^(1) .. h^(K-1) of both streams [K-1, B, N, L, D] (or [0, B, N, L, D]).
    """
    B, search_size, D = search.shape
    rec_size, N, F = rec.shape[1], n_trajectories, weights[8].shape[-2]
    n_saved = steps - 1 if save_states else 0
    search_out = search.new_empty(B, N, search_size, D)
    rec_out = rec.new_empty(B, N, rec_size, D)
    has_pool = target_keys.ndim == 3
    pooled = search.new_empty((B, N, steps, 2, 2, D) if has_pool else (0,))
    saved_search = search.new_empty(n_saved, B, N, search_size, D)
    saved_rec = rec.new_empty(n_saved, B, N, rec_size, D)
    weights = _matrices_to(search.dtype, weights)
    slot_s, slot_r = _slot(search_size), _slot(rec_size)
    users, precision = _users(slot_s, slot_r), dot_precision(search.dtype)
    rows_of_tile = users * max(slot_s, slot_r)
    config = _config("fwd", D, rows_of_tile, search.dtype, precision, _major(search.device))
    if B * N:
        with on_device(search):
            _latent_reasoning_fwd_kernel[(triton.cdiv(B * N, users),)](
                search, rec, search_lengths, rec_lengths, rows, target_keys, *weights,
                search_out, rec_out, pooled, saved_search, saved_rec,
                B * N, N, search_size, rec_size, steps, int(weights[0].shape[0] > 1),
                noise_scale, noise_seed,
                dropout_threshold, 65536.0 / (65536 - dropout_threshold), dropout_seed,
                D=D, F=F, H=n_heads, SEARCH_SLOT=slot_s, REC_SLOT=slot_r, USERS=users,
                BLOCK_F=_block_f(F),
                NOISE=noise_scale != 0.0, DROPOUT=dropout_threshold > 0,
                POOL=has_pool, SAVE=save_states, PARK=config.park, PRECISION=precision,
                num_warps=config.num_warps, num_stages=1,
            )  # fmt: skip
    return search_out, rec_out, pooled, saved_search, saved_rec


# Weight gradients are products over all rows of a chunk of users, so a chunk should be long; this
# bounds what it costs. At D = 64, L = 50 + 50, K = 5 it holds about 500 users in half precision.
_SCRATCH_BYTES = 1 << 29


def _columns_product(dy: Tensor, x: Tensor) -> Tensor:
    """dY^T X in float32 for [P, rows, out] and [P, rows, in]: [P, out, in]."""
    dy = dy.transpose(1, 2)
    if x.dtype == torch.float32:
        return torch.bmm(dy, x)
    if x.is_cuda:
        return torch.bmm(dy, x, out_dtype=torch.float32)
    return torch.bmm(dy.float(), x.float())


def _add_weight_gradients(
    totals: list[Tensor], scratch: Sequence[Tensor], dnorm: Tensor, D: int, F: int
) -> None:
    """Add one chunk's share, from ``scratch`` [P, rows, 16 D + 2 F] of both streams, to ``totals``.

    ``dnorm`` is [P, programs, 2, 3, 2, D].
    """
    P = dnorm.shape[0]
    dy_start = 5 * D + F
    for x in (0, 1):
        own, other = scratch[x], scratch[1 - x]

        def columns(t: Tensor, start: int, size: int) -> Tensor:
            return t[:, :, start : start + size]

        def dy(t: Tensor, start: int, size: int) -> Tensor:
            return t[:, :, dy_start + start : dy_start + start + size]

        def bias(t: Tensor) -> Tensor:
            return t.sum(1, dtype=torch.float32)

        pairs = [  # weight, its bias, rows of both, dY, X
            (0, slice(None), dy(own, 0, 3 * D), columns(own, 0, D)),
            (2, slice(None), dy(own, 3 * D, D), columns(own, D, D)),
            (4, slice(0, D), dy(own, 4 * D, D), columns(own, 2 * D, D)),
            (4, slice(D, 3 * D), dy(other, 5 * D, 2 * D), columns(other, 2 * D, D)),
            (6, slice(None), dy(own, 7 * D, D), columns(own, 3 * D, D)),
        ]
        if F:
            pairs += [
                (8, slice(None), dy(own, 9 * D, F), columns(own, 4 * D, D)),
                (10, slice(None), dy(own, 8 * D, D), columns(own, 5 * D, F)),
            ]
        for weight, out_rows, gradient, operand in pairs:
            totals[weight][:P, x, out_rows] += _columns_product(gradient, operand)
            totals[weight + 1][:P, x, out_rows] += bias(gradient)
    n_norms = 3 if F else 2
    norms = dnorm[:, :, :, :n_norms].sum(1)  # [P, 2, n_norms, 2, D]
    totals[12][:P, :, :n_norms] += norms[:, :, :, 0]
    totals[13][:P, :, :n_norms] += norms[:, :, :, 1]


def latent_reasoning_bwd(
    dsearch_out: Tensor,
    drec_out: Tensor,
    dpooled: Tensor,
    search: Tensor,
    rec: Tensor,
    search_lengths: Tensor,
    rec_lengths: Tensor,
    rows: Tensor,
    target_keys: Tensor,
    weights: Sequence[Tensor],
    steps: int,
    n_heads: int,
    n_trajectories: int,
    noise_scale: float,
    noise_seed: int,
    dropout_threshold: int,
    dropout_seed: int,
    saved_search: Tensor,
    saved_rec: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Launch the backward kernels on chunks of users and multiply out the weight gradients.

    Returns the gradients of both streams [B, L, D] summed over the trajectories, of the target keys
    [B, 2, D] (or [0]) and of the 14 weights in their dtypes.
    """
    B, search_size, D = search.shape
    rec_size, N, F, K = rec.shape[1], n_trajectories, weights[8].shape[-2], steps
    has_pool = target_keys.ndim == 3
    shared = weights[0].shape[0] == 1
    dsearch, drec = torch.empty_like(search), torch.empty_like(rec)
    dtarget_keys = torch.zeros_like(target_keys)
    totals = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    if B == 0:
        return (
            dsearch,
            drec,
            dtarget_keys,
            [t.to(w.dtype) for t, w in zip(totals, weights, strict=True)],
        )

    cast = _matrices_to(search.dtype, weights)
    slot_s, slot_r = _slot(search_size), _slot(rec_size)
    slots, sizes = (slot_s, slot_r), (search_size, rec_size)
    tile, precision = _users(*slots), dot_precision(search.dtype)
    config = _config("bwd", D, tile * max(slots), search.dtype, precision, _major(search.device))
    constants: dict[str, Any] = {
        "D": D, "F": F, "USERS": tile, "PRECISION": precision,
        "num_warps": config.num_warps, "num_stages": 1,
    }  # fmt: skip
    is_dropping = dropout_threshold > 0
    dropout = (dropout_threshold, 65536.0 / (65536 - dropout_threshold), dropout_seed)
    C = _scratch_columns(D, F)
    user_bytes = N * K * (search_size + rec_size) * C * search.element_size()
    chunk = min(B, max(1, _SCRATCH_BYTES // max(user_bytes, 1)))
    float32: dict[str, Any] = {"dtype": torch.float32, "device": search.device}
    dkeys = torch.empty((B, N, K, 2, 2, D) if has_pool else (0,), **float32)
    for start in range(0, B, chunk):
        users = slice(start, min(start + chunk, B))
        lengths = (search_lengths[users], rec_lengths[users])
        n = len(lengths[0]) * N
        programs = triton.cdiv(n, tile)
        scratch = tuple(search.new_empty(K, n * size, C) for size in sizes)
        dh, da, dmemory = (
            tuple(torch.empty(n // N, N, size, D, **float32) for size in sizes) for _ in range(3)
        )
        dnorm = torch.empty(programs, K, 2, 3, 2, D, **float32)
        with on_device(search):
            for x, (state, saved) in enumerate(((search, saved_search), (rec, saved_rec))):
                _recompute_self_kernel[(programs, K)](
                    state[users], lengths[x], rows[users], *cast, saved[:, users], scratch[x],
                    n, N, sizes[x], int(not shared), x, B * N, noise_scale, noise_seed, *dropout,
                    H=n_heads, SLOT=slots[x], NOISE=noise_scale != 0.0,
                    DROPOUT=is_dropping, **constants,
                )  # fmt: skip
            for x in (0, 1):
                _recompute_cross_kernel[(programs, K)](
                    lengths[x], lengths[1 - x], rows[users], *cast, scratch[x], scratch[1 - x],
                    n, N, sizes[x], sizes[1 - x], int(not shared), x, *dropout,
                    H=n_heads, SLOT=slots[x], MEMORY_SLOT=slots[1 - x],
                    DROPOUT=is_dropping, **constants,
                )  # fmt: skip
            for k in reversed(range(K)):
                for x, dout in enumerate((dsearch_out, drec_out)):
                    _ffn_bwd_kernel[(programs,)](
                        dout[users], dpooled[users], dh[x], da[x], lengths[x], lengths[1 - x],
                        rows[users], target_keys[users], *cast, scratch[x][k], dkeys[users],
                        dnorm, n, N, sizes[x], k, K, int(not shared), x, *dropout,
                        SLOT=slots[x], BLOCK_F=_block_f(F), DROPOUT=is_dropping,
                        POOL=has_pool, **constants,
                    )  # fmt: skip
                for x in (0, 1):
                    _cross_bwd_kernel[(programs,)](
                        da[x], da[x], dmemory[1 - x], lengths[x], lengths[1 - x], *cast,
                        scratch[x][k], scratch[1 - x][k],
                        n, N, sizes[x], sizes[1 - x], k, int(not shared), x,
                        H=n_heads, SLOT=slots[x], MEMORY_SLOT=slots[1 - x], **constants,
                    )  # fmt: skip
                for x in (0, 1):
                    _self_bwd_kernel[(programs,)](
                        da[x], dmemory[x], dpooled[users], dh[x], lengths[x], rows[users],
                        target_keys[users], *cast, scratch[x][k], dkeys[users], dnorm,
                        n, N, sizes[x], k, K, int(not shared), x, *dropout,
                        H=n_heads, SLOT=slots[x], DROPOUT=is_dropping, POOL=has_pool,
                        **constants,
                    )  # fmt: skip
        dsearch[users] = dh[0].sum(1)
        drec[users] = dh[1].sum(1)
        dnorm = dnorm.transpose(0, 1)  # [K, programs, 2, 3, 2, D]
        if shared:
            scratch = tuple(t.view(1, -1, C) for t in scratch)
            dnorm = dnorm.reshape(1, -1, 2, 3, 2, D)
        _add_weight_gradients(totals, scratch, dnorm, D, F)
    if has_pool:
        dtarget_keys.copy_(dkeys.sum((1, 2, 3)))
    return (
        dsearch,
        drec,
        dtarget_keys,
        [t.to(w.dtype) for t, w in zip(totals, weights, strict=True)],
    )


# -- what is compiled -----------------------------------------------------------------------------

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_WEIGHTS = ("self_", "cross_", "ffn_", "norm_")
_LENGTHS = ("search_lengths_ptr", "rec_lengths_ptr", "lengths_ptr", "memory_lengths_ptr")
_FLOAT32 = ("dh_ptr", "da_ptr", "dx2_ptr", "dmemory_ptr", "dkeys_ptr", "dnorm_ptr")
_OWN_TYPES = {
    "rows_ptr": "*i64", **dict.fromkeys(_LENGTHS, "*i64"), **dict.fromkeys(_FLOAT32, "*fp32"),
    "noise_scale": "fp32", "noise_seed": "i64", "dropout_scale": "fp32", "dropout_seed": "i64",
}  # fmt: skip


def _variant(
    name: str, kernel: Any, dtype: torch.dtype, weights: torch.dtype, constants: dict[str, Any]
) -> Variant:
    def kind(argument: str) -> str:
        if argument in _OWN_TYPES:
            return _OWN_TYPES[argument]
        if argument.endswith("_weight_ptr") and not argument.startswith("norm"):
            return f"*{_TYPES[dtype]}"
        if argument.endswith("_ptr"):
            return f"*{_TYPES[weights if argument.startswith(_WEIGHTS) else dtype]}"
        return "i32"

    constants = dict(constants)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    signature = {n: kind(n) for n in kernel.arg_names if n not in constants}
    return Variant(name, kernel, signature, constants, warps, stages)


class _Call(NamedTuple):
    """What decides the compile-time constants of a call."""

    dim: int
    size: int  # events of both streams
    dtype: torch.dtype = torch.bfloat16
    weights: torch.dtype = torch.float32
    precision: str = "ieee"


_CALLS = (
    _Call(32, 20), _Call(64, 30), _Call(64, 50), _Call(64, 50, torch.float32, precision="tf32"),
    _Call(64, 50, torch.float32), _Call(64, 128), _Call(128, 50),
)  # fmt: skip


def variants(arch: str) -> Iterator[Variant]:
    """Yield what models with two heads and F = D launch, in training and in rollouts.

    L is the longer history. Training pools every step and drops (``train``), or draws trajectories
    (``rollout``); ``infer`` does neither. Backward is one kernel a stream, and that of the
    cross-attention is the same in both.
    """
    major = int(arch.removeprefix("sm_")) // 10
    plain = {"NOISE": False, "DROPOUT": False, "POOL": False, "SAVE": False}
    train = {"NOISE": False, "DROPOUT": True, "POOL": True, "SAVE": True}
    rollout = {"NOISE": True, "DROPOUT": False, "POOL": False, "SAVE": True}
    for call in _CALLS:
        dim, dtype = call.dim, call.dtype
        slot = _slot(call.size)
        users = _users(slot, slot)
        shape = {
            "D": dim, "F": dim, "H": 2, "SEARCH_SLOT": slot, "REC_SLOT": slot, "SLOT": slot,
            "MEMORY_SLOT": slot, "USERS": users, "BLOCK_F": _block_f(dim),
            "PRECISION": call.precision, "num_stages": 1,
        }  # fmt: skip
        kind = _TYPES[dtype]
        if dtype == torch.float32:
            kind += f"-{call.precision}"
        suffix = f"{kind}-d{dim}-L{call.size}"
        for name, kernel, switches in (
            ("fwd-infer", _latent_reasoning_fwd_kernel, plain),
            ("fwd-train", _latent_reasoning_fwd_kernel, train),
            ("fwd-rollout", _latent_reasoning_fwd_kernel, rollout),
            ("recompute_self-train", _recompute_self_kernel, train),
            ("recompute_self-rollout", _recompute_self_kernel, rollout),
            ("recompute_cross-train", _recompute_cross_kernel, train),
            ("recompute_cross-rollout", _recompute_cross_kernel, rollout),
            ("ffn_bwd-train", _ffn_bwd_kernel, train),
            ("ffn_bwd-rollout", _ffn_bwd_kernel, rollout),
            ("cross_bwd", _cross_bwd_kernel, {}),
            ("self_bwd-train", _self_bwd_kernel, train),
            ("self_bwd-rollout", _self_bwd_kernel, rollout),
        ):
            which = "fwd" if name.startswith("fwd") else "bwd"
            config = _config(which, dim, users * slot, dtype, call.precision, major)
            constants = shape | switches | {"PARK": config.park, "num_warps": config.num_warps}
            yield _variant(f"{name}-{suffix}", kernel, dtype, call.weights, constants)
