"""Latent cross reasoning, backward: a kernel a sublayer (docs/fused-kernel.md).

Each step is computed again from its input and then differentiated. No atomics: a program owns what
it writes. Sublayers meet in float32 gradients and in scratch, where each step leaves a row for
every row of its states (scratch.py). The kernels of self-attention and FFN serve an encoder's
layers too, where SHAPE.SUBLAYERS is 2.

A program has a tile of one stream: ``first_stream`` plus its place on the second axis of the grid.
Streams whose slots differ are launched one by one.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lcr_fast.kernels.core.layout import laid_out_as
from lcr_fast.kernels.core.noise import Dropout, Noise
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.reasoning.pooling import pool_bwd
from lcr_fast.kernels.reasoning.scratch import scratch_columns
from lcr_fast.kernels.reasoning.step import (
    apply_dropout,
    before_last_norm,
    before_norm1,
    before_norm2,
    choose_stream,
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

_RUNTIME_NUMBERS = [
    "first_stream", "n_sequences", "n_trajectories", "search_size", "rec_size", "set_stride",
    "first_step", "k", "steps", "saved_sequences", "dropout_threshold",
]  # fmt: skip


class BackwardStream(NamedTuple):
    """One stream's tensors, of which no kernel takes all."""

    states: Any  # [B, L, D] h^(0)
    lengths: Any  # int64 [B]
    saved: Any  # [K-1, saved_sequences, L, D], at the first sequence of this launch
    scratch: Any  # [steps of this launch, sequences, L, columns]
    dout: Any  # [B, N, L, D] upstream gradient of h^(K)
    dh: Any  # float32 [B, N, L, D] gradient of h^(k+1), if that is not h^(K), then of h^(k)
    da: Any  # float32 [B, N, L, D] gradient of x2, then of a as its own cross-attention has it
    dmemory: Any  # float32 [B, N, L, D] gradient of a as the other stream's has it


@triton.jit
def _load_step_input(
    x, rows, size, saved_sequences, n_trajectories, user_row, k, stream, noise,
    D: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """h^(k): the saved one, or for k = 0 the noisy input as the forward pass read it."""
    if k == 0:
        h = load_initial(x.states, rows, size, n_trajectories, user_row, stream, noise, D, NOISE)
    else:
        step = saved_sequences.to(tl.int64) * size * D * (k - 1)
        h = load_tile(tile_at(x.saved + step, rows, size, D), D)
    return h


@kernel(do_not_specialize=_RUNTIME_NUMBERS)
def recompute_self_kernel(
    search,  # BackwardStream
    rec,  # BackwardStream
    first_stream,
    user_rows_ptr,  # [B]
    attention,  # AttentionWeights of the self-attention
    norms,  # NormWeights
    n_sequences,
    n_trajectories,
    search_size,
    rec_size,
    set_stride,
    first_step,
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
    """Leave h, x1, a and ones in scratch; one program a tile, stream and step."""
    D: tl.constexpr = SHAPE.D
    C: tl.constexpr = scratch_columns(D, SHAPE.F, SHAPE.SUBLAYERS)
    M: tl.constexpr = SEQUENCES * SLOT
    noise = Noise(noise_scale, noise_seed_ptr)
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed_ptr)
    first = tl.program_id(0).to(tl.int64) * SEQUENCES
    stream = first_stream + tl.program_id(1)
    x, size = choose_stream(stream, search, rec, search_size, rec_size)
    k = first_step + tl.program_id(2)
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, x.lengths, n_trajectories, size, M, SLOT)
    scratch_ptr = x.scratch + tl.program_id(2).to(tl.int64) * n_sequences * size * C.width
    at = tile_at(scratch_ptr, rows, size, C.width)
    user_row = rows.sequence
    if NOISE or DROPOUT:
        user_row = load_of_user(user_rows_ptr, first, n_sequences, n_trajectories, M, SLOT)
    h = _load_step_input(
        x, rows, size, saved_sequences, n_trajectories, user_row, k, stream, noise, D, NOISE
    )
    store_tile(at, tl.full([M, C.h - C.ones], 1.0, tl.float32), C.h - C.ones)
    store_tile(columns(at, C.h), h, D)
    lengths = memory_lengths(
        x.lengths, first, n_sequences, n_trajectories, size, M, SLOT, SEQUENCES
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
    search,  # BackwardStream
    rec,  # BackwardStream
    first_stream,
    user_rows_ptr,  # [B]
    attention,  # AttentionWeights of the cross-attention
    n_sequences,
    n_trajectories,
    search_size,
    rec_size,
    set_stride,
    first_step,
    dropout_threshold,
    dropout_scale,
    dropout_seed_ptr,  # int64 []
    SHAPE: tl.constexpr,
    SLOT: tl.constexpr,
    MEMORY_SLOT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Leave x2 in scratch, where a is; one program a tile, stream and step."""
    D: tl.constexpr = SHAPE.D
    C: tl.constexpr = scratch_columns(D, SHAPE.F, SHAPE.SUBLAYERS)
    M: tl.constexpr = SEQUENCES * SLOT
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed_ptr)
    first = tl.program_id(0).to(tl.int64) * SEQUENCES
    stream = first_stream + tl.program_id(1)
    x, size = choose_stream(stream, search, rec, search_size, rec_size)
    memory, memory_size = choose_stream(stream, rec, search, rec_size, search_size)
    k = first_step + tl.program_id(2)
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, x.lengths, n_trajectories, size, M, SLOT)
    memory_rows = locate_rows(
        first, n_sequences, memory.lengths, n_trajectories, memory_size,
        SEQUENCES * MEMORY_SLOT, MEMORY_SLOT,
    )  # fmt: skip
    gate = load_of_user(memory.lengths, first, n_sequences, n_trajectories, M, SLOT) > 0
    user_row = rows.sequence
    if DROPOUT:
        user_row = load_of_user(user_rows_ptr, first, n_sequences, n_trajectories, M, SLOT)
    lengths = memory_lengths(
        memory.lengths, first, n_sequences, n_trajectories, memory_size, M, SLOT, SEQUENCES
    )
    step = tl.program_id(2).to(tl.int64) * n_sequences * C.width
    at = tile_at(x.scratch + step * size, rows, size, C.width)
    memory_at = tile_at(memory.scratch + step * memory_size, memory_rows, memory_size, C.width)
    x2 = before_norm2(
        load_tile(columns(at, C.a), D), load_tile(columns(memory_at, C.a), D), lengths,
        gate.to(tl.float32), user_row, rows.position, k, index, stream, attention, dropout,
        SHAPE, SEQUENCES, DROPOUT,
    )  # fmt: skip
    store_tile(columns(at, C.x2), x2, D)


@kernel(do_not_specialize=_RUNTIME_NUMBERS)
def ffn_bwd_kernel(
    search,  # BackwardStream
    rec,  # BackwardStream
    first_stream,
    user_rows_ptr,  # [B]
    keys_ptr,  # [B, 2, D]
    dpooled_ptr,  # [B, N, K, 2, 2, D]
    dkeys_ptr,  # float32 [B, N, K, 2, 2, D]
    ffn,  # FfnWeights
    norms,  # NormWeights
    dnorm_ptr,  # float32 [programs, K, 2, SUBLAYERS, 2, D] weight and bias of each norm
    n_sequences,
    n_trajectories,
    search_size,
    rec_size,
    set_stride,
    k,
    steps,
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
    """Of one step, backward of h = LN3(c + m3 FFN(c)), c = LN2(x2), pooling included.

    Leaves dx2 in da, and in scratch the gradient of the cross-attention's output. In an encoder's
    layer, where c is a, what it leaves in da is just that.
    """
    D: tl.constexpr = SHAPE.D
    C: tl.constexpr = scratch_columns(D, SHAPE.F, SHAPE.SUBLAYERS)
    M: tl.constexpr = SEQUENCES * SLOT
    HAS_CROSS: tl.constexpr = SHAPE.SUBLAYERS == 3
    LAST: tl.constexpr = SHAPE.SUBLAYERS - 1
    dtype: tl.constexpr = search.scratch.dtype.element_ty
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed_ptr)
    program = tl.program_id(0).to(tl.int64)
    first = program * SEQUENCES
    stream = first_stream + tl.program_id(1)
    x, size = choose_stream(stream, search, rec, search_size, rec_size)
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, x.lengths, n_trajectories, size, M, SLOT)
    at = tile_at(x.scratch, rows, size, C.width)
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
        dh = load_tile(tile_at(x.dout, rows, size, D), D)
        dh = tl.where(valid, dh.to(tl.float32), 0.0)
    else:
        dh = load_tile(tile_at(x.dh, rows, size, D), D)
    if POOL:
        dh = laid_out_as(dh, x3)
        h = c
        if SHAPE.F > 0:
            h = norm(x3, norms, index, LAST, dtype, SHAPE)
        dh = pool_bwd(
            dh, h, sequence_lengths(
                x.lengths, first, n_sequences, n_trajectories, size, SEQUENCES
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
            ffn_at(ffn, index, SHAPE), SHAPE, PARKED,
        )  # fmt: skip

    if HAS_CROSS:
        x2 = laid_out_as(load_tile(columns(at, C.x2), D).to(tl.float32), dh)
        dh = layer_norm_bwd(dh, x2, norm_at(norms, index, 1, SHAPE), dnorm + 2 * D, D)
    store_tile(tile_at(x.da, rows, size, D), dh, D)
    if HAS_CROSS:
        dy = apply_dropout(dh, user_row, rows.position, k, stream, 1, dropout, SHAPE, DROPOUT)
        memory, _ = choose_stream(stream, rec, search, rec_size, search_size)
        gate = load_of_user(memory.lengths, first, n_sequences, n_trajectories, M, SLOT) > 0
        store_tile(columns(at, C.cross_dy), tl.where(gate[:, None], dy, 0.0), D)


@kernel(do_not_specialize=_RUNTIME_NUMBERS)
def cross_bwd_kernel(
    search,  # BackwardStream
    rec,  # BackwardStream
    first_stream,
    attention,  # AttentionWeights of the cross-attention
    n_sequences,
    n_trajectories,
    search_size,
    rec_size,
    set_stride,
    k,
    SHAPE: tl.constexpr,
    SLOT: tl.constexpr,
    MEMORY_SLOT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PARKED: tl.constexpr,
):
    """Of one step, backward of x2 = a + g m2 MCA(a, memory): da, and dmemory of the memory."""
    D: tl.constexpr = SHAPE.D
    C: tl.constexpr = scratch_columns(D, SHAPE.F, SHAPE.SUBLAYERS)
    M: tl.constexpr = SEQUENCES * SLOT
    first = tl.program_id(0).to(tl.int64) * SEQUENCES
    stream = first_stream + tl.program_id(1)
    x, size = choose_stream(stream, search, rec, search_size, rec_size)
    memory, memory_size = choose_stream(stream, rec, search, rec_size, search_size)
    rows = locate_rows(first, n_sequences, x.lengths, n_trajectories, size, M, SLOT)
    memory_rows = locate_rows(
        first, n_sequences, memory.lengths, n_trajectories, memory_size,
        SEQUENCES * MEMORY_SLOT, MEMORY_SLOT,
    )  # fmt: skip
    at = tile_at(x.scratch, rows, size, C.width)
    memory_at = tile_at(memory.scratch, memory_rows, memory_size, C.width)
    dy_at, a_at = columns(at, C.cross_dy), columns(at, C.a)
    a_memory_at = columns(memory_at, C.a)
    da, dmemory = attention_bwd(
        load_tile(dy_at, D), dy_at, load_tile(a_at, D), a_at,
        load_tile(a_memory_at, D), a_memory_at, memory_rows.length,
        load_tile(tile_at(x.da, rows, size, D), D),
        tl.zeros([SEQUENCES * MEMORY_SLOT, D], tl.float32),
        columns(at, C.cross_heads), columns(at, C.cross_dq),
        columns(memory_at, C.cross_dk), columns(memory_at, C.cross_dv),
        attention_at(attention, 2 * k * set_stride + stream, SHAPE),
        SHAPE, SLOT, MEMORY_SLOT, False, PARKED,
    )  # fmt: skip
    store_tile(tile_at(x.da, rows, size, D), da, D)
    store_tile(tile_at(memory.dmemory, memory_rows, memory_size, D), dmemory, D)


@kernel(do_not_specialize=_RUNTIME_NUMBERS)
def self_bwd_kernel(
    search,  # BackwardStream
    rec,  # BackwardStream
    first_stream,
    user_rows_ptr,  # [B]
    keys_ptr,  # [B, 2, D]
    dpooled_ptr,  # [B, N, K, 2, 2, D]
    dkeys_ptr,  # float32 [B, N, K, 2, 2, D]
    attention,  # AttentionWeights of the self-attention
    norms,  # NormWeights
    dnorm_ptr,  # float32 [programs, K, 2, SUBLAYERS, 2, D]
    n_sequences,
    n_trajectories,
    search_size,
    rec_size,
    set_stride,
    k,
    steps,
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
    """Of one step, backward of a = LN1(x1), x1 = h + m1 MSA(h), pooling included."""
    D: tl.constexpr = SHAPE.D
    C: tl.constexpr = scratch_columns(D, SHAPE.F, SHAPE.SUBLAYERS)
    M: tl.constexpr = SEQUENCES * SLOT
    dtype: tl.constexpr = search.scratch.dtype.element_ty
    dropout = Dropout(dropout_threshold, dropout_scale, dropout_seed_ptr)
    program = tl.program_id(0).to(tl.int64)
    first = program * SEQUENCES
    stream = first_stream + tl.program_id(1)
    x, size = choose_stream(stream, search, rec, search_size, rec_size)
    index = 2 * k * set_stride + stream
    rows = locate_rows(first, n_sequences, x.lengths, n_trajectories, size, M, SLOT)
    at = tile_at(x.scratch, rows, size, C.width)
    user_row = rows.sequence
    if DROPOUT:
        user_row = load_of_user(user_rows_ptr, first, n_sequences, n_trajectories, M, SLOT)
    dnorm = dnorm_ptr + ((program * steps + k) * 2 + stream) * (2 * SHAPE.SUBLAYERS * D)
    pooled_stride = steps.to(tl.int64) * (4 * D)
    at_a = (4 * k + stream) * D  # in [K, 2, 2, D]

    da = load_tile(tile_at(x.da, rows, size, D), D)
    if SHAPE.SUBLAYERS == 3:
        da += load_tile(tile_at(x.dmemory, rows, size, D), D)
    if POOL:
        da = pool_bwd(
            da, load_tile(columns(at, C.a), D), sequence_lengths(
                x.lengths, first, n_sequences, n_trajectories, size, SEQUENCES
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
        attention_at(attention, index, SHAPE), SHAPE, SLOT, SLOT, True, PARKED,
    )  # fmt: skip
    store_tile(tile_at(x.dh, rows, size, D), dh, D)
