"""The CUDA kernels compile with nvcc alone, without spilling registers. Needs no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "ranking.cu"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_compiles_without_spills(tmp_path):
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True)
    capabilities = [c for c in (80, 90, 100) if f"sm_{c}" in known.stdout.split()]
    targets = []
    for c in capabilities:
        targets += ["-gencode", f"arch=compute_{c},code=[sm_{c},compute_{c}]"]
    done = subprocess.run(
        [
            *("nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", "-t", "2"),
            *targets,
            *("-c", str(SOURCE), "-o", str(tmp_path / "ranking.o")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    log = done.stdout + done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    # Four dtypes of four kernels, and two kernels for all.
    assert len(spills) == 18 * len(capabilities)
    assert all(spill == ("0", "0") for spill in spills), log
