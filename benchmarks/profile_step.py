r"""Where the time of phase 1, phase 2 and inference goes, by the ranges of lcr_fast.profiling.

    python benchmarks/profile_step.py [phase1|phase2|inference]

prints a table of torch.profiler: one line a range, indented under the range that contains it, with
the time of one repeat, its share, and how many operations of torch it is, views left out: an op of
this package is one. On CUDA also the time of the kernels that it launched, and the kernels that
took most. The profiler itself costs time, most where there are many small operations: take shares
from here and times from the benchmarks.

With --bare it prints nothing and leaves the profiling to others, who see the same ranges as NVTX
and, between cudaProfilerStart and cudaProfilerStop, the repeats without what precedes them:

    nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi -o step \
        python benchmarks/profile_step.py phase1 --device cuda --bare
    nsys stats --report nvtx_sum,nvtx_kern_sum,cuda_gpu_kern_sum step.nsys-rep

    ncu --profile-from-start off --nvtx --nvtx-include "reason/" --set full -o reason \
        python benchmarks/profile_step.py inference --device cuda --bare --repeats 1
    ncu --profile-from-start off --kernel-name regex:latent_reasoning_fwd --set full -o kernels \
        python benchmarks/profile_step.py phase2 --device cuda --bare --repeats 1

ncu runs every kernel many times over, so that its clock is of no use for anything but kernels.
"""

import argparse
import bisect
import collections
import tempfile
from collections.abc import Callable, Sequence
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
# Operations that compute nothing.
VIEWS = {
    "alias", "as_strided", "detach", "detach_", "diagonal", "empty", "empty_like", "empty_strided",
    "expand", "lift_fresh", "new_empty", "permute", "reshape", "resize_", "resolve_conj",
    "resolve_neg", "result_type", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as", "_reshape_alias",
    "_unsafe_view", "is_nonzero", "item", "_local_scalar_dense", "expand_as", "flatten", "narrow",
    "numpy_T", "promote_types", "real",
}  # fmt: skip
_ONE_OPERATION = ("lcr_fast::", "aten::_foreach_", "aten::_fused_")  # whatever they are made of
N_KERNELS = 20  # of the table of kernels


class Line(NamedTuple):
    """One range: its name after those that contain it, and sums over all repeats."""

    path: tuple[str, ...]
    calls: int
    seconds: float
    device_seconds: float
    operations: int


class Profile(NamedTuple):
    """What a profile found, over all repeats."""

    lines: list[Line]  # each range after the one that contains it
    kernels: dict[str, float]  # seconds on the GPU by name


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


def profiled(name: str, workload: Callable[[], Any], n: int) -> Profile:
    """Profile ``n`` repeats."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(ProfilerActivity.CUDA)
    with profiling.enabled():
        workload()  # compiles, fills caches
        with profile(activities=activities) as profiler:
            repeat(name, workload, n)
    return summarize(name, profiler.events())


def summarize(name: str, events: Sequence[Any]) -> Profile:
    """Sum up a profiler's events by range, and its kernels."""
    lines: dict[tuple[str, ...], Line] = {}
    ranges = sorted((e for e in events if _is_range(e)), key=lambda e: e.time_range.start)
    for event in ranges:
        path = _path(event)
        if path[0] == name:
            line = lines.get(path, Line(path, 0, 0.0, 0.0, 0))
            lines[path] = line._replace(
                calls=line.calls + 1,
                seconds=line.seconds + event.cpu_time_total * 1e-6,
                device_seconds=line.device_seconds + event.device_time_total * 1e-6,
            )
    kernels: dict[str, float] = collections.Counter()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if not event.is_user_annotation:
                kernels[event.name] += event.device_time_total * 1e-6
        elif not _is_range(event) and (event.cpu_parent is None or _is_range(event.cpu_parent)):
            path, operations = _path(_range_at(ranges, event.time_range.start)), _operations(event)
            for outer in (path[:n] for n in range(1, len(path) + 1)):
                if (line := lines.get(outer)) is not None:
                    lines[outer] = line._replace(operations=line.operations + operations)
    return Profile(_in_order(list(lines.values())), kernels)


def _range_at(ranges: list[Any], time: float) -> Any:
    """Find the innermost range at a time: an operation of backward runs in a thread of its own."""
    last = bisect.bisect_right(ranges, time, key=lambda e: e.time_range.start)
    return next((e for e in reversed(ranges[:last]) if e.time_range.end >= time), None)


def _operations(event: Any) -> int:
    """Count an operation: those that it is made of, or if none is named, itself."""
    if event.name.startswith(_ONE_OPERATION):
        return 1
    if parts := sum(map(_operations, event.cpu_children)):
        return parts
    namespace, _, operation = event.name.partition("::")
    return int(namespace == "aten" and operation not in VIEWS)


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


def format_kernels(kernels: dict[str, float], n: int) -> str:
    """Write the kernels that took most of ``n`` repeats as a table."""
    whole = sum(kernels.values())
    most = sorted(kernels.items(), key=lambda item: -item[1])[:N_KERNELS]
    rows = [[name[:60], f"{s / n * 1e3:.3f}", f"{s / whole:.1%}"] for name, s in most]
    return tabulate(
        rows, ["kernel", "ms a repeat", "share"], disable_numparse=True,
        colalign=["left", "right", "right"],
    )  # fmt: skip


def format_table(lines: list[Line], n: int) -> str:
    """Write the ranges of ``n`` repeats as a table, and what no inner range covers."""
    whole = lines[0].seconds
    on_device = any(line.device_seconds for line in lines)

    def row(name: str, calls: int | str, line: Line, on_device: bool) -> list:
        cells = [name, calls, f"{line.seconds / n * 1e3:.3f}", f"{line.seconds / whole:.1%}"]
        cells.append(f"{line.operations / n:.0f}")
        return cells + [f"{line.device_seconds / n * 1e3:.3f}"] * on_device

    rows = [
        row(". " * (len(line.path) - 1) + line.path[-1], line.calls, line, on_device)
        for line in lines
    ]
    direct = [line for line in lines if len(line.path) == 2]
    rest = lines[0]._replace(
        seconds=whole - sum(line.seconds for line in direct),
        operations=lines[0].operations - sum(line.operations for line in direct),
    )
    rows.append(row(". (no range)", "", rest, False))
    headers = ["range", "calls", "ms a repeat", "share", "operations"]
    headers += ["ms of kernels"] * on_device
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
                found = profiled(name, workload, arguments.repeats)
                print(format_table(found.lines, arguments.repeats), end="\n\n")
                if found.kernels:
                    print(format_kernels(found.kernels, arguments.repeats), end="\n\n")


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
