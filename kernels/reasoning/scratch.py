"""Scratch of the backward kernels: what a row holds for a row of states in one step.

And what the host makes of it, the gradients of the weights.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lcr_fast.kernels.weight_gradients import Columns, half_product, products_of_columns, split
from lcr_fast.weights import EncoderWeights, ReasoningWeights


class ScratchColumns(NamedTuple):
    """Columns of a row, the first of each; D wide, ``hidden`` and ``dhidden`` F.

    The host multiplies gradients' columns with operands': a gradient's with its operand's make that
    of a matrix, and with ``ones`` that of a bias. Without cross-attention a is c, and what is
    another's alone has no column.
    """

    ones: int  # operand of all gradients; 16 wide, of which one is needed
    h: int  # operand of self_dq, self_dk, self_dv
    self_heads: int  # of self_dy
    a: int  # of cross_dq, and in the other stream's row of cross_dk, cross_dv
    cross_heads: int  # of cross_dy
    c: int  # of dhidden
    hidden: int  # of ffn_dy
    self_dq: int
    self_dk: int
    self_dv: int
    self_dy: int
    cross_dq: int
    cross_dk: int  # of this row as the other stream's memory
    cross_dv: int
    cross_dy: int
    ffn_dy: int
    dhidden: int
    x1: int  # before the norms
    x2: int
    width: int  # of the whole row


_ONES = 16  # the least columns that keep the others aligned
_OF_CROSS = ("a", "cross_heads", "cross_dq", "cross_dk", "cross_dv", "cross_dy", "x2")


@triton.constexpr_function
def scratch_columns(D: int, F: int, sublayers: int = 3) -> ScratchColumns:
    """Lay out a row; for the host and, at compile time, for the kernels."""
    widths = dict.fromkeys(ScratchColumns._fields[:-1], D) | {"ones": _ONES}
    widths |= {"hidden": F, "dhidden": F}
    if sublayers == 2:
        widths |= dict.fromkeys(_OF_CROSS, 0)
    return ScratchColumns(*itertools.accumulate(widths.values(), initial=0))


# What scratch may take: of a GPU's memory, and numbers, 1,200 users' step at the default model's
# width. More would spare launches, which so large a batch does not notice.
_SCRATCH_SHARE = 1 / 128
_MOST_NUMBERS = 80 << 20
_INTERPRETER_MEMORY = 1 << 36


class Pieces(NamedTuple):
    """What backward has in scratch at a time."""

    users: int
    steps: int


def pieces(
    n_users: int, n_steps: int, user_numbers: int, dtype: torch.dtype, device: torch.device
) -> Pieces:
    """Cut a batch whose users take ``user_numbers`` a step as little as scratch allows, evenly.

    All users take as many steps as fit, or if not even one does, fewer of them take one: an even
    number, as Triton compiles other kernels where the int64 numbers of users do not begin at 16
    bytes.
    """
    memory = _INTERPRETER_MEMORY
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    numbers = min(_MOST_NUMBERS, int(_SCRATCH_SHARE * memory) // dtype.itemsize)
    most = max(1, numbers // max(user_numbers, 1))  # users' steps
    at_once = min(n_steps, max(1, most // n_users))
    users = triton.cdiv(n_users, triton.cdiv(n_users, most))
    return Pieces(
        min(n_users, users + users % 2), triton.cdiv(n_steps, triton.cdiv(n_steps, at_once))
    )


class Matrix(NamedTuple):
    """A matrix, its bias, and the columns of scratch whose products are their gradients."""

    weight: str  # fields of ReasoningWeights or EncoderWeights
    bias: str
    columns: Columns


class Layout(NamedTuple):
    """The columns of a row, and the matrices whose gradients are made of them."""

    columns: ScratchColumns
    matrices: list[Matrix]

    @property
    def matrix_columns(self) -> list[Columns]:
        return [matrix.columns for matrix in self.matrices]

    @property
    def gradients(self) -> slice:
        """Columns of all dY."""
        return slice(self.columns.self_dq, self.columns.x1)

    @property
    def operands(self) -> slice:
        """Columns of all X."""
        return slice(self.columns.ones, self.columns.self_dq)


def layout(D: int, F: int, sublayers: int = 3) -> Layout:
    """Lay out the scratch of a reasoning step, or with 2 ``sublayers`` of an encoder's layer."""
    C = scratch_columns(D, F, sublayers)
    has_cross = sublayers == 3
    of_self = "self_" if has_cross else ""
    parts = [
        (f"{of_self}qkv", C.self_dq, 3 * D, C.h, D),
        (f"{of_self}out", C.self_dy, D, C.self_heads, D),
    ]
    if has_cross:
        parts += [
            ("cross_qkv", C.cross_dq, 3 * D, C.a, D),
            ("cross_out", C.cross_dy, D, C.cross_heads, D),
        ]
    if F:
        parts += [("ffn_in", C.dhidden, F, C.c, D), ("ffn_out", C.ffn_dy, D, C.hidden, F)]
    return Layout(
        C,
        [Matrix(f"{name}_weight", f"{name}_bias", Columns(*columns)) for name, *columns in parts],
    )


def products(factors: Sequence[Tensor], of: Layout, shared: bool) -> list[Tensor]:
    """Multiply gradients with their operands, summed over rows: float32, one for each factor.

    ``factors``, [streams, steps, rows, columns], are one of both streams or one of each. P is 1 if
    the steps share their weights, else the number of steps. float32 has the sums of each matrix,
    [streams, P, sums]. Halves multiply all columns of dY with all of X at once, in parts of the
    rows, [streams, P, columns of dY, columns of X]: a sixth of that is read, but it fills a GPU,
    which narrow sums over 100,000 rows do not, and the ones in X make the biases' gradients in
    passing.
    """
    return [_products(scratch, of, shared) for scratch in factors]


def _products(scratch: Tensor, of: Layout, shared: bool) -> Tensor:
    if shared:  # one sum over all steps
        scratch = scratch.view(len(scratch), 1, -1, scratch.shape[-1])
    streams, sets, rows, width = scratch.shape
    if scratch.dtype == torch.float32:
        members = scratch.view(streams * sets, rows, width)
        return products_of_columns(members, members, of.matrix_columns).view(streams, sets, -1)
    parts = next(n for n in (8, 5, 4, 3, 2, 1) if rows % n == 0)
    batch = scratch.view(streams * sets * parts, -1, width)
    product = half_product(batch[..., of.gradients], batch[..., of.operands])
    return product.view(streams, sets, parts, *product.shape[1:]).sum(2)


def add_up(sums: dict[Any, list[Tensor]], key: Any, made: list[Tensor]) -> None:
    """Add what a piece of a batch made to what others did under the same key."""
    if key in sums:
        torch._foreach_add_(sums[key], made)
    else:
        sums[key] = made


def write_gradients(
    gradients: ReasoningWeights | EncoderWeights,
    streams: slice,
    first: int,
    made: Sequence[Tensor],
    of: Layout,
) -> None:
    """Write what :func:`products` made of the streams into the gradients of the weights.

    ``first`` is the first set of weights that it is of.
    """
    of_both = torch.cat(list(made)) if len(made) > 1 else made[0]
    sets = slice(first, first + of_both.shape[1])
    for matrix, values in zip(of.matrices, _of_matrices(of_both, of), strict=True):
        for name, value in zip(matrix[:2], values, strict=True):
            into, value = getattr(gradients, name)[sets, streams], value.transpose(0, 1)
            if matrix.weight == "cross_qkv_weight":  # keys and values are of the other's queries
                D = matrix.columns.width
                into[:, :, :D] = value[:, :, :D]
                into[:, :, D:] = value[:, :, D:].flip(1)
            else:
                into.copy_(value)


def _of_matrices(made: Tensor, of: Layout) -> list[tuple[Tensor, Tensor]]:
    """View products as the gradients of each matrix and its bias, [streams, P, ...]."""
    if made.ndim == 3:
        return split(made, of.matrix_columns)
    found = []
    for dy, out, x, width in of.matrix_columns:
        dy -= of.gradients.start
        of_rows = made[:, :, dy : dy + out]
        found.append((of_rows[..., x : x + width], of_rows[..., of.columns.ones]))
    return found
