"""Device functions of scoring: one tile of candidates against one user's histories, and the head.

A tile has P rows, one candidate each. No row's result depends on the other rows. Products take the
dtype of the candidates' vectors, which is the states'; sums are float32.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lcr_fast.kernels.core.layout import laid_out_as
from lcr_fast.kernels.core.noise import DROPOUT_COUNTER
from lcr_fast.kernels.core.product import (
    load_operand,
    multiply,
    operand,
    product,
    transposed,
    whole,
)

# What batches and requests differ in: not to be compiled for.
SIZES = ["search_size", "rec_size", "size", "n_candidates"]
HEAD_SITES = tl.constexpr(1 << 14)  # of lcr_fast.ops.noise; a kernel knows nothing of the ops


class Stream(NamedTuple):
    """One stream's histories, [B, N, L, D], or without trajectories [B, L, D]."""

    states: Any
    lengths: Any  # int64 [B]


class Mlp(NamedTuple):
    """The head's layers; without an MLP any tensor stands for each."""

    w1: Any  # [parts, H1, 3D (+ D)], as products take it
    b1: Any  # [H1]
    w2: Any  # [parts, H2, H1], likewise
    b2: Any  # [H2]
    w3: Any  # [1, H2]
    b3: Any  # [1]


class HeadShape(NamedTuple):
    """What is compiled into the head."""

    H1: int  # widths of the hidden layers; 0 is no MLP
    H2: int
    H2_TILE: int  # H2 as a tile has it
    DOT: bool  # add the dot product
    HAS_USER: bool
    DROPOUT: bool


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # unlike tl.maximum, it lets a NaN through


@triton.jit
def load_vectors(
    items_ptr, ids, valid, first, D: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr
):
    """Gather columns first .. first + COLUMNS of item vectors [*, D]: [P, COLUMNS], 0 if invalid.

    ``ids`` and ``valid`` are [P].
    """
    offsets = ids.to(tl.int64)[:, None] * D + first + tl.arange(0, COLUMNS)[None, :]
    return tl.load(items_ptr + offsets, mask=valid[:, None], other=0.0).to(DTYPE)


@triton.jit
def load_target_weight(
    weight_ptr, stream: tl.constexpr, columns, D: tl.constexpr, PRECISION: tl.constexpr
):
    """Load some columns of a stream's W (0 search, 1 rec) of [parts, 2, D, D]: [D, n]."""
    offsets = stream * D * D + tl.arange(0, D)[:, None] * D + columns[None, :]
    return load_operand(weight_ptr, offsets, None, 2 * D * D, PRECISION)


@triton.jit
def target_keys(
    items_ptr, ids, valid, weight_ptr, stream: tl.constexpr,
    D: tl.constexpr, KEY_BLOCK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W e of one stream for the vectors of a tile of items, with W as it was prepared: [P, D].

    KEY_BLOCK columns at a time, as all of W, in the parts of a bf16x6 product, would fill the
    shared memory at D = 128.
    """
    P: tl.constexpr = ids.shape[0]
    keys = tl.zeros([P, D], tl.float32)
    for first in range(0, D, KEY_BLOCK):
        e = load_vectors(items_ptr, ids, valid, first, D, KEY_BLOCK, DTYPE)
        columns = first + tl.arange(0, KEY_BLOCK)
        weight = load_target_weight(weight_ptr, stream, columns, D, PRECISION)
        keys = multiply(operand(e, PRECISION), transposed(weight, PRECISION), PRECISION, keys)
    return keys.to(DTYPE)


@triton.jit
def load_length(stream, b, size):
    """Events of a user, int32: all of them where the length says more, as in the reference."""
    return tl.minimum(tl.load(stream.lengths + b), size).to(tl.int32)


@triton.jit
def load_events(states_ptr, events, length, D: tl.constexpr):
    # The mask is the length, not the padded size: padding may hold NaN.
    offsets = events[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(states_ptr + offsets, mask=(events < length)[:, None], other=0.0)


@triton.jit
def attend(
    keys, states_ptr, length, D: tl.constexpr, EVENTS: tl.constexpr, PRECISION: tl.constexpr
):
    """Pool states [length, D] by the softmax of keys . states, in one pass over blocks of events.

    Returns z [P, D] in float32, and the maximum and the inverse sum of the softmax, [P].
    """
    P: tl.constexpr = keys.shape[0]
    top = tl.full([P], float("-inf"), tl.float32)
    total = tl.zeros([P], tl.float32)
    z = tl.zeros([P, D], tl.float32)
    for first in range(0, length, EVENTS):
        events = first + tl.arange(0, EVENTS)
        h = load_events(states_ptr, events, length, D)  # [EVENTS, D]
        logits = product(keys, tl.trans(h), PRECISION)  # [P, EVENTS]
        logits = tl.where((events < length)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp(top - new_top)
        p = tl.exp(logits - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        z = product(p.to(h.dtype), h, PRECISION, z * shrink[:, None])
        top = new_top
    inverse = 1.0 / tl.where(length > 0, total, 1.0)
    return z * inverse[:, None], top, inverse


@triton.jit
def hidden_keep(dropout, row, positions, LAYER: tl.constexpr, first, like):
    """Say which hidden units of a layer, 0 or 1, are kept of ``like`` [P, UNITS]: bool.

    ``dropout`` is a :class:`Dropout`, ``row`` [P] the users' and ``positions`` [P] the candidates';
    a Philox call serves eight units, so ``first``, the first unit, and UNITS are multiples of 8.
    The numbers are those of :func:`dropout_keep`.
    """
    P: tl.constexpr = like.shape[0]
    UNITS: tl.constexpr = like.shape[1]
    halves = tl.zeros([P, UNITS], tl.uint16)
    if dropout.threshold > 0:  # always; a branch keeps the drawing out of the products before it
        octets = (first // 8 + tl.arange(0, UNITS // 8)).to(tl.uint32)[None, :]
        zero = tl.zeros([P, UNITS // 8], tl.uint32)
        w0, w1, w2, w3 = tl.philox(
            tl.load(dropout.seed),
            octets + zero,
            positions.to(tl.uint32)[:, None] + zero,
            tl.full([P, UNITS // 8], DROPOUT_COUNTER + HEAD_SITES + LAYER, tl.uint32),
            row.to(tl.uint32)[:, None] + zero,
        )
        # A join adds the fastest axis; in order: octet, high bit of the word, low bit, half.
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        halves = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16)).reshape(P, UNITS)
    return laid_out_as(halves.to(tl.int32), like) >= dropout.threshold


@triton.jit
def _input_product(
    x, mlp, units, which: tl.constexpr, t, D: tl.constexpr, HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what an input [P, D] gives hidden ``units`` to t; ``which`` is its place in the row."""
    WIDTH: tl.constexpr = 4 * D if HEAD.HAS_USER else 3 * D
    offsets = units[:, None] * WIDTH + (tl.arange(0, D) + which * D)[None, :]  # [BLOCK, D]
    mask = (units < HEAD.H1)[:, None]
    weight = load_operand(mlp.w1, offsets, mask, HEAD.H1 * WIDTH, PRECISION)
    return multiply(operand(x, PRECISION), transposed(weight, PRECISION), PRECISION, t)


@triton.jit
def _first_layer(z_r, z_s, e, user_ptr, mlp, units, HEAD: tl.constexpr, PRECISION: tl.constexpr):
    """Compute t1 [P, BLOCK] of hidden ``units`` [BLOCK].

    z_r, z_s, e are [P, D] in the states' dtype, the user's vector [D].
    """
    D: tl.constexpr = e.shape[1]
    t = _input_product(z_r, mlp, units, 0, None, D, HEAD, PRECISION)
    t = _input_product(z_s, mlp, units, 1, t, D, HEAD, PRECISION)
    t = _input_product(e, mlp, units, 2, t, D, HEAD, PRECISION)
    shared = tl.load(mlp.b1 + units, mask=units < HEAD.H1, other=0.0).to(tl.float32)
    if HEAD.HAS_USER:
        axis = tl.arange(0, D)
        u = tl.load(user_ptr + axis).to(e.dtype).to(tl.float32)
        offsets = units[:, None] * (4 * D) + (axis + 3 * D)[None, :]
        mask = (units < HEAD.H1)[:, None]
        w_u = whole(load_operand(mlp.w1, offsets, mask, HEAD.H1 * 4 * D, PRECISION))
        shared += tl.sum(w_u * u[None, :], 1)
    return t + shared[None, :]


@triton.jit
def third_layer_weights(mlp, HEAD: tl.constexpr):
    """w3 in float32: [H2_TILE]."""
    outputs = tl.arange(0, HEAD.H2_TILE)
    return tl.load(mlp.w3 + outputs, mask=outputs < HEAD.H2, other=0.0).to(tl.float32)


@triton.jit
def _second_layer(
    z_r, z_s, e, user_ptr, mlp, dropout, row, positions,
    HEAD: tl.constexpr, H1_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute t2 [P, H2_TILE], a block of first hidden units at a time."""
    H2_TILE: tl.constexpr = HEAD.H2_TILE
    outputs = tl.arange(0, H2_TILE)
    t2 = tl.zeros([e.shape[0], H2_TILE], tl.float32)
    for first in range(0, HEAD.H1, H1_BLOCK):
        units = first + tl.arange(0, H1_BLOCK)
        x = relu(_first_layer(z_r, z_s, e, user_ptr, mlp, units, HEAD, PRECISION))
        if HEAD.DROPOUT:
            keep = hidden_keep(dropout, row, positions, 0, first, x)
            x = tl.where(keep, x * dropout.scale, 0.0)
        offsets = outputs[:, None] * HEAD.H1 + units[None, :]
        mask = (outputs < HEAD.H2)[:, None] & (units < HEAD.H1)[None, :]
        w2 = load_operand(mlp.w2, offsets, mask, HEAD.H2 * HEAD.H1, PRECISION)
        x = operand(x.to(e.dtype), PRECISION)
        t2 = multiply(x, transposed(w2, PRECISION), PRECISION, t2)
    b2 = tl.load(mlp.b2 + outputs, mask=outputs < HEAD.H2, other=0.0).to(tl.float32)
    return t2 + b2[None, :]


@triton.jit
def score_tile(
    z_r, z_s, e, user_ptr, mlp, dropout, row, positions,
    HEAD: tl.constexpr, H1_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Score a tile of candidates, [P] in float32: the MLP if H1 > 0, the dot product if DOT.

    z_r, z_s [P, D] are float32, e [P, D] is in the states' dtype.
    """
    if HEAD.DOT:  # first: z in float32 need not wait for the MLP
        y = tl.sum((z_r + z_s) * e.to(tl.float32), 1)
    if HEAD.H1 > 0:
        t2 = _second_layer(
            z_r.to(e.dtype), z_s.to(e.dtype), e, user_ptr, mlp, dropout, row, positions,
            HEAD, H1_BLOCK, PRECISION,
        )  # fmt: skip
        x = relu(t2)
        if HEAD.DROPOUT:
            keep = hidden_keep(dropout, row, positions, 1, 0, x)
            x = tl.where(keep, x * dropout.scale, 0.0)
        mlp_score = tl.sum(x * third_layer_weights(mlp, HEAD)[None, :], 1)
        mlp_score += tl.load(mlp.b3).to(tl.float32)
        y = y + mlp_score if HEAD.DOT else mlp_score
    return y
