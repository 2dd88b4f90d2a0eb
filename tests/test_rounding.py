"""What the interpreter cannot run: roundings by instructions of PTX, seen in the machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TOOLS = Path(__file__).parents[1] / "tools"
_COMMON = """
import json

import sass
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lcr_fast.kernels.core.product import rounded_products
from lcr_fast.kernels.reasoning.sublayers import rounded

ALIGNED = [["tt.divisibility", 16]]
found = {}


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
    return [(i.opcode, str(i.operands)) for i in program.instructions]
"""
_CAST = """
@triton.jit
def cast(X, Y, TYPE: tl.constexpr, OURS: tl.constexpr):
    at = tl.arange(0, 256)
    x = tl.load(X + at)
    tl.store(Y + at, rounded(x, TYPE) if OURS else x.to(TYPE))


for name, type_ in (("bf16", tl.bfloat16), ("fp16", tl.float16)):
    pointers = {"X": "*fp32", "Y": "*" + name}
    found[name + ", ours"] = instructions(cast, pointers, TYPE=type_, OURS=True)
    found[name + ", a cast"] = instructions(cast, pointers, TYPE=type_, OURS=False)
"""
_SUM = """
@triton.jit
def sums(P, D, Y, OURS: tl.constexpr):
    row, key = tl.arange(0, 16), tl.arange(0, 32)
    at = row[:, None] * 32 + key[None, :]
    p, d = tl.load(P + at), tl.load(D + at)
    tl.store(Y + row, tl.sum(rounded_products(p, d) if OURS else p * d, 1))


for name, which in (("ours", True), ("plain", False)):
    found["sum, " + name] = instructions(sums, dict.fromkeys("PDY", "*fp32"), OURS=which)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[list[str]]]:
    """Compile both scripts' kernels, and not interpreted, with a cache of their own.

    Return what they print: opcode and operands of every instruction, by kernel.
    """
    folder = tmp_path_factory.mktemp("rounding")
    file = folder / "script.py"
    file.write_text(_COMMON + _CAST + _SUM + "print(json.dumps(found))\n")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(TOOLS)}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_two_at_a_time_is_the_machine_code_of_a_cast(found, dtype):
    """In which half of a register each number belongs is what no test on a CPU would notice."""
    assert any("PACK_AB" in opcode for opcode, _ in found[f"{dtype}, ours"])
    assert found[f"{dtype}, ours"] == found[f"{dtype}, a cast"]


@pytest.mark.full
def test_products_that_are_summed_are_each_rounded(found):
    """Fused, all but one would not be, and a user's bits would depend on its slot in the tile."""
    for name, is_fused in (("sum, ours", False), ("sum, plain", True)):
        opcodes = [opcode for opcode, _ in found[name]]
        assert any(opcode.startswith("FFMA") for opcode in opcodes) == is_fused, opcodes
        assert any(opcode.startswith("FMUL") for opcode in opcodes), opcodes
