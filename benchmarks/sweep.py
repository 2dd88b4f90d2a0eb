"""Time configurations of the Triton kernels on this GPU: what the tables in kernels/ choose from.

    python benchmarks/sweep.py --compile 0/16 & ... python benchmarks/sweep.py --compile 15/16
    python benchmarks/sweep.py --out FILE.jsonl

The first line compiles a share of the configurations into Triton's cache, as most of the time is
compilation; the second times all, a line of JSON each. ``--only`` takes a regular expression. With
``--bare`` nothing is timed, and one call of each is marked for ncu:

    ncu --profile-from-start off --set full python benchmarks/sweep.py --bare --only REGEX
"""

import argparse
import functools
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import harness
import work
from lcr_fast import ops
from lcr_fast.kernels import scoring, weight_gradients
from lcr_fast.kernels.reasoning import config as reasoning_config
from lcr_fast.kernels.reasoning.scratch import layout, products
from lcr_fast.kernels.scoring import config as scoring_config
from lcr_fast.ops.noise import Dropout
from lcr_fast.reference import Steps
from lcr_fast.testing import (
    EncoderCase,
    ReasoningCase,
    encode,
    random_encoder,
    random_reasoning,
    run_encoder,
)
from lcr_fast.weights import ReasoningWeights

Config = reasoning_config.Config
Tiles, HeadTiles = scoring_config.Tiles, scoring_config.HeadTiles
KINDS = {"half": "bf16", "bf16x3": "tf32", "bf16x6": "fp32"}  # and what the harness calls it
STEPS, N_CANDIDATES, N_ITEMS = 5, 100, 20_000
HEAD = (200, 80, 1)


class Sums(NamedTuple):
    """How weight gradients in float32 are summed: fields of the kernel's CONFIG, in its order."""

    part_rows: int
    rows: int  # of a chunk
    block: int
    warps: int
    stages: int


class Job(NamedTuple):
    """A configuration of one op at one shape."""

    op: str  # forward, backward, encode, encode backward, score, score backward, products
    kind: str
    dim: int
    size: int  # events of each stream
    config: Config | Tiles | HeadTiles | Sums

    def __str__(self) -> str:
        config = ", ".join(f"{n}={v}" for n, v in self.config._asdict().items())
        return f"{self.op} {self.kind} d={self.dim} L={self.size} {config}"


def jobs() -> Iterator[Job]:
    for kind in KINDS:
        for dim in (32, 64, 128):
            for size, slot in ((30, 32), (50, 64), (100, 128)):
                tiles = itertools.product((4, 8), sorted({slot, max(64, slot), 128}))
                for warps, rows in tiles:
                    columns = sorted({32, 64, max(64, dim)})
                    for heads, registers in itertools.product(columns, (None, 168)):
                        config = Config(
                            warps, rows=rows, block_heads=heads, block_f=min(heads, 64),
                            registers=registers, looped=kind != "half",
                        )  # fmt: skip
                        yield Job("forward", kind, dim, size, config)
                    # Two programs a multiprocessor wait for each other's barriers: would three or
                    # four, which hold less?
                    is_usual = (warps, rows) == (4, 64)
                    limits = (None, 168, 128) if is_usual else (None,)
                    for parked, registers, heads in itertools.product(
                        (False, True), limits, (32, 64) if is_usual else (32,)
                    ):
                        config = Config(warps, parked, rows, block_heads=heads, registers=registers)
                        yield Job("backward", kind, dim, size, config)
                if slot <= 64:  # one stream needs fewer registers than two
                    for registers, heads in itertools.product((None, 168, 128), (32, 64)):
                        config = Config(4, block_heads=heads, registers=registers)
                        yield Job("encode backward", kind, dim, size, config)
                        yield Job("encode", kind, dim, size, config._replace(block_f=64))
            for candidates, hidden, warps in (
                (16, 16, 4), (32, 16, 4), (32, 32, 4), (32, 32, 8), (64, 32, 4), (64, 32, 8),
            ):  # fmt: skip
                for stages in (1, 2):
                    tiles = Tiles(candidates, 32, hidden, warps, stages)
                    yield Job("score", kind, dim, 30, tiles)
            for (rows, columns, warps), depth, stages in itertools.product(
                ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8)), (32, 64), (1, 2, 3)
            ):
                if depth <= dim:
                    head_tiles = HeadTiles(rows, columns, depth, warps, stages)
                    yield Job("score backward", kind, dim, 30, head_tiles)
            if kind != "half":
                for part_rows, (rows, stages) in itertools.product(
                    (256, 512, 1024), ((32, 1), (32, 2), (32, 3), (64, 1), (64, 2))
                ):
                    yield Job("products", kind, dim, 30, Sums(part_rows, rows, 64, 4, stages))


# -- the calls ------------------------------------------------------------------------------------


def _reasoning(job: Job, n_users: int) -> Callable[[], Any]:
    dtype = harness.DTYPES[KINDS[job.kind]]
    case = ReasoningCase(
        dim=job.dim, search_len=job.size, rec_len=job.size, steps=STEPS, ffn_dim=job.dim,
        pooled=False, padding=0.0, n_users=1,
    )  # fmt: skip
    inputs = random_reasoning(case).to(dtype, device="cuda").inputs
    is_backward = job.op == "backward"
    weights = ReasoningWeights(
        *(inputs[name].requires_grad_(is_backward) for name in ReasoningWeights._fields)
    )
    search, rec = (
        torch.randn(n_users, job.size, job.dim, device="cuda", dtype=dtype) for _ in range(2)
    )
    lengths = torch.full((n_users,), job.size, device="cuda")
    if not is_backward:
        return lambda: ops.latent_reasoning(
            search, rec, lengths, lengths, weights, Steps(STEPS, 2), backend="triton"
        )
    dropout = Dropout(0.1, 1, torch.arange(n_users, device="cuda"))
    keys = torch.randn(n_users, 2, job.dim, device="cuda", dtype=dtype)

    def train():
        reasoned = ops.latent_reasoning(
            search, rec, lengths, lengths, weights, Steps(STEPS, 2), backend="triton",
            target_keys=keys, dropout=dropout,
        )  # fmt: skip
        return torch.autograd.grad(reasoned, list(weights), [torch.ones_like(t) for t in reasoned])

    return train


def _encoder(job: Job, n_users: int) -> Callable[[], Any]:
    """Encode both streams in inference, or forward and backward with dropout."""
    dropout = 0.1 if job.op == "encode backward" else 0.0
    case = EncoderCase(
        dim=job.dim, ffn_dim=job.dim, n_layers=1, search_len=job.size, rec_len=job.size,
        n_users=n_users, dropout=dropout, padding=0.0,
    )  # fmt: skip
    call = random_encoder(case).to(harness.DTYPES[KINDS[job.kind]], device="cuda")
    call = call._replace(lengths=tuple(torch.full_like(n, job.size) for n in call.lengths))
    return functools.partial(run_encoder if dropout else encode, call, "triton")


def _scoring(job: Job, n_users: int) -> dict[str, Callable[[], Any]]:
    dtype, D = harness.DTYPES[KINDS[job.kind]], job.dim
    draw = functools.partial(torch.randn, device="cuda")
    states = [draw(n_users, 1, job.size, D, dtype=dtype) for _ in range(2)]
    lengths = [torch.full((n_users,), job.size, device="cuda")] * 2
    items, user = draw(N_ITEMS + 1, D), draw(n_users, D)
    widths = (4 * D, *HEAD)
    matrices = [draw(o, i) * i**-0.5 for i, o in itertools.pairwise(widths)]
    head = (draw(2, D, D) * D**-0.5, matrices, [draw(o) for o in HEAD])
    ids = torch.randint(1, N_ITEMS, (n_users, N_CANDIDATES), device="cuda")
    rows, dscores = torch.arange(n_users, device="cuda"), draw(n_users, 1, N_CANDIDATES)
    few = [t[:32, 0] for t in states] + [n[:32] for n in lengths]
    dot = False  # is the dot product added?
    call = (*states, *lengths, items, ids, user, *head, rows, 0, rows[:0], dot)
    return {
        "score_fwd": lambda: scoring.score_fwd(*call),
        "score_bwd": lambda: scoring.score_bwd(dscores.to(dtype), *call),
        "score_topk": lambda: scoring.score_topk(
            *few, items, user[:32], *head, 10, rows[:32, None], dot
        ),
    }


def _products(job: Job, n_users: int) -> Callable[[], Any]:
    """Multiply out the weights' gradients of a step, both streams, from what kernels leave."""
    of = layout(job.dim, job.dim)
    scratch = torch.randn(2, 1, n_users * job.size, of.columns.width, device="cuda")
    return lambda: products([scratch], of, shared=True)


# -- configured -----------------------------------------------------------------------------------


def _configured(job: Job) -> Any:
    """Let a job's configuration be chosen, whatever the tables say."""
    if isinstance(job.config, Config):
        forward = reasoning_config.config

        def choose(which, *call):
            # Backward is timed behind a forward pass as it is.
            is_asked = which.endswith("bwd") == job.op.endswith("backward")
            return job.config if is_asked else forward(which, *call)

        return mock.patch.object(reasoning_config, "config", choose)
    if isinstance(job.config, Sums):
        names = weight_gradients.CONFIG
        return mock.patch.dict(names, zip(names, job.config, strict=True))
    if isinstance(job.config, HeadTiles):
        return mock.patch.dict(
            scoring_config.HEAD_TILES, dict.fromkeys(scoring_config.HEAD_TILES, job.config)
        )
    tiles = {key: (job.config,) * len(scoring_config.DIMS) for key in scoring_config.TILES}
    return mock.patch.object(scoring_config, "TILES", tiles)


def run(job: Job, compile_only: bool = False, bare: bool = False) -> dict[str, Any]:
    """Compile a job, or time it: milliseconds, or of backward microseconds a kernel.

    ``bare`` calls it once for an outer profiler, and times nothing.
    """
    n_users = {"half": 8192}.get(job.kind, 2048) if job.op == "forward" else 1024
    n_users = 64 if compile_only else n_users
    with harness.multiplying_in(KINDS[job.kind]), _configured(job):
        if job.op == "score":
            calls = _scoring(job, n_users)
        elif job.op == "score backward":
            calls = {job.op: _scoring(job, n_users)["score_bwd"]}
        else:
            makers = {"encode": _encoder, "encode backward": _encoder, "products": _products}
            calls = {job.op: makers.get(job.op, _reasoning)(job, n_users)}
        found: dict[str, Any] = {}
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            if compile_only:
                continue
            if bare:
                with torch.cuda.profiler.profile():
                    call()
                    torch.cuda.synchronize()
                continue
            if job.op.endswith("backward"):
                with profile(activities=[ProfilerActivity.CUDA]) as trace:
                    call()
                    torch.cuda.synchronize()
                found[name] = {
                    event.key: round(event.self_device_time_total)
                    for event in trace.key_averages()
                    if event.key.endswith("_kernel") and "fwd" not in event.key
                }
            else:
                times = harness.take_turns({name: harness.Variant(call)}, 10, 0.1, "cuda")[name]
                found[name] = harness.summary(times)["median"] * 1e3
    if job.op == "forward" and found:
        lengths = torch.full((n_users,), job.size)
        flops = work.reasoning_flops(lengths, lengths, job.dim, STEPS)
        found["TFLOP/s"] = flops / found["forward"] / 1e9
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", metavar="I/N", help="compile share I of N, and time nothing")
    parser.add_argument("--out", type=Path, help="file of the times, else standard output")
    parser.add_argument("--bare", action="store_true", help="only call, for ncu")
    parser.add_argument("--only", default="", help="a regular expression that jobs must contain")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("sweep: this torch sees no GPU\n")
        return 2
    chosen = [job for job in jobs() if re.search(arguments.only, str(job))]
    if arguments.compile:
        share, n_shares = map(int, arguments.compile.split("/"))
        chosen = chosen[share::n_shares]
    out = arguments.out.open("w") if arguments.out else sys.stdout
    for job in chosen:
        clock = time.monotonic()
        try:
            found = run(job, bool(arguments.compile), arguments.bare)
        except Exception as error:  # does not fit this GPU
            found = {"error": f"{type(error).__name__}: {str(error)[:120]}"}
        if not arguments.compile:
            out.write(json.dumps({"job": str(job), **found}) + "\n")
            out.flush()
        elif "error" in found:
            sys.stderr.write(f"{job}: {found['error']} ({time.monotonic() - clock:.0f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
