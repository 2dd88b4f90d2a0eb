"""Build lcr_fast._C, the C++/CUDA extension; all else about the package is in pyproject.toml.

The CPU operators are always built. The CUDA ones are added where the installed torch is a CUDA
build and nvcc is found; LCR_FAST_BUILD=cpu|cuda overrides that.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        "lcr_fast compiles against the installed PyTorch: install torch first, then run\n"
        "    pip install --no-build-isolation -e ."
    ) from error

CPYTHON_API = "0x030A0000"  # Python 3.10
TORCH_API = "0x020a000000000000"  # torch 2.10: the first with torch::stable::parallel_for
CUDA_ARCHS = "8.0;9.0+PTX"


def with_cuda() -> bool:
    """Whether to build the CUDA operators."""
    choice = os.environ.get("LCR_FAST_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"LCR_FAST_BUILD must be auto, cpu or cuda, got {choice!r}")
    available = torch.version.cuda is not None and CUDA_HOME is not None
    if choice == "cuda" and not available:
        raise SystemExit(
            f"LCR_FAST_BUILD=cuda needs a CUDA build of torch (torch.version.cuda is "
            f"{torch.version.cuda}) and nvcc (CUDA_HOME is {CUDA_HOME})"
        )
    return available and choice != "cpu"


def extension():
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
    if not cuda_sources or not with_cuda():
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
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
