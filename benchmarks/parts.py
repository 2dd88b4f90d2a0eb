"""Runs commands in parts: each with a time limit and a log, none able to stop the others."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"
_GRACE_SECONDS = 10.0  # between an interrupt, which lets pytest write what it has, and the kill
_TAIL_LINES = 40
_LOG_BYTES = 2 << 20  # kept of one command
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|warnings?)")
_NO_TESTS = 5  # exit status of pytest that selected nothing


class Command(NamedTuple):
    """What to run, and how to judge it."""

    title: str
    words: tuple[str, ...]
    seconds: float = 600.0  # at most
    environment: Mapping[str, str] = {}
    is_pytest: bool = False
    #: What to quote of the output, joined, where all is well; else its last line.
    quote: str = ""
    #: What in the output says that this machine cannot run the command, which is no failure.
    cannot: str = ""
    #: Whom findings accuse (a group), the exit status that they cause, and whom to let off.
    accuses: str = ""
    accusing_status: int = 0
    others: str = ""


class Outcome(NamedTuple):
    """How one command ended."""

    title: str
    status: str
    seconds: float
    summary: str
    tail: list[str]  # of the output, empty where all is well


class Part(NamedTuple):
    """Chains of commands: ``jobs`` chains at a time, the commands of each in turn."""

    name: str
    chains: Sequence[Sequence[Command]]
    jobs: int = 1
    seconds: float = 600.0  # at most
    note: str = ""  # what is left out here, and why
    log: str = ""  # the part whose log this one continues; a log of its own if empty


class Result(NamedTuple):
    """How a part ended; ``outcomes`` holds what did not pass."""

    name: str
    status: str
    seconds: float
    summary: str
    outcomes: list[Outcome]

    def as_dict(self) -> dict[str, Any]:
        fields = self._asdict()
        return {**fields, "outcomes": [outcome._asdict() for outcome in self.outcomes]}


class Runner:
    """Runs parts in ``root``, with a log a part in ``folder``; as a context, it leaves no process.

    ``environment`` replaces that of this process.
    """

    def __init__(self, root: Path, folder: Path, environment: Mapping[str, str]) -> None:
        self._root, self._folder, self._environment = root, folder, dict(environment)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill what runs, and start nothing more."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            _signal_group(process, signal.SIGKILL)

    def run(
        self,
        parts: Iterable[Part],
        deadline: float,
        report: Callable[[Result], None] = lambda result: None,
    ) -> list[Result]:
        """Run parts side by side until ``deadline`` of time.monotonic(), and report each."""
        parts = list(parts)

        def run(part: Part) -> Result:
            result = self._run_part(part, deadline)
            report(result)
            return result

        with ThreadPoolExecutor(max(len(parts), 1)) as pool:
            try:
                return list(pool.map(run, parts))
            except BaseException:
                self.stop()
                raise

    def _run_part(self, part: Part, deadline: float) -> Result:
        began = time.monotonic()
        deadline = min(deadline, began + part.seconds)

        def run_chain(chain: Sequence[Command]) -> list[Outcome]:
            return [
                self._run_command(part.log or part.name, command, deadline) for command in chain
            ]

        with ThreadPoolExecutor(part.jobs) as pool:
            outcomes = [one for chain in pool.map(run_chain, part.chains) for one in chain]
        is_pytest = all(command.is_pytest for chain in part.chains for command in chain)
        status, summary = _judge(outcomes, is_pytest)
        summary = "; ".join(filter(None, (summary, part.note)))
        bad = [outcome for outcome in outcomes if outcome.status != PASSED]
        return Result(part.name, status, time.monotonic() - began, summary, bad)

    def _run_command(self, log_name: str, command: Command, deadline: float) -> Outcome:
        began = time.monotonic()
        seconds = min(command.seconds, deadline - began)
        if seconds <= 0 or self._stopped:
            return Outcome(command.title, TIMED_OUT, 0.0, "no time was left to start it", [])
        with tempfile.TemporaryFile() as output:
            try:
                ended = self._wait(command, seconds, output)
            except OSError as error:
                ended = str(error)
            text = _read_end(output)
            with self._lock, (self._folder / f"{log_name}.log").open("a", encoding="utf-8") as log:
                log.write(f"==== {command.title}: {' '.join(command.words)}\n{text}\n")
        took = time.monotonic() - began
        lines = [line for line in text.splitlines() if line.strip()]
        counting = [line for line in lines if command.is_pytest and _COUNT.search(line)]
        last = (counting or lines or [""])[-1].strip("= ")
        if command.cannot and command.cannot in text:
            why = next(line for line in lines if command.cannot in line).strip("= ")
            return Outcome(command.title, NOT_RUN, took, why, [])
        if ended == 0 or (ended == _NO_TESTS and command.is_pytest):
            quoted = re.findall(command.quote, text, re.M) if command.quote else [last]
            return Outcome(command.title, PASSED, took, "; ".join(quoted), [])
        accused = sorted(set(re.findall(command.accuses, text))) if command.accuses else []
        of_others = [name for name in accused if re.search(command.others, name)]
        if accused and accused == of_others and ended == command.accusing_status:
            why = f"{last}, none in our kernels but in {', '.join(accused)}"
            return Outcome(command.title, PASSED, took, why, [])
        tail = lines[-_TAIL_LINES:]
        if ended is None:
            reached = _reached(lines) if command.is_pytest else last
            summary = f"stopped after {seconds:.0f} s: {reached}"
            return Outcome(command.title, TIMED_OUT, took, summary, tail)
        if isinstance(ended, str):
            return Outcome(command.title, FAILED, took, ended, tail)
        summary = f"exit status {ended}: {last}"
        return Outcome(command.title, FAILED, took, summary, tail)

    def _wait(self, command: Command, seconds: float, output) -> int | None:
        """Return the exit status, or None for what had to be stopped, with all that it started."""
        process = subprocess.Popen(
            command.words,
            cwd=self._root,
            env={**self._environment, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with self._lock:
            self._running.add(process)
        try:
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECONDS)
                return None
        finally:
            _signal_group(process, signal.SIGKILL)  # also what a finished command left running
            process.wait()
            with self._lock:
                self._running.discard(process)


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _read_end(output) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _LOG_BYTES))
    return output.read().decode(errors="replace")


# What pytest -v prints of each test, with xdist and without.
_TEST_LINE = re.compile(
    r"^\[gw\d+\][^A-Z]*(?P<how>PASSED|FAILED|ERROR) (?P<name>\S+::.*)$"
    r"|^(?P<name2>\S+::.*?) (?P<how2>PASSED|FAILED|ERROR)\b"
)


def _reached(lines: Iterable[str]) -> str:
    """Say how the tests ended that pytest -v came to, and which did not pass."""
    found = [match for line in lines if (match := _TEST_LINE.match(line))]
    bad = [m["name"] or m["name2"] for m in found if "PASSED" not in (m["how"], m["how2"])]
    summary = f"{len(found) - len(bad)} passed, {len(bad)} failed"
    return summary + (f": {', '.join(bad)}" if bad else "")


def _judge(outcomes: list[Outcome], is_pytest: bool) -> tuple[str, str]:
    """Sum outcomes up: status and one line."""
    found = Counter(outcome.status for outcome in outcomes)
    status = next((s for s in (FAILED, TIMED_OUT, PASSED) if found[s]), NOT_RUN)
    if is_pytest:
        counts: Counter[str] = Counter()
        for outcome in outcomes:
            for number, what in _COUNT.findall(outcome.summary):
                counts[what] += int(number)
        tests = ", ".join(f"{n:,} {what}" for what, n in counts.items() if "warning" not in what)
        if status == PASSED and not counts["passed"]:
            return FAILED, f"no test ran: {tests}" if tests else "no test ran"
        if status == PASSED:
            return status, tests
    else:
        tests = ""
    if len(outcomes) == 1:
        return status, outcomes[0].summary
    parts = [tests, f"{found[PASSED]} of {len(outcomes)} commands passed"]
    alike: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.status != PASSED:
            alike.setdefault((outcome.status, outcome.summary), []).append(outcome.title)
    parts += [f"{', '.join(titles)} {how}: {why}" for (how, why), titles in alike.items()]
    return status, "; ".join(filter(None, parts))
