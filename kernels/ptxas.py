"""Which ptxas assembles our kernels, and how Triton is told so, for our kernels alone.

ptxas 12.8, which Triton 3.6 and 3.7 run for compute capability 9, miscompiles loops with wgmma: the
descriptor of an operand in shared memory is written at the end of a loop only, so that the first
pass multiplies with whatever its register held (``tools/sass.py`` finds such code).
Later releases compile the same PTX correctly, and one of them is in the same wheel for newer GPUs.
So our kernels take the newest release at hand that the driver can load, unless the user chose one.
"""

import ctypes
import functools
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import ptx_get_version
from triton.runtime.jit import JITFunction

_LOG = logging.getLogger("lcr_fast")

Release = tuple[int, int]

_FIRST_GOOD: Release = (12, 9)  # for wgmma


class Ptxas(NamedTuple):
    """A ptxas that can be started."""

    path: str
    release: Release
    version: str  # with the build, which tells two of one release apart
    origin: str

    def __str__(self) -> str:
        return f"ptxas {self.release[0]}.{self.release[1]} ({self.origin})"


class NoPtxasError(RuntimeError):
    """No ptxas at hand compiles our kernels correctly; says why in one sentence."""


# -- what is at hand ------------------------------------------------------------------------------


@functools.cache
def find(path: str, origin: str) -> Ptxas | None:
    """Ask a ptxas for its release; None if there is none at ``path``."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+), (V\S+)", text)
    return found and Ptxas(path, (int(found[1]), int(found[2])), found[3], origin)


@functools.cache
def architectures(path: str) -> frozenset[str]:
    """Ask a ptxas for what it assembles, such as ``sm_90a``."""
    text = subprocess.run([path, "--help"], capture_output=True, text=True).stdout
    return frozenset(re.findall(r"'(sm_\w+)'", text))


def _architecture(capability: int) -> str:
    """Name the architecture that Triton compiles for."""
    return f"sm_{capability}{'a' if capability >= 90 else ''}"


def _knob(capability: int) -> str:
    """Name Triton's own setting of the ptxas for a compute capability, such as 90."""
    return "ptxas_blackwell" if capability >= 100 else "ptxas"


def users_choice(capability: int) -> tuple[str, str] | None:
    """Return the path that the user asked Triton to run, and where they asked; None if nowhere."""
    knob = _knob(capability)
    variable = f"TRITON_{knob.upper()}_PATH"
    if path := os.environ.get(variable):
        return path, variable
    path = vars(knobs.nvidia).get(knob)  # set in the process, without the environment
    return (str(path), f"triton.knobs.nvidia.{knob}") if path else None


def _toolkit_paths() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            yield Path(root) / "bin" / "ptxas"
    for program in ("ptxas", "nvcc"):
        if path := shutil.which(program):
            yield Path(path).resolve().with_name("ptxas")
    yield Path("/usr/local/cuda/bin/ptxas")


def at_hand() -> list[Ptxas]:
    """List every ptxas that is installed: those of Triton's wheel, then of CUDA toolkits."""
    wheel = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    places = {str(wheel / name): f"Triton's {name}" for name in ("ptxas-blackwell", "ptxas")}
    for path in map(Path.resolve, _toolkit_paths()):  # links lead to the same one
        places.setdefault(str(path), f"CUDA toolkit, {path}")
    return [tool for place in places.items() if (tool := find(*place))]


@functools.cache
def driver_cuda() -> Release | None:
    """Return the CUDA release of the GPU driver, None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0 or not version.value:
        return None
    return version.value // 1000, version.value % 1000 // 10


def newest() -> Ptxas:
    """Return the newest at hand, whatever driver there is: what compiles ahead of time."""
    return max(at_hand(), key=lambda tool: tool.release)  # of equals the first


# -- the choice -----------------------------------------------------------------------------------


def is_known_bad(release: Release, capability: int) -> bool:
    """Whether a release miscompiles wgmma, which only compute capability 9 has."""
    return capability // 10 == 9 and release < _FIRST_GOOD


def choose(capability: int) -> Ptxas:
    """Choose the ptxas for a compute capability, such as 90.

    What the user set stands. Else it is the newest at hand that knows the GPU and whose major
    release is not beyond the driver's, as a driver need not load what a later major release
    assembled. Raises :class:`NoPtxasError`.
    """
    if chosen := users_choice(capability):
        tool = find(*chosen)
        if tool is None:
            raise NoPtxasError(
                f"{chosen[1]} names {chosen[0]}, which is no ptxas that can be started"
            )
        return tool
    tools, driver = at_hand(), driver_cuda()
    loadable = [tool for tool in tools if driver is None or tool.release[0] <= driver[0]]
    needed = _architecture(capability)
    able = [tool for tool in loadable if needed in architectures(tool.path)]
    good = [tool for tool in able if not is_known_bad(tool.release, capability)]
    if not good:
        names = ", ".join(map(str, tools)) or "none"
        known = f", and a driver of CUDA {driver[0]}.{driver[1]}" if driver else ""
        least = ""
        if able:
            least = f" of release {_FIRST_GOOD[0]}.{_FIRST_GOOD[1]} or later,"
        elif loadable:
            least = f" that knows {needed},"
        raise NoPtxasError(
            f"it needs a ptxas{least} whose code the driver can load; at hand: {names}{known}"
        )
    return max(good, key=lambda tool: tool.release)  # of equals the first


def obstacle(capability: int) -> str | None:
    """Say in one sentence why no ptxas at hand will do, or None."""
    try:
        choose(capability)
    except NoPtxasError as error:
        return str(error)
    return None


def warning(capability: int) -> str | None:
    """Say in one sentence that the user chose a ptxas that is known to be bad, or None."""
    chosen = users_choice(capability)
    tool = chosen and find(*chosen)
    if tool and is_known_bad(tool.release, capability):
        return (
            f"{tool} is known to miscompile kernels with wgmma: expect crashes or wrong numbers; "
            f"unset it, or take release {_FIRST_GOOD[0]}.{_FIRST_GOOD[1]} or later"
        )
    return None


# -- compiling with it ----------------------------------------------------------------------------


def _assemble(tool: Ptxas, ptx: str, options: Any, capability: int) -> bytes:
    """Run ptxas as Triton does: PTX -> cubin."""
    command = [tool.path, "-lineinfo", f"--gpu-name={_architecture(capability)}"]
    if tool.release >= (13, 0):
        command.append("--regAllocOptLevel=2")  # as Triton 3.7, around a defect of these releases
    if not options.enable_fp_fusion:
        command.append("--fmad=false")
    if options.ptx_options:
        command += options.ptx_options.split()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        done = subprocess.run([*command, source, "-o", out], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{tool} failed with status {done.returncode}: {done.stderr}")
        return out.read_bytes()


@functools.cache
def _tell(tool: Ptxas, capability: int) -> None:
    """Log, once a process, why the first call of an op takes seconds."""
    _LOG.info(
        "Triton and %s compile kernels for %s, each where it is first needed; they are kept in %s",
        tool,
        _architecture(capability),
        knobs.cache.dir,
    )


_assembling = threading.local()  # .tool: what this thread compiles with
_hook_lock = threading.Lock()
_hook_users = 0
_previous_hook: Any = None


def _replace_assembly(*call: Any) -> Any:
    """Take Triton's hook on the stages of a compilation; asked without arguments, for a key.

    Other threads may compile meanwhile, what is not ours: they keep Triton's stage.
    """
    previous = _previous_hook
    if not call:
        return previous() if previous else ("", "")
    if previous:
        previous(*call)
    tool = getattr(_assembling, "tool", None)
    if tool is not None:
        backend, stages, options, *_ = call
        arch = backend.target.arch
        _tell(tool, arch)
        stages["cubin"] = lambda ptx, metadata: _assemble(tool, ptx, options, arch)
    return None


@contextmanager
def _assembled_by(tool: Ptxas) -> Iterator[None]:
    global _hook_users, _previous_hook
    with _hook_lock:
        if _hook_users == 0:
            _previous_hook = knobs.runtime.add_stages_inspection_hook
            knobs.runtime.add_stages_inspection_hook = _replace_assembly
        _hook_users += 1
    _assembling.tool = tool
    try:
        yield
    finally:
        _assembling.tool = None
        with _hook_lock:
            _hook_users -= 1
            if _hook_users == 0:
                knobs.runtime.add_stages_inspection_hook = _previous_hook


def compile_with(tool: Ptxas, source: Any, target: GPUTarget, options: dict[str, Any]) -> Any:
    """Do what ``triton.compile`` does, with this ptxas; its version is part of the cache's key.

    The compiled kernel's ``metadata.ptxas`` names it. Triton writes PTX of the release of its own
    ptxas. An older one cannot read that, and where Triton's does not know the GPU no such PTX may
    be for it: then PTX of this one's release is asked for.
    """
    own = getattr(knobs.nvidia, _knob(target.arch))
    version = ptx_get_version(f"{tool.release[0]}.{tool.release[1]}")
    is_older = version < ptx_get_version(own.version)
    is_new_gpu = _architecture(target.arch) not in architectures(own.path)
    if options.get("ptx_version") is None and (is_older or is_new_gpu):
        options = options | {"ptx_version": version}
    environment = get_cache_invalidating_env_vars() | {"ptxas": tool.version}
    with _assembled_by(tool):
        return triton.compile(source, target=target, options=options, _env_vars=environment)


class _Kernel(JITFunction):
    """A kernel that is assembled by :func:`choose`'s ptxas."""

    def create_binder(self):
        parts = super().create_binder()
        self.compile = _compile_by_choice  # Triton sets its own here
        return parts


def _compile_by_choice(source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> Any:
    return compile_with(choose(target.arch), source, target, options)


def kernel(**options: Any) -> Any:
    """Decorate a kernel as ``triton.jit`` does; device functions that it calls need no more."""

    def decorate(function: Any) -> Any:
        if knobs.runtime.interpret:
            return triton.jit(function, **options)
        return _Kernel(function, **options)

    return decorate
