"""Noise and dropout, drawn where they act, by Philox: the definition is in lcr_fast/noise.py."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lcr_fast.kernels.core.layout import laid_out_as

TWO_PI = tl.constexpr(6.283185307179586)
DROPOUT_COUNTER = tl.constexpr(1 << 31)  # in the third counter word; noise stays below


class Noise(NamedTuple):
    """What noise is drawn by, in a kernel."""

    scale: Any  # float32
    seed: Any  # int64 [], read where it is drawn


class Dropout(NamedTuple):
    """What dropout is drawn by, in a kernel."""

    threshold: Any  # int32: of 2^16 numbers so many drop
    scale: Any  # float32: of what is kept
    seed: Any  # int64 [], read where it is drawn


def dropout_arguments(threshold: int, seed: Tensor) -> Dropout:
    """Give a kernel's arguments of dropout; what is kept is scaled up for what is not."""
    return Dropout(threshold, 65536.0 / (65536 - threshold), seed)


@triton.jit
def _philox(user_row, position, word2, seed, CALLS: tl.constexpr):
    """Philox words for CALLS counters of each row: four uint32 tiles [M, CALLS]."""
    call = tl.arange(0, CALLS).to(tl.uint32)[None, :]
    c1 = position.to(tl.uint32)[:, None]
    c2 = word2.to(tl.uint32)[:, None]
    c3 = user_row.to(tl.uint32)[:, None]  # mod 2^32
    call, c1 = tl.broadcast(call, c1)
    call, c2 = tl.broadcast(call, c2)
    call, c3 = tl.broadcast(call, c3)
    return tl.philox(seed, call, c1, c2, c3)


@triton.jit
def _interleave4(x0, x1, x2, x3):
    """Put four tiles [M, n] together column by column: x0[:, 0], x1[:, 0], ... -> [M, 4 n]."""
    M: tl.constexpr = x0.shape[0]
    n: tl.constexpr = x0.shape[1]
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(M, 4 * n)


@triton.jit
def _uniform(word):
    """Take the top 23 bits, centred in their cell: in (0, 1) and exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * (2.0**-23)


@triton.jit
def _box_muller(word0, word1):
    """Two normals from two words. The angle is reduced exactly, so that no slow path is compiled.

    With quarter = round(4 u) the rest of the angle is within pi / 4, where the polynomials are
    those of Cephes' sinf and cosf.
    """
    radius = tl.sqrt(-2.0 * tl.log(_uniform(word0)))
    u = _uniform(word1)
    quarter = (4.0 * u + 0.5).to(tl.int32)
    angle = TWO_PI * (u - 0.25 * quarter.to(tl.float32))
    z = angle * angle
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * angle + angle
    cosine = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    cosine = cosine * z * z - 0.5 * z + 1.0
    odd = (quarter & 1) != 0
    cos_negative = ((quarter + 1) & 2) != 0
    sin_negative = (quarter & 2) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    return radius * tl.where(cos_negative, -x, x), radius * tl.where(sin_negative, -y, y)


@triton.jit
def normal_noise(user_row, position, trajectory_stream, seed, D: tl.constexpr):
    """Draw eps ~ N(0, I) by Box-Muller, four coordinates a Philox call: [M, D].

    ``user_row`` int64, ``position`` and ``trajectory_stream`` (2 n + stream) are [M].
    """
    w0, w1, w2, w3 = _philox(user_row, position, trajectory_stream, seed, D // 4)
    x0, x1 = _box_muller(w0, w1)  # [M, D/4] each
    x2, x3 = _box_muller(w2, w3)
    return _interleave4(x0, x1, x2, x3)


@triton.jit
def dropout_keep(user_row, position, site, threshold, seed, like):
    """Say which coordinates dropout layer ``site`` keeps, eight a Philox call: bool [M, D].

    ``like`` is the tile [M, D] of 32-bit numbers that they are dropped from.
    """
    M: tl.constexpr = position.shape[0]
    D: tl.constexpr = like.shape[1]
    word2 = (tl.zeros([M], tl.int32) + site).to(tl.uint32) + DROPOUT_COUNTER
    w0, w1, w2, w3 = _philox(user_row, position, word2, seed, D // 8)
    words = _interleave4(w0, w1, w2, w3)  # [M, D/2]
    # Low half first. In 16 bits they are moved to the threads that compare them.
    halves = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16)).reshape(M, D)
    return laid_out_as(halves.to(tl.int32), like) >= threshold
