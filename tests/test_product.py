"""Products of float32 as three or six of bfloat16, and the parts that they are made of."""

import pytest
import torch

import tensor_core
from where import DEVICE, INTERPRETED

pytest.importorskip("triton")

import triton
import triton.language as tl

from lcr_fast.kernels.core.product import parts, product
from lcr_fast.kernels.weight_parts import for_products
from lcr_fast.testing import tf32

N = 64
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter knows no instructions")
# Relative to the sum of the products' sizes.
BOUNDS = {"bf16x6": 2**-20, "bf16x3": 2**-15}


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, y_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b, c = tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(c_ptr + at)
    tl.store(y_ptr + at, product(a, b, PRECISION, c))


@triton.jit
def parts_kernel(x_ptr, parts_ptr, N: tl.constexpr, PARTS: tl.constexpr):
    at = tl.arange(0, N)
    made = parts(tl.load(x_ptr + at), PARTS)
    for i in tl.static_range(PARTS):
        tl.store(parts_ptr + i * N + at, made[i])


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


def split(x: torch.Tensor, n: int) -> torch.Tensor:
    made = torch.empty(n, len(x), dtype=torch.bfloat16, device=DEVICE)
    parts_kernel[(1,)](x.to(DEVICE), made, len(x), n)
    return made.cpu()


@compiled
@pytest.mark.gpu
@pytest.mark.parametrize(("n", "lost"), [(2, 2**-17), (3, 0)])
def test_parts_add_up_to_each_float32(n, lost):
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.where((x.abs() < 3e38) & (x.abs() > 1e-30), x, 1.5)  # NaN too
    made = split(x, n).double()
    assert ((made.sum(0) - x).abs() <= lost * x.double().abs()).all()
    assert torch.equal(made[0].float(), x.bfloat16().float())


@compiled
@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 3])
def test_the_first_part_of_what_is_not_finite_is_not_either(n):
    bits = [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -0x400000, 0x7F800000, -0x800000, 0x7F7FFFFF, 1]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert torch.equal(split(x, n)[0].float().nan_to_num(), x.bfloat16().float().nan_to_num())


@compiled
@pytest.mark.gpu
def test_weights_are_split_whichever_matrix_they_are_of():
    shapes = ((96, 32), (3, 7), (32, 32), (0, 32), (32, 0), (48, 32), (1, 513))
    matrices = [torch.randn(3, 2, *shape).to(DEVICE) for shape in shapes]
    for n, high in ((3, False), (2, True)):
        with tf32(high):
            made = for_products(matrices, torch.float32)
        for found, matrix in zip(made, matrices, strict=True):
            whole = found.view(3, 2, n, *matrix.shape[2:]).double().sum(2)
            error = (whole - matrix.double()).abs()
            assert (error <= (2**-17 if high else 0) * matrix.double().abs()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_are_cast_as_torch_casts_them(dtype):
    matrices = [torch.randn(3, 2, *shape).to(DEVICE) for shape in ((3, 7), (16, 32), (1, 513))]
    for found, matrix in zip(for_products(matrices, dtype), matrices, strict=True):
        assert torch.equal(found.view(matrix.shape), matrix.to(dtype))


def test_the_model_of_a_tensor_core_has_parts_that_add_up():
    x = draw(0).cpu().numpy()
    made = tensor_core.split(x)
    assert (sum(part.astype("float64") for part in made) == x).all()
    assert (abs(made[1]) <= 2**-8 * abs(x)).all()
