"""Device functions of one reasoning step, for its forward and backward kernels.

For each stream x with the other stream x', g = 1 if x' has an event, else 0, and dropout masks m:

    x1 = h_x + m1 MSA_x(h_x)                         a_x = LN1(x1)
    x2 = a_x + g m2 MCA_x(Q = a_x, K = V = a_x')     c_x = LN2(x2)
    x3 = c_x + m3 FFN_x(c_x)                         h_x <- LN3(x3)

States between sublayers have the tensors' dtype, which is also that of the products' operands;
products accumulate in float32, softmax, LayerNorm and all sums are float32.

A state comes with the place where it is parked (``h_at`` beside ``h``), if PARKED: then it is read
from there for every use, and takes no registers meanwhile.
"""

import triton
import triton.language as tl

from lcr_fast.kernels.core.noise import dropout_keep, normal_noise
from lcr_fast.kernels.reasoning.sublayers import attention, ffn, layer_norm
from lcr_fast.kernels.reasoning.tile import load_of_user, locate_rows, park, unpark
from lcr_fast.kernels.reasoning.weights import attention_at, ffn_at, norm_at

# Dropout sites, as in lcr_fast/ops/noise.py: step k has three a stream.
_REASONING_SITES = tl.constexpr(1 << 13)
_STREAM_SITES = tl.constexpr(1 << 12)

SEARCH = tl.constexpr(0)
REC = tl.constexpr(1)


@triton.jit
def apply_dropout(
    update, user_row, position, k, stream: tl.constexpr, place: tl.constexpr, dropout,
    D: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Drop from a sublayer's output; ``place`` is 0 for MSA, 1 for MCA, 2 for FFN."""
    if DROPOUT:
        site = _REASONING_SITES + stream * _STREAM_SITES + 3 * k + place
        if (
            dropout.threshold > 0
        ):  # always; a branch keeps the drawing out of the products before it
            keep = dropout_keep(user_row, position, site, dropout.threshold, dropout.seed, D)
            update = tl.where(keep, update * dropout.scale, 0.0)
    return update


@triton.jit
def locate_stream(
    first, end, lengths_ptr, memory_lengths_ptr, user_rows_ptr, n_trajectories, size,
    M: tl.constexpr, SLOT: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """Rows of a stream's tile, which of them have the other stream to read, and their users' rows.

    The last are what noise and dropout are drawn for, if ``DRAWS``.
    """
    rows = locate_rows(first, end, lengths_ptr, n_trajectories, size, M, SLOT)
    gate = load_of_user(memory_lengths_ptr, first, end, n_trajectories, M, SLOT) > 0
    user_row = rows.sequence
    if DRAWS:
        user_row = load_of_user(user_rows_ptr, first, end, n_trajectories, M, SLOT)
    return rows, gate, user_row


@triton.jit
def load_initial(
    x_ptr, rows, size, n_trajectories, user_row, stream: tl.constexpr, noise,
    D: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """h^(0) + noise_scale eps on valid positions, 0 elsewhere, in the tensor's dtype: [M, D]."""
    valid = (rows.position < rows.length)[:, None]
    user = rows.sequence // n_trajectories
    offsets = (user * size + rows.position)[:, None] * D + tl.arange(0, D)[None, :]
    h = tl.load(x_ptr + offsets, mask=valid, other=0.0)
    if NOISE:
        trajectory_stream = 2 * (rows.sequence % n_trajectories) + stream
        eps = normal_noise(user_row, rows.position, trajectory_stream, noise.seed, D)
        h = tl.where(valid, h.to(tl.float32) + noise.scale * eps, 0.0)
    return h.to(x_ptr.dtype.element_ty)


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
        y = apply_dropout(y, user_row, position, k, stream, place, dropout, D, DROPOUT)
        y += x.to(tl.float32)
    return y


@triton.jit
def before_norm1(
    h, h_at, rows, user_row, k, index, stream: tl.constexpr, weights, dropout,
    SHAPE: tl.constexpr, SLOT: tl.constexpr, DROPOUT: tl.constexpr, PARKED: tl.constexpr,
):  # fmt: skip
    """x1 = h + m1 MSA(h): float32 [M, D]."""
    D: tl.constexpr = SHAPE.D
    y = _residual(unpark(h, h_at, D, PARKED), DROPOUT)
    y = attention(
        h, h_at, h, h_at, rows.length, y, rows.position < rows.length,
        attention_at(weights, index, D), SHAPE, SLOT, SLOT, PARKED,
    )  # fmt: skip
    if DROPOUT:
        h = unpark(h, h_at, D, PARKED)
    return _add_update(y, h, user_row, rows.position, k, stream, 0, dropout, D, DROPOUT)


@triton.jit
def before_norm2(
    a, a_at, memory, memory_at, rows, memory_rows, gate, user_row, k, index, stream: tl.constexpr,
    weights, dropout,
    SHAPE: tl.constexpr, SLOT: tl.constexpr, MEMORY_SLOT: tl.constexpr, DROPOUT: tl.constexpr,
    PARKED: tl.constexpr,
):  # fmt: skip
    """x2 = a + g m2 MCA(a, memory): float32 [M, D]; ``gate`` is bool [M]."""
    D: tl.constexpr = SHAPE.D
    y = _residual(unpark(a, a_at, D, PARKED), DROPOUT)
    y = attention(
        a, a_at, memory, memory_at, memory_rows.length, y, gate,
        attention_at(weights, index, D), SHAPE, SLOT, MEMORY_SLOT, PARKED,
    )  # fmt: skip
    if DROPOUT:
        a = unpark(a, a_at, D, PARKED)
    return _add_update(y, a, user_row, rows.position, k, stream, 1, dropout, D, DROPOUT)


@triton.jit
def before_norm3(
    c, c_at, rows, user_row, k, index, stream: tl.constexpr, weights, dropout,
    SHAPE: tl.constexpr, DROPOUT: tl.constexpr, PARKED: tl.constexpr,
):  # fmt: skip
    """x3 = c + m3 FFN(c): float32 [M, D]."""
    D: tl.constexpr = SHAPE.D
    y = _residual(unpark(c, c_at, D, PARKED), DROPOUT)
    y = ffn(c, c_at, y, ffn_at(weights, index, D, SHAPE.F), SHAPE, PARKED)
    if DROPOUT:
        c = unpark(c, c_at, D, PARKED)
    return _add_update(y, c, user_row, rows.position, k, stream, 2, dropout, D, DROPOUT)


@triton.jit
def norm(x, norms, index, which: tl.constexpr, D: tl.constexpr):
    """LN of a stream and step, ``which`` being 0, 1 or 2: float32 [M, D]."""
    return layer_norm(x, norm_at(norms, index, which, D), D)


@triton.jit
def zero_padding(x, rows):
    """Keep a tile [M, D] at events, 0 at padding."""
    return tl.where((rows.position < rows.length)[:, None], x, 0.0)


@triton.jit
def after_cross(
    x2, h_at, rows, user_row, k, index, stream: tl.constexpr, weights, dropout,
    dtype: tl.constexpr, SHAPE: tl.constexpr, DROPOUT: tl.constexpr, PARKED: tl.constexpr,
):  # fmt: skip
    """Compute h = LN3(c + m3 FFN(c)) of c = LN2(x2), 0 at padding: [M, D].

    With PARKED, c stands where the step's h stood.
    """
    D: tl.constexpr = SHAPE.D
    c = norm(x2, weights.norms, index, 1, D)
    if SHAPE.F > 0:
        c = c.to(dtype)
        park(h_at, c, D, PARKED)
        x3 = before_norm3(
            c, h_at, rows, user_row, k, index, stream, weights.ffn, dropout, SHAPE, DROPOUT, PARKED
        )
        c = norm(x3, weights.norms, index, 2, D)
    return zero_padding(c, rows).to(dtype)
