"""Counter-based noise and dropout: the definition that every backend matches.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
counter and a 64-bit seed into four 32-bit words; Box-Muller turns these into four normals:

    counter = (coordinate // 4, position, 2 * trajectory + stream, row mod 2^32)
    u(word) = ((word >> 9) + 1/2) / 2^23                        in (0, 1), exact in float32
    normals = sqrt(-2 ln u(w0)) (cos 2 pi u(w1), sin 2 pi u(w1)),  the same with w2, w3

Dropout compares 16 bits each, low half of a word first, with the rate in units of 2^-16:

    counter = (coordinate // 8, position, 2^31 + site, row mod 2^32),   site = one dropout layer

Lists that phase 2 draws are of scores with Gumbel noise, -ln(-ln u(word)):

    counter = (candidate // 4, 0, 3 * 2^30 + trajectory, row mod 2^32)

A number depends on nothing but its own indices, so a seed gives the same trajectories for any
split of a batch and any launch shape, and nobody needs to store them. Backends agree on the words
to the bit and on the normals within rounding.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor
) -> tuple[Tensor, ...]:
    """Four words for each counter: uint32 values held in int64 tensors, broadcast together."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all their bits.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ key0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ key1,
            p0 & _MASK,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _words(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> Tensor:
    """Words of each counter, in an axis of their own behind the others: [..., 4]."""
    return torch.stack(torch.broadcast_tensors(*philox(counter, seed)), -1)


def normal_noise_words(
    rows: Tensor, seed: int | Tensor, n_trajectories: int, stream: int, length: int, dim: int
) -> Tensor:
    """Words behind :func:`normal_noise`: int64 [B, N, length, ceil(dim / 4), 4]."""

    def axis(n: int, place: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[place] = n
        return torch.arange(n, device=rows.device).view(shape)

    counter = (
        axis((dim + 3) // 4, 3),
        axis(length, 2),
        2 * axis(n_trajectories, 1) + stream,
        (rows & _MASK).view(-1, 1, 1, 1),
    )
    return _words(counter, seed)


def _uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the number in (0, 1) of each word: of ``dtype``, halves in float32."""
    return ((words >> 9).to(torch.promote_types(dtype, torch.float32)) + 0.5) * 2.0**-23


def normal_noise(
    rows: Tensor,
    seed: int | Tensor,
    n_trajectories: int,
    stream: int,
    length: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw eps ~ N(0, I) for N trajectories of B users, [B, N, length, dim].

    ``rows`` int64 [B] names each user's row, whatever its place in the batch; ``stream`` is 0 for
    search and 1 for recommendation; ``seed`` is 64 bits, an int or int64 []. Halves are computed
    in float32.
    """
    words = normal_noise_words(rows, seed, n_trajectories, stream, length, dim)
    u = _uniform(words, dtype)  # [B, N, length, quads, 4]
    radius = (-2.0 * u[..., 0::2].log()).sqrt()  # [B, N, length, quads, 2]
    angle = (2.0 * math.pi) * u[..., 1::2]
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return normals.flatten(-3)[..., :dim].to(dtype)


# Third counter word: noise stays below, and dropout layers below lists.
_DROPOUT_SITES = 1 << 31
_LISTS = 3 << 30


def gumbel_noise(
    rows: Tensor,
    seed: int | Tensor,
    n_trajectories: int,
    n_candidates: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard Gumbel numbers for lists of N trajectories of B users, [B, N, n_candidates].

    Arguments as those of :func:`normal_noise`.
    """
    device = rows.device
    counter = (
        torch.arange((n_candidates + 3) // 4, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        _LISTS + torch.arange(n_trajectories, device=device).view(-1, 1),
        (rows & _MASK).view(-1, 1, 1),
    )
    words = _words(counter, seed)  # [B, N, quads, 4]
    gumbel = -(-_uniform(words, dtype).log()).log()
    return gumbel.flatten(-2)[..., :n_candidates].to(dtype)


def dropout_threshold(rate: float) -> int:
    """Give the rate in units of 2^-16, the resolution of dropout."""
    return round(rate * 65536)


def dropout_masks(
    rows: Tensor,
    seed: int | Tensor,
    first_site: int,
    n_sites: int,
    length: int,
    dim: int,
    rate: float,
) -> Tensor:
    """Draw float32 masks for ``n_sites`` dropout layers, [n_sites, B, length, dim].

    An entry is 0 with probability t = round(rate 2^16) / 2^16, else 1 / (1 - t). ``rows`` int64
    [B] names each user's row, as in :func:`normal_noise`.
    """
    threshold = dropout_threshold(rate)
    device = rows.device
    counter = (
        torch.arange((dim + 7) // 8, device=device),
        torch.arange(length, device=device).view(-1, 1),
        _DROPOUT_SITES
        + torch.arange(first_site, first_site + n_sites, device=device)[:, None, None, None],
        (rows & _MASK).view(-1, 1, 1),
    )
    words = _words(counter, seed)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)  # [n_sites, B, length, octets, 4, 2]
    keep = halves.flatten(-3)[..., :dim] >= threshold
    return keep.float() * (65536.0 / (65536 - threshold))
