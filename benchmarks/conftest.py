"""Benchmarks run only when asked for: `pytest benchmarks --benchmark [--benchmark-json=FILE]`.

`--device cpu|cuda` (default: cuda where there is one), `--quick` for the cases that matter most,
without torch.compile. All options of pytest-benchmark apply; with --benchmark-disable each body
runs once, untimed, on few users, without torch.compile. `python benchmarks/report.py FILE` prints
such a file as tables; `python benchmarks/gpu_check.py` runs all that concerns a GPU.
"""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import harness
from harness import Variant

_HERE = Path(__file__).parent
_CEILINGS = pytest.StashKey[dict[str, float]]()
_LEFT_OUT = pytest.StashKey[int]()
_replayed = [0.0]  # seconds
PERCENTILES = (50, 99)


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of lcr_fast")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks")
    group.addoption("--quick", action="store_true", help="fewer cases and rounds: minutes in all")
    group.addoption(
        "--compile", action="store_true", help="torch.compile takes part also in --quick cases"
    )
    group.addoption(
        "--warm-up",
        action="store_true",
        help="with --benchmark-disable: full sizes, so that kernels are compiled for a timed run",
    )
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def pytest_configure(config):
    config.addinivalue_line("markers", "extended: left out of --quick")
    config.addinivalue_line("markers", "compiled: torch.compile takes part")
    if config.getoption("--device") is None:
        config.option.device = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    if "precision" in metafunc.fixturenames:
        device = metafunc.config.getoption("--device")
        metafunc.parametrize("precision", harness.PRECISIONS[device])


def replayed_time() -> float:
    """Tell the time to pytest-benchmark while it is shown what was measured before."""
    return _replayed[0]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if item.path.is_relative_to(_HERE)]
    if not config.getoption("--benchmark"):
        left_out = ours
    else:
        quick = config.getoption("--quick")
        left_out = [item for item in ours if quick and item.get_closest_marker("extended")]
    for item in ours:
        if (marker := item.get_closest_marker("benchmark")) is not None:
            clock = pytest.mark.benchmark(**{**marker.kwargs, "timer": replayed_time})
            item.add_marker(clock, append=False)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    config.stash[_LEFT_OUT] = 0 if config.getoption("--benchmark") else len(left_out)


def pytest_terminal_summary(terminalreporter, config):
    if n := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{n} benchmarks left out: they run with --benchmark")


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash.get(_LEFT_OUT, 0):
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    """Keep what explains a number, drop what names a computer or its owner."""
    cpu = machine_info.get("cpu", {})
    brand = cpu.get("brand_raw", platform.processor())
    if {"family", "model"} <= cpu.keys():  # virtual machines call every generation "AMD EPYC"
        brand += f" (family {cpu['family']}, model {cpu['model']})"
    machine_info.clear()
    machine_info.update(
        cpu=brand,
        cores=cpu.get("count"),
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
    )
    if importlib.util.find_spec("triton"):
        machine_info["triton"] = importlib.metadata.version("triton")
    if config.getoption("device") == "cuda":
        machine_info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    # Paths would name a computer too.
    words = [
        word.split("=")[0] + "=" + Path(word.split("=")[1]).name if "=" in word else word
        for word in config.invocation_params.args
    ]
    machine_info["command"] = " ".join(["pytest", *(w.split("/")[-1] for w in words)])
    machine_info["ceilings"] = config.stash.get(_CEILINGS, {})


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(commit_info):
    commit_id = commit_info.get("id")
    commit_info.clear()
    commit_info["id"] = commit_id


@pytest.fixture(scope="session")
def device(pytestconfig) -> str:
    return pytestconfig.getoption("device")


@pytest.fixture
def small(benchmark, pytestconfig) -> bool:
    """Whether a body that nobody times may take few users."""
    return benchmark.disabled and not pytestconfig.getoption("--warm-up")


@pytest.fixture
def compiles(request, benchmark, pytestconfig) -> bool:
    """Whether torch.compile takes part: it needs up to a minute a shape."""
    wanted = pytestconfig.getoption("--compile") or not pytestconfig.getoption("--quick")
    marked = request.node.get_closest_marker("compiled") is not None
    return benchmark.enabled and wanted and marked


@pytest.fixture
def capture(benchmark, pytestconfig, device):
    """Return what captures ours and eager in CUDA graphs; nothing on a CPU, or to warm up."""
    left_out = device != "cuda" or pytestconfig.getoption("--warm-up")

    def capture(functions, input_sets) -> dict[str, Callable[[], Any]]:
        if left_out:
            return {}
        found, failures = harness.captured(functions, input_sets)
        if failures:
            benchmark.extra_info["not captured"] = failures
        return found

    return capture


@pytest.fixture
def ceilings(benchmark, pytestconfig, device) -> dict[str, float]:
    """Return what the machine can do at best, measured once; nothing where nothing is timed."""
    if benchmark.disabled:
        return {}
    if _CEILINGS not in pytestconfig.stash:
        pytestconfig.stash[_CEILINGS] = harness.ceilings(device)
    return pytestconfig.stash[_CEILINGS]


@pytest.fixture
def race(benchmark, pytestconfig, device):
    """Time one function against others, in turns, so that all of them meet the same noise.

    ``race(ours, {"name": (function, share)}, rounds, seconds)``: a function that does only a
    ``share`` of the work has its time divided by it, and one that has used up ``seconds`` sits out
    the other rounds. Ours goes to pytest-benchmark, median and quartiles of the others to
    ``extra_info``. Returns the medians of the others, nothing where nothing is timed. With
    ``single``, each time is one call's, and percentiles of all are kept too.
    """

    def run(
        ours: Callable[[], Any],
        others: dict[str, tuple[Callable[[], Any], float]],
        rounds: int = 15,
        seconds: float = 4.0,
        on: str = device,
        single: bool = False,
    ) -> dict[str, float]:
        variants = {"": Variant(ours)} | {n: Variant(*other) for n, other in others.items()}
        if benchmark.disabled:
            for function, _ in variants.values():
                function()
            benchmark.pedantic(lambda: None)
            return {}
        if pytestconfig.getoption("--quick"):
            rounds, seconds = rounds if single else min(rounds, 7), min(seconds, 0.5)
        times = harness.take_turns(variants, rounds, seconds, on, single)
        if single:
            benchmark.extra_info["percentiles"] = {
                name: {p: float(np.percentile(all_, p)) for p in PERCENTILES}
                for name, all_ in times.items()
            }
        _hand_over(benchmark, times.pop(""))
        summaries = {name: harness.summary(seconds) for name, seconds in times.items()}
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["others"] = {
            name: one | {"share": others[name][1]} for name, one in summaries.items()
        }
        return {name: one["median"] for name, one in summaries.items()}

    return run


def _hand_over(benchmark, seconds: list[float]) -> None:
    """Give measured times to pytest-benchmark, which cannot interleave or queue by itself."""
    left = iter(seconds)

    def replay():
        _replayed[0] += next(left)

    benchmark.pedantic(replay, rounds=len(seconds))
