"""The CUDA kernels of ranking, without a GPU: nvcc compiles them, and a CPU runs them.

tests/cuda_emulation is as much of CUDA as they use; tests/ranking_emulated.cpp compares.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC, TESTS = Path(__file__).parents[1] / "csrc", Path(__file__).parent
SOURCE = CSRC / "cuda" / "ranking.cu"


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "capability",
    [75, 80, 90, 100],
)
def test_compiles_and_spills_next_to_nothing(tmp_path, capability):
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
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    # Four dtypes of five kernels, and two kernels for all.
    assert len(spills) == 22
    # One of bfloat16 keeps a few bytes of predicates in memory on sm_100.
    assert max(spills) <= 16, log


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_kernels_count_as_the_cpu_does(tmp_path):
    """All dtypes, ties and outputs, sizes around the limits of each kernel, and bad data."""
    # kernel<<<grid, threads, 0, stream>>>(arguments) is all that is not C++.
    launch = re.compile(r"(\w+(?:<[\w, ]+>)?)\s*<<<(.*?)>>>\(", re.DOTALL)
    kernels = launch.sub(r"emulation::launch(\2, \1, ", SOURCE.read_text())
    assert "<<<" not in kernels
    (tmp_path / "ranking_cuda.cpp").write_text(kernels.replace('"../', f'"{CSRC}/'))
    emulated = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fsanitize=undefined")

    def build(*arguments):
        words = ("g++", "-std=c++20", "-O2", *map(str, arguments))
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    sources = {
        "ranking_cuda.cpp": (*emulated, "-I", TESTS / "cuda_emulation"),
        TESTS / "ranking_emulated.cpp": emulated,
        **dict.fromkeys((CSRC / "cpu").glob("ranking*.cpp"), ()),
        CSRC / "cpu" / "level.cpp": (),
    }
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: build(*sources[source], "-c", source), sources))
    build("-fsanitize=undefined", *tmp_path.glob("*.o"), "-o", "emulated")
    done = subprocess.run([tmp_path / "emulated"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
