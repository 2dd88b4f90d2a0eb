"""Samples and users a second of training, evaluation and lists, against the number of processes.

    python benchmarks/processes.py [--processes 1 2] [--rounds 5] [--rows 1000000]

The data is a log like KuaiSAR's of so many rows (``kuaisar_log.py``); the model has its default
size, tables by rows. torchrun starts every job, on one thread a process, jobs of all numbers of
processes in turn. Told are medians of the rounds, with the least and the most: by the clock, and by
the CPU time of the busiest process, which is what an idle machine would take, waits aside.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

import kuaisar_log
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import kuaisar
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.serving.offline import recommend
from lcr_fast.training import distributed
from lcr_fast.training.evaluation import make_batcher, rank_targets
from lcr_fast.training.models import fit_config
from lcr_fast.training.scorers import model_scorer
from lcr_fast.training.trainer import Trainer

_STEPS = {"supervised": 8, "grpo": 4}
_TITLES = {"supervised": "phase 1, samples/s", "grpo": "phase 2, samples/s"}
_RANKED, _LISTED = 1024, 16  # users


def rates(data: PreparedData, out: Path) -> dict[str, tuple[float, float]]:
    """Measure what the processes of this job do together: samples or users a second.

    By the clock, and by the CPU time of the busiest process.
    """
    torch.manual_seed(0)
    model = LCRSER(fit_config(data, LCRConfig()))
    config = TrainConfig(tables="rows")
    found = {}
    for objective, n_steps in _STEPS.items():
        trainer = Trainer(model, data, config, objective, out / objective)
        size = trainer.schedule.batch_size
        rng = np.random.default_rng(0)
        batches = [rng.integers(len(trainer.batcher), size=size) for _ in range(n_steps + 1)]
        trainer.step(batches.pop(), rng)  # sets up what stays

        def train(trainer=trainer, batches=batches, rng=rng) -> None:
            for rows in batches:
                trainer.step(rows, rng)

        found[_TITLES[objective]] = _rate(n_steps * size, train)
    model.eval()
    batcher = make_batcher(data, "test", model)
    rows = np.arange(min(_RANKED, len(batcher)))
    found["evaluation, users/s"] = _rate(
        len(rows), lambda: rank_targets(model_scorer(model), batcher, "sampled", rows=rows)
    )
    users = data.users.texts()[:_LISTED]
    size = len(users) // distributed.current().count
    found["lists, users/s"] = _rate(
        len(users), lambda: list(recommend(model, data, users, batch_size=size))
    )
    return found


def _rate(n: int, function: Callable[[], object]) -> tuple[float, float]:
    start, used = time.monotonic(), time.process_time()
    function()
    seconds, used = time.monotonic() - start, time.process_time() - used
    return n / seconds, n / max(distributed.current().rounds([used]))


def run_job(count: int, data: Path) -> dict[str, list[float]]:
    """Measure a job of some processes; return its rates."""
    with tempfile.TemporaryDirectory() as name:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        subprocess.run(
            [*torchrun, __file__, "--measure", str(data), name],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
        )
        return json.loads((Path(name) / "rates.json").read_text())


def measure(data: str, out: str) -> None:
    """Write the rates of a job, whose process this is."""
    prepared = PreparedData.open(data, verify=False)
    if os.environ["WORLD_SIZE"] == "1":
        found = rates(prepared, Path(out))
    else:
        with distributed.joined("cpu"):
            found = rates(prepared, Path(out))
    if os.environ["RANK"] == "0":
        (Path(out) / "rates.json").write_text(json.dumps(found))


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    with tempfile.TemporaryDirectory() as name:
        log, data = Path(name) / "log", Path(name) / "data"
        kuaisar_log.write(log, arguments.rows)
        prepare(kuaisar.read(log), data)
        jobs = arguments.processes * arguments.rounds
        found = [(count, run_job(count, data)) for count in jobs]
    lines = []
    for title in found[0][1]:
        cells = []
        for count, clock in itertools.product(arguments.processes, ("clock", "CPU")):
            values = [each[title][clock == "CPU"] for of, each in found if of == count]
            middle, low, high = map(_rounded, (statistics.median(values), min(values), max(values)))
            cells.append(f"{middle} ({low} to {high})")
        lines.append((title, *cells))
    headers = ["", *(f"{n}, by {of}" for n in arguments.processes for of in ("clock", "CPU"))]
    sys.stdout.write(tabulate(lines, headers, "github", disable_numparse=True) + "\n")


if __name__ == "__main__":
    main()
