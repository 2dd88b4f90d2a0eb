"""The torch-free C++ of encoders, reasoning and requests under AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


DRIVERS = ("reasoning_sanitized", "request_sanitized")


@pytest.fixture(scope="module")
def drivers(tmp_path_factory) -> Path:
    """Build the drivers; return their folder."""
    if shutil.which("g++") is None or not (ROOT / "csrc").is_dir():
        pytest.skip("needs g++ and the sources")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("int main() {}\n")
    probe = ["g++", *SANITIZED, "empty.cpp", "-o", "empty"]
    if subprocess.run(probe, cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip("g++ has no sanitizers here")
    kernels = ROOT / "csrc" / "cpu"
    parts = ("reasoning*", "pairs*", "scoring*", "request", "noise", "level")
    sources = [path for part in parts for path in sorted(kernels.glob(f"{part}.cpp"))]
    mains = [ROOT / "tests" / f"{driver}.cpp" for driver in DRIVERS]
    flags = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", *SANITIZED]

    def build(*arguments: object) -> None:
        command = ["g++", *flags, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: build("-c", source), [*mains, *sources]))
    objects = [folder / f"{source.stem}.o" for source in sources]
    for driver in DRIVERS:
        build(folder / f"{driver}.o", *objects, "-o", driver)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_no_sanitizer_complains(drivers, driver, level):
    done = subprocess.run(
        [drivers / driver],
        env=os.environ | {"LCR_FAST_CPU": level},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 2:
        pytest.skip(f"this CPU has no {level}")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
