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


# One warp multiplies x [64, 16] by w [8, 16] transposed, in bfloat16; all four load y [64, 8].
PRODUCT = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry product(
    .param .u64 .ptr .global .align 1 product_param_0,
    .param .u64 .ptr .global .align 1 product_param_1,
    .param .u64 .ptr .global .align 1 product_param_2
)
.reqntid 128
{
    ld.param.b64    %rd1, [product_param_0];
    ld.param.b64    %rd2, [product_param_1];
    ld.param.b64    %rd3, [product_param_2];
    mov.u32         %r1, %tid.x;
    mov.b32         %r2, global_smem;
    setp.lt.u32     %p1, %r1, 32;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2], 32;
    @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    setp.eq.u32     %p2, %r1, 0;
    @%p2 mbarrier.init.shared::cta.b64 [%r2+8], 1;
    mul.lo.u32      %r3, %r1, 16;           // a thread's 16 bytes, and where they are swizzled to
    cvt.u64.u32     %rd4, %r3;
    add.s64         %rd5, %rd1, %rd4;
    add.s64         %rd6, %rd2, %rd4;
    shr.u32         %r4, %r3, 3;
    and.b32         %r4, %r4, 16;
    xor.b32         %r4, %r4, %r3;
    add.s32         %r5, %r2, %r4;
    ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd5];
    st.shared.v4.b32 [%r5+1024], {%r6, %r7, %r8, %r9};
    setp.lt.u32     %p3, %r1, 16;
    @%p3 ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd6];
    @%p3 st.shared.v4.b32 [%r5+3072], {%r6, %r7, %r8, %r9};
    fence.proxy.async.shared::cta;
    bar.sync        0;
    ld.shared.b32   %r10, [%r2];
    @!%p1 bra       $L__wait;
    elect.sync      %r11|%p4, -1;
    bfe.u32         %r12, %r2, 4, 14;
    cvt.u64.u32     %rd7, %r12;
    add.s64         %rd8, %rd7, DESCRIPTOR;
    add.s64         %rd7, %rd8, 64;
    add.s64         %rd8, %rd8, 192;
    mov.b32         %r13, SHAPE;
    mov.pred        %p5, 0;
    @%p4 tcgen05.mma.cta_group::1.kind::f16 [ %r10 + 0 ], %rd7, %rd8, %r13, %p5;
    @%p4 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2+8];
$L__wait:
{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r2+8], 0;
    @!complete bra.uni waitLoop;
}
    bar.sync        0;
    shr.u32         %r14, %r1, 5;           // a warp's lanes, of which its 16 rows take half
    shl.b32         %r14, %r14, 21;
    add.s32         %r14, %r14, %r10;
    tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {%r15, %r16, %r17, %r18}, [%r14 + 0], 4;
    tcgen05.wait::ld.sync.aligned;
    and.b32         %r19, %r1, 15;          // row 16 (t / 32) + t % 16, columns from 4 (t / 16 % 2)
    shr.u32         %r20, %r1, 5;
    mad.lo.u32      %r19, %r20, 16, %r19;
    bfe.u32         %r20, %r1, 4, 1;
    shl.b32         %r19, %r19, 1;
    add.s32         %r19, %r19, %r20;
    mad.wide.u32    %rd9, %r19, 16, %rd3;
    st.global.v4.b32 [%rd9], {%r15, %r16, %r17, %r18};
    bar.sync        0;
    @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 32;
    ret;
}
""".replace("DESCRIPTOR", str(6 << 61 | 1 << 46 | 256 // 16 << 32)).replace(
    "SHAPE", str(1 << 4 | 1 << 7 | 1 << 10 | 8 // 8 << 17 | 64 // 16 << 24)
)
_COMMIT = "@%p4 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2+8];"


def run_product(ptx: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator).bfloat16()
    w = torch.randn(8, 16, generator=generator).bfloat16()
    y = torch.full((64, 8), torch.nan)
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (x, w, y)]
    Program(ptx).run((1,), 4096, [begin for begin, _ in spans], spans)
    return y, (x.double() @ w.double().T).float()


def test_it_multiplies_into_tensor_memory():
    y, expected = run_product(PRODUCT)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("line", "instead", "fault"),
    [
        ("fence.proxy.async.shared::cta;", "", "a product reads what no fence.proxy.async"),
        ("@!complete bra.uni waitLoop;", "", "the sum of a product under way"),
        (_COMMIT, "", "a wait for products that nobody commits"),
        (_COMMIT, f"{_COMMIT} st.shared.b32 [%r2+1024], %r1;", "two lanes write different"),
        (_COMMIT, f"{_COMMIT} st.shared.b32 [%r5+1024], %r1;", "a product's operand changes"),
        ("@%p4 tcgen05.mma", "tcgen05.mma", "tcgen05.mma by several threads"),
        ("[ %r10 + 0 ]", "[ %r10 + 28 ]", "column 32 of 32 of tensor memory"),
        ("%r13, %p5;", "%r13, %p4;", "it reads tensor memory that nobody wrote"),
        (
            "mov.b32         %r13, ",
            "mov.b32         %r13, 1",
            "other than halves|a product's shape",
        ),
        ("[%r14 + 0], 4;", "[%r10 + 0], 4;", "tensor memory of another warp"),
        ("tcgen05.wait::ld.sync.aligned;", "", "nobody waits for a load of tensor memory"),
        ("[%r14 + 0], 4;", "[%r14 + 0], 5;", "it reads tensor memory that nobody wrote"),
        ("@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 32;", "", "is not freed"),
        ("%r10, 32;", "%r10, 64;", "other tensor memory than it has"),
        ("ld.shared.b32   %r10, [%r2];", "ld.shared.b32 %r10, [%r2+8];", "it touches a mbarrier"),
        ("@%p2 mbarrier.init.shared::cta.b64 [%r2+8], 1;", "", "no mbarrier is there"),
    ],
)
def test_it_finds_what_is_planted_around_tensor_memory(line, instead, fault):
    assert line in PRODUCT
    with pytest.raises(FaultError, match=fault):
        run_product(PRODUCT.replace(line, instead))


@pytest.mark.parametrize("warp", [0, 3])
def test_it_finds_stores_into_a_sum_that_is_not_waited_for(warp):
    """Of other warps than the one that multiplies, which comes first or last."""
    store = """ld.shared.b32 %r10, [%r2]; shr.u32 %r14, %r1, 5; shl.b32 %r14, %r14, 21;
    add.s32 %r14, %r14, %r10;
    tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r14 + 0], 4, {%r6, %r7, %r8, %r9};
    tcgen05.wait::st.sync.aligned;
    """
    ptx = PRODUCT.replace("ld.shared.b32   %r10, [%r2];", store)
    ptx = ptx.replace(
        "setp.lt.u32     %p1, %r1, 32;", f"shr.u32 %r14, %r1, 5; setp.eq.u32 %p1, %r14, {warp};"
    )
    fault = "the sum of a product under way" if warp == 0 else "two warps write different values"
    with pytest.raises(FaultError, match=fault):
        run_product(ptx)
    y, expected = run_product(ptx.replace("@!%p1 bra", "bar.sync 0; @!%p1 bra"))
    assert torch.equal(y, expected)


def test_it_knows_how_many_operands_an_instruction_has():
    """The third of a maximum, and of an addition, which has none."""
    largest = "max.f32 %r7, %r7, %r7, 0f7F800000; add.s64         %rd5"
    _, y, _ = run(REVERSE.replace("add.s64         %rd5", largest))
    assert torch.equal(y.view(torch.float32), torch.full((64,), torch.inf))
    with pytest.raises(FaultError, match="4 operands"):
        run(REVERSE.replace("add.s64         %rd5", "add.s32 %r7, %r7, 0, 0; add.s64 %rd5"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
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
