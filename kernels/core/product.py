"""Matrix products of float32 and halves, as the precision that was asked for wants them.

float32 is multiplied on tensor cores, which take TF32, a float32 with 10 bits of fraction:

    tf32     x y with both rounded to TF32
    tf32x3   x = big + small, both TF32: small big + big small + big big; float32's accuracy, as
             what is left out, small small, is 2^-22 of x y

``gpu.dot_precision`` says which. Halves are multiplied exactly; their precision is called ieee.
"""

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_PIECE = tl.constexpr(64)


@triton.jit
def _round_to_tf32(x):
    """Round to the nearest TF32: the tensor core itself would truncate, which is biased."""
    if not _INTERPRETED:  # the interpreter multiplies float32 exactly
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return x


@triton.jit
def _product(a, b, c, PRECISION: tl.constexpr):
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a, b = _round_to_tf32(a), _round_to_tf32(b)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _product_in_pieces(a, b, c, PRECISION: tl.constexpr):
    """Halve the inner axis until a piece has a depth of at most _PIECE."""
    M: tl.constexpr = a.shape[0]
    K: tl.constexpr = a.shape[1]
    N: tl.constexpr = b.shape[1]
    if K > _PIECE:
        left, right = tl.split(a.reshape(M, 2, K // 2).permute(0, 2, 1))
        upper, lower = tl.split(b.reshape(2, K // 2, N).permute(1, 2, 0))
        c = _product_in_pieces(left, upper, c, PRECISION)
        c = _product_in_pieces(right, lower, c, PRECISION)
    else:
        c = _product(a, b, c, PRECISION)
    return c


@triton.jit
def product(a, b, PRECISION: tl.constexpr, c=None):
    """Compute a b + c in float32, c being 0 by default.

    Where PRECISION ends in "cut", operands that do not fit the shared memory whole take turns.
    """
    if PRECISION == "tf32x3 cut":
        c = _product_in_pieces(a, b, c, "tf32x3")
    elif PRECISION == "tf32 cut":
        c = _product_in_pieces(a, b, c, "tf32")
    elif PRECISION == "ieee cut":
        c = _product_in_pieces(a, b, c, "ieee")
    else:
        c = _product(a, b, c, PRECISION)
    return c
