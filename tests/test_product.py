"""Products of float32 in one or three of TF32, and the parts that they are made of."""

import numpy as np
import pytest
import torch

import tensor_core

pytest.importorskip("triton")

import triton
import triton.language as tl

from lcr_fast.kernels.core.product import _as_tf32, _parts, product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 64
# Relative to the sum of the products' sizes: of three products, and of one, whose operands are
# rounded to 11 bits.
BOUNDS = {"tf32x3": 2**-20, "tf32": 2**-10}


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, y_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b, c = tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(c_ptr + at)
    tl.store(y_ptr + at, product(a, b, PRECISION, c))


@triton.jit
def parts_kernel(x_ptr, big_ptr, small_ptr, rounded_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    big, small = _parts(x)
    tl.store(big_ptr + at, big)
    tl.store(small_ptr + at, small)
    tl.store(rounded_ptr + at, _as_tf32(x))


def multiplied(a, b, c, precision):
    y = torch.full_like(c, float("nan"))
    product_kernel[(1,)](a, b, c, y, N, precision, num_warps=4)
    return y


def draw(seed: int, low: float = -1.0) -> torch.Tensor:
    numbers = torch.rand(N, N, generator=torch.Generator().manual_seed(seed))
    return (low + (1 - low) * numbers).to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("low", [-1.0, 0.0], ids=["of both signs", "positive"])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_products_are_as_exact_as_their_precision(precision, low, scale):
    a, b, c = draw(0, low) * scale, draw(1, low), draw(2, low) * scale
    exact = a.double() @ b.double() + c.double()
    size = a.double().abs() @ b.double().abs() + c.double().abs()
    error = (multiplied(a, b, c, precision) - exact).abs() / size
    assert error.max() <= BOUNDS[precision]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -0x400000])
def test_a_nan_reaches_its_row_and_no_other(precision, bits):
    a, b, c = draw(0), draw(1), draw(2)
    a.view(torch.int32)[3, 5] = bits
    y = multiplied(a, b, c, precision)
    assert y[3].isnan().all()
    assert y.isfinite().sum() == N * (N - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", BOUNDS)
def test_nothing_infinite_becomes_finite(precision):
    a, b, c = draw(0), draw(1), draw(2)
    a[3, 5], b[7, 11] = float("inf"), float("-inf")
    y = multiplied(a, b, c, precision)
    assert not y[3].isfinite().any()
    assert not y[:, 11].isfinite().any()
    assert y.isfinite().sum() == (N - 1) ** 2


def split(x: np.ndarray) -> tuple[np.ndarray, ...]:
    of = torch.from_numpy(x).to(DEVICE)
    made = [torch.empty_like(of) for _ in range(3)]
    parts_kernel[(1,)](of, *made, len(x))
    return tuple(t.cpu().numpy() for t in made)


@pytest.mark.gpu
def test_parts_add_up_and_the_large_one_is_tf32():
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32).numpy()
    x = np.where(np.abs(x) < 3e38, x, np.float32(1.5))  # NaN too
    big, small, rounded = split(x)
    np.testing.assert_array_equal(big.astype(np.float64) + small, x.astype(np.float64))
    assert not (big.view(np.uint32) & 0x1FFF).any()
    np.testing.assert_array_equal(big, tensor_core.round_to_tf32(x))
    cut = (rounded.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    np.testing.assert_array_equal(cut, big)
    units = small / np.spacing(np.abs(x)).astype(np.float64)  # of the last place of x
    np.testing.assert_array_equal(units, np.rint(units))
    assert np.abs(units).max() <= 2**12


@pytest.mark.gpu
def test_a_nan_keeps_a_part_that_is_one():
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001], np.uint32).view(np.float32)
    big, small, rounded = split(nans)
    assert (np.isnan(big) | np.isnan(small)).all()
    kept = [0, 2, 3]  # no arithmetic of a GPU makes the second one
    assert np.isnan(rounded[kept]).all()
