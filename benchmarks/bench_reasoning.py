"""Latent cross reasoning: forward, forward and backward as phase 1 runs it, and noisy rollouts.

And the encoders of both streams, which are cases of K = 0.

Around d = 64, K = 5 and histories of 30 events (32 on CUDA), one axis at a time. ``auto`` against

- eager: the reference, with torch's fused attention; in halves with every operation rounded;
- torch.compile of it, at the shapes that matter most;
- captured, captured eager: ours and eager in CUDA graphs;
- N calls (rollouts): one eager call a trajectory, on a copy of the history with noise in memory.

FLOPs and bytes are those of :mod:`work`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import harness
import work
from lcr_fast import ops
from lcr_fast.config import LCRConfig
from lcr_fast.ops.noise import Noise
from lcr_fast.reference import Steps
from lcr_fast.testing import (
    EncoderCase,
    ReasoningCase,
    assert_call_parity,
    random_encoder,
    random_lengths,
    random_reasoning,
    random_weights,
    run_encoder,
)

HEADS = 2
NOISE_SCALE, SEED = 0.1, 7
INPUT_SETS = 3
# Of six users the largest error was a matter of luck: 0.7 to 5 times eager's over six seeds; of 16,
# 0.7 to 1.7 times.
PARITY_USERS = 16


class Case(NamedTuple):
    """One shape; both histories hold L events, or random numbers of events up to L."""

    B: int
    L: int = 30
    d: int = 64
    K: int = 5  # 0 for the encoders
    N: int = 0  # trajectories; 0 without noise
    lengths: str = "full"
    dtype: str = "fp32"
    compiled: bool = False

    @property
    def label(self) -> str:
        parts = [f"{name} = {getattr(self, name)}" for name in "BLdK"]
        parts += [f"N = {self.N}"] * bool(self.N) + ["random lengths"] * (self.lengths == "random")
        return ", ".join(parts) + f", {self.dtype}" * (self.dtype != "fp32")

    @property
    def id(self) -> str:
        """Name the axes, each after its number."""
        names = "BLdKN" if self.N else "BLdK"
        sizes = [f"{getattr(self, name)}-{name}" for name in names]
        return "-".join([*sizes, self.lengths, self.dtype])

    def axes(self) -> dict[str, Any]:
        axes = self._asdict()
        del axes["compiled"]
        return axes if self.N else axes | {"N": 1}


def _around(centre: Case, **axes) -> list[Case]:
    return [centre._replace(**{name: v}) for name, values in axes.items() for v in values]


def forward_cases(device: str) -> dict[Case, bool]:
    """Cases of the forward, and whether ``--quick`` leaves them out."""
    if device == "cuda":
        cases = {}
        for dtype in ("bf16", "tf32", "fp32"):
            centre = Case(1024, L=32, dtype=dtype, compiled=dtype == "bf16")
            cases |= {centre: False, centre._replace(L=50): dtype != "bf16"}
            plain = centre._replace(compiled=False)
            more = _around(plain, B=(1, 32, 8192), L=(20, 100), d=(32, 128), K=(1, 3))
            cases |= dict.fromkeys([*more, plain._replace(lengths="random")], True)
        return cases
    cases = {}
    for B in (1, 256):
        centre = Case(B)
        cases[centre._replace(compiled=True)] = False
        axes = _around(
            centre, L=(20, 50), d=(32, 128), K=(1, 3), lengths=("random",), dtype=("bf16",)
        )
        cases |= dict.fromkeys(axes, True)
    return cases | dict.fromkeys(_around(Case(1), B=(8, 64)), True)


def training_cases(device: str) -> dict[Case, bool]:
    if device == "cuda":
        cases = {}
        for dtype in ("bf16", "tf32", "fp32"):
            centre = Case(1024, L=32, dtype=dtype, compiled=dtype == "bf16")
            plain = centre._replace(compiled=False)
            more = _around(plain, B=(32, 8192), L=(50, 100), d=(128,), K=(1, 3))
            cases |= {centre: False} | dict.fromkeys(more, True)
        return cases
    centre = Case(64)
    more = _around(centre, B=(1, 8, 256), L=(20, 50), d=(32, 128), K=(1, 3), lengths=("random",))
    return {centre._replace(compiled=True): False} | dict.fromkeys(more, True)


def rollout_cases(device: str) -> dict[Case, bool]:
    if device == "cuda":
        centre = Case(1024, L=32, N=8, dtype="bf16")
        more = _around(centre, N=(2, 32), B=(32,), K=(1,), dtype=("tf32", "fp32"))
    else:
        centre = Case(16, N=8)
        more = _around(centre, N=(2, 16), B=(1, 64), K=(1,))
    return {centre: False} | dict.fromkeys(more, True)


def encoder_cases(device: str) -> dict[Case, bool]:
    if device == "cuda":
        cases = {}
        for dtype in ("bf16", "tf32", "fp32"):
            centre = Case(1024, L=32, K=0, dtype=dtype, compiled=dtype == "bf16")
            more = _around(centre._replace(compiled=False), B=(32, 8192), L=(50, 100), d=(128,))
            cases |= {centre: False} | dict.fromkeys(more, True)
        return cases
    centre = Case(64, K=0)
    return {centre: False} | dict.fromkeys(_around(centre, B=(1, 256), L=(50,), d=(128,)), True)


_CASES = {
    "test_forward": forward_cases,
    "test_forward_and_backward": training_cases,
    "test_rollout": rollout_cases,
    "test_rollout_and_backward": rollout_cases,
    "test_encoders": encoder_cases,
    "test_encoders_and_backward": encoder_cases,
}


def pytest_generate_tests(metafunc):
    cases = _CASES[metafunc.function.__name__](metafunc.config.getoption("device"))
    parameters = [
        pytest.param(
            case,
            id=case.id,
            marks=[pytest.mark.extended] * extended + [pytest.mark.compiled] * case.compiled,
        )
        for case, extended in cases.items()
    ]
    metafunc.parametrize("case", parameters)


Function = Callable[["Inputs"], tuple[Tensor, ...]]


class Inputs(NamedTuple):
    """One set of a call's inputs."""

    search: Tensor  # [B, L, d]
    rec: Tensor  # [B, L, d]
    search_lengths: Tensor  # [B]
    rec_lengths: Tensor  # [B]
    rows: Tensor  # [B]
    keys: Tensor  # [B, 2, d]
    upstream: tuple[Tensor, ...]  # gradients of what a call returns


def draw(case: Case, device: str, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    B, L, d, dtype = case.B, case.L, case.d, harness.DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def lengths() -> Tensor:
        drawn = random_lengths(B, L, generator)
        return (torch.full_like(drawn, L) if case.lengths == "full" else drawn).to(device)

    n_search, n_rec = lengths(), lengths()
    leading = (B, case.N) if case.N else (B,)
    upstream = [normal(*leading, L, d), normal(*leading, L, d)]
    if case.K and not case.N:
        upstream.append(normal(B, case.K, 2, 2, d))
    keys = normal(B, 2, d) * d**-0.5
    rows = torch.randperm(4 * B, generator=generator)[:B].to(device)
    return Inputs(normal(B, L, d), normal(B, L, d), n_search, n_rec, rows, keys, tuple(upstream))


class Bench:
    """One case on a device: its inputs and weights, and what to do with them."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.sets = [draw(case, device, seed) for seed in range(INPUT_SETS)]
        config = LCRConfig(dim=case.d, n_heads=HEADS, steps=case.K)
        generator = torch.Generator().manual_seed(0)
        encoder, reasoning, _ = random_weights(config, generator, torch.float32)
        weights = reasoning if case.K else encoder
        self.weights = type(weights)(
            *(w.detach().to(device, harness.DTYPES[case.dtype]).requires_grad_() for w in weights)
        )

    def forward(self, backend: str, pooled: bool) -> Function:
        """Return what is timed on a backend."""
        if self.case.N:
            return self.rollout(backend)
        return self.reason(backend, pooled) if self.case.K else self.encode(backend)

    def encode(self, backend: str) -> Function:
        def forward(x: Inputs) -> tuple[Tensor, ...]:
            return ops.encode(
                x.search, x.rec, x.search_lengths, x.rec_lengths, self.weights, n_heads=HEADS,
                backend=backend,
            )  # fmt: skip

        return forward

    def reason(self, backend: str, pooled: bool) -> Function:
        def forward(x: Inputs) -> tuple[Tensor, ...]:
            reasoned = ops.latent_reasoning(
                x.search, x.rec, x.search_lengths, x.rec_lengths, self.weights,
                Steps(self.case.K, HEADS), target_keys=x.keys if pooled else None, backend=backend,
            )  # fmt: skip
            return tuple(t for t in reasoned if t is not None)

        return forward

    def rollout(self, backend: str) -> Function:
        def forward(x: Inputs) -> tuple[Tensor, ...]:
            return ops.latent_reasoning(
                x.search, x.rec, x.search_lengths, x.rec_lengths, self.weights,
                Steps(self.case.K, HEADS), noise=Noise(self.case.N, NOISE_SCALE, SEED, x.rows),
                backend=backend,
            ).streams  # fmt: skip

        return forward

    def n_calls(self, x: Inputs) -> tuple[Tensor, ...]:
        """Reason once a trajectory, the histories copied and their noise in memory."""
        case, reason = self.case, self.reason("reference", pooled=False)
        shape = (case.N, case.B, case.L, case.d)
        search, rec = (
            h.repeat(case.N, 1, 1, 1) + NOISE_SCALE * torch.randn(shape, device=h.device).to(h)
            for h in (x.search, x.rec)
        )
        calls = [reason(x._replace(search=search[n], rec=rec[n])) for n in range(case.N)]
        return tuple(torch.stack(states, 1) for states in zip(*calls, strict=True))

    def leaves(self, x: Inputs) -> list[Tensor]:
        """List what has a gradient."""
        has_keys = self.case.K and not self.case.N
        own = [x.search, x.rec, x.keys] if has_keys else [x.search, x.rec]
        return [*(t.requires_grad_() for t in own), *self.weights]

    def with_backward(self, forward: Function) -> Function:
        """Return the gradients of what ``forward`` returns."""

        def both(x: Inputs) -> tuple[Tensor, ...]:
            leaves = self.leaves(x)
            return torch.autograd.grad(forward(x), leaves, x.upstream)

        return both

    def counts(self, backward: bool) -> dict[str, float]:
        """Work of a call by formula, the mean of the sets of inputs."""
        case, n_sets = self.case, len(self.sets)
        copies, itemsize = max(case.N, 1), harness.DTYPES[case.dtype].itemsize
        lengths = [torch.cat([x[i] for x in self.sets]).cpu() for i in (2, 3)]
        of_all_sets = (
            work.reasoning_flops(*lengths, case.d, case.K)
            if case.K
            else work.encoder_flops(*lengths, case.d)
        )
        flops = copies * of_all_sets / n_sets
        if backward:
            return {"FLOPs": work.training_flops(flops)}
        weights = sum(w.nbytes for w in self.weights)
        events = work.reasoning_bytes(*lengths, case.d, itemsize, 0, copies) / n_sets
        counts = {"FLOPs": flops, "bytes": events + weights}
        if case.K:
            eager = work.eager_reasoning_bytes(*lengths, case.d, itemsize, case.K) / n_sets
            counts["eager bytes"] = copies * eager
        return counts


def assert_parity(case: Case, device: str) -> None:
    """Hold ``auto`` to the exact results and gradients on a few users of the case's shape."""
    dtype = harness.DTYPES[case.dtype]
    if not case.K:
        shape = EncoderCase(
            dim=case.d, n_heads=HEADS, ffn_dim=case.d, n_layers=1, search_len=case.L,
            rec_len=case.L, n_users=PARITY_USERS, padding=0.0,
        )  # fmt: skip
        encoder = random_encoder(shape).to(dtype, device=device)
        assert_call_parity(encoder, "auto", run_encoder)
        return
    shape = ReasoningCase(
        dim=case.d, n_heads=HEADS, search_len=case.L, rec_len=case.L, n_users=PARITY_USERS,
        steps=case.K, ffn_dim=case.d, n_trajectories=min(case.N, 2), padding=0.0,
    )  # fmt: skip
    call = random_reasoning(shape).to(dtype, device=device)
    assert_call_parity(call, "auto")


@pytest.fixture
def run(benchmark, race, small, compiles, capture, ceilings, device):
    """Return what times a case: parity, then ``auto`` against its baselines, then the account."""

    def run(case: Case, backward: bool) -> None:
        benchmark.extra_info |= {"case": case.label, "axes": case.axes(), "device": device}
        assert_parity(case, device)
        if small:
            case = case._replace(B=min(case.B, 2))
        bench = Bench(case, device)
        make = partial(bench.forward, pooled=backward)
        forwards = {"": make("auto"), "eager": make("reference")}
        if case.N:
            forwards["N calls"] = bench.n_calls
        if compiles:
            torch.compiler.reset()
            mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
            forwards["torch.compile"] = torch.compile(make("reference"), mode=mode, dynamic=False)
        bound = harness.rounding_bound(case.dtype, backward)
        with harness.multiplying_in(case.dtype):
            calls = {
                name: bench.with_backward(f) if backward else torch.no_grad()(f)
                for name, f in forwards.items()
            }
            expected = calls["eager"](bench.sets[0])
            for name, call in calls.items():
                if name != "N calls":  # draws noise of its own
                    harness.assert_close(name, call(bench.sets[0]), expected, bound)
            sets = [(x,) for x in bench.sets]
            turns = {name: harness.rotate(call, sets) for name, call in calls.items()}
            for name, replay in capture(calls, sets).items():
                harness.assert_close(name, replay(), expected, bound)
                turns[name] = replay
            others = {name: (call, 1.0) for name, call in turns.items() if name}
            race(turns[""], others, rounds=15, seconds=1.0)
            if benchmark.enabled:
                _account(benchmark, bench, ceilings, backward)
                _weigh(benchmark, bench, forwards, calls, device, backward)

    return run


def _account(benchmark, bench: Bench, ceilings: dict[str, float], backward: bool) -> None:
    """Keep the work, its rate and its share of what the machine can do."""
    info, median = benchmark.extra_info, harness.work_seconds(benchmark)
    counts = bench.counts(backward)
    rate = counts["FLOPs"] / median / 1e9
    info |= counts | {"GFLOP/s": rate}
    info["share of matmul rate"] = rate / ceilings[f"matmul {bench.case.dtype} GFLOP/s"]
    if "bytes" in counts:
        bandwidth = counts["bytes"] / median / 1e9
        info |= {"GB/s": bandwidth, "share of copy bandwidth": bandwidth / ceilings["copy GB/s"]}


def _weigh(benchmark, bench: Bench, forwards, calls, device: str, backward: bool) -> None:
    """Keep what each variant allocates at most, and what it saves for its backward."""
    x = bench.sets[0]
    benchmark.extra_info["peak bytes"] = {
        name: harness.peak_bytes(partial(call, x), device) for name, call in calls.items()
    }
    if backward:
        leaves = bench.leaves(x)
        benchmark.extra_info["saved bytes"] = {
            name: harness.saved_bytes(partial(forward, x), [*leaves, *x[:6]])
            for name, forward in forwards.items()
        }


@pytest.mark.benchmark(group="reasoning forward")
def test_forward(run, case):
    run(case, backward=False)


@pytest.mark.benchmark(group="reasoning forward and backward")
def test_forward_and_backward(run, case):
    run(case, backward=True)


@pytest.mark.benchmark(group="rollout")
def test_rollout(run, case):
    run(case, backward=False)


@pytest.mark.benchmark(group="rollout and backward")
def test_rollout_and_backward(run, case):
    run(case, backward=True)


@pytest.mark.benchmark(group="encoders")
def test_encoders(run, case):
    run(case, backward=False)


@pytest.mark.benchmark(group="encoders, forward and backward")
def test_encoders_and_backward(run, case):
    run(case, backward=True)
