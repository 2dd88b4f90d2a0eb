"""Which ptxas assembles the kernels, and that nobody else's is touched."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from lcr_fast import ops
from lcr_fast.kernels import gpu as gpus
from lcr_fast.kernels import ptxas
from lcr_fast.kernels.ptxas import NoPtxasError, Ptxas
from lcr_fast.ops import _triton, reasoning, scoring
from lcr_fast.ops._dispatch import say_once

TOOLS = Path(__file__).parents[1] / "tools"
OLD = Ptxas("/old", (12, 8), "V12.8.93", "Triton's ptxas")
NEWER = Ptxas("/newer", (12, 9), "V12.9.86", "Triton's ptxas-blackwell")
NEWEST = Ptxas("/newest", (13, 1), "V13.1.80", "CUDA toolkit")


@pytest.fixture
def machine(monkeypatch):
    """Return a function that says what is installed, and which CUDA the driver knows."""

    def install(*tools: Ptxas, driver: tuple[int, int] | None = (13, 0)) -> None:
        for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(ptxas, "at_hand", lambda: list(tools))
        monkeypatch.setattr(ptxas, "driver_cuda", lambda: driver)
        since = {"sm_90a": (11, 8), "sm_100a": (12, 8), "sm_103a": (12, 9), "sm_80": (11, 0)}
        known = {tool.path: tool for tool in tools}
        monkeypatch.setattr(
            ptxas,
            "architectures",
            lambda path: {a for a, first in since.items() if known[path].release >= first},
        )

        def find(path: str, origin: str) -> Ptxas | None:
            return known[path]._replace(origin=origin) if path in known else None

        monkeypatch.setattr(ptxas, "find", find)

    return install


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_newest_that_the_driver_loads(machine, capability):
    machine(OLD, NEWEST, NEWER)
    assert ptxas.choose(capability) == NEWEST
    machine(OLD, NEWEST, NEWER, driver=None)
    assert ptxas.choose(capability) == NEWEST
    machine(OLD, NEWEST, NEWER, driver=(12, 4))  # of one major release all are loaded
    assert ptxas.choose(capability) == NEWER
    machine(NEWER, NEWER._replace(path="/same"))
    assert ptxas.choose(capability).path == "/newer"


def test_a_bad_one_alone_is_an_obstacle_where_it_is_bad(machine):
    machine(OLD)
    assert ptxas.choose(80) == OLD
    assert ptxas.obstacle(80) is None
    with pytest.raises(NoPtxasError):
        ptxas.choose(90)
    sentence = ptxas.obstacle(90)
    assert "12.9 or later" in sentence
    assert "at hand: ptxas 12.8 (Triton's ptxas), and a driver of CUDA 13.0" in sentence
    machine(OLD, NEWEST, driver=(12, 8))
    assert "ptxas 13.1 (CUDA toolkit), and a driver of CUDA 12.8" in ptxas.obstacle(90)
    machine()
    assert "at hand: none" in ptxas.obstacle(80)


def test_one_that_does_not_know_the_gpu_is_not_taken(machine):
    machine(OLD, NEWER, NEWEST, driver=(12, 9))
    assert ptxas.choose(103) == NEWER
    machine(OLD, NEWEST, driver=(12, 8))
    assert ptxas.choose(100) == OLD
    assert ptxas.obstacle(103) == (
        "it needs a ptxas that knows sm_103a, whose code the driver can load; at hand: ptxas 12.8 "
        "(Triton's ptxas), ptxas 13.1 (CUDA toolkit), and a driver of CUDA 12.8"
    )


def test_the_users_choice_stands(machine, monkeypatch):
    machine(OLD, NEWEST)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/old")
    assert ptxas.choose(90) == OLD._replace(origin="TRITON_PTXAS_PATH")
    assert ptxas.obstacle(90) is None
    assert ptxas.warning(90).startswith("ptxas 12.8 (TRITON_PTXAS_PATH) is known to miscompile")
    assert ptxas.warning(80) is None
    assert ptxas.choose(100) == NEWEST  # Triton has another variable there
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/newest")
    assert ptxas.warning(90) is None
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/nothing")
    assert ptxas.obstacle(90) == (
        "TRITON_PTXAS_PATH names /nothing, which is no ptxas that can be started"
    )


def test_a_choice_in_the_process_stands_too(machine, monkeypatch):
    machine(OLD, NEWEST)
    monkeypatch.setitem(vars(ptxas.knobs.nvidia), "ptxas", "/old")
    assert ptxas.choose(90) == OLD._replace(origin="triton.knobs.nvidia.ptxas")


@pytest.fixture
def gpu(machine, monkeypatch):
    """Return a function that plugs a GPU of a compute capability in."""

    def plug(major: int, minor: int, *tools: Ptxas) -> None:
        machine(*tools)
        for function in (gpus.obstacle, gpus.ptxas_warning):
            function.cache_clear()
        monkeypatch.setattr(_triton, "has_gpu", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(gpus, "_capability", lambda index: (major, minor))
        monkeypatch.setattr(gpus, "gpu_of", lambda device: gpus.Gpu(major, 227 << 10))

    yield plug
    for function in (gpus.obstacle, gpus.ptxas_warning):
        function.cache_clear()


def reasoning_obstacle(dim: int = 64, dtype: torch.dtype = torch.float32) -> str | None:
    case = reasoning.ReasoningCase("cuda", dtype, dim, 2, dim, 30, 30)
    return reasoning.LATENT_REASONING.obstacles(case)["triton"]


def test_auto_runs_the_reference_where_only_a_bad_ptxas_is(gpu):
    gpu(9, 0, OLD)
    assert "12.9 or later" in reasoning_obstacle()
    case = scoring.ScoringCase("cuda", torch.float32, 64, (200, 80))
    backends = scoring.SCORE.obstacles(case)
    assert backends["triton"] == reasoning_obstacle()
    assert ops.choose_backend("score", "auto", backends) == "reference"
    with pytest.raises(ValueError, match=r"cannot serve score: it needs a ptxas of release 12\.9"):
        ops.choose_backend("score", "triton", backends)
    assert _triton.ptxas_in_use() is None


def test_a_good_ptxas_is_named(gpu):
    gpu(9, 0, OLD, NEWEST)
    assert reasoning_obstacle() is None
    assert _triton.ptxas_in_use() == "ptxas 13.1 (CUDA toolkit)"


def test_an_old_gpu_is_refused(gpu):
    gpu(7, 5, NEWEST)
    assert reasoning_obstacle() == "it needs compute capability 8.0 or more, and GPU 0 has 7.5"


def test_a_bad_choice_is_said_once(gpu, monkeypatch, caplog):
    gpu(9, 0, OLD, NEWEST)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/old")
    say_once.cache_clear()
    assert reasoning_obstacle() is None
    assert reasoning_obstacle() is None
    assert [record.message for record in caplog.records] == [ptxas.warning(90)]


def test_wide_float32_needs_wgmma(gpu):
    gpu(8, 0, NEWEST)
    assert reasoning_obstacle(64) is None
    assert "do not fit registers at width 128" in reasoning_obstacle(128)
    assert reasoning_obstacle(128, torch.bfloat16) is None
    gpu(9, 0, NEWEST)
    assert reasoning_obstacle(128) is None


def test_the_wheels_own_are_found():
    found = {tool.origin: tool for tool in ptxas.at_hand()}
    assert found["Triton's ptxas-blackwell"].release >= (12, 9)
    assert found["Triton's ptxas"].version.startswith("V12.")
    assert {"sm_80", "sm_90a", "sm_100a"} <= ptxas.architectures(found["Triton's ptxas"].path)
    assert "sm_103a" in ptxas.architectures(found["Triton's ptxas-blackwell"].path)
    assert ptxas.find("/no/such/ptxas", "nowhere") is None
    assert ptxas.find(sys.executable, "not ptxas") is None


def test_ptx_is_of_a_release_that_can_be_read_and_knows_the_gpu(monkeypatch):
    """Triton writes for its own ptxas: at compute capability 100 perhaps for a newer one."""
    own = {"ptxas": ("/own", "12.8"), "ptxas_blackwell": ("/own blackwell", "13.0")}
    tools = {name: SimpleNamespace(path=path, version=v) for name, (path, v) in own.items()}
    monkeypatch.setattr(ptxas.knobs, "nvidia", SimpleNamespace(**tools))
    known = {"/own": {"sm_80", "sm_90a"}, "/own blackwell": {"sm_100a"}}
    monkeypatch.setattr(ptxas, "architectures", known.get)
    monkeypatch.setattr(ptxas.triton, "compile", lambda source, target, options, **_: options)

    def options(tool: Ptxas, capability: int, **given: int) -> dict:
        return ptxas.compile_with(tool, None, GPUTarget("cuda", capability, 32), given)

    assert options(OLD, 100) == {"ptx_version": 87}
    assert options(OLD, 100, ptx_version=86) == {"ptx_version": 86}
    assert options(OLD, 80) == {}
    assert options(NEWEST, 100) == {}
    assert options(NEWEST, 110) == {"ptx_version": 91}


_COMPILE = """
import json, logging, os
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
import kernel_resources as resources
from lcr_fast.kernels import ptxas

name, variant = next(
    (name, v) for name, v in resources.all_variants("sm_90") if "user_bwd-no-dot-bf16" in name
)
told = []
logger = logging.getLogger("lcr_fast")
logger.setLevel(logging.INFO)
logger.addFilter(lambda record: told.append(record.getMessage()))
before = dict(os.environ)
hook = knobs.runtime.add_stages_inspection_hook
tools = [tool for tool in ptxas.at_hand() if tool.origin.startswith("Triton's")]
ours = [resources.compile_variant(variant, "sm_90", tool) for tool in [*tools, *tools]][:2]
plain = []
compile_plainly = ptxas.compile_with
ptxas.compile_with = lambda tool, source, target, options: plain.append(
    triton.compile(source, target=target, options=options)
)
resources.compile_variant(variant, "sm_90", tools[0])
try:
    with ptxas._assembled_by(tools[0]):
        raise ZeroDivisionError
except ZeroDivisionError:
    pass
print(json.dumps({
    "versions": [tool.version for tool in tools],
    "compiled by": [kernel.metadata.ptxas for kernel in ours],
    "hashes": [kernel.metadata.hash for kernel in [*ours, *plain]],
    "plain names one": hasattr(plain[0].metadata, "ptxas"),
    "environment": dict(os.environ) == before,
    "told": told,
    "hook": knobs.runtime.add_stages_inspection_hook is hook,
}))
"""


@pytest.mark.full
def test_ours_are_keyed_by_their_ptxas_and_others_are_left_alone(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(TOOLS)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["compiled by"] == found["versions"]
    assert len(set(found["versions"])) == 2
    assert len(set(found["hashes"])) == 3
    assert not found["plain names one"]
    assert found["environment"]
    assert found["hook"]
    assert len(found["told"]) == 2  # once a ptxas
    assert all("compile kernels for sm_90a" in text for text in found["told"])
    assert all(str(tmp_path) in text for text in found["told"])
