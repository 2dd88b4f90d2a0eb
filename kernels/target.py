"""Device functions of scoring: one tile of candidates against one user's histories, and the head.

A tile has P rows, one candidate each. No row's result depends on the other rows. Products take the
dtype of the candidates' vectors, which is the states'; sums are float32.
"""

import triton
import triton.language as tl

from lcr_fast.kernels.products import product

_DROPOUT_SITES = tl.constexpr(1 << 31)  # as in lcr_fast.noise


@triton.jit
def dropout_tile(seed, row, SITE: tl.constexpr, positions, first, COLUMNS: tl.constexpr):
    """Draw 16 bits for every position and the coordinates first .. first + COLUMNS: int32 tile.

    The numbers are those of lcr_fast.noise. ``first`` and COLUMNS are multiples of 8: one Philox
    call serves 8 coordinates.
    """
    octets = (first // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    zero = tl.zeros([positions.shape[0], COLUMNS // 8], tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        octets + zero,
        positions.to(tl.uint32)[:, None] + zero,
        tl.full([positions.shape[0], COLUMNS // 8], _DROPOUT_SITES + SITE, tl.uint32),
        row.to(tl.uint32) + zero,
    )
    # A join adds the fastest axis; in order: octet, high bit of the word, low bit, half.
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    halves = tl.join(low, high)
    return tl.reshape(halves, [positions.shape[0], COLUMNS]).to(tl.int32)


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
def target_keys(
    items_ptr, ids, valid, weight_ptr,
    D: tl.constexpr, KEY_BLOCK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W e for the vectors of a tile of items, with W [D, D]: [P, D].

    KEY_BLOCK columns at a time, as all of W, in the two parts of a tf32x3 product, would fill the
    shared memory at D = 128.
    """
    P: tl.constexpr = ids.shape[0]
    axis = tl.arange(0, D)
    keys = tl.zeros([P, D], tl.float32)
    for first in range(0, D, KEY_BLOCK):
        e = load_vectors(items_ptr, ids, valid, first, D, KEY_BLOCK, DTYPE)
        column = first + tl.arange(0, KEY_BLOCK)
        weight = tl.load(weight_ptr + axis[:, None] * D + column[None, :]).to(DTYPE)
        keys = product(e, tl.trans(weight), PRECISION, keys)
    return keys.to(DTYPE)


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
def first_layer(
    z_r, z_s, e,  # [P, D]
    user_ptr, w1_ptr, b1_ptr,  # [D], [H1, 3D (+ D)], [H1]
    units,  # [BLOCK]
    D: tl.constexpr, H1: tl.constexpr, HAS_USER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute t1 of some hidden units, [P, BLOCK], and return the weights read: 3 x [BLOCK, D]."""
    WIDTH: tl.constexpr = 4 * D if HAS_USER else 3 * D
    axis = tl.arange(0, D)
    row_ptrs = w1_ptr + units[:, None] * WIDTH + axis[None, :]  # [BLOCK, D]
    mask = (units < H1)[:, None]
    w_r = tl.load(row_ptrs, mask=mask, other=0.0).to(e.dtype)
    w_s = tl.load(row_ptrs + D, mask=mask, other=0.0).to(e.dtype)
    w_e = tl.load(row_ptrs + 2 * D, mask=mask, other=0.0).to(e.dtype)
    t = product(z_r, tl.trans(w_r), PRECISION)
    t = product(z_s, tl.trans(w_s), PRECISION, t)
    t = product(e, tl.trans(w_e), PRECISION, t)
    shared = tl.load(b1_ptr + units, mask=units < H1, other=0.0).to(tl.float32)
    if HAS_USER:
        u = tl.load(user_ptr + axis).to(tl.float32)
        w_u = tl.load(row_ptrs + 3 * D, mask=mask, other=0.0).to(tl.float32)
        shared += tl.sum(w_u * u[None, :], 1)
    return t + shared[None, :], w_r, w_s, w_e


@triton.jit
def second_layer_weights(w2_ptr, units, H1: tl.constexpr, H2: tl.constexpr, H2_TILE: tl.constexpr):
    outputs = tl.arange(0, H2_TILE)
    return tl.load(
        w2_ptr + outputs[:, None] * H1 + units[None, :],
        mask=(outputs < H2)[:, None] & (units < H1)[None, :],
        other=0.0,
    )  # [H2_TILE, BLOCK]


@triton.jit
def second_layer(
    z_r, z_s, e, user_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    seed, row, positions, threshold, scale,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H1_BLOCK: tl.constexpr,
    H2_TILE: tl.constexpr, SITE: tl.constexpr, HAS_USER: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute t2 [P, H2_TILE], a block of first hidden units at a time."""
    t2 = tl.zeros([e.shape[0], H2_TILE], tl.float32)
    for first in range(0, H1, H1_BLOCK):
        units = first + tl.arange(0, H1_BLOCK)
        t1, _, _, _ = first_layer(
            z_r, z_s, e, user_ptr, w1_ptr, b1_ptr, units, D, H1, HAS_USER, PRECISION
        )
        x = relu(t1)
        if DROPOUT:
            bits = dropout_tile(seed, row, SITE, positions, first, H1_BLOCK)
            x = tl.where(bits >= threshold, x * scale, 0.0)
        w2 = second_layer_weights(w2_ptr, units, H1, H2, H2_TILE).to(e.dtype)
        t2 = product(x.to(e.dtype), tl.trans(w2), PRECISION, t2)
    outputs = tl.arange(0, H2_TILE)
    b2 = tl.load(b2_ptr + outputs, mask=outputs < H2, other=0.0).to(tl.float32)
    return t2 + b2[None, :]


@triton.jit
def head(
    z_r, z_s, e,  # [P, D]: float32, float32, states' dtype
    user_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
    seed, row, positions, threshold, scale,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, DOT: tl.constexpr, H1_BLOCK: tl.constexpr,
    H2_TILE: tl.constexpr, SITE: tl.constexpr, HAS_USER: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Score a tile of candidates, [P] in float32: the MLP if H1 > 0, the dot product if DOT."""
    if DOT:  # first: z in float32 need not wait for the MLP
        y = tl.sum((z_r + z_s) * e.to(tl.float32), 1)
    if H1 > 0:
        t2 = second_layer(
            z_r.to(e.dtype), z_s.to(e.dtype), e, user_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
            seed, row, positions, threshold, scale,
            D, H1, H2, H1_BLOCK, H2_TILE, SITE, HAS_USER, DROPOUT, PRECISION,
        )  # fmt: skip
        x = relu(t2)
        if DROPOUT:
            bits = dropout_tile(seed, row, SITE + 1, positions, 0, H2_TILE)
            x = tl.where(bits >= threshold, x * scale, 0.0)
        outputs = tl.arange(0, H2_TILE)
        w3 = tl.load(w3_ptr + outputs, mask=outputs < H2, other=0.0).to(tl.float32)
        mlp = tl.sum(x * w3[None, :], 1) + tl.load(b3_ptr).to(tl.float32)
        y = y + mlp if DOT else mlp
    return y
