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
    """Split x into big, rounded to TF32, and x - big, which has one bit more than TF32 at most."""
    big = (x.to(tl.int32, bitcast=True) + _HALF) & -(2 * _HALF)
    big = big.to(tl.float32, bitcast=True)  # of a NaN it may be 0; small is NaN
    return big, x - big


@triton.jit
def _product_of_parts(a, b, c):
    """Compute a b + c by tf32x3: the small products first, c last, in float32."""
    big_a, small_a = _parts(a)
    big_b, small_b = _parts(b)
    y = tl.dot(small_a, big_b, input_precision="tf32")
    y = tl.dot(big_a, small_b, y, input_precision="tf32")
    y = tl.dot(big_a, big_b, y, input_precision="tf32")
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
