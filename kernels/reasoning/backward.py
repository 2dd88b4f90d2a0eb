"""Latent cross reasoning, backward: a kernel a sublayer and stream (docs/fused-kernel.md).

Each step is computed again from its input and then differentiated. No atomics: a program owns what
it writes. Sublayers meet in float32 gradients and in scratch, where each step leaves a row for
every row of its states (scratch.py). The kernels of self-attention and FFN serve an encoder's
layers too, where SHAPE.SUBLAYERS is 2.
"""

import triton
import triton.language as tl

from lcr_fast.kernels.core.noise import Dropout, Noise
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.reasoning.pooling import pool_bwd
from lcr_fast.kernels.reasoning.scratch import scratch_columns
from lcr_fast.kernels.reasoning.step import (
    apply_dropout,
    before_last_norm,
    before_norm1,
    before_norm2,
    load_initial,
    norm,
    zero_padding,
)
from lcr_fast.kernels.reasoning.sublayers import attention_bwd, ffn_bwd, layer_norm_bwd
from lcr_fast.kernels.reasoning.tile import (
    columns,
    load_of_user,
    load_tile,
    locate_rows,
    memory_lengths,
    sequence_lengths,
    store_tile,
    tile_at,
)
from lcr_fast.kernels.reasoning.weights import attention_at, ffn_at, norm_at


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


_RUNTIME_NUMBERS = [
    "n_sequences", "n_trajectories", "size", "memory_size", "first_step", "k", "steps",
    "set_stride", "stream", "saved_sequences", "dropout_threshold",
]  # fmt: skip


@kernel(do_not_specialize=_RUNTIME_NUMBERS)
def recompute_self_kernel(
    x_ptr,  # [B, L, D]
    lengths_ptr,  # [B]
    user_rows_ptr,  # [B]
    attention,  # AttentionWeights of the self-attention
    norms,  # NormWeights
    saved_ptr,  # [K-1, saved_sequences, L, D], at the first sequence of this launch
    scratch_ptr,  # [steps of this launch, sequences, L, columns]
    n_sequences,
    n_trajectories,
    size,
    first_step,
    set_stride,
    stream,
    saved_sequences,
    noise_scale,
    noise_seed_ptr,  # int64 []
    dropout_threshold,
    dropout_scale,
    dropout_seed_ptr,  # int64 []
    SHAPE: tl.constexpr,
    SLOT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    NOISE: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Leave h, x1, a and ones of one stream in scratch; one program a tile and step."""
    D: tl.constexpr = SHAPE.D
    C: tl.constexpr = scratch_columns(D, SHAPE.F, SHAPE.SUBLAYERS)
    M: tl.constexpr = SEQUENCES * SLOT
    noise = Noise(noise_scale, noise_seed_ptr)
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed_ptr)
    first = tl.program_id(0).to(tl.int64) * SEQUENCES
    k = first_step + tl.program_id(1)
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, lengths_ptr, n_trajectories, size, M, SLOT)
    scratch_ptr += tl.program_id(1).to(tl.int64) * n_sequences * size * C.width
    at = tile_at(scratch_ptr, rows, size, C.width)
    user_row = rows.sequence
    if NOISE or DROPOUT:
        user_row = load_of_user(user_rows_ptr, first, n_sequences, n_trajectories, M, SLOT)
    h = _load_step_input(
        x_ptr, saved_ptr, rows, size, saved_sequences, n_trajectories, user_row, k, stream,
        noise, D, NOISE,
    )  # fmt: skip
    store_tile(at, tl.full([M, C.h - C.ones], 1.0, tl.float32), C.h - C.ones)
    store_tile(columns(at, C.h), h, D)
    lengths = memory_lengths(
        lengths_ptr, first, n_sequences, n_trajectories, size, M, SLOT, SEQUENCES
    )
    x1 = before_norm1(
        h, lengths, user_row, rows.position, k, index, stream, attention, dropout,
        SHAPE, SEQUENCES, DROPOUT,
    )  # fmt: skip
    store_tile(columns(at, C.x1), x1, D)
    a = norm(x1, norms, index, 0, h.dtype, SHAPE)
    store_tile(columns(at, C.a), zero_padding(a, rows), D)


@kernel(do_not_specialize=_RUNTIME_NUMBERS)
def recompute_cross_kernel(
    lengths_ptr,  # [B]
    memory_lengths_ptr,  # [B]
    user_rows_ptr,  # [B]
    attention,  # AttentionWeights of the cross-attention
    scratch_ptr,  # [steps of this launch, sequences, L, columns]
    memory_scratch_ptr,  # [steps of this launch, sequences, L', columns]
    n_sequences,
    n_trajectories,
    size,
    memory_size,
    first_step,
    set_stride,
    stream,
    dropout_threshold,
    dropout_scale,
    dropout_seed_ptr,  # int64 []
    SHAPE: tl.constexpr,
    SLOT: tl.constexpr,
    MEMORY_SLOT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Leave x2 of one stream in scratch, where a is; one program a tile and step."""
    D: tl.constexpr = SHAPE.D
    C: tl.constexpr = scratch_columns(D, SHAPE.F, SHAPE.SUBLAYERS)
    M: tl.constexpr = SEQUENCES * SLOT
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed_ptr)
    first = tl.program_id(0).to(tl.int64) * SEQUENCES
    k = first_step + tl.program_id(1)
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, lengths_ptr, n_trajectories, size, M, SLOT)
    memory_rows = locate_rows(
        first, n_sequences, memory_lengths_ptr, n_trajectories, memory_size,
        SEQUENCES * MEMORY_SLOT, MEMORY_SLOT,
    )  # fmt: skip
    step = tl.program_id(1).to(tl.int64) * n_sequences * C.width
    scratch_ptr += step * size
    memory_scratch_ptr += step * memory_size
    gate = load_of_user(memory_lengths_ptr, first, n_sequences, n_trajectories, M, SLOT) > 0
    user_row = rows.sequence
    if DROPOUT:
        user_row = load_of_user(user_rows_ptr, first, n_sequences, n_trajectories, M, SLOT)
    lengths = memory_lengths(
        memory_lengths_ptr, first, n_sequences, n_trajectories, memory_size, M, SLOT, SEQUENCES
    )
    at = tile_at(scratch_ptr, rows, size, C.width)
    memory_at = tile_at(memory_scratch_ptr, memory_rows, memory_size, C.width)
    x2 = before_norm2(
        load_tile(columns(at, C.a), D), load_tile(columns(memory_at, C.a), D), lengths,
        gate.to(tl.float32), user_row, rows.position, k, index, stream, attention, dropout,
        SHAPE, SEQUENCES, DROPOUT,
    )  # fmt: skip
    store_tile(columns(at, C.x2), x2, D)


@kernel(do_not_specialize=_RUNTIME_NUMBERS)
def ffn_bwd_kernel(
    dout_ptr,  # [B, N, L, D] upstream gradient of h^(K)
    dpooled_ptr,  # [B, N, K, 2, 2, D]
    dh_ptr,  # float32 [B, N, L, D] gradient of h^(k+1), if that is not h^(K)
    dx2_ptr,  # float32 [B, N, L, D]; an encoder's da
    lengths_ptr,  # [B]
    memory_lengths_ptr,  # [B]
    user_rows_ptr,  # [B]
    keys_ptr,  # [B, 2, D]
    ffn,  # FfnWeights
    norms,  # NormWeights
    scratch_ptr,  # [sequences, L, columns] of this step
    dkeys_ptr,  # float32 [B, N, K, 2, 2, D]
    dnorm_ptr,  # float32 [programs, K, 2, SUBLAYERS, 2, D] weight and bias of each norm
    n_sequences,
    n_trajectories,
    size,
    k,
    steps,
    set_stride,
    stream,
    dropout_threshold,
    dropout_scale,
    dropout_seed_ptr,  # int64 []
    SHAPE: tl.constexpr,
    SLOT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    DROPOUT: tl.constexpr,
    POOL: tl.constexpr,
    PARKED: tl.constexpr,
):
    """Of one stream and step, backward of h = LN3(c + m3 FFN(c)), c = LN2(x2), pooling included.

    Leaves dx2, and in scratch the gradient of the cross-attention's output; of an encoder's layer
    da, as c is a.
    """
    D: tl.constexpr = SHAPE.D
    C: tl.constexpr = scratch_columns(D, SHAPE.F, SHAPE.SUBLAYERS)
    M: tl.constexpr = SEQUENCES * SLOT
    HAS_CROSS: tl.constexpr = SHAPE.SUBLAYERS == 3
    LAST: tl.constexpr = SHAPE.SUBLAYERS - 1
    dtype: tl.constexpr = scratch_ptr.dtype.element_ty
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed_ptr)
    program = tl.program_id(0).to(tl.int64)
    first = program * SEQUENCES
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, lengths_ptr, n_trajectories, size, M, SLOT)
    at = tile_at(scratch_ptr, rows, size, C.width)
    user_row = rows.sequence
    if DROPOUT:
        user_row = load_of_user(user_rows_ptr, first, n_sequences, n_trajectories, M, SLOT)
    dnorm = dnorm_ptr + ((program * steps + k) * 2 + stream) * (2 * SHAPE.SUBLAYERS * D)
    pooled_stride = steps.to(tl.int64) * (4 * D)
    at_h = (4 * k + 2 + stream) * D  # in [K, 2, 2, D]

    if HAS_CROSS:
        x2 = load_tile(columns(at, C.x2), D).to(tl.float32)
        c = norm(x2, norms, index, 1, dtype, SHAPE)
        if SHAPE.F > 0:
            store_tile(columns(at, C.c), c, D)
    else:
        c = load_tile(columns(at, C.c), D)
    x3 = c.to(tl.float32)
    if SHAPE.F > 0:
        x3 = before_last_norm(
            c, user_row, rows.position, k, index, stream, ffn, dropout, SHAPE, DROPOUT
        )
    if k == steps - 1:  # padding carries no gradient, whatever the upstream tensor holds there
        valid = (rows.position < rows.length)[:, None]
        dh = load_tile(tile_at(dout_ptr, rows, size, D), D)
        dh = tl.where(valid, dh.to(tl.float32), 0.0)
    else:
        dh = load_tile(tile_at(dh_ptr, rows, size, D), D)
    if POOL:
        h = c
        if SHAPE.F > 0:
            h = norm(x3, norms, index, LAST, dtype, SHAPE)
        dh = pool_bwd(
            dh, h, sequence_lengths(
                lengths_ptr, first, n_sequences, n_trajectories, size, SEQUENCES
            ),
            keys_ptr + stream * D, dpooled_ptr + at_h, dkeys_ptr + at_h, pooled_stride,
            first, n_sequences, n_trajectories, SEQUENCES,
        )  # fmt: skip
    if SHAPE.F > 0:
        of_norm = norm_at(norms, index, LAST, SHAPE)
        dc = layer_norm_bwd(dh, x3, of_norm, dnorm + 2 * LAST * D, D)
        dy = apply_dropout(dc, user_row, rows.position, k, stream, LAST, dropout, SHAPE, DROPOUT)
        dy = dy.to(dtype)
        store_tile(columns(at, C.ffn_dy), dy, D)
        dh = ffn_bwd(
            dy, columns(at, C.ffn_dy), c, columns(at, C.c), dc,
            columns(at, C.hidden), columns(at, C.dhidden),
            ffn_at(ffn, index, D, SHAPE.F), SHAPE, PARKED,
        )  # fmt: skip

    if HAS_CROSS:
        x2 = load_tile(columns(at, C.x2), D).to(tl.float32)
        dh = layer_norm_bwd(dh, x2, norm_at(norms, index, 1, SHAPE), dnorm + 2 * D, D)
    store_tile(tile_at(dx2_ptr, rows, size, D), dh, D)
    if HAS_CROSS:
        dy = apply_dropout(dh, user_row, rows.position, k, stream, 1, dropout, SHAPE, DROPOUT)
        gate = load_of_user(memory_lengths_ptr, first, n_sequences, n_trajectories, M, SLOT) > 0
        store_tile(columns(at, C.cross_dy), tl.where(gate[:, None], dy, 0.0), D)


@kernel(do_not_specialize=_RUNTIME_NUMBERS)
def cross_bwd_kernel(
    dx2_ptr,  # float32 [B, N, L, D]
    da_ptr,  # float32 [B, N, L, D]
    dmemory_ptr,  # float32 [B, N, L', D]
    lengths_ptr,  # [B]
    memory_lengths_ptr,  # [B]
    attention,  # AttentionWeights of the cross-attention
    scratch_ptr,  # [sequences, L, columns] of this step
    memory_scratch_ptr,  # [sequences, L', columns]
    n_sequences,
    n_trajectories,
    size,
    memory_size,
    k,
    set_stride,
    stream,
    SHAPE: tl.constexpr,
    SLOT: tl.constexpr,
    MEMORY_SLOT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PARKED: tl.constexpr,
):
    """Of one stream and step, backward of x2 = a + g m2 MCA(a, memory): da and dmemory."""
    D: tl.constexpr = SHAPE.D
    C: tl.constexpr = scratch_columns(D, SHAPE.F, SHAPE.SUBLAYERS)
    M: tl.constexpr = SEQUENCES * SLOT
    first = tl.program_id(0).to(tl.int64) * SEQUENCES
    rows = locate_rows(first, n_sequences, lengths_ptr, n_trajectories, size, M, SLOT)
    memory_rows = locate_rows(
        first, n_sequences, memory_lengths_ptr, n_trajectories, memory_size,
        SEQUENCES * MEMORY_SLOT, MEMORY_SLOT,
    )  # fmt: skip
    at = tile_at(scratch_ptr, rows, size, C.width)
    memory_at = tile_at(memory_scratch_ptr, memory_rows, memory_size, C.width)
    dy_at, a_at = columns(at, C.cross_dy), columns(at, C.a)
    a_memory_at = columns(memory_at, C.a)
    da, dmemory = attention_bwd(
        load_tile(dy_at, D), dy_at, load_tile(a_at, D), a_at,
        load_tile(a_memory_at, D), a_memory_at, memory_rows.length,
        load_tile(tile_at(dx2_ptr, rows, size, D), D),
        tl.zeros([SEQUENCES * MEMORY_SLOT, D], tl.float32),
        columns(at, C.cross_heads), columns(at, C.cross_dq),
        columns(memory_at, C.cross_dk), columns(memory_at, C.cross_dv),
        attention_at(attention, 2 * k * set_stride + stream, D),
        SHAPE, SLOT, MEMORY_SLOT, False, PARKED,
    )  # fmt: skip
    store_tile(tile_at(da_ptr, rows, size, D), da, D)
    store_tile(tile_at(dmemory_ptr, memory_rows, memory_size, D), dmemory, D)


@kernel(do_not_specialize=_RUNTIME_NUMBERS)
def self_bwd_kernel(
    da_ptr,  # float32 [B, N, L, D], of the stream's own cross-attention, or of an encoder's FFN
    dmemory_ptr,  # float32 [B, N, L, D], of the other's
    dpooled_ptr,  # [B, N, K, 2, 2, D]
    dh_ptr,  # float32 [B, N, L, D] gradient of h^(k)
    lengths_ptr,  # [B]
    user_rows_ptr,  # [B]
    keys_ptr,  # [B, 2, D]
    attention,  # AttentionWeights of the self-attention
    norms,  # NormWeights
    scratch_ptr,  # [sequences, L, columns] of this step
    dkeys_ptr,  # float32 [B, N, K, 2, 2, D]
    dnorm_ptr,  # float32 [programs, K, 2, SUBLAYERS, 2, D]
    n_sequences,
    n_trajectories,
    size,
    k,
    steps,
    set_stride,
    stream,
    dropout_threshold,
    dropout_scale,
    dropout_seed_ptr,  # int64 []
    SHAPE: tl.constexpr,
    SLOT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    DROPOUT: tl.constexpr,
    POOL: tl.constexpr,
    PARKED: tl.constexpr,
):
    """Of one stream and step, backward of a = LN1(x1), x1 = h + m1 MSA(h), pooling included."""
    D: tl.constexpr = SHAPE.D
    C: tl.constexpr = scratch_columns(D, SHAPE.F, SHAPE.SUBLAYERS)
    M: tl.constexpr = SEQUENCES * SLOT
    dtype: tl.constexpr = scratch_ptr.dtype.element_ty
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed_ptr)
    program = tl.program_id(0).to(tl.int64)
    first = program * SEQUENCES
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, lengths_ptr, n_trajectories, size, M, SLOT)
    at = tile_at(scratch_ptr, rows, size, C.width)
    user_row = rows.sequence
    if DROPOUT:
        user_row = load_of_user(user_rows_ptr, first, n_sequences, n_trajectories, M, SLOT)
    dnorm = dnorm_ptr + ((program * steps + k) * 2 + stream) * (2 * SHAPE.SUBLAYERS * D)
    pooled_stride = steps.to(tl.int64) * (4 * D)
    at_a = (4 * k + stream) * D  # in [K, 2, 2, D]

    da = load_tile(tile_at(da_ptr, rows, size, D), D)
    if SHAPE.SUBLAYERS == 3:
        da += load_tile(tile_at(dmemory_ptr, rows, size, D), D)
    if POOL:
        da = pool_bwd(
            da, load_tile(columns(at, C.a), D), sequence_lengths(
                lengths_ptr, first, n_sequences, n_trajectories, size, SEQUENCES
            ),
            keys_ptr + stream * D, dpooled_ptr + at_a, dkeys_ptr + at_a, pooled_stride,
            first, n_sequences, n_trajectories, SEQUENCES,
        )  # fmt: skip
    x1 = load_tile(columns(at, C.x1), D).to(tl.float32)
    dx1 = layer_norm_bwd(da, x1, norm_at(norms, index, 0, SHAPE), dnorm, D)
    dy = apply_dropout(dx1, user_row, rows.position, k, stream, 0, dropout, SHAPE, DROPOUT)
    dy = dy.to(dtype)
    dy_at = columns(at, C.self_dy)
    store_tile(dy_at, dy, D)
    h_at = columns(at, C.h)
    h = load_tile(h_at, D)
    dh, _ = attention_bwd(
        dy, dy_at, h, h_at, h, h_at, rows.length, dx1, dx1,
        columns(at, C.self_heads), columns(at, C.self_dq), columns(at, C.self_dk),
        columns(at, C.self_dv),
        attention_at(attention, index, D), SHAPE, SLOT, SLOT, True, PARKED,
    )  # fmt: skip
    store_tile(tile_at(dh_ptr, rows, size, D), dh, D)
