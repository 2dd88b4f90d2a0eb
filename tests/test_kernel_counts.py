"""What a user costs a kernel in a step, counted in listings as nvdisasm prints them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import kernel_counts
from kernel_counts import Counts, count_pass, count_step
from test_sass import listing

from lcr_fast.kernels.reasoning import backward
from lcr_fast.kernels.reasoning.config import Shape

HEADS = [
    ".L_heads:",
    "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24, gsb0",
    "MUFU.EX2 R3, R3",
    "STSM.16.M88.4 [R1], R4",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P1 BRA `(.L_heads)",
]
UNITS = [
    ".L_units:",
    "HMMA.16816.F32.BF16 R4, R4, R8, R4",
    "LDG.E.128 R8, [R2.64]",
    "@P2 BRA `(.L_units)",
]
STEPS = [
    "LDG.E R1, [R2.64]", ".L_steps:", "FADD R1, R1, R1", *HEADS, *UNITS, "STL.64 [R1], R2",
    "LDS R3, [R4]", "@P0 BRA `(.L_steps)", "STG.E [R2.64], R1",
]  # fmt: skip


def test_loops_inside_the_steps_count_as_often_as_they_are_passed():
    assert count_step(listing(*STEPS), head_blocks=2, unit_blocks=3) == Counts(
        instructions=2 * 5 + 3 * 3 + 4,
        products=2 + 3,
        shared=2 * 512 + 32 * 4,
        device=3 * 32 * 16,
        spilled=32 * 8,
        barriers=2,
    )


def test_loops_over_streams_are_passed_twice_and_hold_the_others():
    streams = [".L_streams:", "FADD R1, R1, R1", *HEADS, "@P3 BRA `(.L_streams)"]
    steps = [".L_steps:", "LDS R3, [R4]", *streams, "@P0 BRA `(.L_steps)"]
    found = count_step(listing(*steps), head_blocks=3, unit_blocks=1, looped=True)
    assert found.instructions == 2 * (3 * 5 + 2) + 2
    assert found.products == 2 * 3


def test_a_step_without_loops_inside_counts_once():
    found = count_step(listing(".L_steps:", "MUFU.EX2 R3, R3", "@P0 BRA `(.L_steps)"), 2, 3)
    assert found == Counts(2, 0, 0, 0, 0, 0)


def test_a_call_that_does_not_return_leaves_a_loop_too():
    """So ptxas leaves loops of code for compute capability 8."""
    steps = [
        ".L_steps:", "FADD R1, R1, R1", ".L_units:", "HMMA.16816.F32.BF16 R4, R4, R8, R4",
        "@!P0 CALL.REL.NOINC `(.L_out)", "BRA `(.L_units)", ".L_out:", "@P1 BRA `(.L_steps)",
    ]  # fmt: skip
    found = count_step(listing(*steps), head_blocks=2, unit_blocks=3)
    assert found.products == 3
    assert found.instructions == 3 * 3 + 2


def test_a_kernel_without_steps_is_named():
    with pytest.raises(ValueError, match="the kernel has no loop"):
        count_step(listing("MUFU.EX2 R3, R3"), 1, 1)


def test_a_pass_counts_what_is_outside_of_loops_too():
    listed = listing(*STEPS)
    found = count_pass(listed, (4, 2, 3))
    assert found.instructions == 3 + 4 * (2 * 5 + 3 * 3 + 4)  # one before, two behind
    assert found.products == 4 * (2 + 3)


def test_a_pass_whose_loops_were_unrolled_counts_as_it_stands():
    assert count_pass(listing("MUFU.EX2 R3, R3"), (4, 2)).instructions == 2
    steps = [".L_steps:", "MUFU.EX2 R3, R3", "@P0 BRA `(.L_steps)"]
    assert count_pass(listing(*steps), (1, 4, 1)) == count_pass(listing(*steps), (4,))
    with pytest.raises(ValueError, match="the kernel has 1 loops, not 2"):
        count_pass(listing(*steps), (4, 2))


@pytest.mark.parametrize(
    ("name", "parked", "loops"),
    [("ffn_bwd", False, 2), ("cross_bwd", True, 2), ("self_bwd", False, 1)],
)
def test_a_kernel_of_backward_passes_its_blocks(monkeypatch, name, parked, loops):
    shape = Shape(D=64, F=96, H=4, BLOCK_HEADS=16, BLOCK_F=32, PRECISION="ieee")
    given = {"SHAPE": shape, "SEQUENCES": 2, "PARKED": parked}
    kernel = getattr(backward, f"{name}_kernel")
    variant = SimpleNamespace(kernel=kernel, constexprs=given, options={"num_warps": 4})
    bodies = (HEADS, UNITS)[:loops]
    listed = listing("LDS R3, [R4]", *(line for body in bodies for line in body))
    monkeypatch.setattr(kernel_counts.sass, "disassemble", lambda _: listed)
    found = kernel_counts.counts(variant, SimpleNamespace(asm={"cubin": None}))
    in_loops = 5 + 3 if loops == 2 else 5  # instructions
    times = 3 if name == "ffn_bwd" else 4
    # Of both streams, a program each for two sequences; listings end with an instruction.
    assert found.instructions == 4 * (2 + times * in_loops)


@pytest.mark.full
def test_scoring_and_backward_are_counted():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    only = (
        "scoring.(hidden|state_bwd)-fp32-bf16x3-d64.*C100|operands"  # of operands W1 and W2
        "|reasoning.(ffn_bwd-train|cross_bwd)-bf16-d64-L30"
    )
    command = [sys.executable, kernel_counts.__file__, "--arch", "sm_90", "--only", only]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [row.split(" | ") for row in done.stdout.splitlines()[2:]]
    assert len(rows) == 6
    instructions = {row[0]: float(row[2].replace(",", "")) for row in rows}
    assert all(n > 9_000 for n in instructions.values()), instructions
