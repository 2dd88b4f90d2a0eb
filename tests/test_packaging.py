"""Imports, optional parts and backends: what is not there must not hurt, nor go unnoticed."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from lcr_fast import LCRSER, LCRConfig, ops
from lcr_fast.dynamo import constant

ROOT = Path(__file__).parents[1]

TRAIN_ONE_STEP = """
    import torch
    from lcr_fast import LCRSER, LCRConfig
    from lcr_fast.grpo import choose_actions
    from lcr_fast.objectives import rank_loss, tcl
    from lcr_fast.testing import random_batch

    config = LCRConfig(n_items=9, n_terms=4, dim=4, max_search_len=2, max_rec_len=3)
    model, batch = LCRSER(config), random_batch(config, 6, 3, torch.Generator().manual_seed(0))
    target = model.item_vectors(batch.candidates[:, 0])
    reasoned = model.reason(model.encode(batch), batch, target)
    loss = rank_loss(model.score(reasoned.streams, batch), batch.target)
    lengths = (batch.search_lengths, batch.rec_lengths)
    (loss + tcl(reasoned.pooled, lengths, target)).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    reasoned = model.rollout(model.encode(batch), batch, 2, 0.1, seed=0)
    choose_actions(model.score(reasoned.streams, batch), batch.target, "top1", "hr@1")
"""


def run_without(modules: tuple[str, ...], code: str) -> None:
    """Run code in a fresh interpreter where importing any of ``modules`` fails."""
    prelude = f"import sys, warnings\nsys.modules.update(dict.fromkeys({modules!r}))\n"
    script = prelude + textwrap.dedent(code)
    # The kernels are interpreted for tests only (conftest.py).
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_import_and_training_need_no_optional_package_and_no_gpu():
    run_without(
        ("triton", "polars", "matplotlib", "safetensors", "tabulate", "tqdm"),
        """
    import lcr_fast, lcr_fast.data.batching, lcr_fast.data.negatives
    assert "torch._dynamo" not in sys.modules  # which takes longer than all else
    """
        + TRAIN_ONE_STEP
        + """
    assert "lcr_fast.kernels" not in sys.modules
    assert not torch.cuda.is_initialized()
    """,
    )


def test_an_unbuilt_extension_warns_once_and_the_reference_serves():
    run_without(
        ("lcr_fast._C",),
        """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import lcr_fast
        import lcr_fast.ops.noise, lcr_fast.ops.ranking
    texts = [str(w.message) for w in caught if "lcr_fast" in str(w.message)]
    assert len(texts) == 1, texts
    assert "pip install --no-build-isolation --no-deps -e ." in texts[0], texts
    assert "import of lcr_fast._C halted" in texts[0], texts
    """
        + TRAIN_ONE_STEP
        + """
    from lcr_fast import ops
    for call in (
        lambda: ops.normal_noise(torch.arange(2), 0, 1, 0, 2, 4, backend="cpp"),
        lambda: ops.target_rank(torch.zeros(1, 2), torch.tensor([0]), backend="cpp"),
    ):
        try:
            call()
        except ValueError as error:
            assert "reference" in str(error) and "_C" in str(error), error
        else:
            raise AssertionError("backend='cpp' was served by something else")
    """,
    )


def test_kernels_cannot_be_imported_twice(monkeypatch):
    """`kernels` and `lcr_fast.kernels` would be two modules, each registering every op."""
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=r"import lcr_fast\.kernels, not kernels"):
        importlib.import_module("kernels")
    assert importlib.import_module("lcr_fast.kernels").__name__ == "lcr_fast.kernels"


@pytest.mark.parametrize(
    ("build", "code", "message"),
    [
        ("auto", 1, "no C++20 compiler (/bin/false does not work): install one"),
        pytest.param("none", 0, "", marks=pytest.mark.full),
        pytest.param("gpu", 1, "must be auto, cpu, cuda or none", marks=pytest.mark.full),
    ],
)
def test_without_a_compiler_a_build_says_so_or_is_left_out(tmp_path, build, code, message):
    pytest.importorskip("setuptools")
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "objects"))
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", *folders],
        cwd=ROOT,
        env=os.environ | {"CXX": "/bin/false", "LCR_FAST_BUILD": build},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.rglob("*"))


@pytest.mark.full
def test_the_kernels_of_cpus_compile_for_arm(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    if compiler is None or not sources:
        pytest.skip("needs the sources and a compiler for ARM")
    command = [compiler, "-std=c++20", "-O0", "-Wall", "-Werror", "-c", *map(str, sources)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- building, of a package of one source a device ------------------------------------------------

PYPROJECT = """
[project]
name = "lcr-fast"
version = "0"
[tool.setuptools]
packages = ["lcr_fast"]
"""
# setup.py as where torch is of CUDA 13.0.
WITH_CUDA = """
import sys, torch
torch.version.cuda, torch._C._cuda_getDeviceCount = "13.0", lambda: 0
sys.argv[0] = "setup.py"
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""
# What scikit-build-core's plugin does to every project, wherever it is installed.
WITH_A_PLUGIN = """
import sys
from setuptools import Distribution

own = Distribution.finalize_options


def finalize_options(self):
    own(self)
    self.get_command_class("build").sub_commands.append(("build_cmake", None))


Distribution.finalize_options = finalize_options
sys.argv = ["setup.py", "--version"]
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    (tree / "csrc/cuda").mkdir(parents=True)
    (tree / "lcr_fast").mkdir()
    for name in ("setup.py", "MANIFEST.in", "csrc/exports.map"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    (tree / "pyproject.toml").write_text(PYPROJECT)
    (tree / "lcr_fast/__init__.py").touch()
    (tree / "csrc/one.cpp").write_text('extern "C" int PyInit__C() { return 1; }')
    (tree / "csrc/cuda/one.cu").touch()
    return tree


def setup_py(tree: Path, *arguments: str, code: str | None = None, **environment: str):
    command = ("setup.py",) if code is None else ("-c", code)
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.full
def test_an_extension_is_built_again_if_anything_has_changed(tree):
    """And not otherwise: an install compiles in a new folder each time."""
    built = tree / "lcr_fast/_C.abi3.so"

    def is_compiled(name: str, **environment: str) -> bool:
        command = ("--quiet", "build_ext", "--inplace", "--build-temp", name)
        done = setup_py(tree, *command, **{"LCR_FAST_BUILD": "cpu"} | environment)
        assert done.returncode == 0, done.stderr
        return any((tree / name).rglob("*.o"))

    assert is_compiled("first")
    first = built.read_bytes()
    assert not is_compiled("second")
    assert built.read_bytes() == first
    assert is_compiled("other flags", CXXFLAGS="-O1")
    assert is_compiled("the first flags")
    (tree / "csrc/one.cpp").write_text('extern "C" int PyInit__C() { return 2; }')
    assert is_compiled("another source")
    assert built.read_bytes() != first
    built.write_bytes(first)
    assert is_compiled("another extension in its place")


@pytest.mark.full
def test_nothing_built_remains_of_an_earlier_install(tree):
    install = "from setuptools import build_meta; build_meta.build_editable('.')"
    for build in ("cpu", "none"):
        done = setup_py(tree, code=install, LCR_FAST_BUILD=build)
        assert done.returncode == 0, done.stderr
        assert (tree / "lcr_fast/_C.abi3.so").exists() == (build == "cpu")


def test_plugins_of_setuptools_may_add_steps_to_the_build(tree):
    done = setup_py(tree, code=WITH_A_PLUGIN, LCR_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"  # the version


@pytest.mark.full
@pytest.mark.parametrize("build", ["cpu", "none"])
def test_all_sources_are_distributed_whatever_is_built(tree, build):
    done = setup_py(tree, "--quiet", "sdist", LCR_FAST_BUILD=build)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((tree / "dist").iterdir())) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"csrc/one.cpp", "csrc/cuda/one.cu", "csrc/exports.map"} <= names


# What nvcc and the host's compiler say of their versions, and what is said of that.
OBSTACLES = {
    "no nvcc": (None, None, None, "in bin of CUDA_HOME, which is {home}"),
    "nvcc of another CUDA": (
        *("12.4", None),
        *2 * ("nvcc in {home} is of CUDA 12.4, torch {torch} of CUDA 13.0: install beside",),
    ),
    "a compiler newer than nvcc": (
        *("13.0", "99.0.0"),
        *2 * ("greater than the maximum required version by CUDA 13.0.",),
    ),
    "no cudart": (
        *("13.0", None),
        *2 * ("toolkit seems to be in {home}, as nvcc is, but its library cudart does not link",),
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("build", ["auto", "cuda"])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_cannot_be_built_for_cuda_is_built_for_cpus_unless_asked_for(
    tree, tmp_path, obstacle, build
):
    link = ["c++", "-shared", "-xc++", "-", "-lcudart", "-o", os.devnull]
    if subprocess.run(link, input=b"", capture_output=True, check=False).returncode == 0:
        pytest.skip("cudart links from anywhere here")
    nvcc, compiler, *messages = OBSTACLES[obstacle]
    home = tmp_path / "toolkit"
    (home / "include").mkdir(parents=True)
    environment = {"CUDA_HOME": str(home), "LCR_FAST_BUILD": build}
    if nvcc is not None:
        executable(home / "bin/nvcc", f"echo release {nvcc}, V{nvcc}.1")
    if compiler is not None:
        script = f'case "$*" in *-dumpfullversion*) echo {compiler};; *) exec c++ "$@";; esac'
        environment["CXX"] = str(executable(tmp_path / "c++", script))
    done = setup_py(tree, "--quiet", "build_ext", "--inplace", code=WITH_CUDA, **environment)
    assert "Traceback" not in done.stderr
    assert done.returncode == (build == "cuda"), done.stderr
    assert (tree / "lcr_fast/_C.abi3.so").exists() == (build == "auto")
    if message := messages[build == "cuda"]:
        assert message.format(home=home, torch=torch.__version__) in done.stderr
    if build == "auto" and message:
        assert "lcr_fast is built without its CUDA operators: " in done.stderr


@pytest.mark.full
def test_a_toolkit_is_where_a_wrapper_of_nvcc_leads(tree, tmp_path):
    home = tmp_path / "toolkit"
    executable(home / "bin/nvcc", "echo release 12.4, V12.4.1")
    wrapper = executable(tmp_path / "elsewhere/bin/nvcc", f"echo '#$ _HERE_={home}/bin' >&2")
    path = f"{wrapper.parent}:{os.environ['PATH']}"
    environment = {"CUDA_HOME": "", "CUDA_PATH": "", "PATH": path, "LCR_FAST_BUILD": "cuda"}
    done = setup_py(tree, "build_ext", code=WITH_CUDA, **environment)
    assert done.returncode == 1
    assert f"nvcc in {home} is of CUDA 12.4" in done.stderr


@pytest.mark.full
def test_cuda_is_not_built_without_its_source(tree, tmp_path):
    (tree / "csrc/cuda/one.cu").unlink()
    executable(tmp_path / "bin/nvcc", "echo release 13.0, V13.0.1")
    environment = {"CUDA_HOME": str(tmp_path), "LCR_FAST_BUILD": "cuda"}
    done = setup_py(tree, "build_ext", code=WITH_CUDA, **environment)
    assert done.returncode == 1
    assert "the sources (csrc/cuda holds none)" in done.stderr


def test_what_is_constant_is_not_traced():
    """The mark is Dynamo's own, set without it."""

    @constant
    def answer() -> int:
        return threading.get_ident() and 2  # which Dynamo does not trace

    compiled = torch.compile(lambda x: answer() * x, backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)) == 2


# -- backends -------------------------------------------------------------------------------------

AVAILABLE = {"triton": "it needs a GPU", "cpp": None, "reference": None}


def test_auto_takes_the_first_backend_that_can_serve():
    assert ops.choose_backend("op", "auto", AVAILABLE) == "cpp"
    assert ops.choose_backend("op", "auto", {**AVAILABLE, "triton": None}) == "triton"


def test_an_explicit_backend_is_served_or_refused():
    assert ops.choose_backend("op", "reference", AVAILABLE) == "reference"
    with pytest.raises(ValueError, match="'triton' cannot serve op: it needs a GPU") as caught:
        ops.choose_backend("op", "triton", AVAILABLE)
    assert "backend='cpp' or 'reference'" in str(caught.value)
    with pytest.raises(ValueError, match="'tpu' cannot serve op: there is no such implementation"):
        ops.choose_backend("op", "tpu", AVAILABLE)


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_a_model_whose_backend_cannot_serve_it_is_refused_at_once(backend):
    """Step embeddings run on the reference alone."""
    with pytest.raises(ValueError, match=f"'{backend}' cannot serve .*'reference'"):
        LCRSER(LCRConfig(dim=4, step_embedding=True, backend=backend))


def test_backend_report_has_a_line_for_each_op():
    lines = LCRSER(LCRConfig(dim=4, backend="reference")).backend_report().split("\n")
    assert [line.split(":")[0] for line in lines] == [
        "embed", "encode", "latent_reasoning", "score", "seen_bonus",
    ]  # fmt: skip
    assert all(line.split(": ", 1)[1].startswith("reference") for line in lines)
