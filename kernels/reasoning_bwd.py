"""Latent cross reasoning, backward: a kernel a sublayer and stream (docs/fused-kernel.md).

Each step is computed again from its input and then differentiated. No atomics: a program owns what
it writes. Sublayers meet in float32 gradients and in scratch, where each step leaves a row for
every row of its states, in these columns:

    X    h | self heads | a | cross heads | c | FFN hidden                                5 D + F
    dY   self dq, dk, dv | self dy | cross dq | dk, dv as memory | cross dy | FFN dy | dhidden
                                                                                          9 D + F
    x1 | x2                                                                               2 D

The host multiplies columns of dY with columns of X, which gives the gradients of all matrices.
"""

import triton
import triton.language as tl

from lcr_fast.kernels.blocks import (
    attention_bwd,
    columns,
    ffn_bwd,
    key_slots,
    layer_norm_bwd,
    load_of_user,
    load_tile,
    locate_rows,
    pool_bwd,
    store_tile,
    tile_at,
)
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.steps import (
    apply_dropout,
    before_norm1,
    before_norm2,
    before_norm3,
    cross_weights,
    ffn_weights,
    load_initial,
    norm,
    norm_weights,
    self_weights,
    zero_padding,
)


def scratch_columns(D: int, F: int) -> int:
    """Width of a row of scratch."""
    return 16 * D + 2 * F


@triton.jit
def _scratch_at(ptr, rows, size, D: tl.constexpr, F: tl.constexpr):
    return tile_at(ptr, rows, size, 16 * D + 2 * F)


@triton.jit
def _load_step_input(
    x_ptr, saved_ptr, rows, size, saved_sequences, n_trajectories, user_row, k,
    stream: tl.constexpr, noise, D: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """h^(k): the saved one, or for k = 0 the noisy input as the forward pass read it."""
    if k == 0:
        h = load_initial(x_ptr, rows, size, n_trajectories, user_row, stream, noise, D, NOISE)
    else:
        step = saved_sequences.to(tl.int64) * size * D * (k - 1)
        h = load_tile(tile_at(saved_ptr + step, rows, size, D), D)
    return h


_STREAM_SIZES = [
    "n_sequences", "n_trajectories", "size", "memory_size", "k", "steps", "set_stride", "stream",
    "saved_sequences", "noise_seed", "dropout_threshold", "dropout_seed",
]  # fmt: skip


@kernel(do_not_specialize=_STREAM_SIZES)
def recompute_self_kernel(
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
    NOISE: tl.constexpr, DROPOUT: tl.constexpr, RELOAD: tl.constexpr, PRECISION: tl.constexpr,
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
    scratch_ptr += k.to(tl.int64) * n_sequences * size * (16 * D + 2 * F)
    at = _scratch_at(scratch_ptr, rows, size, D, F)
    user_row = rows[0]
    if NOISE or DROPOUT:
        user_row = load_of_user(rows_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT)
    h = _load_step_input(
        x_ptr, saved_ptr, rows, size, saved_sequences, n_trajectories, user_row, k, stream,
        noise, D, NOISE,
    )  # fmt: skip
    store_tile(at, h, D)
    x1 = before_norm1(
        h, at, rows, user_row, k, index, stream, weights, dropout,
        D, H, SLOT, DROPOUT, RELOAD, PRECISION,
    )  # fmt: skip
    store_tile(columns(at, 14 * D + 2 * F), x1, D)
    a = zero_padding(norm(x1, weights, index, 0, D), rows)
    store_tile(columns(at, 2 * D), a, D)


@kernel(do_not_specialize=_STREAM_SIZES)
def recompute_cross_kernel(
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
    DROPOUT: tl.constexpr, RELOAD: tl.constexpr, PRECISION: tl.constexpr,
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
    step = k.to(tl.int64) * n_sequences * (16 * D + 2 * F)
    scratch_ptr += step * size
    memory_scratch_ptr += step * memory_size
    gate = (
        load_of_user(memory_lengths_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT) > 0
    )
    user_row = rows[0]
    if DROPOUT:
        user_row = load_of_user(rows_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT)
    at = _scratch_at(scratch_ptr, rows, size, D, F)
    a_at = columns(at, 2 * D)
    memory_at = columns(_scratch_at(memory_scratch_ptr, memory_rows, memory_size, D, F), 2 * D)
    x2 = before_norm2(
        load_tile(a_at, D), a_at, load_tile(memory_at, D), memory_at, rows, memory_rows, gate,
        user_row, k, index, stream, weights, dropout,
        D, H, SLOT, MEMORY_SLOT, DROPOUT, RELOAD, PRECISION,
    )  # fmt: skip
    store_tile(columns(at, 15 * D + 2 * F), x2, D)


@kernel(do_not_specialize=_STREAM_SIZES)
def ffn_bwd_kernel(
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
    BLOCK_F: tl.constexpr, DROPOUT: tl.constexpr, POOL: tl.constexpr, RELOAD: tl.constexpr,
    PRECISION: tl.constexpr,
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
    at = _scratch_at(scratch_ptr, rows, size, D, F)
    user_row = sequence
    if DROPOUT:
        user_row = load_of_user(rows_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT)
    dnorm = dnorm_ptr + ((program * steps + k) * 2 + stream) * (6 * D)
    pooled_stride = steps.to(tl.int64) * (4 * D)
    at_h = (4 * k + 2 + stream) * D  # in [K, 2, 2, D]

    x2 = load_tile(columns(at, X2), D).to(tl.float32)
    c = norm(x2, weights, index, 1, D).to(dtype)
    x3 = c.to(tl.float32)
    if F > 0:
        store_tile(columns(at, 4 * D), c, D)
        x3 = before_norm3(
            c, columns(at, 4 * D), rows, user_row, k, index, stream, weights, dropout,
            D, F, BLOCK_F, DROPOUT, RELOAD, PRECISION,
        )  # fmt: skip
    if k == steps - 1:  # padding carries no gradient, whatever the upstream tensor holds there
        valid = (position < length)[:, None]
        dh = load_tile(tile_at(dout_ptr, rows, size, D), D)
        dh = tl.where(valid, dh.to(tl.float32), 0.0)
    else:
        dh = load_tile(tile_at(dh_ptr, rows, size, D), D)
    if POOL:
        h = x3
        if F > 0:
            h = norm(x3, weights, index, 2, D)
        dh = pool_bwd(
            dh, zero_padding(h, rows).to(dtype), key_slots(length, SLOT), keys_ptr + stream * D,
            dpooled_ptr + at_h, dkeys_ptr + at_h, pooled_stride,
            first, n_sequences, n_trajectories, D, USERS,
        )  # fmt: skip
    if F > 0:
        norm_weight_ptr, _ = norm_weights(weights, index, 2, D)
        dc = layer_norm_bwd(dh, x3, norm_weight_ptr, dnorm + 4 * D, D)
        dy = apply_dropout(dc, user_row, position, k, stream, 2, dropout, D, DROPOUT).to(dtype)
        store_tile(columns(at, DY + 8 * D), dy, D)
        dh = ffn_bwd(
            dy, columns(at, DY + 8 * D), c, columns(at, 4 * D), dc,
            columns(at, 5 * D), columns(at, DY + 9 * D),
            ffn_weights(weights, index, D, F), D, F, BLOCK_F, RELOAD, PRECISION,
        )  # fmt: skip

    norm_weight_ptr, _ = norm_weights(weights, index, 1, D)
    x2 = load_tile(columns(at, X2), D).to(tl.float32)
    dx2 = layer_norm_bwd(dh, x2, norm_weight_ptr, dnorm + 2 * D, D)
    store_tile(tile_at(dx2_ptr, rows, size, D), dx2, D)
    dy = apply_dropout(dx2, user_row, position, k, stream, 1, dropout, D, DROPOUT)
    gate = (
        load_of_user(memory_lengths_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT) > 0
    )
    store_tile(columns(at, DY + 7 * D), tl.where(gate[:, None], dy, 0.0), D)


@kernel(do_not_specialize=_STREAM_SIZES)
def cross_bwd_kernel(
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
    SLOT: tl.constexpr, MEMORY_SLOT: tl.constexpr, USERS: tl.constexpr,
    RELOAD: tl.constexpr, PRECISION: tl.constexpr,
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
    at = _scratch_at(scratch_ptr, rows, size, D, F)
    memory_at = _scratch_at(memory_scratch_ptr, memory_rows, memory_size, D, F)
    dy_at, a_at = columns(at, DY + 7 * D), columns(at, 2 * D)
    a_memory_at = columns(memory_at, 2 * D)
    da, dmemory = attention_bwd(
        load_tile(dy_at, D), dy_at, load_tile(a_at, D), a_at,
        load_tile(a_memory_at, D), a_memory_at, memory_rows[2],
        load_tile(tile_at(dx2_ptr, rows, size, D), D),
        tl.zeros([USERS * MEMORY_SLOT, D], tl.float32),
        columns(at, 3 * D), columns(at, DY + 4 * D),
        columns(memory_at, DY + 5 * D), columns(memory_at, DY + 6 * D),
        cross_weights(weights, 2 * k * set_stride + stream, D),
        D, H, SLOT, MEMORY_SLOT, False, RELOAD, PRECISION,
    )  # fmt: skip
    store_tile(tile_at(da_ptr, rows, size, D), da, D)
    store_tile(tile_at(dmemory_ptr, memory_rows, memory_size, D), dmemory, D)


@kernel(do_not_specialize=_STREAM_SIZES)
def self_bwd_kernel(
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
    DROPOUT: tl.constexpr, POOL: tl.constexpr, RELOAD: tl.constexpr, PRECISION: tl.constexpr,
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
    at = _scratch_at(scratch_ptr, rows, size, D, F)
    user_row = sequence
    if DROPOUT:
        user_row = load_of_user(rows_ptr, first, n_sequences, n_trajectories, USERS * SLOT, SLOT)
    dnorm = dnorm_ptr + ((program * steps + k) * 2 + stream) * (6 * D)
    pooled_stride = steps.to(tl.int64) * (4 * D)
    at_a = (4 * k + stream) * D  # in [K, 2, 2, D]

    da = load_tile(tile_at(da_ptr, rows, size, D), D)
    da += load_tile(tile_at(dmemory_ptr, rows, size, D), D)
    if POOL:
        da = pool_bwd(
            da, load_tile(columns(at, 2 * D), D), key_slots(length, SLOT),
            keys_ptr + stream * D, dpooled_ptr + at_a, dkeys_ptr + at_a, pooled_stride,
            first, n_sequences, n_trajectories, D, USERS,
        )  # fmt: skip
    x1 = load_tile(columns(at, X1), D).to(tl.float32)
    norm_weight_ptr, _ = norm_weights(weights, index, 0, D)
    dx1 = layer_norm_bwd(da, x1, norm_weight_ptr, dnorm, D)
    dy = apply_dropout(dx1, user_row, position, k, stream, 0, dropout, D, DROPOUT).to(dtype)
    dy_at = columns(at, DY + 3 * D)
    store_tile(dy_at, dy, D)
    h = load_tile(at, D)
    dh, _ = attention_bwd(
        dy, dy_at, h, at, h, at, length, dx1, dx1,
        columns(at, D), columns(at, DY), columns(at, DY + D), columns(at, DY + 2 * D),
        self_weights(weights, index, D), D, H, SLOT, SLOT, True, RELOAD, PRECISION,
    )  # fmt: skip
    store_tile(tile_at(dh_ptr, rows, size, D), dh, D)
