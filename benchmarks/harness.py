"""How benchmarks measure: turns, clocks, memory, the machine's ceilings, and the usual baselines.

On CUDA a turn queues launches until they fill about two milliseconds and reads CUDA events before
and after; on CPU it reads the clock around one call, or around as many as take 0.1 ms.
"""

import contextlib
import ctypes
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lcr_fast.testing import every_op_rounded, tf32

Function = Callable[[], Any]

#: What a case computes in: halves, or float32 whose products may be TF32.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp32", "tf32", "bf16")}
#: What a captured variant is called, by the name of what was captured.
CAPTURED = {"": "captured", "eager": "captured eager"}

_TURN_SECONDS = {"cuda": 2e-3, "cpu": 1e-4}
_MOST_CALLS = 200  # in one turn
_LEAST_ROUNDS = 3


class Variant(NamedTuple):
    """Something to time: a function, and the share of the whole work that it does."""

    function: Function
    share: float = 1.0


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def summary(seconds: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = quantiles(seconds)
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(seconds)}


def seconds_a_call(function: Function, n_calls: int, device: str) -> float:
    """Time ``n_calls`` calls, queued where the device has a queue."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(n_calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / n_calls
    begin = time.perf_counter()
    for _ in range(n_calls):
        function()
    return (time.perf_counter() - begin) / n_calls


def take_turns(
    variants: dict[str, Variant], rounds: int, seconds: float, device: str, single: bool = False
) -> dict[str, list[float]]:
    """Time variants in turns, so that all of them meet the same noise.

    Everyone warms up and has three rounds at least; who has used up ``seconds`` sits out the
    others. ``single`` times single calls, the answer in hand each time.
    """
    n_calls, spent = {}, {}
    for name, (function, _) in variants.items():
        if device == "cuda":
            function()  # may compile, which says nothing about the next call
        spent[name] = seconds_a_call(function, 1, device)
        wanted = 1 if single else int(_TURN_SECONDS[device] / max(spent[name], 1e-7))
        n_calls[name] = min(max(wanted, 1), _MOST_CALLS)
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for turn in range(rounds):
        for name in order if turn % 2 == 0 else reversed(order):
            if turn >= _LEAST_ROUNDS and spent[name] > seconds:
                continue
            function, share = variants[name]
            took = seconds_a_call(function, n_calls[name], device)
            times[name].append(took / share)
            spent[name] += took * n_calls[name]
    return times


def rotate(function: Callable[..., Any], input_sets: Iterable[Sequence[Any]]) -> Function:
    """Call ``function`` with the next set of inputs each time, so that no cache keeps them."""
    turn = itertools.cycle(list(input_sets))
    return lambda: function(*next(turn))


@contextlib.contextmanager
def multiplying_in(precision: str) -> Iterator[None]:
    """Let torch, and what asks it, take TF32 products if named; in halves round every operation."""
    rounded = every_op_rounded() if precision == "bf16" else contextlib.nullcontext()
    with tf32(precision == "tf32"), rounded:
        yield


# The heads of the paper's plain reading; the defaults' cost as much but for a bonus of seen items.
PLAIN_READING = {"score": "mlp", "user_embedding": True, "seen_bonus": False}


def moved(value: Any, **where: Any) -> Any:
    """Detach tensors in nested tuples and send them ``to(**where)``, a dtype only if they float.

    What else is in the tuples stays as it is.
    """
    if isinstance(value, Tensor):
        kept = where if value.is_floating_point() else {**where, "dtype": None}
        return value.detach().to(**kept)
    if not isinstance(value, tuple | list):
        return value
    parts = (moved(part, **where) for part in value)
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def graphed(function: Callable[..., Any], input_sets: Sequence[Sequence[Any]]) -> Function:
    """Capture ``function`` on each set of inputs in a CUDA graph; a call replays the next one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in input_sets:
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    captured = []
    for inputs in input_sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(*inputs)
        captured.append((graph, out))
    turn = itertools.cycle(captured)

    def replay():
        graph, out = next(turn)
        graph.replay()
        return out

    return replay


def captured(
    functions: dict[str, Callable[..., Any]], input_sets: Sequence[Sequence[Any]]
) -> tuple[dict[str, Function], dict[str, str]]:
    """Capture ours and eager, or what is given of them.

    Returns what was captured, and what could not be with its error.
    """
    found, failures = {}, {}
    for name, title in CAPTURED.items():
        if name not in functions:
            continue
        try:
            found[title] = graphed(functions[name], input_sets)
        except RuntimeError as error:
            failures[title] = str(error).splitlines()[0]
    return found, failures


def work_seconds(benchmark) -> float:
    """Give the median that rates are of: of the replay where one was timed, else of the call.

    What a call takes may be what its launches take; that is no rate of a GPU.
    """
    replay = benchmark.extra_info["others"].get(CAPTURED[""])
    return replay["median"] if replay else benchmark.stats.stats.median


def rounding_bound(precision: str, backward: bool = False) -> float:
    """Say how far results of one precision may be apart, in RMS, relative to their size."""
    if precision == "fp32" and not backward:
        return 1e-4  # five post-norm steps amplify a rounding error by ten at most
    # Every sublayer rounds; in eager bfloat16, gradients of a head are off by up to 0.12. A ReLU
    # whose input rounds to the other side of 0 moves gradients, in float32 too: of 64 users by
    # 1.7e-3 of their size, of that user alone by 1e-2 (seen in eager, against float64).
    return 0.2 if backward and precision == "bf16" else 0.05


def assert_close(name: str, found: Any, expected: Any, bound: float) -> None:
    """Require tensors, or nested tuples of them, to agree but for rounding: ``rounding_bound``.

    This finds variants that compute something else; the parity of ours is asserted elsewhere.
    """
    if not isinstance(expected, Tensor):
        for one, other in zip(found, expected, strict=True):
            assert_close(name, one, other, bound)
        return
    # Padded candidates score -inf.
    found, expected = (t.detach().double().nan_to_num(neginf=0.0) for t in (found, expected))
    assert found.shape == expected.shape, f"{name}: {found.shape}, not {expected.shape}"
    error = (found - expected).square().mean().sqrt().item()
    size = expected.square().mean().sqrt().item()
    assert error <= bound * size + 1e-12, f"{name}: RMS error {error:.2e} of {size:.2e}"


# -- memory ---------------------------------------------------------------------------------------


def peak_bytes(function: Function, device: str) -> int:
    """Memory that one call adds at its peak: of the GPU, or of the process. 0 where unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    resets = Path("/proc/self/clear_refs")
    if not resets.exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # else a call lives on what others have freed
    resets.write_text("5")  # forget the peak so far
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    function()
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident)


def saved_bytes(forward: Callable[[], Any], inputs: Iterable[Tensor]) -> int:
    """Memory that a forward keeps for its backward, apart from its own inputs."""
    own = {t.untyped_storage().data_ptr() for t in inputs}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    del out  # lived until here, so that no storage was counted twice
    return sum(kept.values())


# -- the machine ----------------------------------------------------------------------------------

_MATMUL = {"cpu": 1024, "cuda": 8192}
_MATMUL_PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": PRECISIONS["cuda"]}
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


def ceilings(device: str) -> dict[str, float]:
    """Measure what the machine can do at best: torch's matmul rates and copy bandwidth."""
    found = {}
    n = _MATMUL[device]
    for name in _MATMUL_PRECISIONS[device]:
        a, b = (torch.randn(n, n, device=device, dtype=DTYPES[name]) for _ in range(2))
        with multiplying_in(name):
            times = take_turns({"matmul": Variant(lambda a=a, b=b: a @ b)}, 20, 1.0, device)
        found[f"matmul {name} GFLOP/s"] = 2 * n**3 / min(times["matmul"]) / 1e9
    source = torch.randn(_COPY_BYTES[device] // 4, device=device)
    copy = torch.empty_like(source)
    times = take_turns({"copy": Variant(lambda: copy.copy_(source))}, 20, 1.0, device)
    found["copy GB/s"] = 2 * source.nbytes / min(times["copy"]) / 1e9
    return found
