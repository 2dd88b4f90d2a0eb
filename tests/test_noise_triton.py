"""The generator of the Triton kernels against the documented one: words to the bit, and normals."""

import pytest
import torch

from where import DEVICE

pytest.importorskip("triton")
import triton
import triton.language as tl

import oracle
from lcr_fast import noise
from lcr_fast.kernels.core.noise import _philox, dropout_keep, normal_noise

pytestmark = pytest.mark.gpu
# Rows that use the upper bits of a word, and more than a word.
ROWS = [0, 5, 2**31 + 7, 2**32 + 5, -1, 3, 4, 2**40, 11, 12, 13, 14, 15, 16, 17, 18]
SEEDS = [0, 12345678901234567, -3]


@triton.jit(do_not_specialize=["word2", "seed"])
def _words_kernel(rows_ptr, positions_ptr, out_ptr, word2, seed: tl.int64, CALLS: tl.constexpr):
    i = tl.arange(0, 16)
    rows, positions = tl.load(rows_ptr + i), tl.load(positions_ptr + i)
    words = _philox(rows, positions, tl.zeros([16], tl.int32) + word2, seed, CALLS)
    at = i[:, None] * CALLS + tl.arange(0, CALLS)[None, :]
    for w in tl.static_range(4):
        tl.store(out_ptr + w * (16 * CALLS) + at, words[w].to(tl.int64) & 0xFFFFFFFF)


@triton.jit(do_not_specialize=["trajectory_stream", "site", "threshold", "seed"])
def _draw_kernel(
    rows_ptr, positions_ptr, normals_ptr, keep_ptr, trajectory_stream, site, threshold,
    seed: tl.int64, D: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, 16)
    rows, positions = tl.load(rows_ptr + i), tl.load(positions_ptr + i)
    at = i[:, None] * D + tl.arange(0, D)[None, :]
    streams = tl.zeros([16], tl.int32) + trajectory_stream
    normals = normal_noise(rows, positions, streams, seed, D)
    tl.store(normals_ptr + at, normals)
    keep = dropout_keep(rows, positions, site, threshold, seed, normals)
    tl.store(keep_ptr + at, keep.to(tl.int32))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.tensor(ROWS, device=DEVICE)
    return rows, torch.arange(16, device=DEVICE) * 9


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_the_documented_ones_to_the_bit(seed):
    rows, positions = inputs()
    words = torch.empty(4, 16, 4, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](rows, positions, words, 7, seed, CALLS=4)
    key = (seed % 2**32, seed % 2**64 >> 32)
    for i, (row, position) in enumerate(zip(ROWS, positions.tolist(), strict=True)):
        for call in range(4):
            expected = oracle.philox((call, position, 7, row % 2**32), key)
            assert words[:, i, call].tolist() == list(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_normals_and_masks_are_those_of_the_reference(seed):
    rows, positions = inputs()
    dim, n, stream, site, threshold = 32, 2, 1, 4097, 20000
    normals = torch.empty(16, dim, device=DEVICE)
    keep = torch.empty(16, dim, dtype=torch.int32, device=DEVICE)
    _draw_kernel[(1,)](rows, positions, normals, keep, 2 * n + stream, site, threshold, seed, D=dim)
    length = int(positions.max()) + 1
    at = positions.cpu()[:, None, None].expand(-1, 1, dim)
    drawn = noise.normal_noise(rows.cpu(), seed, n + 1, stream, length, dim, torch.float64)
    exact = drawn[:, n].gather(1, at).squeeze(1)  # [16, dim]
    # The largest radius is sqrt(2 ln 2^24) = 5.8; a wrong bit of a word would show.
    assert (normals.cpu().double() - exact).abs().max() < 4e-6
    masks = noise.dropout_masks(rows.cpu(), seed, site, 1, length, dim, threshold / 65536)
    assert torch.equal(keep.cpu() > 0, masks[0].gather(1, at).squeeze(1) > 0)
    assert 0 < keep.sum() < keep.numel()
