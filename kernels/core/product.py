"""Matrix products of float32 and halves, as the precision that was asked for wants them.

Tensor cores take no float32. It is split into parts in bfloat16 of 8 bits each, x = x1 + x2 + x3,
whose products are exact and added in float32:

    bf16x6   x3 y1 + x2 y2 + x1 y3 + x2 y1 + x1 y2 + x1 y1: all 24 bits; what is left out is 2^-25
             of x y
    bf16x3   x2 y1 + x1 y2 + x1 y1: 16 bits, where torch allows TF32, which has 11

``gpu.dot_precision`` says which. Halves are multiplied exactly; their precision is called ieee.

TF32 would take one product for bf16x3, three for bf16x6 (Triton's tf32x3), each twice as long on a
tensor core. But its operands are shuffled between threads, and some transposed by them, while those
in bfloat16 are packed where the product before left them, and are transposed as they are read.
"""

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_PIECE = tl.constexpr(64)
# Of two numbers at a time, whose parts share a register.
_SPLIT_IN_2 = tl.constexpr("""{
    .reg .f32 low, high;
    .reg .b32 low_part, high_part;
    cvt.rn.bf16x2.f32 $0, $3, $2;
    shl.b32 low_part, $0, 16;
    and.b32 high_part, $0, 0xffff0000;
    sub.rn.f32 low, $2, low_part;
    sub.rn.f32 high, $3, high_part;
    cvt.rn.bf16x2.f32 $1, high, low;
}""")
_SPLIT_IN_3 = tl.constexpr("""{
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


@triton.constexpr_function
def n_parts(precision: str) -> int:
    """In how many parts float32 is multiplied; 1 in the interpreter, which does so exactly."""
    if knobs.runtime.interpret:
        return 1
    return {"bf16x6": 3, "bf16x3": 2}.get(precision.removesuffix(" cut"), 1)


@triton.jit
def parts(x, PARTS: tl.constexpr):
    """Split float32 into bfloat16 that add up to it, or nearly if they are 2, the largest first."""
    if PARTS == 3:
        made = tl.inline_asm_elementwise(
            _SPLIT_IN_3,
            "=&r,=&r,=&r,r,r",
            [x],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        made = tl.inline_asm_elementwise(
            _SPLIT_IN_2, "=&r,=&r,r,r", [x], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    return made


@triton.jit
def _sum_of_products(a, b, PARTS: tl.constexpr, c):
    """Compute a b + c of parts: the smallest products first, c last, in float32."""
    if PARTS == 3:
        y = tl.dot(a[2], b[0])
        y = tl.dot(a[1], b[1], y)
        y = tl.dot(a[0], b[2], y)
        y = tl.dot(a[1], b[0], y)
    else:
        y = tl.dot(a[1], b[0])
    y = tl.dot(a[0], b[1], y)
    y = tl.dot(a[0], b[0], y)
    return y if c is None else y + c


# An *operand* is a tuple of tiles: the parts of a float32, or one tile of what is multiplied whole.
# Where a precision ends in "cut", operands do not fit the shared memory whole. Then they are one
# tile each, and are split where a piece of it has its turn.


@triton.constexpr_function
def _is_cut(precision: str) -> bool:
    return precision.endswith(" cut")


@triton.constexpr_function
def _n_tiles(precision: str) -> int:
    return 1 if _is_cut(precision) else n_parts(precision)


@triton.constexpr_function
def _uncut(precision: str) -> str:
    return precision.removesuffix(" cut")


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """Make x an operand."""
    PARTS: tl.constexpr = _n_tiles(PRECISION)
    return parts(x, PARTS) if PARTS > 1 else (x,)


@triton.jit
def _load(ptrs, mask):
    return tl.load(ptrs) if mask is None else tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def whole(x):
    """Add up an operand, in float32; of three parts that is the number that was split."""
    LAST: tl.constexpr = len(x) - 1
    y = x[LAST].to(tl.float32)
    for i in tl.static_range(LAST):
        y += x[LAST - 1 - i].to(tl.float32)
    return y


@triton.jit
def load_operand(ptr, offsets, mask, part, PRECISION: tl.constexpr):
    """Load an operand whose parts stand ``part`` numbers apart."""
    PARTS: tl.constexpr = n_parts(PRECISION)
    first = _load(ptr + offsets, mask)
    if PARTS == 1:
        made = (first,)
    else:
        second = _load(ptr + part + offsets, mask)
        if PARTS == 2:
            made = (first, second)  # type: ignore[assignment]
        else:
            third = _load(ptr + 2 * part + offsets, mask)
            made = (first, second, third)  # type: ignore[assignment]
        if _is_cut(PRECISION):
            made = (whole(made),)  # type: ignore[assignment]
    return made


@triton.jit
def store_operand(ptr, offsets, x, mask, part, PRECISION: tl.constexpr):
    """Store x, float32, as :func:`load_operand` loads it."""
    made = operand(x, PRECISION)
    for i in tl.static_range(len(made)):
        tl.store(ptr + i * part + offsets, made[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def transposed(x, PRECISION: tl.constexpr):
    """Transpose an operand."""
    PARTS: tl.constexpr = _n_tiles(PRECISION)
    if PARTS == 1:
        made = (x[0].trans(),)
    elif PARTS == 2:
        made = (x[0].trans(), x[1].trans())  # type: ignore[assignment]
    else:
        made = (x[0].trans(), x[1].trans(), x[2].trans())  # type: ignore[assignment]
    return made


@triton.jit
def _whole_product(a, b, c, PRECISION: tl.constexpr):
    if _INTERPRETED and PRECISION == "bf16x3":  # the name tells tests/tensor_core.py which
        y = tl.dot(a, b, c, input_precision="tf32x3")
    else:
        y = tl.dot(a, b, c, input_precision="ieee")
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
        c = product(a, b, PRECISION, c)
    return c


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr, c=None):
    """Compute a b + c of operands, in float32, c being 0 by default."""
    PARTS: tl.constexpr = _n_tiles(PRECISION)
    if _is_cut(PRECISION):
        y = _product_in_pieces(a[0], b[0], c, _uncut(PRECISION))
    elif PARTS > 1:
        y = _sum_of_products(a, b, PARTS, c)
    else:
        y = _whole_product(a[0], b[0], c, PRECISION)
    return y


@triton.jit
def product(a, b, PRECISION: tl.constexpr, c=None):
    """Compute a b + c in float32, c being 0 by default."""
    right = operand(b, PRECISION)
    return multiply(operand(a, PRECISION), right, PRECISION, c)


@triton.jit
def rounded_products(a, b):
    """Multiply a and b (float32), each product rounded before anything is added.

    Of a sum over a tile, all products but one would be fused into their addition. Which one is
    rounded would depend on the slot, and threads that exchange their parts of a sum would each
    fuse their own and end with different bits, of which one is stored by chance.
    """
    if _INTERPRETED:
        y = a * b
    else:
        y = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return y
