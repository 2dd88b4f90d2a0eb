"""What the interpreter cannot run: roundings by instructions of PTX, seen in the machine code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TOOLS = Path(__file__).parents[1] / "tools"
_COMMON = """
import sass
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lcr_fast.kernels.reasoning.sublayers import rounded, rounded_products

ALIGNED = [["tt.divisibility", 16]]


def instructions(function, pointers, **constants):
    names = function.arg_names
    source = ASTSource(
        function,
        {**pointers, **dict.fromkeys(constants, "constexpr")},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): ALIGNED for name in pointers},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    ((_, program),) = sass.programs(sass.disassemble(made.asm["cubin"]))
    return [(i.opcode, i.operands) for i in program.instructions]
"""
_CAST = """
@triton.jit
def kernel(X, Y, TYPE: tl.constexpr, OURS: tl.constexpr):
    at = tl.arange(0, 256)
    x = tl.load(X + at)
    tl.store(Y + at, rounded(x, TYPE) if OURS else x.to(TYPE))


for name, type_ in (("bf16", tl.bfloat16), ("fp16", tl.float16)):
    ours, plain = (
        instructions(kernel, {"X": "*fp32", "Y": "*" + name}, TYPE=type_, OURS=which)
        for which in (True, False)
    )
    assert any("PACK_AB" in opcode for opcode, _ in ours), ours
    assert ours == plain, (ours, plain)
"""
_SUM = """
@triton.jit
def kernel(P, D, Y, OURS: tl.constexpr):
    row, key = tl.arange(0, 16), tl.arange(0, 32)
    at = row[:, None] * 32 + key[None, :]
    p, d = tl.load(P + at), tl.load(D + at)
    tl.store(Y + row, tl.sum(rounded_products(p, d) if OURS else p * d, 1))


for which in (True, False):
    found = instructions(kernel, dict.fromkeys("PDY", "*fp32"), OURS=which)
    fused = [opcode for opcode, _ in found if opcode.startswith("FFMA")]
    assert bool(fused) != which, found
    assert any(opcode.startswith("FMUL") for opcode, _ in found), found
"""


def run(script: str, folder: Path) -> None:
    """Run a script with a cache of its own, its kernels compiled and not interpreted."""
    file = folder / "script.py"
    file.write_text(_COMMON + script)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(TOOLS)}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rounding_two_at_a_time_is_the_machine_code_of_a_cast(tmp_path):
    """In which half of a register each number belongs is what no test on a CPU would notice."""
    run(_CAST, tmp_path)


def test_products_that_are_summed_are_each_rounded(tmp_path):
    """Fused, all but one would not be, and a user's bits would depend on its slot in the tile."""
    run(_SUM, tmp_path)
