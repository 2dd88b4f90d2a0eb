"""Tiny prepared data and models, shared by the tests of training, evaluation and the CLI.

Tests marked ``full`` take long, and where faults were planted the others found them too, or they
need compilers: they run where FULL=1 is in the environment, some of them in the gate.
``full("triton")`` marks a test on that backend only. A GPU is not slow, so there none of its tests
is left out.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they or
the ops are imported. With COMPILED=sm_90 in the environment, or another of
``lcr_fast.kernels.gpu.GPUS``, they are compiled for that GPU instead, and their PTX is emulated.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch

from where import COMPILED, GPU

if COMPILED:
    os.environ["TRITON_INTERPRET"] = "0"
    from ptx_emulation import gpu

    gpu.install(COMPILED)
elif not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fused_reasoning
from fork_server import RunCode, serving
from lcr_fast.config import LCRConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.testing import tf32
from lcr_fast.training.models import attach_text, fit_config

WORLD = synthetic.World(n_users=24, n_topics=16, n_targets=14)
_MODEL = LCRConfig(
    dim=8, steps=2, max_search_len=4, max_rec_len=5, max_clicks=2, mlp_hidden=(8,),
    user_embedding=True,
)  # fmt: skip

# Processes of a bare ``pytest``. On a GPU nearly all time is compilation: of each process' memory
# there, and how many are enough. Elsewhere a container may have fewer cores than it shows.
_GPU_BYTES = 6 << 30
_MOST_ON_GPU = 12
_MOST_ON_CPU = 4


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config):
    """Take several processes where a bare ``pytest`` runs all tests; ``-n 0`` is one."""
    option, of_all = config.option, pytest.Config.ArgsSource.TESTPATHS
    asked = getattr(option, "numprocesses", 1)  # 1 without pytest-xdist
    one = option.collectonly or option.usepdb or option.capture == "no" or os.cpu_count() == 1
    is_whole_run = config.args_source is of_all and not one
    if asked is None and is_whole_run and not _is_worker(config):
        most = _MOST_ON_CPU
        if GPU:
            memory = torch.cuda.get_device_properties(0).total_memory
            most = min(memory // _GPU_BYTES, _MOST_ON_GPU)
        option.numprocesses = min(most, os.cpu_count() or 1)
        option.dist = "worksteal"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start, too


def _is_worker(config) -> bool:
    return hasattr(config, "workerinput")


_FULL = os.environ.get("FULL") == "1"
_LEFT_OUT = pytest.StashKey[int]()


def _is_full(item) -> bool:
    mark = item.get_closest_marker("full")
    if mark is None or (GPU and item.get_closest_marker("gpu")):
        return False
    return not mark.args or item.callspec.params["backend"] in mark.args


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if not _FULL and _is_full(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    config.stash[_LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter, config):
    # Where pytest-xdist is used, this process has not collected any.
    left_out = 0 if _FULL else config.stash.get(_LEFT_OUT, "some")
    if left_out:
        terminalreporter.write_line(f"{left_out} more tests run with FULL=1 in the environment")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors this small only wait for each other on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter():
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        import fast_interpreter

        fast_interpreter.install()


@pytest.fixture(autouse=True)
def _compiled_anew():
    """Forget what torch.compile made of a function, which it makes at most 8 times a process."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def tf32_allowed():
    with tf32(True):
        yield


@pytest.fixture
def dots_in_order(monkeypatch):
    """Let the interpreter sum a dot in order: its BLAS may round a row by its place in the tile."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_dot(self, a, b, d, *_):
        total = d.data.copy()  # [M, N]
        for k in range(a.data.shape[-1]):
            total += a.data[..., k, None].astype(total.dtype) * b.data[..., k, None, :]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(scope="session")
def run_code() -> Iterator[RunCode]:
    """Return a function that runs code in a process of its own: see tests/fork_server.py."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with serving() as run:
        yield run


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(synthetic.generate(WORLD), folder)
    return folder


@pytest.fixture(scope="session")
def prepared(prepared_folder) -> PreparedData:
    return PreparedData.open(prepared_folder)


@pytest.fixture(scope="session")
def make_model():
    """Return a function that makes a tiny model for a data set, the same one for the same seed."""

    def make(data: PreparedData, seed: int = 0, **changes) -> LCRSER:
        torch.manual_seed(seed)
        config = fit_config(data, _MODEL).replace(**changes)
        return attach_text(LCRSER(config), data)

    return make


@pytest.fixture(
    params=[
        pytest.param(b, marks=[pytest.mark.gpu] if b == "triton" else [])
        for b in fused_reasoning.DEVICES
    ]
)
def backend(request) -> str:
    """Name a fused backend that serves the reasoning here."""
    fused_reasoning.require(request.param, fused_reasoning.DEFAULT)
    return request.param
