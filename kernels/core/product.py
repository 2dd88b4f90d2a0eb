"""Matrix products of float32 and halves, as the precision that was asked for wants them.

Tensor cores take no float32. It is multiplied as

    tf32     one product of both rounded to TF32, which has 10 bits of fraction
    bf16x6   x = x1 + x2 + x3, parts in bfloat16 of 8 bits each, which are all 24 of a float32:
             x3 y1 + x2 y2 + x1 y3 + x2 y1 + x1 y2 + x1 y1; what is left out is 2^-25 of x y

``gpu.dot_precision`` says which. Halves are multiplied exactly; their precision is called ieee.

Triton has a product of three TF32 ones, tf32x3, which costs a tensor core as much as six of
bfloat16. But operands in bfloat16 are packed where the product before left them, and are transposed
as they are read, while TF32 is shuffled between threads for both; its parts have 22 bits.
"""

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_PIECE = tl.constexpr(64)
_HALF = tl.constexpr(0x1000)  # half a unit of TF32's last place, in the bits of a float32
_MOST = tl.constexpr(0x7FFFFFFF - 0x1000)
# Of two numbers at a time, whose parts share a register.
_SPLIT = tl.constexpr("""{
    .reg .f32 low, high;
    .reg .b32 low_part, high_part;
    cvt.rn.bf16x2.f32 $0, $4, $3;
    shl.b32 low_part, $0, 16;
    and.b32 high_part, $0, 0xffff0000;
    sub.rn.f32 low, $3, low_part;
    sub.rn.f32 high, $4, high_part;
    cvt.rn.bf16x2.f32 $1, high, low;
    shl.b32 low_part, $1, 16;
    and.b32 high_part, $1, 0xffff0000;
    sub.rn.f32 low, low, low_part;
    sub.rn.f32 high, high, high_part;
    cvt.rn.bf16x2.f32 $2, high, low;
}""")


@triton.jit
def _as_tf32(x):
    """Add what makes the tensor core's cut a rounding to the nearest, ties away from 0.

    A NaN whose bits would overflow has fewer set.
    """
    bits = tl.minimum(x.to(tl.int32, bitcast=True), _MOST)
    return (bits + _HALF).to(tl.float32, bitcast=True)


@triton.constexpr_function
def n_parts(precision: str) -> int:
    """In how many parts a matrix of weights is to come."""
    is_split = precision.startswith("bf16x6") and not knobs.runtime.interpret
    return 3 if is_split else 1


@triton.jit
def parts(x):
    """Split float32 into three bfloat16 that add up to it, the largest first."""
    return tl.inline_asm_elementwise(
        _SPLIT, "=&r,=&r,=&r,r,r", [x], (tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def product_with_parts(a, b1, b2, b3, c=None):
    """Compute a (b1 + b2 + b3) + c by bf16x6: the smallest products first, c last, in float32."""
    a1, a2, a3 = parts(a)
    y = tl.dot(a3, b1)
    y = tl.dot(a2, b2, y)
    y = tl.dot(a1, b3, y)
    y = tl.dot(a2, b1, y)
    y = tl.dot(a1, b2, y)
    y = tl.dot(a1, b1, y)
    return y if c is None else y + c


@triton.jit
def _product(a, b, c, PRECISION: tl.constexpr):
    if a.dtype != tl.float32:
        y = tl.dot(a, b, c)
    elif PRECISION == "tf32":
        if not _INTERPRETED:  # the interpreter multiplies float32 exactly
            a, b = _as_tf32(a), _as_tf32(b)
        y = tl.dot(a, b, c, input_precision="tf32")
    elif _INTERPRETED:
        y = tl.dot(a, b, c, input_precision="ieee")
    else:
        b1, b2, b3 = parts(b)
        y = product_with_parts(a, b1, b2, b3, c)
    return y


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
    if PRECISION == "bf16x6 cut":
        c = _product_in_pieces(a, b, c, "bf16x6")
    elif PRECISION == "tf32 cut":
        c = _product_in_pieces(a, b, c, "tf32")
    elif PRECISION == "ieee cut":
        c = _product_in_pieces(a, b, c, "ieee")
    else:
        c = _product(a, b, c, PRECISION)
    return c
