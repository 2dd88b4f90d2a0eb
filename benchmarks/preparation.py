"""Time and peak memory of ``lcr-fast prepare`` against the size of the log.

    python benchmarks/preparation.py [--rows 1000000 5000000 20000000] [--source kuaisar|frames]

Every log is made by ``kuaisar_log.py`` and prepared by a process of its own; for ``frames`` its
streams are written as CSV tables first. The peak is the kernel's (``ru_maxrss``), that of
``/usr/bin/time -v``.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
from tabulate import tabulate

import kuaisar_log
from lcr_fast.data import kuaisar


def write_frames(log: Path, folder: Path) -> None:
    """Write the streams of a KuaiSAR folder as the tables that ``frames`` reads."""
    read = kuaisar.read(log)
    folder.mkdir()
    read.events.write_csv(folder / "events.csv")
    words = pl.col("terms").list.join(" ")
    read.searches.with_columns(words).write_csv(folder / "searches.csv")
    read.clicks.write_csv(folder / "clicks.csv")


def apart(function, *arguments) -> None:
    """Call a function in another process, whose memory goes with it."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} failed")


def prepare(source: str, log: Path, out: Path) -> tuple[float, float, float]:
    """Return the seconds, the CPU's seconds and the peak GiB of preparing a log."""
    command = [sys.executable, "-m", "lcr_fast", "prepare", source, str(log), str(out)]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit("prepare failed")
    seconds = time.monotonic() - start
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 5_000_000, 20_000_000])
    parser.add_argument("--source", choices=("kuaisar", "frames"), default="kuaisar")
    arguments = parser.parse_args()
    lines = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as name:
            log, folder = Path(name) / "log", Path(name) / "frames"
            apart(kuaisar_log.write, log, rows)
            if arguments.source == "frames":
                apart(write_frames, log, folder)
                log = folder
            size = sum(file.stat().st_size for file in log.iterdir()) / 2**30
            seconds, cpu, memory = prepare(arguments.source, log, Path(name) / "out")
        lines.append(
            (f"{rows:,}", f"{size:.2f}", f"{seconds / 60:.2f}", f"{cpu:.0f}", f"{memory:.1f}")
        )
    headers = ("rows", "GiB of text", "minutes", "CPU s", "peak GiB")
    sys.stdout.write(tabulate(lines, headers, "github", disable_numparse=True) + "\n")


if __name__ == "__main__":
    main()
