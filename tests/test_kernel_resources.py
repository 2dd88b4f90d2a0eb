"""The Triton kernels compile for real GPUs, here without one, and fit them.

``python -m lcr_fast.kernels.resources`` compiles every variant into the committed table that these
tests read. A few are compiled again here, in a process of its own: interpreted kernels cannot be.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from lcr_fast.kernels import resources
from lcr_fast.kernels.resources import SHARED_BYTES, Usage
from lcr_fast.kernels.variant import Variant

PATH = Path(__file__).parents[1] / "docs" / "kernel-resources.md"
TABLE = resources.from_markdown(PATH.read_text())
VARIANTS = {
    (name, arch): variant for arch in SHARED_BYTES for name, variant in resources.all_variants(arch)
}
REFRESH = "run `python -m lcr_fast.kernels.resources -o docs/kernel-resources.md`"

# One of each kernel that runs in every training step, at the default model's width.
COMPILED_HERE = (
    r"^(scoring\.score_fwd-bf16-d64-L50-C5|reasoning\.(fwd-train|self_bwd-rollout)-bf16-d64-L30)$"
)


def wants_tensor_cores(variant: Variant) -> bool:
    """Whether a variant multiplies halves or TF32; float32 proper has no tensor cores."""
    halves = any(kind in ("*fp16", "*bf16") for kind in variant.signature.values())
    return halves or "tf32" in variant.constexprs.values()


# Bytes that a thread may spill at D of 32 and 64, by the first pattern that "name architecture"
# matches. The aim is 0; the rest keeps what has been reached.
MOST_SPILLED = (
    (r"^reasoning\.fwd-\w+-fp32-ieee-d64-L50 sm_80$", 136),
    (r"^reasoning\.fwd-\w+-fp32-ieee-d64-L50 sm_90$", 216),
    (r"^scoring\.head_bwd-fp32-ieee-d64-L50-C5 sm_80$", 8),
    (r"", 0),
)


def assert_fits(row: Usage) -> None:
    """Assert that a variant runs, and on tensor cores and without spills where that is due."""
    variant = VARIANTS[row.kernel, row.arch]
    assert row.shared <= SHARED_BYTES[row.arch], row
    assert row.products not in (resources.UNCOMPILED, resources.TOO_MUCH_TENSOR_MEMORY), row
    assert row.programs > 0, row
    if wants_tensor_cores(variant):
        assert row.products != "FMA", row
    if row.arch != "sm_100" and variant.constexprs.get("D") in (32, 64):
        name = f"{row.kernel} {row.arch}"
        limit = next(most for pattern, most in MOST_SPILLED if re.search(pattern, name))
        assert row.spilled <= limit, row


def test_the_table_lists_what_exists():
    assert {(row.kernel, row.arch) for row in TABLE.rows} == set(VARIANTS), REFRESH
    assert len(VARIANTS) == sum(1 for arch in SHARED_BYTES for _ in resources.all_variants(arch))


@pytest.mark.parametrize("module", resources.kernel_modules())
def test_the_table_is_of_these_sources(module):
    assert TABLE.fingerprints[module] == resources.fingerprint(module), REFRESH


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_the_table_obeys_the_limits(arch):
    for row in TABLE.rows:
        if row.arch == arch and (row.kernel, row.arch) in VARIANTS:
            assert_fits(row)


def test_some_variants_compile_to_what_the_table_says():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lcr_fast.kernels.resources", "--arch", "sm_80", "sm_90"]
    done = subprocess.run(
        [*command, "--only", COMPILED_HERE], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compiled = resources.from_markdown(done.stdout)
    assert compiled.rows
    for row in compiled.rows:
        assert_fits(row)
    if compiled.triton == TABLE.triton:
        assert set(compiled.rows) <= set(TABLE.rows)


def test_a_table_that_was_written_can_be_read():
    assert resources.from_markdown(resources.to_markdown(TABLE.rows)).rows == TABLE.rows
    with pytest.raises(ValueError, match="no line that names"):
        resources.from_markdown("| kernel | arch |")


def test_the_fingerprint_covers_what_a_module_imports_but_not_its_words(monkeypatch):
    assert {"reasoning_fwd", "reasoning_bwd", "steps", "blocks"} <= set(
        resources._sources("reasoning")
    )
    assert "blocks" not in resources._sources("scoring")
    sources = resources._sources("reasoning")
    before = resources.fingerprint("reasoning")
    blocks = sources["blocks"]
    for changed, is_same in (
        (blocks.replace('"""Slot of each row, [M]."""', '"""Another docstring."""'), True),
        (blocks + "\n# a comment\n", True),
        (blocks.replace("tl.constexpr(1e-5)", "tl.constexpr(2e-5)"), False),
        (blocks.replace("return tl.arange(0, M) // SLOT", "return tl.arange(0, M)"), False),
    ):
        assert changed != blocks
        monkeypatch.setattr(resources, "_sources", lambda _, c=changed: sources | {"blocks": c})
        assert (resources.fingerprint("reasoning") == before) == is_same


def test_tensor_memory_that_no_gpu_has_is_named(monkeypatch):
    compiled = SimpleNamespace(metadata=SimpleNamespace(tmem_size=576))
    monkeypatch.setattr(resources, "compile_variant", lambda *_: compiled)
    (name, arch), variant = next(iter(VARIANTS.items()))
    row = resources.measure(name, variant, arch)
    assert row.products == resources.TOO_MUCH_TENSOR_MEMORY
    assert row.programs == 0
