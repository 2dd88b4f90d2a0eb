"""Scratch of the backward kernels: what a row holds for a row of states in one step."""

import itertools
from typing import NamedTuple

import triton


class ScratchColumns(NamedTuple):
    """Columns of a row, the first of each; D wide, ``hidden`` and ``dhidden`` F.

    The host multiplies gradients' columns with operands': a gradient's with its operand's make that
    of a matrix, and with ``ones`` that of a bias.
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


@triton.constexpr_function
def scratch_columns(D: int, F: int) -> ScratchColumns:
    """Lay out a row; for the host and, at compile time, for the kernels."""
    names = ScratchColumns._fields[:-1]
    widths = [{"ones": _ONES, "hidden": F, "dhidden": F}.get(name, D) for name in names]
    return ScratchColumns(*itertools.accumulate(widths, initial=0))
