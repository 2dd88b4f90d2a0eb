"""Build lcr_fast._C, the C++/CUDA extension; all else about the package is in pyproject.toml.

The CPU operators are built, and the CUDA ones too where the installed torch is a CUDA build and
an nvcc is found that fits it; LCR_FAST_BUILD=cpu|cuda overrides that. LCR_FAST_BUILD=none builds
nothing, which needs no compiler: everything then runs on the slower reference.

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
from setuptools.command.build import build


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
        _check_cuda_version,
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
CHOICE = os.environ.get("LCR_FAST_BUILD", "auto")
# What the compilers are told beside the arguments below.
_ENVIRONMENT = (
    "CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "LIBRARY_PATH",
    "LCR_FAST_BUILD", "CUDA_HOME", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS",
    "TORCH_CUDA_ARCH_LIST",
)  # fmt: skip


def _nvcc() -> str | None:
    """Return the toolkit's nvcc; images to run CUDA hold its libraries alone."""
    return shutil.which(f"{CUDA_HOME}/bin/nvcc") if CUDA_HOME else None


def _stamp(sources: list[str]) -> str:
    """Digest everything that an extension is built of, and what has been built."""
    compilers = [shlex.split(get_cxx_compiler())]
    if nvcc := _nvcc():
        compilers.append([nvcc])
    parts = [sys.version, torch.__version__, *(os.environ.get(name, "") for name in _ENVIRONMENT)]
    parts += sources  # with CUDA's or without
    for command in compilers:
        found = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        parts += [*command, found.stdout]
    digest = hashlib.sha256("\0".join(parts).encode())
    files = (path for path in Path("csrc").rglob("*") if path.is_file())
    for path in sorted([Path("setup.py"), BUILT, *files]):
        digest.update(f"\0{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def extensions() -> list:
    """Describe what to build: nothing, or lcr_fast._C for the CPU or for both devices."""
    if CHOICE not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"LCR_FAST_BUILD must be auto, cpu, cuda or none, got {CHOICE!r}")
    return [] if CHOICE == "none" else [extension(with_cuda())]


class BuildAll(build):
    """Run build_ext without extensions too: it removes what an earlier install has left."""

    # A list: plugins of setuptools that are installed, as scikit-build-core's, append to it.
    sub_commands = [  # noqa: RUF012
        (name, None if name == "build_ext" else of) for name, of in build.sub_commands
    ]


class BuildExt(BuildExtension):
    """Look for compilers, and for CUDA's library, first: torch would end in a traceback."""

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
        (ours,) = self.extensions
        if "cudart" in ours.libraries and (why := self.cuda_obstacle(ours.library_dirs)):
            if CHOICE == "cuda":
                raise SystemExit(f"lcr_fast: {why}, or LCR_FAST_BUILD=cpu")
            self.warn(f"lcr_fast is built without its CUDA operators: {why}")
            vars(ours).update(vars(extension(cuda=False)))
        if BUILT.is_file() and STAMP.is_file() and STAMP.read_text() == _stamp(ours.sources):
            path = Path(self.get_ext_fullpath(ours.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(BUILT, path)
            return
        super().build_extensions()

    def cuda_obstacle(self, folders: list[str]) -> str | None:
        """Say why CUDA's operators cannot be built by what is there, if so, and what to do."""
        said = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=False)
        release = re.search(r"release ((\d+)\.\d+)", said.stdout)
        if release and release[2] != torch.version.cuda.split(".")[0]:
            return (
                f"nvcc in {CUDA_HOME} is of CUDA {release[1]}, torch {torch.__version__} of CUDA "
                f"{torch.version.cuda}: install beside a torch of CUDA {release[2]} with "
                "--no-build-isolation, or set CUDA_HOME to the toolkit of another nvcc"
            )
        try:
            _check_cuda_version(*self._check_abi())
        except RuntimeError as error:  # of the compiler's version
            return f"{str(error).rstrip('.')}: name another one by CXX"
        command = [*shlex.split(get_cxx_compiler()), "-shared", "-xc++", "-"]
        link = [*command, *(f"-L{folder}" for folder in folders), "-lcudart", "-o", os.devnull]
        if subprocess.run(link, input=b"", capture_output=True, check=False).returncode:
            return (
                f"CUDA's toolkit seems to be in {CUDA_HOME}, as nvcc is, but its library cudart "
                "does not link from there: set CUDA_HOME to the toolkit's folder"
            )
        return None

    def run(self) -> None:
        """Build, and note of what an extension in the source tree was built."""
        super().run()
        if not self.inplace:
            return
        if not self.extensions:  # what stays would be loaded
            BUILT.unlink(missing_ok=True)
            STAMP.unlink(missing_ok=True)
        elif BUILT.is_file():
            STAMP.parent.mkdir(exist_ok=True)
            STAMP.write_text(_stamp(self.extensions[0].sources))


def with_cuda() -> bool:
    """Whether to build the CUDA operators."""
    sources = any(Path("csrc/cuda").glob("*.cu"))
    available = torch.version.cuda is not None and _nvcc() is not None and sources
    if CHOICE == "cuda" and not available:
        raise SystemExit(
            f"LCR_FAST_BUILD=cuda needs a CUDA build of torch (torch.version.cuda is "
            f"{torch.version.cuda}), nvcc (in bin of CUDA_HOME, which is {CUDA_HOME}) and the "
            f"sources (csrc/cuda holds {'them' if sources else 'none'})"
        )
    return available and CHOICE != "cpu"


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
    if not cuda:
        return CppExtension("lcr_fast._C", sources, extra_compile_args={"cxx": cxx}, **common)
    # Without a visible GPU torch cannot guess the architectures.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    return CUDAExtension(
        "lcr_fast._C",
        [*sources, *sorted(map(str, csrc.glob("cuda/*.cu")))],
        extra_compile_args={
            "cxx": [*cxx, "-DUSE_CUDA"],
            "nvcc": ["-O3", f"-Xcompiler={','.join(host)}"],
        },
        **common,
    )


setup(
    ext_modules=extensions(),
    cmdclass={"build": BuildAll, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
