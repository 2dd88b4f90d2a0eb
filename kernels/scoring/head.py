"""The MLP of the head over rows, one candidate of one trajectory each, whichever user they are of.

A layer is a kernel, a program a tile of rows and of the layer's columns. What one leaves for the
next are operands: float32 is split into its parts once, where it is made.

Rows R = users x N x C of a chunk of users that starts at ``first_user``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lcr_fast.kernels.core.noise import Dropout
from lcr_fast.kernels.core.product import (
    load_operand,
    multiply,
    n_parts,
    operand,
    rounded_products,
    store_operand,
    transposed,
    whole,
)
from lcr_fast.kernels.ptxas import kernel
from lcr_fast.kernels.scoring.tile import (
    hidden_keep,
    load_vectors,
    relu,
    third_layer_weights,
)


class Rows(NamedTuple):
    """Which rows there are: integers, each an argument of a kernel."""

    n_rows: Any
    n_candidates: Any
    of_user: Any  # rows of a user: trajectories x candidates
    first_user: Any


# Neither these nor the threshold of dropout are compiled in.
_NUMBERS = ["n_rows", "n_candidates", "rows_of_user", "first_user", "threshold"]


@triton.jit
def _rows_of_tile(rows, tile, ROWS: tl.constexpr):
    """Give a tile's first row, int64, and which of its rows there are, [ROWS]."""
    row_0 = tile.to(tl.int64) * ROWS
    return row_0, row_0 + tl.arange(0, ROWS) < rows.n_rows


@triton.jit
def _locate(rows, row_0, inside):
    """Give each row's user and the candidate's position: [ROWS]."""
    row = row_0.to(tl.int32) + tl.arange(0, inside.shape[0])
    row = tl.where(inside, row, 0)
    return rows.first_user + row // rows.of_user, row % rows.n_candidates


@triton.jit
def _load(x_ptr, rows, row_0, inside, columns, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Load columns [n] of an operand [parts, R, WIDTH]: [ROWS, n] each."""
    ROWS: tl.constexpr = inside.shape[0]
    offsets = tl.arange(0, ROWS)[:, None] * WIDTH + columns[None, :]
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    part = rows.n_rows.to(tl.int64) * WIDTH
    return load_operand(x_ptr + row_0 * WIDTH, offsets, mask, part, PRECISION)


@triton.jit
def _store(x_ptr, rows, row_0, inside, columns, x, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Store float32 [ROWS, n] as :func:`_load` loads it."""
    ROWS: tl.constexpr = inside.shape[0]
    offsets = tl.arange(0, ROWS)[:, None] * WIDTH + columns[None, :]
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    part = rows.n_rows.to(tl.int64) * WIDTH
    store_operand(x_ptr + row_0 * WIDTH, offsets, x, mask, part, PRECISION)


@triton.jit
def _times_weight(
    x_ptr,  # [parts, R, DEPTH]
    rows,
    row_0,
    inside,  # [ROWS]
    weight_ptr,  # [parts, OUT, IN]
    columns,  # [n] of the result
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute columns of x W^T, or of x W if not TRANSPOSED: float32 [ROWS, n]."""
    y = tl.zeros([inside.shape[0], columns.shape[0]], tl.float32)
    for first in range(0, DEPTH, BLOCK_DEPTH):
        depth = first + tl.arange(0, BLOCK_DEPTH)
        x = _load(x_ptr, rows, row_0, inside, depth, DEPTH, PRECISION)
        is_depth = depth < DEPTH
        if TRANSPOSED:
            mask = (columns < OUT)[:, None] & is_depth[None, :]
            offsets = columns[:, None] * IN + depth[None, :]
            weight = load_operand(weight_ptr, offsets, mask, OUT * IN, PRECISION)
            y = multiply(x, transposed(weight, PRECISION), PRECISION, y)
        else:
            mask = is_depth[:, None] & (columns < IN)[None, :]
            offsets = depth[:, None] * IN + columns[None, :]
            weight = load_operand(weight_ptr, offsets, mask, OUT * IN, PRECISION)
            y = multiply(x, weight, PRECISION, y)
    return y


@kernel(do_not_specialize=_NUMBERS)
def hidden_kernel(
    inputs_ptr,  # [parts, R, 3D] z_r, z_s, e
    w1_ptr,  # [parts, H1, 3D (+ D)]
    b1_ptr,  # [H1]
    user_ptr,  # [B, D]
    user_rows_ptr,  # [B]
    hidden_ptr,  # [parts, R, H1]
    n_rows,
    n_candidates,
    rows_of_user,
    first_user,
    threshold,
    scale,
    seed_ptr,  # int64 []
    D: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Make hidden = m1 relu(t1) of BLOCK units."""
    H1: tl.constexpr = HEAD.H1
    WIDTH: tl.constexpr = 4 * D if HEAD.HAS_USER else 3 * D
    # That of the states, to which a user's vector is cast.
    DTYPE: tl.constexpr = inputs_ptr.dtype.element_ty if n_parts(PRECISION) == 1 else tl.float32
    n_blocks: tl.constexpr = (H1 + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    rows = Rows(n_rows, n_candidates, rows_of_user, first_user)
    row_0, inside = _rows_of_tile(rows, pid // n_blocks, ROWS)
    first = pid % n_blocks * BLOCK
    units = first + tl.arange(0, BLOCK)
    is_unit = units < H1
    t1 = _times_weight(
        inputs_ptr, rows, row_0, inside, w1_ptr, units,
        3 * D, H1, WIDTH, True, BLOCK_DEPTH, PRECISION,
    )  # fmt: skip
    user, position = _locate(rows, row_0, inside)
    if HEAD.HAS_USER:
        for column in range(0, D, BLOCK_DEPTH):
            u = load_vectors(user_ptr, user, inside, column, D, BLOCK_DEPTH, DTYPE)
            depth = 3 * D + column + tl.arange(0, BLOCK_DEPTH)
            offsets = units[:, None] * WIDTH + depth[None, :]
            weight = load_operand(w1_ptr, offsets, is_unit[:, None], H1 * WIDTH, PRECISION)
            u = operand(u, PRECISION)
            t1 = multiply(u, transposed(weight, PRECISION), PRECISION, t1)
    t1 += tl.load(b1_ptr + units, mask=is_unit, other=0.0).to(tl.float32)[None, :]
    x = relu(t1)
    if HEAD.DROPOUT:
        dropout = Dropout(threshold, scale, seed_ptr)
        row = tl.load(user_rows_ptr + user)
        x = tl.where(hidden_keep(dropout, row, position, 0, first, x), x * scale, 0.0)
    _store(hidden_ptr, rows, row_0, inside, units, x, H1, PRECISION)


@triton.jit
def _second_layer(
    hidden_ptr, w2_ptr, b2_ptr, rows, row_0, inside,
    HEAD: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute t2, [ROWS, H2_TILE]."""
    outputs = tl.arange(0, HEAD.H2_TILE)
    t2 = _times_weight(
        hidden_ptr, rows, row_0, inside, w2_ptr, outputs,
        HEAD.H1, HEAD.H2, HEAD.H1, True, BLOCK_DEPTH, PRECISION,
    )  # fmt: skip
    return t2 + tl.load(b2_ptr + outputs, mask=outputs < HEAD.H2, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _second_keep(user_rows_ptr, rows, row_0, inside, dropout, like):
    """Say which units of the second layer, ``like`` [ROWS, H2_TILE], are kept: bool."""
    user, position = _locate(rows, row_0, inside)
    row = tl.load(user_rows_ptr + user)
    return hidden_keep(dropout, row, position, 1, 0, like)


@triton.jit
def _load_input(inputs_ptr, rows, row_0, inside, which, D: tl.constexpr, PRECISION: tl.constexpr):
    """Load z_r (0), z_s (1) or e (2) as a whole: float32 [ROWS, D]."""
    columns = which * D + tl.arange(0, D)
    return whole(_load(inputs_ptr, rows, row_0, inside, columns, 3 * D, PRECISION))


@kernel(do_not_specialize=_NUMBERS)
def output_kernel(
    inputs_ptr,  # [parts, R, 3D] z_r, z_s, e
    hidden_ptr,  # [parts, R, H1]
    w2_ptr,  # [parts, H2, H1]
    mlp,  # Mlp
    user_rows_ptr,  # [B]
    scores_ptr,  # [B, N, C]
    n_rows,
    n_candidates,
    rows_of_user,
    first_user,
    threshold,
    scale,
    seed_ptr,  # int64 []
    D: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Score: y = w3 . m2 relu(t2) + b3, and the dot product if the head has one."""
    rows = Rows(n_rows, n_candidates, rows_of_user, first_user)
    row_0, inside = _rows_of_tile(rows, tl.program_id(0), ROWS)
    t2 = _second_layer(
        hidden_ptr, w2_ptr, mlp.b2, rows, row_0, inside, HEAD, BLOCK_DEPTH, PRECISION
    )
    x = relu(t2)
    if HEAD.DROPOUT:
        dropout = Dropout(threshold, scale, seed_ptr)
        keep = _second_keep(user_rows_ptr, rows, row_0, inside, dropout, t2)
        x = tl.where(keep, x * scale, 0.0)
    y = tl.sum(x * third_layer_weights(mlp, HEAD)[None, :], 1) + tl.load(mlp.b3).to(tl.float32)
    if HEAD.DOT:
        z = _load_input(inputs_ptr, rows, row_0, inside, 0, D, PRECISION)
        z += _load_input(inputs_ptr, rows, row_0, inside, 1, D, PRECISION)
        e = _load_input(inputs_ptr, rows, row_0, inside, 2, D, PRECISION)
        y += tl.sum(z * e, 1)
    first_row = rows.first_user * rows.of_user.to(tl.int64) + row_0
    scores_ptrs = scores_ptr + first_row + tl.arange(0, ROWS)
    tl.store(scores_ptrs, y.to(scores_ptr.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=_NUMBERS)
def output_bwd_kernel(
    hidden_ptr,  # [parts, R, H1]
    w2_ptr,  # [parts, H2, H1]
    mlp,  # Mlp
    user_rows_ptr,  # [B]
    dscores_ptr,  # [B, N, C]
    dt2_ptr,  # [parts, R, H2]
    sums_ptr,  # float32 [tiles, 2, H2] sums over a tile: dt2, dy m2 relu(t2)
    n_rows,
    n_candidates,
    rows_of_user,
    first_user,
    threshold,
    scale,
    seed_ptr,  # int64 []
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Make dt2 = dy w3 m2 [t2 > 0]."""
    H2: tl.constexpr = HEAD.H2
    tile = tl.program_id(0)
    rows = Rows(n_rows, n_candidates, rows_of_user, first_user)
    row_0, inside = _rows_of_tile(rows, tile, ROWS)
    t2 = _second_layer(
        hidden_ptr, w2_ptr, mlp.b2, rows, row_0, inside, HEAD, BLOCK_DEPTH, PRECISION
    )
    first_row = rows.first_user * rows.of_user.to(tl.int64) + row_0
    dy = tl.load(dscores_ptr + first_row + tl.arange(0, ROWS), mask=inside, other=0.0)
    dy = dy.to(tl.float32)
    x2 = relu(t2)
    dt2 = tl.where(t2 > 0, dy[:, None] * third_layer_weights(mlp, HEAD)[None, :], 0.0)
    if HEAD.DROPOUT:
        dropout = Dropout(threshold, scale, seed_ptr)
        keep = _second_keep(user_rows_ptr, rows, row_0, inside, dropout, t2)
        x2 = tl.where(keep, x2 * scale, 0.0)
        dt2 = tl.where(keep, dt2 * scale, 0.0)
    outputs = tl.arange(0, HEAD.H2_TILE)
    sums_ptrs = sums_ptr + tile.to(tl.int64) * (2 * H2) + outputs
    tl.store(sums_ptrs, tl.sum(dt2, 0), mask=outputs < H2)
    tl.store(sums_ptrs + H2, tl.sum(rounded_products(dy[:, None], x2), 0), mask=outputs < H2)
    _store(dt2_ptr, rows, row_0, inside, outputs, dt2, H2, PRECISION)


@kernel(do_not_specialize=_NUMBERS[:-1])
def hidden_bwd_kernel(
    hidden_ptr,  # [parts, R, H1]
    w2_ptr,  # [parts, H2, H1]
    dt2_ptr,  # [parts, R, H2]
    dt1_ptr,  # [parts, R, H1]
    sums_ptr,  # float32 [tiles, H1] sums over a tile of dt1
    n_rows,
    n_candidates,
    rows_of_user,
    first_user,
    scale,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Make dt1 = W2^T dt2 m1 [t1 > 0] of BLOCK units."""
    H1: tl.constexpr = HEAD.H1
    n_blocks: tl.constexpr = (H1 + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    tile = pid // n_blocks
    rows = Rows(n_rows, n_candidates, rows_of_user, first_user)
    row_0, inside = _rows_of_tile(rows, tile, ROWS)
    units = pid % n_blocks * BLOCK + tl.arange(0, BLOCK)
    dt1 = _times_weight(
        dt2_ptr, rows, row_0, inside, w2_ptr, units,
        HEAD.H2, HEAD.H2, H1, False, BLOCK_DEPTH, PRECISION,
    )  # fmt: skip
    # What is positive was neither cut off nor dropped; its largest part is enough to tell.
    offsets = tl.arange(0, ROWS)[:, None] * H1 + units[None, :]
    mask = inside[:, None] & (units < H1)[None, :]
    hidden = tl.load(hidden_ptr + row_0 * H1 + offsets, mask=mask, other=0.0)
    dt1 = tl.where(hidden > 0, dt1 * scale if HEAD.DROPOUT else dt1, 0.0)
    sums_ptrs = sums_ptr + tile.to(tl.int64) * H1 + units
    tl.store(sums_ptrs, tl.sum(dt1, 0), mask=units < H1)
    _store(dt1_ptr, rows, row_0, inside, units, dt1, H1, PRECISION)


@kernel(do_not_specialize=_NUMBERS[:-1])
def inputs_bwd_kernel(
    inputs_ptr,  # [parts, R, 3D] z_r, z_s, e
    dt1_ptr,  # [parts, R, H1]
    w1_ptr,  # [parts, H1, 3D (+ D)]
    dscores_ptr,  # [B, N, C]
    dinputs_ptr,  # [R, 3D]
    softmax_ptr,  # float32 [2, 3, R], of each stream; here the last of the three, dz . z
    n_rows,
    n_candidates,
    rows_of_user,
    first_user,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Make dz_r, dz_s or de, without what e gains by the keys."""
    H1: tl.constexpr = HEAD.H1
    WIDTH: tl.constexpr = 4 * D if HEAD.HAS_USER else 3 * D
    pid = tl.program_id(0)
    which = pid % 3
    rows = Rows(n_rows, n_candidates, rows_of_user, first_user)
    row_0, inside = _rows_of_tile(rows, pid // 3, ROWS)
    axis = tl.arange(0, D)
    i = tl.arange(0, ROWS)
    dx = tl.zeros([ROWS, D], tl.float32)
    if H1 > 0:
        dx += _times_weight(
            dt1_ptr, rows, row_0, inside, w1_ptr, which * D + axis,
            H1, H1, WIDTH, False, BLOCK_DEPTH, PRECISION,
        )  # fmt: skip
    if HEAD.DOT:
        first_row = rows.first_user * rows.of_user.to(tl.int64) + row_0
        dy = tl.load(dscores_ptr + first_row + i, mask=inside, other=0.0).to(tl.float32)
        # z_r and z_s gain by e, and e by both.
        other = _load_input(
            inputs_ptr, rows, row_0, inside, tl.where(which < 2, 2, 0), D, PRECISION
        )
        if which == 2:
            other += _load_input(inputs_ptr, rows, row_0, inside, 1, D, PRECISION)
        dx += dy[:, None] * other
    dx = dx.to(dinputs_ptr.dtype.element_ty)
    offsets = i[:, None] * (3 * D) + (which * D + axis)[None, :]
    tl.store(dinputs_ptr + row_0 * (3 * D) + offsets, dx, mask=inside[:, None])
    if which < 2:
        # From the rounded dz, which is what the next kernels multiply with the states.
        z = _load_input(inputs_ptr, rows, row_0, inside, which, D, PRECISION)
        mean = tl.sum(dx.to(tl.float32) * z, 1)
        stream = 1 - which
        softmax_ptr += (stream * 3 + 2) * rows.n_rows.to(tl.int64) + row_0
        tl.store(softmax_ptr + i, mean, mask=inside)


@kernel(do_not_specialize=["n_rows", "rows_of_user", "first_user"])
def user_bwd_kernel(
    dt1_ptr,  # [parts, R, H1]
    w1_ptr,  # [parts, H1, 4D]
    dt1_sums_ptr,  # float32 [B, H1] sum of dt1 over a user's rows
    duser_ptr,  # [B, D]
    n_rows,
    rows_of_user,
    first_user,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    USER_ROWS: tl.constexpr,
    USER_BLOCK: tl.constexpr,
):
    """Make du of one user, whose vector all of its rows share."""
    H1: tl.constexpr = HEAD.H1
    user = tl.program_id(0).to(tl.int64)
    b = first_user + user
    axis = tl.arange(0, D)
    du = tl.zeros([D], tl.float32)
    dt1_ptr += user * rows_of_user * H1
    part = n_rows.to(tl.int64) * H1
    for first_unit in range(0, H1, USER_BLOCK):
        units = first_unit + tl.arange(0, USER_BLOCK)
        is_unit = units < H1
        sums = tl.zeros([USER_BLOCK], tl.float32)
        for first in range(0, rows_of_user, USER_ROWS):
            row = tl.arange(0, USER_ROWS)
            offsets = row[:, None] * H1 + units[None, :]
            mask = (first + row < rows_of_user)[:, None] & is_unit[None, :]
            rows_ptr = dt1_ptr + tl.cast(first, tl.int64) * H1
            dt1 = load_operand(rows_ptr, offsets, mask, part, PRECISION)
            sums += tl.sum(whole(dt1), 0)
        tl.store(dt1_sums_ptr + b * H1 + units, sums, mask=is_unit)
        offsets = units[:, None] * (4 * D) + (3 * D + axis)[None, :]
        w_u = load_operand(w1_ptr, offsets, is_unit[:, None], H1 * 4 * D, PRECISION)
        du += tl.sum(whole(w_u) * sums[:, None], 0)
    tl.store(duser_ptr + b * D + axis, du.to(duser_ptr.dtype.element_ty))
