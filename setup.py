"""Build lcr_fast._C, the C++/CUDA extension; all else about the package is in pyproject.toml.

The CPU operators are built, and the CUDA ones too where the installed torch is a CUDA build and
nvcc is found; LCR_FAST_BUILD=cpu|cuda overrides that. LCR_FAST_BUILD=none builds nothing, which
needs no compiler: everything then runs on the slower reference.

A second install of the same sources by the same tools takes what the first one built.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup


def name_toolkit() -> None:
    """Tell torch where CUDA's toolkit is, if the nvcc on the path is a wrapper outside of it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    if (Path(nvcc).parents[1] / "include" / "cuda_runtime.h").is_file():
        return  # where torch looks
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    if folder := re.search(r"^#\$ _HERE_=(.+)/bin$", said, re.MULTILINE):
        os.environ["CUDA_HOME"] = folder[1]


name_toolkit()
try:
    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
        get_cxx_compiler,
    )
except ImportError as error:
    raise SystemExit(
        "lcr_fast compiles against the installed PyTorch: install torch first, then run\n"
        "    pip install --no-build-isolation -e ."
    ) from error

CPYTHON_API = "0x030A0000"  # Python 3.10
TORCH_API = "0x020a000000000000"  # torch 2.10: the first with torch::stable::parallel_for
CUDA_ARCHS = "8.0;9.0+PTX"
BUILT = Path("lcr_fast/_C.abi3.so")
STAMP = Path("build/extension.sha256")  # of what BUILT was built of, and of itself
# What the compilers are told beside the arguments below.
_ENVIRONMENT = (
    "CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "LIBRARY_PATH",
    "LCR_FAST_BUILD", "CUDA_HOME", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS",
    "TORCH_CUDA_ARCH_LIST",
)  # fmt: skip


def _stamp() -> str:
    """Digest everything that an extension is built of, and what has been built."""
    compilers = [shlex.split(get_cxx_compiler())]
    if CUDA_HOME is not None and (nvcc := shutil.which(f"{CUDA_HOME}/bin/nvcc")):
        compilers.append([nvcc])
    parts = [sys.version, torch.__version__, *(os.environ.get(name, "") for name in _ENVIRONMENT)]
    for command in compilers:
        found = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        parts += [*command, found.stdout]
    digest = hashlib.sha256("\0".join(parts).encode())
    sources = (path for path in Path("csrc").rglob("*") if path.is_file())
    for path in sorted([Path("setup.py"), BUILT, *sources]):
        digest.update(f"\0{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def extensions() -> list:
    """Describe what to build: nothing, or lcr_fast._C for the CPU or for both devices."""
    choice = os.environ.get("LCR_FAST_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"LCR_FAST_BUILD must be auto, cpu, cuda or none, got {choice!r}")
    return [] if choice == "none" else [extension(with_cuda(choice))]


class Build(BuildExtension):
    """Look for a compiler, and for CUDA's library, first: torch would end in a traceback."""

    def build_extensions(self) -> None:
        command = [*shlex.split(get_cxx_compiler()), "-std=c++20", "-fsyntax-only", "-xc++", "-"]
        try:
            subprocess.run(command, input=b"#include <bit>\n", capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            raise SystemExit(
                f"lcr_fast: no C++20 compiler ({shlex.join(command[:1])} does not work): install "
                "one (such as g++ 11 or clang 14), name it by CXX, or set LCR_FAST_BUILD=none to "
                "run everything on the slower reference"
            ) from None
        for of_cuda in (e for e in self.extensions if "cudart" in e.libraries):
            folders = [f"-L{folder}" for folder in of_cuda.library_dirs]
            command = [*shlex.split(get_cxx_compiler()), "-shared", "-xc++", "-", *folders]
            link = [*command, "-lcudart", "-o", os.devnull]
            if subprocess.run(link, input=b"", capture_output=True, check=False).returncode:
                raise SystemExit(
                    f"lcr_fast: CUDA's toolkit seems to be in {CUDA_HOME}, as nvcc is, but its "
                    "library cudart does not link from there: set CUDA_HOME to the toolkit's "
                    "folder, or LCR_FAST_BUILD=cpu to build without the CUDA operators"
                )
        if BUILT.is_file() and STAMP.is_file() and STAMP.read_text() == _stamp():
            for of_ours in self.extensions:
                path = Path(self.get_ext_fullpath(of_ours.name))
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(BUILT, path)
            return
        super().build_extensions()

    def run(self) -> None:
        """Build, and note of what an extension in the source tree was built."""
        super().run()
        if self.extensions and self.inplace and BUILT.is_file():
            STAMP.parent.mkdir(exist_ok=True)
            STAMP.write_text(_stamp())


def with_cuda(choice: str) -> bool:
    """Whether to build the CUDA operators."""
    available = torch.version.cuda is not None and CUDA_HOME is not None
    if choice == "cuda" and not available:
        raise SystemExit(
            f"LCR_FAST_BUILD=cuda needs a CUDA build of torch (torch.version.cuda is "
            f"{torch.version.cuda}) and nvcc (CUDA_HOME is {CUDA_HOME})"
        )
    return available and choice != "cpu"


def extension(cuda: bool):
    """Describe lcr_fast._C: stable ABI on both sides, so one binary serves many versions."""
    csrc = Path("csrc")
    sources = sorted(map(str, [*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")]))
    # Of all compilers alike: a product and a sum become one fused operation where the code says
    # so, nowhere else. After these, -g0 undoes the -g with which CPython may have been built.
    host = ["-ffp-contract=off", "-fvisibility=hidden", "-g0"]
    cxx = [
        "-O3",
        "-std=c++20",
        "-Wall",
        *host,
        "-fvisibility-inlines-hidden",
        f"-DPy_LIMITED_API={CPYTHON_API}",
        f"-DTORCH_TARGET_VERSION={TORCH_API}",
    ]
    exports = csrc / "exports.map"
    common = {
        "py_limited_api": True,
        "depends": sorted(map(str, [*csrc.rglob("*.h"), exports])),
        "extra_link_args": [f"-Wl,--version-script={exports}"] if sys.platform == "linux" else [],
    }
    cuda_sources = sorted(map(str, csrc.glob("cuda/*.cu")))
    if not cuda_sources or not cuda:
        return CppExtension("lcr_fast._C", sources, extra_compile_args={"cxx": cxx}, **common)
    # Without a visible GPU torch cannot guess the architectures.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    return CUDAExtension(
        "lcr_fast._C",
        [*sources, *cuda_sources],
        extra_compile_args={
            "cxx": [*cxx, "-DUSE_CUDA"],
            "nvcc": ["-O3", f"-Xcompiler={','.join(host)}"],
        },
        **common,
    )


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
