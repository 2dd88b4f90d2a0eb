"""The Triton kernels compile for real GPUs, here without one, and fit them.

``python tools/kernel_resources.py`` compiles every variant into the committed table that these
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

import triton

import kernel_resources as resources
from kernel_resources import SHARED_BYTES, Usage
from lcr_fast.kernels import ptxas

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "kernel-resources.json"
TABLE = resources.from_json(PATH.read_text())
VARIANTS = {
    (name, arch): variant for arch in SHARED_BYTES for name, variant in resources.all_variants(arch)
}
REFRESH = "run `python tools/kernel_resources.py -o docs/kernel-resources.json`"

MISCOMPILED = r"reasoning\.recompute_self-train-bf16-d64-L50"
# One of each kernel that runs in every training step, at the default model's width.
COMPILED_HERE = (
    r"^(scoring\.score_fwd-bf16-d64-L50-C5|reasoning\.(fwd-train|self_bwd-train)-bf16-d64-L30)$"
)


def assert_fits(row: Usage) -> None:
    """Assert that a variant compiles, fits, multiplies on tensor cores and at good addresses."""
    assert not resources.faults([row])
    assert "FMA" not in row.products, row


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


def run_python(*arguments: object) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(ROOT / "tools"), env.get("PYTHONPATH"))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return run_python(ROOT / "tools" / f"{name}.py", *arguments)


def run_resources(*arguments: object) -> subprocess.CompletedProcess:
    return run_tool("kernel_resources", *arguments)


@pytest.mark.full
def test_recomputation_fits_the_shared_memory_where_it_takes_most():
    case = "^recompute_cross-bf16x6-d(64-L128-H2|128-L128-H2)$"
    done = run_tool("shared_memory", "--arch", "sm_89", "sm_90", "--only", case)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 3  # width 128 is not served without wgmma


@pytest.mark.full
def test_backward_of_wide_candidates_fits_small_shared_memories():
    case = "^scoring-512-128-candidate_bwd-fp32-bf16x6-d128"
    done = run_tool("shared_memory", "--arch", "sm_89", "--only", case)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 2  # 5 candidates, 100


@pytest.mark.full
def test_some_variants_compile_to_what_the_table_says():
    done = run_resources("--arch", "sm_80", "sm_90", "--only", COMPILED_HERE)
    assert done.returncode == 0, done.stderr
    compiled = resources.from_json(done.stdout)
    assert compiled.rows
    for row in compiled.rows:
        assert_fits(row)
    if compiled.compiled_by == TABLE.compiled_by:
        assert set(compiled.rows) <= set(TABLE.rows)


_FUSED = """
import re, sys
import kernel_resources as resources

arch, name = sys.argv[1:]
ptx = resources.compile_variant(dict(resources.all_variants(arch))[name], arch).asm["ptx"]
exchanged = set(re.findall(r"shfl\\.sync\\.bfly\\.b32\\s+(%\\w+)", ptx))
fused = re.findall(r"fma\\.rn\\S*\\s+%\\w+, %\\w+, %\\w+, (%\\w+);", ptx)
added = re.findall(r"add\\S*\\s+%\\w+, (%\\w+), (%\\w+);", ptx)
print(sum(not exchanged.isdisjoint(both) for both in added), len(exchanged.intersection(fused)))
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("sm_90", "reasoning.self_bwd-train-bf16-d32-L20"),
        ("sm_100", "scoring.output_bwd-bf16-d64-L50-C100"),
    ],
)
def test_threads_that_share_a_sum_have_the_same_bits(arch, name):
    """None adds what another sent to a product that only the other rounded."""
    done = run_python("-c", _FUSED, arch, name)
    n_added, n_fused = map(int, done.stdout.split())
    assert n_added > 0
    assert n_fused == 0


@pytest.mark.full
def test_the_check_finds_what_a_bad_ptxas_makes():
    bad = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    tool = ptxas.find(str(bad), "Triton's ptxas")
    if tool is None or not ptxas.is_known_bad(tool.release, 90):
        pytest.skip(f"{tool} is not known to miscompile")
    done = run_resources(
        "--check", PATH, "--arch", "sm_90", "--only", f"^{MISCOMPILED}$", "--ptxas", bad
    )
    assert done.returncode == 1, done.stderr
    assert re.search(rf"{MISCOMPILED} for sm_90: \d+ garbage descriptors", done.stdout)


@pytest.mark.full
def test_an_older_ptxas_than_triton_writes_for_assembles():
    older = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    case = r"^lookup\.seen_bonus_fwd-bf16$"
    done = run_resources("--check", PATH, "--arch", "sm_100", "--only", case, "--ptxas", older)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_table_that_was_written_can_be_read():
    text = resources.to_json(TABLE)
    assert resources.from_json(text) == TABLE
    assert text == PATH.read_text()
    with pytest.raises(ValueError, match="no table of this tool"):
        resources.from_json("{}")
    with pytest.raises(ValueError, match="the columns must be kernel, arch"):
        resources.from_json(text.replace('"descriptors"', '"stages"'))


def test_the_page_sums_up_the_table():
    page = PATH.with_suffix(".md").read_text()
    assert page == resources.to_page(TABLE), REFRESH
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if "_bwd |" in line]
    name, _, registers, *_ = next(row for row in rows if row[0] == "reasoning.self_bwd")
    of_sm_80 = [r for r in TABLE.rows if r.kernel.startswith(f"{name}-") and r.arch == "sm_80"]
    assert int(registers.split(" / ")[0]) == max(row.registers for row in of_sm_80)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"descriptors": "2 garbage"}, "2 garbage descriptors"),
        ({"shared": 1 << 20}, "1048576 bytes of shared memory do not fit"),
        ({"products": resources.UNCOMPILED}, resources.UNCOMPILED),
    ],
)
def test_a_faulty_row_is_named(change, sentence):
    row = next(row for row in TABLE.rows if row.descriptors == "good")
    assert resources.faults([row]) == []
    assert resources.faults([row._replace(**change)]) == [
        f"{row.kernel} for {row.arch}: {sentence}"
    ]


def test_the_fingerprint_covers_what_a_module_imports_but_not_its_words(monkeypatch):
    sources = resources._sources("reasoning")
    assert {"reasoning.forward", "reasoning.backward", "reasoning.step", "core.noise"} <= set(
        sources
    )
    assert "reasoning.tile" not in resources._sources("scoring")
    before = resources.fingerprint("reasoning")
    tile, sublayers = sources["reasoning.tile"], sources["reasoning.sublayers"]
    for name, changed, is_same in (
        ("tile", tile.replace('"""Slot of each row, [M]."""', '"""Another docstring."""'), True),
        ("tile", tile + "\n# a comment\n", True),
        ("tile", tile.replace("return tl.arange(0, M) // SLOT", "return tl.arange(0, M)"), False),
        ("sublayers", sublayers.replace("tl.constexpr(1e-5)", "tl.constexpr(2e-5)"), False),
    ):
        module = f"reasoning.{name}"
        assert changed != sources[module]
        monkeypatch.setattr(resources, "_sources", lambda _, m=module, c=changed: sources | {m: c})
        assert (resources.fingerprint("reasoning") == before) == is_same


def test_tensor_memory_that_no_gpu_has_is_named(monkeypatch):
    compiled = SimpleNamespace(metadata=SimpleNamespace(tmem_size=576))
    monkeypatch.setattr(resources, "compile_variant", lambda *_: compiled)
    (name, arch), variant = next(iter(VARIANTS.items()))
    row = resources.measure(name, variant, arch)
    assert row.products == resources.TOO_MUCH_TENSOR_MEMORY
    assert row.programs == 0
