"""Device functions of one reasoning step, and of an encoder's layer, forward and backward.

For each stream x with the other stream x', g = 1 if x' has an event, else 0, and dropout masks m:

    x1 = h_x + m1 MSA_x(h_x)                         a_x = LN1(x1)
    x2 = a_x + g m2 MCA_x(Q = a_x, K = V = a_x')     c_x = LN2(x2)
    x3 = c_x + m3 FFN_x(c_x)                         h_x <- LN3(x3)

A layer has SHAPE.SUBLAYERS = 2 and no cross-attention: c_x is a_x, and behind the FFN is its LN2.
States between sublayers have the tensors' dtype, which is also that of the products' operands;
products accumulate in float32, softmax, LayerNorm and all sums are float32.

Rows at padding hold what their own numbers make of them, and nothing reads it: keys at padding have
no weight, pooling leaves them out, and only zeros are stored for them.
"""

import triton
import triton.language as tl

from lcr_fast.kernels.core.noise import dropout_keep, normal_noise
from lcr_fast.kernels.reasoning.sublayers import attention, ffn, layer_norm, rounded
from lcr_fast.kernels.reasoning.weights import attention_at, ffn_at, norm_at

# Dropout sites, as in lcr_fast/ops/noise.py: a step or a layer has one a sublayer and stream.
_ENCODER_SITES = tl.constexpr(0)
_REASONING_SITES = tl.constexpr(1 << 13)
_STREAM_SITES = tl.constexpr(1 << 12)

SEARCH = tl.constexpr(0)
REC = tl.constexpr(1)


@triton.jit
def choose_stream(stream, search, rec, search_size, rec_size):
    """Take the stream of that number and its size; with both swapped, the other stream."""
    if stream == SEARCH:
        chosen, size = search, search_size
    else:
        chosen, size = rec, rec_size
    return chosen, size


@triton.jit
def apply_dropout(
    update, user_row, position, k, stream, place: tl.constexpr, dropout,
    SHAPE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Drop from the output of the step's sublayer at ``place``, from 0."""
    if DROPOUT:
        FIRST: tl.constexpr = _REASONING_SITES if SHAPE.SUBLAYERS == 3 else _ENCODER_SITES
        site = FIRST + stream * _STREAM_SITES + SHAPE.SUBLAYERS * k + place
        if (
            dropout.threshold > 0
        ):  # always; a branch keeps the drawing out of the products before it
            seed = tl.load(dropout.seed)
            keep = dropout_keep(user_row, position, site, dropout.threshold, seed, update)
            update = tl.where(keep, update * dropout.scale, 0.0)
    return update


@triton.jit
def load_initial(
    x_ptr, rows, size, n_trajectories, user_row, stream, noise,
    D: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """h^(0) + noise_scale eps on valid positions, 0 elsewhere, in the tensor's dtype: [M, D]."""
    valid = (rows.position < rows.length)[:, None]
    user = rows.sequence // n_trajectories
    offsets = (user.to(tl.int64) * size + rows.position)[:, None] * D + tl.arange(0, D)[None, :]
    h = tl.load(x_ptr + offsets, mask=valid, other=0.0)
    if NOISE:
        trajectory_stream = 2 * (rows.sequence - user * n_trajectories) + stream
        seed = tl.load(noise.seed)
        eps = normal_noise(user_row, rows.position, trajectory_stream, seed, D)
        h = tl.where(valid, h.to(tl.float32) + noise.scale * eps, 0.0)
    return h.to(x_ptr.dtype.element_ty)


@triton.jit
def _add_update(
    y, x, user_row, position, k, stream, place: tl.constexpr, dropout,
    SHAPE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Compute x + m update, where a sum without dropout has x already: float32 [M, D]."""
    if DROPOUT:
        y = apply_dropout(y, user_row, position, k, stream, place, dropout, SHAPE, DROPOUT)
        y += x.to(tl.float32)
    return y


@triton.jit
def before_norm1(
    h, lengths, user_row, position, k, index, stream, weights, dropout,
    SHAPE: tl.constexpr, SEQUENCES: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """x1 = h + m1 MSA(h): float32 [M, D]."""
    y = attention(
        h, h, lengths, None, attention_at(weights, index, SHAPE), SHAPE, SEQUENCES, not DROPOUT
    )
    return _add_update(y, h, user_row, position, k, stream, 0, dropout, SHAPE, DROPOUT)


@triton.jit
def before_norm2(
    a, memory, lengths, gate, user_row, position, k, index, stream, weights, dropout,
    SHAPE: tl.constexpr, SEQUENCES: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """x2 = a + g m2 MCA(a, memory): float32 [M, D]; ``gate`` is float32 [M]."""
    y = attention(
        a, memory, lengths, gate, attention_at(weights, index, SHAPE), SHAPE, SEQUENCES,
        not DROPOUT,
    )  # fmt: skip
    return _add_update(y, a, user_row, position, k, stream, 1, dropout, SHAPE, DROPOUT)


@triton.jit
def before_last_norm(
    c, user_row, position, k, index, stream, weights, dropout,
    SHAPE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """x3, an encoder's x2, = c + m FFN(c): float32 [M, D]."""
    y = ffn(c, ffn_at(weights, index, SHAPE), SHAPE, not DROPOUT)
    LAST: tl.constexpr = SHAPE.SUBLAYERS - 1
    return _add_update(y, c, user_row, position, k, stream, LAST, dropout, SHAPE, DROPOUT)


@triton.jit
def norm(x, norms, index, which: tl.constexpr, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """LN behind one sublayer of a stream and step, from 0: [M, D] in ``dtype``."""
    return rounded(layer_norm(x, norm_at(norms, index, which, SHAPE), SHAPE.D), dtype)


@triton.jit
def zero_padding(x, rows):
    """Keep a tile [M, D] at events, 0 at padding."""
    return tl.where((rows.position < rows.length)[:, None], x, 0.0)
