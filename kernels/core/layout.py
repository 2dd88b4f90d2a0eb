"""Where the threads of a program hold a tile."""

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def laid_out_as(x, like):
    """Give x, of 32 bits a number, held by the threads that hold the same elements of ``like``.

    The compiler gives all operands of an instruction one layout, and prefers that of a product to
    that of a load. Without this instruction, which becomes none, it may move each of the tiles that
    are made of x where it could have moved x.
    """
    if _INTERPRETED:
        y = x
    else:
        y = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [x, like], dtype=x.dtype, is_pure=True, pack=1
        )
    return y
