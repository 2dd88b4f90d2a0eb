"""The CUDA kernels compile with nvcc alone, without spilling registers. Needs no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "ranking.cu"


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "capability",
    [80, 90, 100],
)
def test_compiles_without_spills(tmp_path, capability):
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True)
    if f"sm_{capability}" not in known.stdout.split():
        pytest.skip("this nvcc does not know it")
    done = subprocess.run(
        [
            *("nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings"),
            f"-gencode=arch=compute_{capability},code=[sm_{capability},compute_{capability}]",
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
    assert len(spills) == 18
    assert all(spill == ("0", "0") for spill in spills), log
