"""Benchmarks run only when asked for: `pytest benchmarks --benchmark [--benchmark-json=FILE]`.

All options of pytest-benchmark apply; with --benchmark-disable each body runs once, untimed.
`python benchmarks/report.py FILE` prints such a file as Markdown tables.
"""

import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--benchmark"):
        return
    skip = pytest.mark.skip(reason="benchmarks run with --benchmark")
    for item in items:
        if item.path.is_relative_to(config.rootpath / "benchmarks"):
            item.add_marker(skip)


def pytest_benchmark_update_machine_info(machine_info):
    """Keep what explains a number, drop what names a computer or its owner."""
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", platform.processor()),
        cores=cpu.get("count"),
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
    )


def pytest_benchmark_update_commit_info(commit_info):
    commit_id = commit_info.get("id")
    commit_info.clear()
    commit_info["id"] = commit_id


@pytest.fixture
def race(benchmark):
    """Time one function against others, in turns, so that all of them meet the same noise.

    ``race(ours, {"name": (function, share)}, rounds)``: a function that does only a ``share`` of
    the work has its time divided by it, and one that has used up ``seconds`` sits out the other
    rounds. Medians of the others, their shares and numbers of rounds go to ``extra_info``.
    """

    def run(
        ours: Callable,
        others: dict[str, tuple[Callable, float]],
        rounds: int = 15,
        seconds: float = 4.0,
    ) -> dict[str, float]:
        times = {name: [] for name in others}

        def one_round():
            for name, (function, share) in others.items():
                if sum(times[name]) * share > seconds:
                    continue
                start = time.perf_counter()
                function()
                times[name].append((time.perf_counter() - start) / share)

        benchmark.pedantic(ours, setup=one_round, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:
            return {}
        # The first time of each is its warm-up, unless it is the only one.
        medians = {n: statistics.median(t[1:] or t) for n, t in times.items()}
        benchmark.extra_info["others"] = {
            name: {
                "median": medians[name],
                "share": others[name][1],
                "rounds": max(1, len(times[name]) - 1),
            }
            for name in others
        }
        return medians

    return run
