"""Weight gradients in float32: products of columns, summed over rows in parts and chunks."""

import pytest
import torch

import tensor_core
from where import DEVICE, INTERPRETED

pytest.importorskip("triton")

from lcr_fast.kernels.core.product import n_parts
from lcr_fast.kernels.gpu import dot_precision
from lcr_fast.kernels.reasoning.scratch import layout, products
from lcr_fast.kernels.weight_gradients import (
    Columns,
    _part_rows,
    product_of_operands,
    product_of_rows,
    products_of_columns,
    split,
)
from lcr_fast.kernels.weight_parts import for_products

# Of one tile and of several, whole and ragged; two share their columns.
MATRICES = (Columns(0, 48, 8, 16), Columns(48, 200, 0, 72), Columns(0, 64, 72, 65))
# Parts of 64 rows, of two chunks: less than one, whole ones, and one whose last chunk is ragged.
N_ROWS = [0, 1, 63, 128, 157] if DEVICE == "cpu" else [0, 1, 63, 512, 1021]


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    """Draw positive numbers: every partial sum is then rounded by its part of the whole."""
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_exact_to(bound: float, found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    assert ((found - exact).abs() <= bound * exact).all()


@pytest.mark.gpu
@pytest.mark.parametrize("n_rows", N_ROWS)
@pytest.mark.parametrize("members", [1, 3])
def test_sums_are_those_of_each_matrix_and_bias(members, n_rows):
    dy, x = draw(members, n_rows, 248), draw(members, n_rows, 144, seed=1)
    sums = split(products_of_columns(dy, x, MATRICES), MATRICES)
    for (first_dy, out, first_x, width), (dw, db) in zip(MATRICES, sums, strict=True):
        of_dy = dy[..., first_dy : first_dy + out].double()
        of_x = x[..., first_x : first_x + width].double()
        assert_exact_to(2**-21, dw, of_dy.transpose(-1, -2) @ of_x)
        assert_exact_to(2**-21, db, of_dy.sum(-2))


@pytest.mark.parametrize(
    ("rows", "tiles", "expected"), [(0, 1, 64), (6400, 12, 96), (3840, 20, 96), (30_720, 20, 512)]
)
def test_parts_are_as_small_as_fill_a_gpu(rows, tiles, expected):
    assert _part_rows(rows, tiles) == expected


@pytest.mark.gpu
def test_rows_may_be_views_of_wider_ones():
    rows = draw(2, 700, 96)
    dy, x = rows[0, :, 16:64], rows[1, :, 64:]
    assert_exact_to(2**-21, product_of_rows(dy, x), dy.double().T @ x.double())


def operand(x: torch.Tensor) -> torch.Tensor:
    """Make what kernels leave of float32 [rows, columns]: [parts, rows, columns]."""
    n = n_parts.fn(dot_precision(x.dtype))
    return for_products([x], x.dtype, set_axes=0)[0].view(n, *x.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("n_rows", N_ROWS)
@pytest.mark.parametrize(("out", "width"), [(48, 16), (80, 200), (65, 129)])
def test_sums_of_operands(out, width, n_rows):
    dy, x = draw(n_rows, out), draw(n_rows, width, seed=1)
    found = product_of_operands(operand(dy), operand(x))
    assert_exact_to(2**-21, found, dy.double().T @ x.double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_summed_in_float32(dtype):
    """A matrix library lets tensor cores add row to row, and they truncate.

    With each row, less than 2^-23 of the sum so far is lost, 350 times that of the whole: below
    2^-14. A half would lose more.
    """
    dy, x = draw(700, 48).to(dtype), draw(700, 32, seed=1).to(dtype)
    exact = dy.double().T @ x.double()
    assert_exact_to(2**-14, product_of_rows(dy, x), exact)
    with pytest.raises(AssertionError):
        assert_exact_to(2**-14, exact.to(dtype).float(), exact)


@pytest.mark.skipif(not INTERPRETED, reason="a model of what a GPU does")
def test_truncation_on_tensor_cores_does_not_grow_with_the_rows(monkeypatch):
    dy, x = draw(9000, 16), draw(9000, 16, seed=1)
    exact = dy.double().T @ x.double()
    with tensor_core.multiplying(monkeypatch, "highest"):
        assert_exact_to(2**-20, product_of_rows(dy, x), exact)
        assert_exact_to(2**-20, product_of_operands(dy[None], x[None]), exact)
    zeros = torch.zeros(16, 16).numpy()
    in_one_chain = torch.from_numpy(tensor_core.product(dy.T.numpy(), x.numpy(), "bf16x6", zeros))
    assert ((in_one_chain / exact - 1).abs() > 2**-17).all()


@pytest.mark.gpu
def test_gradients_of_biases_are_summed_in_a_tree():
    """A product with ones would add row to row, and the error grow with the batch."""
    of = layout(32, 32)
    scratch = draw(2, 4500, of.columns.width)
    (made,) = products([scratch.unsqueeze(0)], of, shared=True)
    for (_, db), (dy, out, *_) in zip(
        split(made, of.matrix_columns), of.matrix_columns, strict=True
    ):
        assert_exact_to(2**-21, db[0, 0], scratch[..., dy : dy + out].double().sum((0, 1)))
