"""All that can be known of this package on a GPU, by one command in at most a quarter of an hour.

    python benchmarks/gpu_check.py [--only PART ...] [--limit SECONDS] [--out FOLDER]

- package: what was found, and which implementation serves each op;
- tests: `pytest -m gpu`, in parallel where pytest-xdist is installed;
- sanitizer: every kernel family against the reference, then under compute-sanitizer's memcheck and
  racecheck where that is installed;
- train: a short `lcr-fast train --device cuda`, and one that replays its steps (--capture);
- warm-up: every body of the benchmarks once at full size, in parallel, which compiles its kernels;
- benchmarks: the timed runs, alone on the GPU;
- compiled: those with torch.compile again, as many as time is left for.

The first five run side by side, as most of their time is compilation. A part that fails or runs
out of time does not stop the others. FOLDER gets a JSON file named after the GPU, which
benchmarks/report.py reads, its tables as table.md, and a log a part; where benchmarks/results has a
file of the same GPU, table.md ends with what each case took then and takes now. Exit status: 0 if
all passed, 1 if not, 2 if there is no GPU.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.cpp_extension import CUDA_HOME

import kernel_check
from parts import PASSED, Command, Part, Result, Runner

ROOT = Path(__file__).resolve().parents[1]
TIMED = ("benchmarks", "compiled")
PARTS = ("package", "tests", "sanitizer", "train", "warm-up", *TIMED)
BENCHMARKS = ("reasoning", "training", "scoring", "inference", "ranking")
COMPILED = ("reasoning", "inference", "scoring")  # have cases with torch.compile
LIMIT = 900.0
# What runs before the timed benchmarks gets at most this share of the time.
_SIDE_BY_SIDE = 0.55
_REPORT_SECONDS = 12.0
_STOP_SECONDS = 12.0  # that a command may take to end once it is told to
_BENCHMARK_SECONDS = 120.0  # of one file

_PACKAGE = """
from lcr_fast import LCRConfig, LCRSER
from lcr_fast.ops._extension import extension_error, has_kernel
served = [device for device in ("cpu", "cuda") if has_kernel("ranking_metrics", device)]
print("C++ extension:", extension_error() or "built for " + " and ".join(served))
print(LCRSER(LCRConfig(n_items=1, n_users=1)).backend_report({device!r}))
"""


class Machine(NamedTuple):
    """What the commands depend on."""

    device: str
    n_cpus: int
    has_xdist: bool
    sanitizer: str | None  # path


def find_tool(name: str) -> str | None:
    """Find an executable on PATH or in a CUDA toolkit."""
    folders = (Path(CUDA_HOME, "bin"), Path(CUDA_HOME, "compute-sanitizer")) if CUDA_HOME else ()
    return shutil.which(name) or next(
        (found for folder in folders if (found := shutil.which(name, path=str(folder)))), None
    )


def find_machine() -> Machine:
    has_xdist = importlib.util.find_spec("xdist") is not None
    return Machine("cuda", os.cpu_count() or 1, has_xdist, find_tool("compute-sanitizer"))


def _output(*words: str) -> str:
    """Return what a command prints, or nothing where it is missing or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    return ""


def _version(path: str | None) -> str:
    """Return the version that a tool reports of itself; paths would name a computer."""
    if path is None:
        return "not found"
    found = re.search(r"\d+(\.\d+)+", _output(path, "--version"))
    return found[0] if found else "unknown"


def find_versions(device: str) -> dict[str, str]:
    """Name the machine and its tools, paths left out."""
    found = {}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ).split("\n")[0]
        found["cuda"] = str(torch.version.cuda)
    found["cores"] = str(os.cpu_count())
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    found["torch"] = torch.__version__
    for name in ("nvcc", "g++", "clang++", "compute-sanitizer"):
        found[name] = _version(find_tool(name))
    found["ptxas on the path"] = _version(find_tool("ptxas"))
    if (spec := importlib.util.find_spec("triton")) is not None and spec.origin:
        found["triton"] = importlib.metadata.version("triton")
        for path in sorted(Path(spec.origin).parent.glob("backends/nvidia/bin/ptxas*")):
            found[f"{path.name} of triton"] = _version(str(path))
    if chosen := os.environ.get("TRITON_PTXAS_PATH"):
        found["ptxas of TRITON_PTXAS_PATH"] = _version(chosen)
    return {name: value for name, value in found.items() if value}


# -- the parts ------------------------------------------------------------------------------------

PYTEST = (
    sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider",
    "-p", "benchmarks.failures_at_once",
)  # fmt: skip
# cuBLAS' kernels, whose synchronisation racecheck does not see (seen of nvjet on an H200).
_OTHERS = r"nvjet|cublas|cutlass|gemm"
_SANITIZER_STATUS = 9  # the program itself ends with 1
# Many processes on a few cores: no one may take them all.
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
_SANITIZER_TOOLS: tuple[tuple[str, tuple[str, ...], dict[str, str]], ...] = (
    # Without torch's pool every tensor is an allocation of its own, with its own bounds. torch
    # handles what CUDA's functions return; what kernels do is what counts.
    ("memcheck", ("--report-api-errors", "no"), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    ("racecheck", (), {}),
)


def _spread_pytest(
    machine: Machine, name: str, files: Iterable[Path], options: Sequence[str], jobs: int
) -> Part:
    """Run test files over ``jobs`` processes, by pytest-xdist or one process a file."""
    files = sorted(files)
    if machine.has_xdist:
        words = (*PYTEST, "-n", str(jobs), "--dist", "worksteal", *options, *map(str, files))
        return Part(name, [[Command(name, words, environment=_ONE_THREAD, is_pytest=True)]])
    chains = [
        [
            Command(
                file.stem, (*PYTEST, *options, str(file)), environment=_ONE_THREAD, is_pytest=True
            )
        ]
        for file in files
    ]
    return Part(name, chains, jobs, note="pytest-xdist is not installed: one process a file")


def _share(machine: Machine, share: float) -> int:
    return max(1, round(machine.n_cpus * share))


def package(machine: Machine) -> Part:
    words = (sys.executable, "-c", _PACKAGE.format(device=machine.device))
    return Part("package", [[Command("package", words, quote=r"^\S.*")]], seconds=60)


def tests(machine: Machine) -> Part:
    files = (ROOT / "tests").glob("test_*.py")
    return _spread_pytest(machine, "tests", files, ("-m", "gpu"), _share(machine, 0.6))


def sanitizer(machine: Machine) -> Part:
    """Compile and judge each family bare, before the tools, which slow a process down."""
    chains = []
    for family in kernel_check.FAMILIES:
        words = (sys.executable, str(ROOT / "benchmarks" / "kernel_check.py"), family)
        chain = [Command(family, words, environment=_ONE_THREAD)]
        for tool, options, environment in _SANITIZER_TOOLS if machine.sanitizer else ():
            status = str(_SANITIZER_STATUS)
            checker = (str(machine.sanitizer), "--tool", tool, "--error-exitcode", status, *options)
            chain.append(Command(
                f"{family} under {tool}", (*checker, *words),
                environment={**_ONE_THREAD, **environment}, cannot="Device not supported",
                accuses=r"\bat (\w+)\+0x", accusing_status=_SANITIZER_STATUS, others=_OTHERS,
            ))  # fmt: skip
        chains.append(chain)
    note = "" if machine.sanitizer else "no memcheck and racecheck: compute-sanitizer not found"
    return Part("sanitizer", chains, min(len(chains), _share(machine, 0.25)), note=note)


def train(machine: Machine, work: Path) -> Part:
    chains = []
    for title, more in (("train", ()), ("train captured", ("--capture",))):
        words = (
            sys.executable, "-m", "lcr_fast", "train", "--device", machine.device,
            "--out", str(work / title), "--epochs", "1", "--rl-epochs", "1",
            "--rl-epoch-size", "64", "--variants", "lcr", "rl", *more,
        )  # fmt: skip
        chains.append([Command(title, words, quote=r"valid_ndcg@5 [\d.]+")])
    return Part("train", chains, len(chains), seconds=300)


def _bench_files(names: Iterable[str]) -> list[Path]:
    return [ROOT / "benchmarks" / f"bench_{name}.py" for name in names]


def _bench_options(machine: Machine) -> tuple[str, ...]:
    return ("--benchmark", "--quick", "--device", machine.device)


def warm_up(machine: Machine) -> Part:
    options = (*_bench_options(machine), "--benchmark-disable", "--warm-up")
    return _spread_pytest(
        machine, "warm-up", _bench_files(BENCHMARKS), options, _share(machine, 0.3)
    )


def _timed(machine: Machine, work: Path, name: str, files: Iterable[str], *options: str) -> Part:
    """Start a process a file, one at a time: no failure takes other files' times along."""
    chain = []
    for file in _bench_files(files):
        words = (
            *PYTEST, *_bench_options(machine), "--benchmark-columns=median", "--durations=5",
            f"--benchmark-json={work / name}-{file.stem}.json", *options, str(file),
        )  # fmt: skip
        chain.append(Command(file.stem, words, _BENCHMARK_SECONDS, is_pytest=True))
    return Part(name, [chain], log=TIMED[0])


def benchmarks(machine: Machine, work: Path) -> Part:
    return _timed(machine, work, "benchmarks", BENCHMARKS)


def compiled(machine: Machine, work: Path) -> Part:
    return _timed(machine, work, "compiled", COMPILED, "-m", "compiled", "--compile")


# -- the report -----------------------------------------------------------------------------------


def merge(paths: Iterable[Path]) -> dict[str, Any]:
    """Put files of pytest-benchmark together; of a case that was timed twice the last counts.

    Ceilings are the best of all. Files that are missing or empty count as no benchmark.
    """
    merged: dict[str, Any] = {}
    ceilings: dict[str, float] = {}
    cases: dict[str, dict[str, Any]] = {}
    for path in paths:
        if not path.is_file() or not (text := path.read_text(encoding="utf-8")):
            continue
        values = json.loads(text)
        merged = merged or values
        for name, value in values["machine_info"].get("ceilings", {}).items():
            ceilings[name] = max(value, ceilings.get(name, 0.0))
        cases |= {case["fullname"]: case for case in values["benchmarks"]}
    if not merged:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        merged = {"machine_info": {}, "datetime": now}
    merged["machine_info"]["ceilings"] = ceilings
    return {**merged, "benchmarks": list(cases.values())}


def without_paths(text: str) -> str:
    """Leave out where this machine keeps the package and Python's, which says nothing elsewhere."""
    text = re.sub(r"(/[\w.+-]+)+/(site|dist)-packages/", "", text)
    return text.replace(f"{ROOT}/", "")


def result_name(versions: dict[str, str]) -> str:
    return re.sub(r"\W+", "-", versions.get("gpu", "cpu").lower())


def _say(line: str) -> None:
    print(line, flush=True)


def say_result(result: Result) -> None:
    _say(f"{result.name}: {result.status} in {result.seconds:.0f} s: {result.summary}")
    for outcome in result.outcomes:
        if outcome.tail:
            _say("\n".join([f"  {outcome.title} ends:", *(f"    {line}" for line in outcome.tail)]))


def _medians(run: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Seconds of every case that was timed, and captured in a graph if it was."""
    found = {}
    for case in run["benchmarks"]:
        extra = case.get("extra_info", {})
        test = case["fullname"].rpartition("::test_")[2].partition("[")[0]
        name = f"{test}, {extra.get('case')}"
        if (stats := case.get("stats")) and "median" in stats:
            found[name, "called"] = stats["median"]
        if captured := extra.get("others", {}).get("captured"):
            found[name, "captured"] = captured["median"]
    return found


def then_and_now(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Compare the cases that two runs share, in Markdown; empty if they share none."""
    old, new = _medians(before), _medians(now)
    rows = [
        f"| {name} | {how} | {1e3 * old[name, how]:.3g} | {1e3 * new[name, how]:.3g} "
        f"| {old[name, how] / new[name, how]:.2f} |"
        for name, how in new
        if (name, how) in old
    ]
    if not rows:
        return ""
    head = (
        f"\n## Then and now\n\nMedian milliseconds in the run of {before['datetime'][:10]}, with "
        "the software of that day, and in this one; a ratio above 1 is faster now.\n\n"
        "| case | | then | now | ratio |\n|---|---|--:|--:|--:|\n"
    )
    return head + "\n".join(rows) + "\n"


def write_report(
    folder: Path, versions: dict[str, str], results: list[Result], work: Path, command: str
) -> Path:
    """Write the JSON file and, from it, table.md; return the former."""
    merged = merge(path for name in TIMED for path in sorted(work.glob(f"{name}-*.json")))
    merged["machine_info"] = {**versions, **merged["machine_info"], "command": command}
    merged["checks"] = [result.as_dict() for result in results]
    path = folder / f"{result_name(versions)}.json"
    path.write_text(without_paths(json.dumps(merged, indent=1)), encoding="utf-8")
    tables = _output(sys.executable, str(ROOT / "benchmarks" / "report.py"), str(path))
    committed = ROOT / "benchmarks" / "results" / path.name
    comparison = (
        then_and_now(json.loads(committed.read_text()), merged) if committed.exists() else ""
    )
    (folder / "table.md").write_text(
        (tables or "no tables: benchmarks/report.py failed") + "\n" + comparison
    )
    return path


def run(
    parts: dict[str, Callable[[], Part]], names: Sequence[str], runner: Runner, limit: float
) -> list[Result]:
    """Run the named parts: the timed ones last, each alone, the others side by side before them."""
    began = time.monotonic()
    end = began + limit - _REPORT_SECONDS - _STOP_SECONDS
    timed = [name for name in TIMED if name in names]
    first = [parts[name]() for name in names if name not in TIMED]
    results = runner.run(first, began + _SIDE_BY_SIDE * limit if timed else end, say_result)
    for name in timed:
        results += runner.run([parts[name]()], end, say_result)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all parts")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="an empty folder")
    arguments = parser.parse_args(argv)
    if arguments.limit < 60:
        parser.error(f"--limit must be at least 60 seconds, got {arguments.limit:g}")
    if not torch.cuda.is_available():
        print("gpu_check: this torch sees no GPU, so there is nothing to check", file=sys.stderr)
        return 2
    folder = arguments.out.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"--out: {arguments.out} is not an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return check(find_machine(), arguments.only, arguments.limit, folder)


def check(machine: Machine, names: Sequence[str], limit: float, folder: Path) -> int:
    """Run parts on a machine and report into a folder; return the exit status."""
    versions = find_versions(machine.device)
    _say("\n".join(f"{name}: {value}" for name, value in versions.items()))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with (
        tempfile.TemporaryDirectory() as temporary,
        Runner(ROOT, folder, environment | {"PYTHONUNBUFFERED": "1"}) as runner,
    ):
        work = Path(temporary)
        parts = {
            "package": lambda: package(machine),
            "tests": lambda: tests(machine),
            "sanitizer": lambda: sanitizer(machine),
            "train": lambda: train(machine, work),
            "warm-up": lambda: warm_up(machine),
            "benchmarks": lambda: benchmarks(machine, work),
            "compiled": lambda: compiled(machine, work),
        }
        results = run(parts, [name for name in PARTS if name in names], runner, limit)
        command = f"gpu_check.py --only {' '.join(names)} --limit {limit:g}"
        path = write_report(folder, versions, results, work, command)
    _say(f"written: {path.name} and table.md in {folder}")
    return 0 if all(result.status == PASSED for result in results) else 1


def _stop(*_: object) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # so that no process is left behind
    sys.exit(main())
