"""Latent cross reasoning: K steps of both streams in one program, forward and backward.

One program takes a tile of whole users (slots of one power-of-two size, see blocks.py) through all
K steps. For each stream x with the other stream x', g = 1 if x' has an event, else 0, and dropout
masks m:

    x1 = h_x + m1 MSA_x(h_x)                    a_x = LN1(x1)
    x2 = a_x + g m2 MCA_x(Q = a_x, K = V = a_x')   c_x = LN2(x2)
    x3 = c_x + m3 FFN_x(c_x)                    h_x <- LN3(x3)

h^(0) is read once, h^(K) written once; noise is added where h^(0) is read and dropout masks are
drawn where they act (lcr_fast/noise.py). Nothing else touches device memory but the weights, the
pooled vectors of TCL if asked for, and in training the input of every step after the first.

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
    locate_rows,
    normal_noise,
    pool,
    pool_bwd,
    row_slots,
    tile_offsets,
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
def _load_of_user(ptr, rows, end, n_trajectories):
    """Element of each row's user in a tensor [B]; 0 beyond the last sequence: [M]."""
    sequence, _, _, _ = rows
    return tl.load(ptr + sequence // n_trajectories, mask=sequence < end, other=0)


@triton.jit
def _load_initial(
    x_ptr, rows, size, n_trajectories, user_row, stream: tl.constexpr, noise,
    D: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """h^(0) + noise_scale eps on valid positions, 0 elsewhere, in the tensor's dtype: [M, D]."""
    sequence, position, length, _ = rows
    valid = (position < length)[:, None]
    user = sequence // n_trajectories
    h = tl.load(x_ptr + tile_offsets(user, position, size, D), mask=valid, other=0.0)
    if NOISE:
        scale, seed = noise
        trajectory_stream = 2 * (sequence % n_trajectories) + stream
        eps = normal_noise(user_row, position, trajectory_stream, seed, D)
        h = tl.where(valid, h.to(tl.float32) + scale * eps, 0.0)
    return h.to(x_ptr.dtype.element_ty)


@triton.jit
def _store_state(out_ptr, state, rows, size, D: tl.constexpr):
    sequence, position, _, stored = rows
    offsets = tile_offsets(sequence, position, size, D)
    tl.store(out_ptr + offsets, state.to(out_ptr.dtype.element_ty), mask=stored[:, None])


@triton.jit
def _residual(x, DROPOUT: tl.constexpr):
    """What a sublayer's sum starts from: x itself, or 0 if dropout comes between them."""
    if DROPOUT:
        y = tl.zeros(x.shape, tl.float32)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def _add_update(
    y, x, user_row, position, k, stream: tl.constexpr, place: tl.constexpr, dropout,
    D: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """x + m update, of a sublayer's sum that started from :func:`_residual`: float32 [M, D]."""
    if DROPOUT:
        y = _apply_dropout(y, user_row, position, k, stream, place, dropout, D, DROPOUT)
        y += x.to(tl.float32)
    return y


@triton.jit
def _before_norm1(
    h, rows, user_row, k, index, stream: tl.constexpr, weights, dropout,
    D: tl.constexpr, H: tl.constexpr, SLOT: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x1 = h + m1 MSA(h): float32 [M, D]."""
    _, position, length, _ = rows
    y = attention(
        h, h, length, _residual(h, DROPOUT), position < length,
        _self_weights(weights, index, D), D, H, SLOT, SLOT, PRECISION,
    )  # fmt: skip
    return _add_update(y, h, user_row, position, k, stream, 0, dropout, D, DROPOUT)


@triton.jit
def _before_norm2(
    a, memory, rows, memory_rows, gate, user_row, k, index, stream: tl.constexpr, weights, dropout,
    D: tl.constexpr, H: tl.constexpr, SLOT: tl.constexpr, MEMORY_SLOT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x2 = a + g m2 MCA(a, memory): float32 [M, D]; ``gate`` is bool [M]."""
    _, position, _, _ = rows
    _, _, memory_length, _ = memory_rows
    y = attention(
        a, memory, memory_length, _residual(a, DROPOUT), gate,
        _cross_weights(weights, index, D), D, H, SLOT, MEMORY_SLOT, PRECISION,
    )  # fmt: skip
    return _add_update(y, a, user_row, position, k, stream, 1, dropout, D, DROPOUT)


@triton.jit
def _before_norm3(
    c, rows, user_row, k, index, stream: tl.constexpr, weights, dropout,
    D: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x3 = c + m3 FFN(c): float32 [M, D]."""
    _, position, _, _ = rows
    y = ffn(
        c, _residual(c, DROPOUT), _ffn_weights(weights, index, D, F), D, F, BLOCK_F, PRECISION
    )
    return _add_update(y, c, user_row, position, k, stream, 2, dropout, D, DROPOUT)


@triton.jit
def _norm(x, weights, index, which: tl.constexpr, D: tl.constexpr):
    weight_ptr, bias_ptr = _norm_weights(weights, index, which, D)
    return layer_norm(x, weight_ptr, bias_ptr, D)


@triton.jit
def _zero_padding(x, rows):
    _, position, length, _ = rows
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
    rows_s = locate_rows(
        first, n_sequences, search_lengths_ptr, n_trajectories, search_size, M_S, SEARCH_SLOT
    )
    rows_r = locate_rows(
        first, n_sequences, rec_lengths_ptr, n_trajectories, rec_size, M_R, REC_SLOT
    )
    # A stream reads the other one only where that has an event.
    gate_s = _load_of_user(rec_lengths_ptr, rows_s, n_sequences, n_trajectories) > 0
    gate_r = _load_of_user(search_lengths_ptr, rows_r, n_sequences, n_trajectories) > 0
    user_row_s = rows_s[0]
    user_row_r = rows_r[0]
    if NOISE or DROPOUT:
        user_row_s = _load_of_user(rows_ptr, rows_s, n_sequences, n_trajectories)
        user_row_r = _load_of_user(rows_ptr, rows_r, n_sequences, n_trajectories)

    h_s = _load_initial(
        search_ptr, rows_s, search_size, n_trajectories, user_row_s, _SEARCH, noise, D, NOISE
    )  # [M_S, D]
    h_r = _load_initial(
        rec_ptr, rows_r, rec_size, n_trajectories, user_row_r, _REC, noise, D, NOISE
    )  # [M_R, D]

    slots_s = key_slots(rows_s[2], SEARCH_SLOT)
    slots_r = key_slots(rows_r[2], REC_SLOT)
    stride = steps.to(tl.int64) * (4 * D)
    for k in tl.range(0, steps, disable_licm=True):
        # Addresses depend on k, so that no weight is kept on chip across the steps.
        index = 2 * k * set_stride
        step_ptr = pooled_ptr + k * (4 * D)
        x1 = _before_norm1(
            h_s, rows_s, user_row_s, k, index, _SEARCH, weights, dropout,
            D, H, SEARCH_SLOT, DROPOUT, PRECISION,
        )  # fmt: skip
        a_s = _zero_padding(_norm(x1, weights, index, 0, D), rows_s).to(dtype)
        if POOL:
            pool(
                a_s, slots_s, keys_ptr, step_ptr, stride,
                first, n_sequences, n_trajectories, D, USERS,
            )  # fmt: skip
        x1 = _before_norm1(
            h_r, rows_r, user_row_r, k, index + 1, _REC, weights, dropout,
            D, H, REC_SLOT, DROPOUT, PRECISION,
        )  # fmt: skip
        a_r = _zero_padding(_norm(x1, weights, index + 1, 0, D), rows_r).to(dtype)
        if POOL:
            pool(
                a_r, slots_r, keys_ptr + D, step_ptr + D, stride,
                first, n_sequences, n_trajectories, D, USERS,
            )  # fmt: skip
        x2 = _before_norm2(
            a_s, a_r, rows_s, rows_r, gate_s, user_row_s, k, index, _SEARCH, weights, dropout,
            D, H, SEARCH_SLOT, REC_SLOT, DROPOUT, PRECISION,
        )  # fmt: skip
        h_s = _after_cross(
            x2, rows_s, user_row_s, k, index, _SEARCH, weights, dropout, dtype,
            D, F, BLOCK_F, DROPOUT, PRECISION,
        )  # fmt: skip
        if POOL:
            pool(
                h_s, slots_s, keys_ptr, step_ptr + 2 * D, stride,
                first, n_sequences, n_trajectories, D, USERS,
            )  # fmt: skip
        x2 = _before_norm2(
            a_r, a_s, rows_r, rows_s, gate_r, user_row_r, k, index + 1, _REC, weights, dropout,
            D, H, REC_SLOT, SEARCH_SLOT, DROPOUT, PRECISION,
        )  # fmt: skip
        h_r = _after_cross(
            x2, rows_r, user_row_r, k, index + 1, _REC, weights, dropout, dtype,
            D, F, BLOCK_F, DROPOUT, PRECISION,
        )  # fmt: skip
        if POOL:
            pool(
                h_r, slots_r, keys_ptr + D, step_ptr + 3 * D, stride,
                first, n_sequences, n_trajectories, D, USERS,
            )  # fmt: skip
        if SAVE and k + 1 < steps:
            saved_s = n_sequences.to(tl.int64) * search_size * D * k
            saved_r = n_sequences.to(tl.int64) * rec_size * D * k
            _store_state(saved_search_ptr + saved_s, h_s, rows_s, search_size, D)
            _store_state(saved_rec_ptr + saved_r, h_r, rows_r, rec_size, D)

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
def _place(rows, first_sequence, size, D: tl.constexpr, F: tl.constexpr):
    """Offsets of a tile's rows in a step's scratch, int64 [M, 1], and which of them exist."""
    sequence, position, _, stored = rows
    row = (sequence - first_sequence) * size + position
    return (row * (16 * D + 2 * F))[:, None], stored[:, None]


@triton.jit
def _park(ptr, place, x, D: tl.constexpr):
    """Store a tile in D columns of scratch."""
    offset, stored = place
    tl.store(ptr + offset + tl.arange(0, D)[None, :], x.to(ptr.dtype.element_ty), mask=stored)


@triton.jit
def _unpark(ptr, place, D: tl.constexpr):
    offset, stored = place
    return tl.load(ptr + offset + tl.arange(0, D)[None, :], mask=stored, other=0.0)


@triton.jit
def _load_step_input(
    x_ptr, saved_ptr, rows, size, n_sequences, n_trajectories, user_row, k, stream: tl.constexpr,
    noise, D: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """h^(k): the saved one, or for k = 0 the noisy input as the forward pass read it."""
    if k == 0:
        h = _load_initial(x_ptr, rows, size, n_trajectories, user_row, stream, noise, D, NOISE)
    else:
        sequence, position, _, stored = rows
        step = n_sequences.to(tl.int64) * size * D * (k - 1)
        offset = tile_offsets(sequence, position, size, D)
        h = tl.load(saved_ptr + step + offset, mask=stored[:, None], other=0.0)
    return h


@triton.jit
def _load_gradient(ptr, rows, size, D: tl.constexpr):
    """Upstream gradient of a state, 0 at padding: float32 [M, D]."""
    sequence, position, length, _ = rows
    offset = tile_offsets(sequence, position, size, D)
    return tl.load(ptr + offset, mask=(position < length)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _cross_bwd(
    dh, scratch_ptr, memory_scratch_ptr, place, memory_place, rows, memory_rows, gate,
    da, dmemory, user_row, k, index, stream: tl.constexpr, weights, dropout,
    dnorm_ptr, keys_ptr, dpooled_ptr, dkeys_ptr, pooled_stride, first, end, n_trajectories,
    D: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    SLOT: tl.constexpr, MEMORY_SLOT: tl.constexpr, BLOCK_F: tl.constexpr,
    DROPOUT: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of h = LN3(c + m3 FFN(c)), c = LN2(x2), x2 = a + g m2 MCA(a, memory).

    Reads x2, a and the memory from scratch. Returns da and dmemory, added to.
    """
    DY: tl.constexpr = 5 * D + F
    X2: tl.constexpr = 15 * D + 2 * F
    _, position, length, _ = rows
    _, memory_position, memory_length, _ = memory_rows
    event_slot = key_slots(length, SLOT)

    x2 = _unpark(scratch_ptr + X2, place, D).to(tl.float32)
    c = _norm(x2, weights, index, 1, D).to(scratch_ptr.dtype.element_ty)
    if F > 0:
        _park(scratch_ptr + 4 * D, place, c, D)
        x3 = _before_norm3(
            c, rows, user_row, k, index, stream, weights, dropout, D, F, BLOCK_F, DROPOUT, PRECISION
        )  # fmt: skip
        if POOL:
            h = _zero_padding(_norm(x3, weights, index, 2, D), rows).to(c.dtype)
            dh = pool_bwd(
                dh, h, event_slot, keys_ptr, dpooled_ptr + 2 * D, dkeys_ptr + 2 * D, pooled_stride,
                first, end, n_trajectories, D, gate.shape[0] // SLOT,
            )  # fmt: skip
        norm_weight_ptr, _ = _norm_weights(weights, index, 2, D)
        dc = layer_norm_bwd(dh, x3, norm_weight_ptr, dnorm_ptr + 4 * D, D)
        dy = _apply_dropout(dc, user_row, position, k, stream, 2, dropout, D, DROPOUT).to(c.dtype)
        _park(scratch_ptr + DY + 8 * D, place, dy, D)
        dc = ffn_bwd(
            dy, c, dc, scratch_ptr + 5 * D, scratch_ptr + DY + 9 * D, place,
            _ffn_weights(weights, index, D, F), D, F, BLOCK_F, PRECISION,
        )  # fmt: skip
    else:
        dc = dh
        if POOL:
            h = _zero_padding(c, rows).to(c.dtype)
            dc = pool_bwd(
                dc, h, event_slot, keys_ptr, dpooled_ptr + 2 * D, dkeys_ptr + 2 * D, pooled_stride,
                first, end, n_trajectories, D, gate.shape[0] // SLOT,
            )  # fmt: skip

    norm_weight_ptr, _ = _norm_weights(weights, index, 1, D)
    dx2 = layer_norm_bwd(dc, x2, norm_weight_ptr, dnorm_ptr + 2 * D, D)
    dy = _apply_dropout(dx2, user_row, position, k, stream, 1, dropout, D, DROPOUT)
    dy = tl.where(gate[:, None], dy, 0.0).to(c.dtype)
    _park(scratch_ptr + DY + 7 * D, place, dy, D)
    a = _unpark(scratch_ptr + 2 * D, place, D)
    memory = _unpark(memory_scratch_ptr + 2 * D, memory_place, D)
    return attention_bwd(
        dy, a, memory, row_slots(gate.shape[0], SLOT),
        key_slots(memory_position, memory_length, MEMORY_SLOT), da + dx2, dmemory,
        scratch_ptr + 3 * D, scratch_ptr + DY + 4 * D, memory_scratch_ptr + DY + 5 * D,
        place, memory_place, _cross_weights(weights, index, D), D, H, False, PRECISION,
    )  # fmt: skip


@triton.jit
def _self_bwd(
    da, scratch_ptr, place, rows, user_row, k, index, stream: tl.constexpr, weights, dropout,
    dnorm_ptr, keys_ptr, dpooled_ptr, dkeys_ptr, pooled_stride, first, end, n_trajectories,
    D: tl.constexpr, F: tl.constexpr, H: tl.constexpr, SLOT: tl.constexpr,
    DROPOUT: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of a = LN1(x1), x1 = h + m1 MSA(h), that of h: float32 [M, D]."""
    DY: tl.constexpr = 5 * D + F
    X1: tl.constexpr = 14 * D + 2 * F
    _, position, length, _ = rows
    event_slot = key_slots(length, SLOT)
    if POOL:
        a = _unpark(scratch_ptr + 2 * D, place, D)
        da = pool_bwd(
            da, a, event_slot, keys_ptr, dpooled_ptr, dkeys_ptr, pooled_stride,
            first, end, n_trajectories, D, event_slot.shape[0] // SLOT,
        )  # fmt: skip
    x1 = _unpark(scratch_ptr + X1, place, D).to(tl.float32)
    norm_weight_ptr, _ = _norm_weights(weights, index, 0, D)
    dx1 = layer_norm_bwd(da, x1, norm_weight_ptr, dnorm_ptr, D)
    dy = _apply_dropout(dx1, user_row, position, k, stream, 0, dropout, D, DROPOUT)
    dy = dy.to(scratch_ptr.dtype.element_ty)
    _park(scratch_ptr + DY + 3 * D, place, dy, D)
    h = _unpark(scratch_ptr, place, D)
    dh, _ = attention_bwd(
        dy, h, h, row_slots(event_slot.shape[0], SLOT), event_slot, dx1, dx1,
        scratch_ptr + D, scratch_ptr + DY, scratch_ptr + DY + D,
        place, place, _self_weights(weights, index, D), D, H, True, PRECISION,
    )  # fmt: skip
    return dh


@triton.jit(do_not_specialize=[*_RUNTIME_SIZES, "first_sequence", "end_sequence"])
def _latent_reasoning_bwd_kernel(
    dsearch_out_ptr, drec_out_ptr,  # [B, N, L_s, D], [B, N, L_r, D]
    dpooled_ptr,  # [B, N, K, 2, 2, D]
    search_ptr, rec_ptr,  # [B, L_s, D], [B, L_r, D]
    search_lengths_ptr, rec_lengths_ptr, rows_ptr,  # [B]
    keys_ptr,  # [B, 2, D]
    self_qkv_weight_ptr, self_qkv_bias_ptr, self_out_weight_ptr, self_out_bias_ptr,
    cross_qkv_weight_ptr, cross_qkv_bias_ptr, cross_out_weight_ptr, cross_out_bias_ptr,
    ffn_in_weight_ptr, ffn_in_bias_ptr, ffn_out_weight_ptr, ffn_out_bias_ptr,
    norm_weight_ptr, norm_bias_ptr,
    saved_search_ptr, saved_rec_ptr,  # [K-1, B, N, L_s, D], [K-1, B, N, L_r, D]
    scratch_search_ptr, scratch_rec_ptr,  # [K, sequences, L, 16 D + 2 F]
    dsearch_ptr, drec_ptr,  # float32 [sequences, L, D]
    dkeys_ptr,  # float32 [B, N, K, 2, 2, D]
    dnorm_ptr,  # float32 [programs, K, 2, 3, 2, D] weight and bias of each norm
    first_sequence, end_sequence,  # those of this launch, and of the tensors [sequences, ...]
    n_sequences, n_trajectories, search_size, rec_size, steps, set_stride,
    noise_scale, noise_seed: tl.int64,
    dropout_threshold, dropout_scale, dropout_seed: tl.int64,
    D: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    SEARCH_SLOT: tl.constexpr, REC_SLOT: tl.constexpr, USERS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    NOISE: tl.constexpr, DROPOUT: tl.constexpr, POOL: tl.constexpr,
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

    program = tl.program_id(0).to(tl.int64)
    first = first_sequence + program * USERS
    rows_s = locate_rows(
        first, end_sequence, search_lengths_ptr, n_trajectories, search_size, M_S, SEARCH_SLOT
    )
    rows_r = locate_rows(
        first, end_sequence, rec_lengths_ptr, n_trajectories, rec_size, M_R, REC_SLOT
    )
    gate_s = _load_of_user(rec_lengths_ptr, rows_s, end_sequence, n_trajectories) > 0
    gate_r = _load_of_user(search_lengths_ptr, rows_r, end_sequence, n_trajectories) > 0
    user_row_s = rows_s[0]
    user_row_r = rows_r[0]
    if NOISE or DROPOUT:
        user_row_s = _load_of_user(rows_ptr, rows_s, end_sequence, n_trajectories)
        user_row_r = _load_of_user(rows_ptr, rows_r, end_sequence, n_trajectories)

    place_s = _place(rows_s, first_sequence, search_size, D, F)
    place_r = _place(rows_r, first_sequence, rec_size, D, F)
    chunk = (end_sequence - first_sequence).to(tl.int64)
    scratch_s_step = chunk * search_size * (16 * D + 2 * F)
    scratch_r_step = chunk * rec_size * (16 * D + 2 * F)
    # dh travels between the steps in the output tensors.
    carry_s = tile_offsets(rows_s[0] - first_sequence, rows_s[1], search_size, D)
    carry_r = tile_offsets(rows_r[0] - first_sequence, rows_r[1], rec_size, D)
    stored_s, stored_r = rows_s[3][:, None], rows_r[3][:, None]
    dh = _load_gradient(dsearch_out_ptr, rows_s, search_size, D)
    tl.store(dsearch_ptr + carry_s, dh, mask=stored_s)
    dh = _load_gradient(drec_out_ptr, rows_r, rec_size, D)
    tl.store(drec_ptr + carry_r, dh, mask=stored_r)

    # One stage: the loop's loads must not move over its barriers.
    for j in tl.range(0, steps, num_stages=1, disable_licm=True):
        k = steps - 1 - j
        index = 2 * k * set_stride
        scratch_s = scratch_search_ptr + k * scratch_s_step
        scratch_r = scratch_rec_ptr + k * scratch_r_step
        dnorm_s = dnorm_ptr + (program * steps + k) * (12 * D)
        dnorm_r = dnorm_s + 6 * D
        pooled_stride = steps.to(tl.int64) * (4 * D)
        dpooled = dpooled_ptr + k * (4 * D)
        dkeys = dkeys_ptr + k * (4 * D)

        h = _load_step_input(
            search_ptr, saved_search_ptr, rows_s, search_size, n_sequences, n_trajectories,
            user_row_s, k, _SEARCH, noise, D, NOISE,
        )  # fmt: skip
        x1 = _before_norm1(
            h, rows_s, user_row_s, k, index, _SEARCH, weights, dropout,
            D, H, SEARCH_SLOT, DROPOUT, PRECISION,
        )  # fmt: skip
        a_s = _zero_padding(_norm(x1, weights, index, 0, D), rows_s).to(dtype)
        _park(scratch_s, place_s, h, D)
        _park(scratch_s + 2 * D, place_s, a_s, D)
        _park(scratch_s + 14 * D + 2 * F, place_s, x1, D)
        h = _load_step_input(
            rec_ptr, saved_rec_ptr, rows_r, rec_size, n_sequences, n_trajectories,
            user_row_r, k, _REC, noise, D, NOISE,
        )  # fmt: skip
        x1 = _before_norm1(
            h, rows_r, user_row_r, k, index + 1, _REC, weights, dropout,
            D, H, REC_SLOT, DROPOUT, PRECISION,
        )  # fmt: skip
        a_r = _zero_padding(_norm(x1, weights, index + 1, 0, D), rows_r).to(dtype)
        _park(scratch_r, place_r, h, D)
        _park(scratch_r + 2 * D, place_r, a_r, D)
        _park(scratch_r + 14 * D + 2 * F, place_r, x1, D)
        x2 = _before_norm2(
            a_s, a_r, rows_s, rows_r, gate_s, user_row_s, k, index, _SEARCH, weights, dropout,
            D, H, SEARCH_SLOT, REC_SLOT, DROPOUT, PRECISION,
        )  # fmt: skip
        _park(scratch_s + 15 * D + 2 * F, place_s, x2, D)
        x2 = _before_norm2(
            a_r, a_s, rows_r, rows_s, gate_r, user_row_r, k, index + 1, _REC, weights, dropout,
            D, H, REC_SLOT, SEARCH_SLOT, DROPOUT, PRECISION,
        )  # fmt: skip
        _park(scratch_r + 15 * D + 2 * F, place_r, x2, D)
        tl.debug_barrier()  # other threads read what these parked

        da_s = tl.zeros([M_S, D], tl.float32)
        da_r = tl.zeros([M_R, D], tl.float32)
        dh = tl.load(dsearch_ptr + carry_s, mask=stored_s, other=0.0)
        da_s, da_r = _cross_bwd(
            dh, scratch_s, scratch_r, place_s, place_r, rows_s, rows_r, gate_s,
            da_s, da_r, user_row_s, k, index, _SEARCH, weights, dropout,
            dnorm_s, keys_ptr, dpooled, dkeys, pooled_stride, first, end_sequence, n_trajectories,
            D, F, H, SEARCH_SLOT, REC_SLOT, BLOCK_F, DROPOUT, POOL, PRECISION,
        )  # fmt: skip
        dh = tl.load(drec_ptr + carry_r, mask=stored_r, other=0.0)
        da_r, da_s = _cross_bwd(
            dh, scratch_r, scratch_s, place_r, place_s, rows_r, rows_s, gate_r,
            da_r, da_s, user_row_r, k, index + 1, _REC, weights, dropout,
            dnorm_r, keys_ptr + D, dpooled + D, dkeys + D, pooled_stride,
            first, end_sequence, n_trajectories,
            D, F, H, REC_SLOT, SEARCH_SLOT, BLOCK_F, DROPOUT, POOL, PRECISION,
        )  # fmt: skip
        dh = _self_bwd(
            da_s, scratch_s, place_s, rows_s, user_row_s, k, index, _SEARCH, weights, dropout,
            dnorm_s, keys_ptr, dpooled, dkeys, pooled_stride, first, end_sequence, n_trajectories,
            D, F, H, SEARCH_SLOT, DROPOUT, POOL, PRECISION,
        )  # fmt: skip
        tl.store(dsearch_ptr + carry_s, dh, mask=stored_s)
        dh = _self_bwd(
            da_r, scratch_r, place_r, rows_r, user_row_r, k, index + 1, _REC, weights, dropout,
            dnorm_r, keys_ptr + D, dpooled + D, dkeys + D, pooled_stride,
            first, end_sequence, n_trajectories,
            D, F, H, REC_SLOT, DROPOUT, POOL, PRECISION,
        )  # fmt: skip
        tl.store(drec_ptr + carry_r, dh, mask=stored_r)
        tl.debug_barrier()


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


def _config(D: int, slot_s: int, slot_r: int, dtype: torch.dtype) -> dict[str, Any]:
    rows = max(slot_s, slot_r)
    return {"USERS": max(1, 32 // rows), "num_warps": 4 if rows <= 32 else 8, "num_stages": 1}


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
    slot_s, slot_r = _slot(search_size), _slot(rec_size)
    config = _config(D, slot_s, slot_r, search.dtype)
    if B * N:
        with on_device(search):
            _latent_reasoning_fwd_kernel[(triton.cdiv(B * N, config["USERS"]),)](
                search, rec, search_lengths, rec_lengths, rows, target_keys, *weights,
                search_out, rec_out, pooled, saved_search, saved_rec,
                B * N, N, search_size, rec_size, steps, int(weights[0].shape[0] > 1),
                noise_scale, noise_seed,
                dropout_threshold, 65536.0 / (65536 - dropout_threshold), dropout_seed,
                D=D, F=F, H=n_heads, SEARCH_SLOT=slot_s, REC_SLOT=slot_r,
                BLOCK_F=32 if F % 32 == 0 else 16,
                NOISE=noise_scale != 0.0, DROPOUT=dropout_threshold > 0,
                POOL=has_pool, SAVE=save_states,
                PRECISION=dot_precision(search.dtype), **config,
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
    """Launch the backward kernel on chunks of users and multiply out the weight gradients.

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

    slot_s, slot_r = _slot(search_size), _slot(rec_size)
    config = _config(D, slot_s, slot_r, search.dtype)
    C = _scratch_columns(D, F)
    user_bytes = N * K * (search_size + rec_size) * C * search.element_size()
    chunk = min(B, max(1, _SCRATCH_BYTES // max(user_bytes, 1)))
    float32: dict[str, Any] = {"dtype": torch.float32, "device": search.device}
    dkeys = torch.empty((B, N, K, 2, 2, D) if has_pool else (0,), **float32)
    for start in range(0, B, chunk):
        end = min(start + chunk, B)
        n = (end - start) * N
        programs = triton.cdiv(n, config["USERS"])
        scratch_s = search.new_empty(K, n * search_size, C)
        scratch_r = rec.new_empty(K, n * rec_size, C)
        dh_s = torch.empty(end - start, N, search_size, D, **float32)
        dh_r = torch.empty(end - start, N, rec_size, D, **float32)
        dnorm = torch.empty(programs, K, 2, 3, 2, D, **float32)
        with on_device(search):
            _latent_reasoning_bwd_kernel[(programs,)](
                dsearch_out, drec_out, dpooled, search, rec, search_lengths, rec_lengths, rows,
                target_keys, *weights, saved_search, saved_rec, scratch_s, scratch_r, dh_s, dh_r,
                dkeys, dnorm, start * N, end * N,
                B * N, N, search_size, rec_size, K, int(not shared), noise_scale, noise_seed,
                dropout_threshold, 65536.0 / (65536 - dropout_threshold), dropout_seed,
                D=D, F=F, H=n_heads, SEARCH_SLOT=slot_s, REC_SLOT=slot_r,
                BLOCK_F=32 if F % 32 == 0 else 16,
                NOISE=noise_scale != 0.0, DROPOUT=dropout_threshold > 0, POOL=has_pool,
                PRECISION=dot_precision(search.dtype), **config,
            )  # fmt: skip
        dsearch[start:end] = dh_s.sum(1)
        drec[start:end] = dh_r.sum(1)
        dnorm = dnorm.transpose(0, 1)  # [K, programs, 2, 3, 2, D]
        if shared:
            scratch_s, scratch_r = scratch_s.view(1, -1, C), scratch_r.view(1, -1, C)
            dnorm = dnorm.reshape(1, -1, 2, 3, 2, D)
        _add_weight_gradients(totals, (scratch_s, scratch_r), dnorm, D, F)
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
_OWN_TYPES = {
    "search_lengths_ptr": "*i64", "rec_lengths_ptr": "*i64", "rows_ptr": "*i64",
    "dsearch_ptr": "*fp32", "drec_ptr": "*fp32", "dkeys_ptr": "*fp32", "dnorm_ptr": "*fp32",
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


def variants() -> Iterator[Variant]:
    """Yield what models with two heads and F = D launch, in training and in rollouts.

    L is the longer history. Training pools every step and drops (``train``), or draws trajectories
    (``rollout``); ``infer`` does neither.
    """
    plain = {"NOISE": False, "DROPOUT": False, "POOL": False, "SAVE": False}
    train = {"NOISE": False, "DROPOUT": True, "POOL": True, "SAVE": True}
    rollout = {"NOISE": True, "DROPOUT": False, "POOL": False, "SAVE": True}
    for call in _CALLS:
        dim, dtype = call.dim, call.dtype
        slot = _slot(call.size)
        shape = {
            "D": dim, "F": dim, "H": 2, "SEARCH_SLOT": slot, "REC_SLOT": slot, "BLOCK_F": 32,
            "PRECISION": call.precision,
        } | _config(dim, slot, slot, dtype)  # fmt: skip
        kind = _TYPES[dtype]
        if dtype == torch.float32:
            kind += f"-{call.precision}"
        elif call.weights == dtype:
            kind += "-weights"
        suffix = f"{kind}-d{dim}-L{call.size}"
        for name, kernel, switches in (
            ("fwd-infer", _latent_reasoning_fwd_kernel, plain),
            ("fwd-train", _latent_reasoning_fwd_kernel, train),
            ("fwd-rollout", _latent_reasoning_fwd_kernel, rollout),
            ("bwd-train", _latent_reasoning_bwd_kernel, train),
            ("bwd-rollout", _latent_reasoning_bwd_kernel, rollout),
        ):
            constants = shape | switches
            yield _variant(f"{name}-{suffix}", kernel, dtype, call.weights, constants)
