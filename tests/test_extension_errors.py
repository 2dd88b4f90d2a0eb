"""The C++ operators' errors are sentences, whatever the toolchain made of the standard library."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from extension_errors import ERRORS, noise, zeros
from lcr_fast.ops._extension import extension_error

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    extension_error() is not None, reason=f"lcr_fast._C is not built: {extension_error()}"
)


def installed() -> Path:
    from lcr_fast import _C

    return Path(_C.__file__)


def raise_all(extension: Path) -> list[str]:
    """Raise every error of the extension, in a process of its own: none may end it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "extension_errors.py"), str(extension)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_error_is_a_sentence():
    assert raise_all(installed()) == list(ERRORS)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_standard_library_of_its_own_changes_no_error(tmp_path):
    """As some toolchains build it: with streams behind the messages, this crashed."""
    build = ("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "objects"))
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *build],
        cwd=ROOT,
        env=os.environ | {"LDFLAGS": "-static-libstdc++", "LCR_FAST_BUILD": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    extension = tmp_path / "lcr_fast" / installed().name
    assert b"libstdc++.so" not in extension.read_bytes()
    assert raise_all(extension) == list(ERRORS)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_it_shows_only_its_init_and_calls_no_stream():
    def symbols(*options: str) -> set[str]:
        command = ["nm", "--dynamic", "--format=posix", *options, str(installed())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {line.split()[0].split("@")[0] for line in done.stdout.splitlines()}

    assert symbols("--defined-only") == {"PyInit__C"}
    of_streams = re.compile("_Z(NK?S[iod]|.*(stream|locale|ios_base))")  # as they are mangled
    wanted = {name for name in symbols("--undefined-only") if of_streams.match(name)}
    # <iostream>, which torch's headers include, calls no more than this.
    assert wanted <= {"_ZNSt8ios_base4InitC1Ev", "_ZNSt8ios_base4InitD1Ev"}


def literals(source: str) -> set[str]:
    """Return the text between quotes in the calls of check() and fail()."""
    found = set()
    for begin in re.finditer(r"\b(?:check|fail)\(", source):
        depth, end = 1, begin.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        text = re.sub(r'"\s*\n\s*"', "", source[begin.end() : end])
        found |= set(re.findall(r'"([^"]*)"', text))
    return found


def test_every_check_is_among_the_errors():
    """All but those that need another CPU or a GPU."""
    told = " ".join(ERRORS)
    for path in sorted((ROOT / "csrc").glob("*ops.cpp")):
        source = re.sub(r"#ifdef USE_CUDA.*?#endif", "", path.read_text(), flags=re.DOTALL)
        found = literals(source)
        assert found
        for text in found:
            assert text in told, f"{path.name}: {text}"


def test_what_torch_refuses_is_a_sentence():
    with pytest.raises(RuntimeError, match=r"^torch failed in a C\+\+ operator: .*[a-z]"):
        noise(rows=zeros(1, dtype=torch.int64), n_trajectories=2**30, length=2**10, dim=2**10)


LITTLE_MEMORY = """
import resource
import torch
import extension_errors as e
from lcr_fast import _C

e.rank()  # loads what it needs
events = 2**21
states = torch.zeros(1, 1, events, 1)
lengths = torch.zeros(1, dtype=torch.int64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
torch.ops.lcr_fast.cpu_score_fwd(
    states, states, lengths, lengths, torch.zeros(2, 1), torch.zeros(1, 100, dtype=torch.int64),
    torch.zeros(0), torch.zeros(2, 1, 1), [], [], torch.zeros(0), 0, lengths, True,
)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_that_does_not_suffice_is_a_sentence(run_code):
    """It runs out in a task, on any thread."""
    done = run_code(LITTLE_MEMORY)
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: the memory does not suffice" in done.stderr
