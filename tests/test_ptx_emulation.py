"""The emulation of PTX finds what is planted, and the kernels' tests pass in it.

``COMPILED=sm_90 pytest tests/test_reasoning_fused.py -k "not cpp"`` runs all tests of a file so.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptx_emulation.program import Counts, FaultError, Program

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

# Two warps exchange what they read: y[t] = x[63 - t], through shared memory.
REVERSE = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry reverse(
    .param .u64 .ptr .global .align 1 reverse_param_0,
    .param .u64 .ptr .global .align 1 reverse_param_1
)
.reqntid 64
{
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64    %rd1, [reverse_param_0];
    ld.param.b64    %rd2, [reverse_param_1];
    mov.u32         %r1, %tid.x;
    mul.wide.u32    %rd3, %r1, 4;
    add.s64         %rd4, %rd1, %rd3;
    ld.global.b32   %r2, [%rd4];
    mov.b32         %r3, global_smem;
    shl.b32         %r4, %r1, 2;
    add.s32         %r5, %r3, %r4;
    st.shared.b32   [%r5], %r2;
    bar.sync        0;
    sub.s32         %r6, %r3, %r4;
    ld.shared.b32   %r7, [%r6+252];
    add.s64         %rd5, %rd2, %rd3;
    st.global.b32   [%rd5], %r7;
    ret;
}
"""


def run(
    ptx: str, n_programs: int = 1, shared_bytes: int = 256
) -> tuple[torch.Tensor, torch.Tensor, Counts]:
    x, y = torch.arange(64, dtype=torch.int32), torch.full((64,), -1, dtype=torch.int32)
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (x, y)]
    arguments = [x.data_ptr(), y.data_ptr()]
    return x, y, Program(ptx).run((n_programs,), shared_bytes, arguments, spans)


def test_it_computes_and_counts():
    x, y, counts = run(REVERSE)
    assert torch.equal(y, x.flip(0))
    assert counts == Counts(instructions=2 * 16, barriers=2, bank_passes=4, fewest_passes=4)


def test_it_counts_conflicts_of_banks():
    """Rows of 128 bytes: a warp's words are all in one bank."""
    conflicts = REVERSE.replace("%r1, 2;", "%r1, 7;").replace("[%r6+252]", "[%r6+8064]")
    x, y, counts = run(conflicts, shared_bytes=64 * 128)
    assert torch.equal(y, x.flip(0))
    assert (counts.bank_passes, counts.fewest_passes) == (4 * 32, 4)


@pytest.mark.parametrize(
    ("line", "instead", "fault"),
    [
        ("bar.sync        0;", "", "it reads shared memory that nobody wrote"),
        ("add.s64         %rd5", "st.shared.b32 [%r5], %r7; add.s64 %rd5", "it reads what another"),
        ("[%r6+252]", "[%r6+256]", "byte 256 of 256 of shared memory"),
        ("[%r6+252]", "[%r6+250]", "a misaligned address of shared memory"),
        ("st.shared.b32   [%r5], %r2;", "", "it reads shared memory that nobody wrote"),
        ("[%rd4]", "[%rd4+4]", "global memory outside of every argument"),
        ("[%rd5]", "[%rd2]", "two lanes write different values"),
        ("mul.wide.u32    %rd3, %r1, 4;", "mul.wide.u32    %rd3, %r1, 2;", "a misaligned address"),
        ("sub.s32", "sub.s31", "instructions that are not emulated: sub.s31"),
    ],
)
def test_it_finds_what_is_planted(line, instead, fault):
    assert line in REVERSE
    with pytest.raises(FaultError, match=fault):
        run(REVERSE.replace(line, instead))


def test_it_finds_a_barrier_that_some_warps_never_reach():
    leaves = "setp.gt.u32 %p1, %r1, 31; @%p1 ret; bar.sync 0;"
    with pytest.raises(FaultError, match="a barrier that some warps never reach"):
        run(REVERSE.replace("bar.sync        0;", leaves))


def test_it_finds_a_race_of_programs():
    program = "mov.u32 %r8, %ctaid.x; add.s32 %r7, %r7, %r8; st.global.b32"
    run(REVERSE.replace("st.global.b32", program))
    with pytest.raises(FaultError, match=r"program \(1, 0, 0\): a race of two programs"):
        run(REVERSE.replace("st.global.b32", program), n_programs=2)


def test_lanes_that_part_meet_again():
    """Odd ones skip an instruction; the shuffle behind needs all of them."""
    part = """and.b32 %r8, %r1, 1; setp.eq.b32 %p1, %r8, 1;
    @%p1 bra $L__even;
    add.s32 %r7, %r7, 100;
$L__even:
    shfl.sync.bfly.b32 %r7, %r7, 1, 31, -1;
    """
    x, y, _ = run(REVERSE.replace("add.s64         %rd5", part + "add.s64         %rd5"))
    expected = x.flip(0) + 100 * (x % 2 == 0)
    assert torch.equal(y, expected.view(32, 2).flip(1).flatten())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_that_are_compiled_match_float64(arch, tmp_path):
    """Forward and backward of reasoning and scoring, with races looked for."""
    pytest.importorskip("triton")
    tests = [
        "test_reasoning_fused.py::test_parity[triton-dropout]",
        "test_scoring_triton.py::test_triton_parity_with_dropout[mlp-5]",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests],
        cwd=Path(__file__).parent,
        env=os.environ | {"COMPILED": arch, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{len(tests)} passed" in done.stdout
