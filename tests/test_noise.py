"""Philox noise and dropout: known answers, backends, independence of the batch, moments."""

import math

import numpy as np
import pytest
import torch

import oracle
from lcr_fast import noise
from lcr_fast.ops._extension import extension_error
from lcr_fast.ops.noise import dropout_masks, normal_noise, seed_tensor

needs_cpp = pytest.mark.skipif(extension_error() is not None, reason="lcr_fast._C is not built")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]

# Known answers of Philox4x32-10 as its authors publish them (Random123): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# A row, a seed and a trajectory that use the upper bits of their words.
ROWS = torch.tensor([0, 5, 2**31 + 7, 2**32 + 5, -1])
SEEDS = [0, 12345678901234567, -3]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    assert tuple(oracle.philox(counter, key)) == words
    tensors = tuple(torch.tensor([c]) for c in counter)
    assert tuple(int(w) for w in noise.philox(tensors, key[0] + (key[1] << 32))) == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dim", [1, 4, 7])
def test_normal_noise_is_the_documented_one(seed, dim):
    drawn = noise.normal_noise(ROWS, seed, 3, 1, 2, dim, torch.float64)
    assert drawn.shape == (5, 3, 2, dim)
    for b, row in enumerate(ROWS.tolist()):
        for n in range(3):
            for j in range(2):
                expected = oracle.normals(row, seed, n, 1, j, dim)
                np.testing.assert_allclose(drawn[b, n, j].numpy(), expected, rtol=1e-13)
    assert torch.equal(drawn[1], drawn[3])  # rows count modulo 2^32


@needs_cpp
@pytest.mark.parametrize("dim", [1, 4, 7, 33])
def test_cpp_normals_are_the_reference_within_rounding(dim):
    rows = torch.arange(50) * 997
    for stream in (0, 1):
        fast = normal_noise(rows, 7, 5, stream, 3, dim, backend="cpp")
        exact = noise.normal_noise(rows, 7, 5, stream, 3, dim, torch.float64)
        eager = noise.normal_noise(rows, 7, 5, stream, 3, dim)
        # The largest radius is sqrt(2 ln 2^24) = 5.8; a wrong bit of a word would show.
        for drawn in (fast, eager):
            assert (drawn - exact).abs().max() < 4e-6
            assert drawn.dtype == torch.float32
    for seed in SEEDS:
        fast = normal_noise(ROWS, seed, 2, 0, 3, dim, backend="cpp")
        torch.testing.assert_close(fast, noise.normal_noise(ROWS, seed, 2, 0, 3, dim))


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_are_the_documented_ones_to_the_bit(backend):
    """A mask at the threshold of one half-word keeps it, and drops it one unit above."""
    rows, dim, seed, site, position = torch.tensor([2**31 + 3]), 70, -9, 4097, 2
    counters = [(block, position, 2**31 + site, 2**31 + 3) for block in range(9)]
    words = [w for c in counters for w in oracle.philox(c, (2**32 - 9, 2**32 - 1))]
    halves = [half for w in words for half in (w % 2**16, w // 2**16)]
    for d, half in enumerate(halves[:dim]):
        for threshold, kept in ((half, True), (half + 1, False)):
            if 0 <= threshold < 65536:
                rate = threshold / 65536
                masks = dropout_masks(rows, seed, site, 1, position + 1, dim, rate, backend=backend)
                assert bool(masks[0, 0, position, d]) == kept


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("dim", [1, 8, 65])
def test_dropout_masks_are_the_documented_ones(rate, dim):
    masks = noise.dropout_masks(ROWS, 11, 6, 2, 3, dim, rate)
    assert masks.shape == (2, 5, 3, dim)
    for site in range(2):
        for b, row in enumerate(ROWS.tolist()):
            for j in range(3):
                expected = oracle.dropout_mask(row, 11, 6 + site, j, dim, rate)
                assert np.array_equal(masks[site, b, j].numpy(), expected)


@needs_cpp
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dim", [1, 8, 65, 129])
def test_cpp_dropout_masks_are_the_reference_to_the_bit(seed, dim):
    fast = dropout_masks(ROWS, seed, 4096, 3, 2, dim, 0.3, backend="cpp")
    assert torch.equal(fast, noise.dropout_masks(ROWS, seed, 4096, 3, 2, dim, 0.3))


def draw_noise(rows, backend, n=3, length=4, dim=6, stream=0, seed=5):
    return normal_noise(rows, seed, n, stream, length, dim, backend=backend)


def draw_masks(rows, backend, n=3, length=4, dim=6, stream=0, seed=5):
    masks = dropout_masks(rows, seed, 4096 * stream, n, length, dim, 0.4, backend=backend)
    return masks.transpose(0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draw", [draw_noise, draw_masks])
def test_a_number_depends_on_its_own_indices_only(draw, backend):
    rows = torch.tensor([4, 9, 2, 30])
    drawn = draw(rows, backend)  # [B, N, L, D]
    parts = torch.cat([draw(part.clone(), backend) for part in rows.split([1, 3])])
    assert torch.equal(parts, drawn)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(draw(rows[order], backend), drawn[order])
    assert torch.equal(draw(rows.repeat_interleave(2)[::2], backend), drawn)  # strided rows
    assert torch.equal(draw(rows, backend, n=5, length=9, dim=7)[:, :3, :4, :6], drawn)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draw", [draw_noise, draw_masks])
def test_every_index_and_the_seed_change_the_numbers(draw, backend):
    rows = torch.tensor([4, 9])
    drawn = draw(rows, backend, dim=64)
    for other in (
        draw(rows, backend, dim=64, stream=1),
        draw(rows, backend, dim=64, seed=6),
        draw(rows, backend, dim=64, seed=5 + 2**32),
        drawn.flip(0),
        drawn.roll(1, 1),
        drawn.roll(1, 2),
        drawn.roll(1, 3),
    ):
        assert not torch.equal(other, drawn)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draw", [draw_noise, draw_masks])
@pytest.mark.parametrize("sizes", [{"n": 0}, {"length": 0}, {"dim": 0}, {}])
def test_empty_draws(draw, backend, sizes):
    rows = torch.arange(2 if sizes else 0)
    shape = {"n": 3, "length": 4, "dim": 6} | sizes
    assert draw(rows, backend, **sizes).shape == (len(rows), *shape.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_of_the_normals(backend):
    x = draw_noise(torch.arange(100), backend, n=8, length=20, dim=16).double()
    n = x.numel()  # 256000; bounds are five standard errors
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(x.pow(3).mean()) < 5 * math.sqrt(15 / n)
    assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    # No correlation along any axis, streams included.
    other_stream = draw_noise(torch.arange(100), backend, n=8, length=20, dim=16, stream=1)
    for y in (*(x.roll(1, axis) for axis in range(4)), x.roll(2, 3), other_stream.double()):
        assert abs((x * y).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_candidates", [1, 4, 7])
def test_gumbel_noise_is_the_documented_one(seed, n_candidates):
    drawn = noise.gumbel_noise(ROWS, seed, 3, n_candidates, torch.float64)
    assert drawn.shape == (5, 3, n_candidates)
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for b, row in enumerate(ROWS.tolist()):
        for n in range(3):
            words = [
                word
                for quad in range(-(-n_candidates // 4))
                for word in oracle.philox((quad, 0, 3 * 2**30 + n, row % 2**32), key)
            ]
            uniform = (np.array(words[:n_candidates]) // 512 + 0.5) / 2**23
            expected = -np.log(-np.log(uniform))
            np.testing.assert_allclose(drawn[b, n].numpy(), expected, rtol=1e-10)
    assert torch.equal(
        drawn, noise.gumbel_noise(ROWS, torch.tensor(seed), 3, n_candidates, drawn.dtype)
    )


def test_moments_of_gumbel_noise():
    x = noise.gumbel_noise(torch.arange(200), 7, 8, 101).double()
    n = x.numel()  # 161,600
    assert abs(x.mean() - 0.57721566) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(x.var() / (math.pi**2 / 6) - 1) < 5 * math.sqrt(4.4 / n)  # of kurtosis 5.4
    for y in (x.roll(1, axis) for axis in range(3)):
        assert abs(((x - x.mean()) * (y - x.mean())).mean()) < 5 * x.var() / math.sqrt(n)
    assert torch.isfinite(noise.gumbel_noise(torch.arange(20), 7, 8, 101, torch.float16)).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_and_keeps_the_mean(rate):
    masks = dropout_masks(torch.arange(100), 3, 0, 4, 20, 32, rate).double()
    n = masks.numel()
    error = 5 * math.sqrt(rate * (1 - rate) / n)
    assert abs((masks == 0).double().mean() - rate) < error + 2**-17  # the rate's resolution
    assert abs(masks.mean() - 1) < error / (1 - rate)
    # Neither neighbours nor layers share their fate.
    centred = masks - 1
    for axis in range(4):
        correlation = (centred * centred.roll(1, axis)).mean() / centred.square().mean()
        assert abs(correlation) < 5 / math.sqrt(n)


def test_dropout_of_rate_zero_is_one():
    assert (dropout_masks(torch.arange(3), 3, 0, 2, 4, 9, 0.0) == 1).all()


def test_halves_are_rounded_float32_noise():
    rows = torch.arange(5)
    for backend in ("reference", *(["cpp"] if extension_error() is None else [])):
        single = normal_noise(rows, 1, 2, 0, 3, 5, backend=backend)
        for dtype in (torch.float16, torch.bfloat16):
            half = normal_noise(rows, 1, 2, 0, 3, 5, dtype, backend=backend)
            assert torch.equal(half, single.to(dtype))


def test_noise_ops_refuse_what_they_cannot_serve():
    rows = torch.arange(3)
    with pytest.raises(ValueError, match=r"rows must be int64 \[B\], got torch.int32 \[3\]"):
        normal_noise(rows.int(), 0, 1, 0, 2, 4)
    with pytest.raises(ValueError, match=r"rows must be int64 \[B\]"):
        dropout_masks(rows[None], 0, 0, 1, 2, 4, 0.1)
    for rate in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
            dropout_masks(rows, 0, 0, 1, 2, 4, rate)
    with pytest.raises(ValueError, match=r"cpp.*it draws float32.*'reference'"):
        normal_noise(rows, 0, 1, 0, 2, 4, torch.float64, backend="cpp")
    with pytest.raises(ValueError, match="'triton' cannot serve normal_noise"):
        normal_noise(rows, 0, 1, 0, 2, 4, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draw", [draw_noise, draw_masks])
def test_a_seed_may_be_a_tensor(draw, backend):
    rows = torch.arange(3)
    for seed in SEEDS:
        assert torch.equal(
            draw(rows, backend, seed=torch.tensor(seed)), draw(rows, backend, seed=seed)
        )


def test_a_seed_is_one_integer():
    rows = torch.arange(3)
    for wrong in (torch.zeros(1, dtype=torch.int64), torch.tensor(1.0), rows.to("meta").sum()):
        with pytest.raises(ValueError, match=r"a seed must be an int, or int64 \[\] on cpu, got"):
            seed_tensor(wrong, rows)
    for wrong in (0.5, "7", None, 2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"a seed must be an int of 64 bits with a sign, got"):
            seed_tensor(wrong, rows)


@needs_cpp
def test_opcheck():
    rows, seed = torch.arange(3), torch.tensor(5)
    torch.library.opcheck(torch.ops.lcr_fast.normal_noise.default, (rows, seed, 2, 1, 3, 6))
    torch.library.opcheck(torch.ops.lcr_fast.dropout_masks.default, (rows, seed, 0, 2, 3, 6, 99))
