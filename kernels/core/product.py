"""Matrix products of float32 and halves, as the precision that was asked for wants them.

float32 is multiplied on tensor cores, which take TF32, a float32 with 10 bits of fraction, and cut
off the other 13:

    tf32     x y with both rounded to TF32
    tf32x3   x = big + small, big rounded to TF32: small big + big small + big big; float32's
             accuracy, as what is left out, small small and a last bit of small, is 2^-22 of x y

``gpu.dot_precision`` says which. Halves are multiplied exactly; their precision is called ieee.

Triton has a tf32x3 of its own. It rounds both parts by an instruction that ptxas makes four of, and
looks for NaN in every sum, so that an infinite operand does not become one: a third more
instructions. Here an infinite operand makes a sum NaN; the LayerNorm behind it would.
"""

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_PIECE = tl.constexpr(64)
_HALF = tl.constexpr(0x1000)  # half a unit of TF32's last place, in the bits of a float32
_MOST = tl.constexpr(0x7FFFFFFF - 0x1000)


@triton.jit
def _as_tf32(x):
    """Add what makes the tensor core's cut a rounding to the nearest, ties away from 0.

    A NaN whose bits would overflow has fewer set.
    """
    bits = tl.minimum(x.to(tl.int32, bitcast=True), _MOST)
    return (bits + _HALF).to(tl.float32, bitcast=True)


@triton.jit
def _parts(x):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high;
        cvt.rn.bf16x2.f32 $0, $4, $3;
        shl.b32 low, $0, 16;
        and.b32 high, $0, 0xffff0000;
        sub.f32 low, $3, low;
        sub.f32 high, $4, high;
        cvt.rn.bf16x2.f32 $1, high, low;
        .reg .b32 low2, high2;
        shl.b32 low2, $1, 16;
        and.b32 high2, $1, 0xffff0000;
        sub.f32 low2, low, low2;
        sub.f32 high2, high, high2;
        cvt.rn.bf16x2.f32 $2, high2, low2;
        }""",
        "=&r,=&r,=&r,r,r", [x], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )


@triton.jit
def _product_of_parts(a, b, c):
    a1, a2, a3 = _parts(a)
    b1, b2, b3 = _parts(b)
    y = tl.dot(a3, b1)
    y = tl.dot(a2, b2, y)
    y = tl.dot(a1, b3, y)
    y = tl.dot(a2, b1, y)
    y = tl.dot(a1, b2, y)
    y = tl.dot(a1, b1, y)
    return y if c is None else y + c


@triton.jit
def _product(a, b, c, PRECISION: tl.constexpr):
    if _INTERPRETED or a.dtype != tl.float32:  # the interpreter multiplies float32 exactly
        y = tl.dot(a, b, c, input_precision=PRECISION)
    elif PRECISION == "tf32x3":
        y = _product_of_parts(a, b, c)
    else:
        y = tl.dot(_as_tf32(a), _as_tf32(b), c, input_precision=PRECISION)
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
    if PRECISION == "tf32x3 cut":
        c = _product_in_pieces(a, b, c, "tf32x3")
    elif PRECISION == "tf32 cut":
        c = _product_in_pieces(a, b, c, "tf32")
    elif PRECISION == "ieee cut":
        c = _product_in_pieces(a, b, c, "ieee")
    else:
        c = _product(a, b, c, PRECISION)
    return c
