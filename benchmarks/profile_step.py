r"""Where the time of phase 1, phase 2 and inference goes, by the ranges of lcr_fast.profiling.

    python benchmarks/profile_step.py [phase1|phase2|inference]

prints a table of torch.profiler: one line a range, indented under the range that contains it, with
the time of one repeat and its share; on CUDA also the time of the kernels that it launched. The
profiler itself costs time, most where there are many small operations: take shares from here and
times from the benchmarks.

With --bare it prints nothing and leaves the profiling to others, who see the same ranges as NVTX
and, between cudaProfilerStart and cudaProfilerStop, the repeats without what precedes them:

    nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi -o step \
        python benchmarks/profile_step.py phase1 --device cuda --bare
    nsys stats --report nvtx_sum,nvtx_kern_sum,cuda_gpu_kern_sum step.nsys-rep

    ncu --profile-from-start off --nvtx --nvtx-include "reason/" --set full -o reason \
        python benchmarks/profile_step.py inference --device cuda --bare --repeats 1
    ncu --profile-from-start off --kernel-name regex:_latent_reasoning --set full -o kernels \
        python benchmarks/profile_step.py phase2 --device cuda --bare --repeats 1

ncu runs every kernel many times over, so that its clock is of no use for anything but kernels.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from lcr_fast import profiling
from lcr_fast.config import LCRConfig, TrainConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.testing import random_batch
from lcr_fast.training.models import attach_text, fit_config
from lcr_fast.training.trainer import Trainer

OBJECTIVES = {"phase1": "supervised", "phase2": "grpo"}
WORKLOADS = (*OBJECTIVES, "inference")
USERS = {"phase1": 256, "phase2": 16, "inference": 64}
MAX_LENGTH = 30


class Line(NamedTuple):
    """One range: its name after those that contain it, and sums over all repeats."""

    path: tuple[str, ...]
    calls: int
    seconds: float
    device_seconds: float


def make_model(data: PreparedData, arguments: argparse.Namespace) -> LCRSER:
    torch.manual_seed(0)
    config = LCRConfig(
        dim=arguments.dim,
        steps=arguments.steps,
        max_search_len=MAX_LENGTH,
        max_rec_len=MAX_LENGTH,
        max_clicks=2,
        backend=arguments.backend,
    )
    return attach_text(LCRSER(fit_config(data, config)), data).to(arguments.device)


def make_workload(
    name: str, data: PreparedData, arguments: argparse.Namespace, folder: Path
) -> Callable[[], Any]:
    """Return what one repeat does."""
    model = make_model(data, arguments)
    users = arguments.users or USERS[name]
    if name == "inference":
        generator = torch.Generator().manual_seed(0)
        batch = random_batch(model.config, users, arguments.candidates, generator)
        batch = batch.to(arguments.device)
        return torch.inference_mode()(lambda: model.eval()(batch))
    config = TrainConfig(rl_negatives=arguments.candidates - 1)
    trainer = Trainer(model, data, config, OBJECTIVES[name], folder / name)
    rng = np.random.default_rng(0)
    return lambda: trainer.step(rng.integers(len(trainer.batcher), size=users), rng)


def repeat(name: str, workload: Callable[[], Any], n: int) -> None:
    for _ in range(n):
        with profiling.range_(name):
            workload()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()


def profiled(name: str, workload: Callable[[], Any], n: int) -> list[Line]:
    """Profile ``n`` repeats; return their ranges, each after the one that contains it."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(ProfilerActivity.CUDA)
    with profiling.enabled():
        workload()  # compiles, fills caches
        with profile(activities=activities) as profiler:
            repeat(name, workload, n)
    lines: dict[tuple[str, ...], Line] = {}
    for event in profiler.events():
        path = _path(event)
        if path and path[0] == name and _is_range(event):
            line = lines.get(path, Line(path, 0, 0.0, 0.0))
            lines[path] = Line(
                path,
                line.calls + 1,
                line.seconds + event.cpu_time_total * 1e-6,
                line.device_seconds + event.device_time_total * 1e-6,
            )
    return _in_order(list(lines.values()))


def _is_range(event: Any) -> bool:
    # An optimizer marks itself, as "Optimizer.step#AdamW.step".
    on_cpu = event.device_type == torch.autograd.DeviceType.CPU
    return on_cpu and event.is_user_annotation and "#" not in event.name


def _path(event: Any) -> tuple[str, ...]:
    names = []
    while event is not None:
        if _is_range(event):
            names.append(event.name)
        event = event.cpu_parent
    return tuple(reversed(names))


def _in_order(lines: list[Line], parent: tuple[str, ...] = ()) -> list[Line]:
    found = []
    for line in lines:
        if line.path[:-1] == parent:
            found += [line, *_in_order(lines, line.path)]
    return found


def format_table(lines: list[Line], n: int) -> str:
    """Write the ranges of ``n`` repeats as a table, and what no inner range covers."""
    whole = lines[0].seconds
    on_device = any(line.device_seconds for line in lines)

    def row(name: str, calls: int | str, seconds: float, device_seconds: float | str) -> list:
        cells = [name, calls, f"{seconds / n * 1e3:.3f}", f"{seconds / whole:.1%}"]
        if on_device:
            known = isinstance(device_seconds, float)
            cells.append(f"{device_seconds / n * 1e3:.3f}" if known else "")
        return cells

    rows = [
        row(". " * (len(line.path) - 1) + line.path[-1], line.calls, *line[2:]) for line in lines
    ]
    inside = sum(line.seconds for line in lines if len(line.path) == 2)
    rows.append(row(". (no range)", "", whole - inside, ""))
    headers = ["range", "calls", "ms a repeat", "share"] + ["ms of kernels"] * on_device
    return tabulate(
        rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", nargs="?", choices=WORKLOADS, help="default: all of them")
    parser.add_argument("--users", type=int, help=f"users a step; default: {USERS}")
    parser.add_argument("--steps", type=int, default=3, metavar="K", help="default: 3")
    parser.add_argument("--dim", type=int, default=64, help="default: 64")
    parser.add_argument(
        "--candidates", type=int, default=100, help="of phase 2 and inference; default: 100"
    )
    parser.add_argument("--population", type=int, default=400, help="users of the data")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--backend", default="auto", help="default: auto")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--bare", action="store_true", help="only run, for nsys or ncu")
    arguments = parser.parse_args(argv)
    for name in ("steps", "dim", "candidates", "population", "repeats"):
        least = 0 if name == "steps" else 1
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    world = synthetic.World(n_users=arguments.population, min_events=60, max_events=60, noise=0.6)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = prepare(synthetic.generate(world), folder / "data")
        for name in [arguments.workload] if arguments.workload else WORKLOADS:
            workload = make_workload(name, data, arguments, folder)
            if arguments.bare:
                run_bare(name, workload, arguments.repeats)
            else:
                print(format_table(profiled(name, workload, arguments.repeats), arguments.repeats))
                print()


def run_bare(name: str, workload: Callable[[], Any], n: int) -> None:
    """Run ``n`` repeats with their ranges, marked for an outer profiler where CUDA is in use."""
    workload()
    with profiling.enabled():
        if not torch.cuda.is_initialized():
            repeat(name, workload, n)
            return
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            repeat(name, workload, n)


if __name__ == "__main__":
    main()
