"""What the interpreter cannot run: halves are rounded two at a time by an instruction of PTX."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TOOLS = Path(__file__).parents[1] / "tools"
_COMPILE = """
import sass
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lcr_fast.kernels.reasoning.sublayers import rounded


@triton.jit
def kernel(X, Y, TYPE: tl.constexpr, OURS: tl.constexpr):
    at = tl.arange(0, 256)
    x = tl.load(X + at)
    tl.store(Y + at, rounded(x, TYPE) if OURS else x.to(TYPE))


aligned = [["tt.divisibility", 16]]
for name, type_ in (("bf16", tl.bfloat16), ("fp16", tl.float16)):
    found = []
    for ours in (True, False):
        source = ASTSource(
            kernel, {"X": "*fp32", "Y": "*" + name, "TYPE": "constexpr", "OURS": "constexpr"},
            {(2,): type_, (3,): ours}, {(0,): aligned, (1,): aligned},
        )
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
        ((_, program),) = sass.programs(sass.disassemble(made.asm["cubin"]))
        found.append([(i.opcode, i.operands) for i in program.instructions])
    assert any("PACK_AB" in opcode for opcode, _ in found[0]), found[0]
    assert found[0] == found[1], found
"""


def test_rounding_two_at_a_time_is_the_machine_code_of_a_cast(tmp_path):
    """In which half of a register each number belongs is what no test on a CPU would notice."""
    script = tmp_path / "rounding.py"
    script.write_text(_COMPILE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(TOOLS)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
