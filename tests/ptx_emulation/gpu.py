"""Let Triton compile for a GPU that is not there, and run what it compiled in the emulation.

Tensors stay on the CPU: a kernel gets their addresses.
"""

import struct
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit
from triton.runtime.errors import OutOfResources

from lcr_fast.kernels import gpu
from lcr_fast.kernels.gpu import GPUS
from ptx_emulation.program import FaultError, Program

# Programs of sum_runs_kernel store what join_runs_kernel then overwrites.
_OVERWRITTEN = {"sum_runs_kernel"}
_TENSOR_COLUMNS = 512  # of tensor memory; Triton itself asks where it loads a kernel


class _Driver:
    """As much of a driver as launching asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Kernel:
    """What Triton believes to have loaded on the GPU."""

    function = 0
    metadata = None
    packed_metadata = ()

    def __init__(self, name: str, signature: dict[str, Any], compiled: Any) -> None:
        self._name = name
        self._types = tuple(signature.values())
        columns = getattr(compiled.metadata, "tmem_size", None) or 0
        if columns > _TENSOR_COLUMNS:
            raise OutOfResources(columns, _TENSOR_COLUMNS, "tensor memory")
        self._program = Program(compiled.asm["ptx"])
        self._shared = compiled.metadata.shared

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        values = rest[6:]  # behind what concerns the real launch
        arguments, spans = [], set()
        for kind, value in _flat(self._types, values):
            if kind.startswith("*"):
                arguments.append(value.data_ptr())
                memory = value.untyped_storage()
                spans.add((memory.data_ptr(), memory.data_ptr() + memory.nbytes()))
            elif kind == "fp32":
                arguments.append(int.from_bytes(struct.pack("<f", value), "little"))
            else:
                arguments.append(int(value) % 2**64)
        arguments += [0, 0]  # scratch of Triton, of which these kernels ask for none
        may_overwrite = self._name in _OVERWRITTEN
        try:
            self._program.run((x, y, z), self._shared, arguments, sorted(spans), may_overwrite)
        except FaultError as fault:
            raise FaultError(f"{self._name} {(x, y, z)}: {fault}") from None


def _flat(types: tuple, values: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a kernel takes at run time, of NamedTuples their fields."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def install(arch: str) -> None:
    """Launch every kernel, for the rest of the process, compiled for one of ``GPUS``.

    Before any launcher is imported, and where Triton is not set to interpret.
    """
    if arch not in GPUS:
        raise ValueError(f"{arch!r} is not emulated, only {', '.join(GPUS)}")
    compile_and_keep = jit.JITFunction._do_compile

    def emulate(self, key, signature, device, *rest):
        compiled = compile_and_keep(self, key, signature, device, *rest)
        kernels, *_ = self.device_caches[device]
        kernels[key] = _Kernel(self.fn.__name__, signature, compiled)
        return kernels[key]

    driver.set_active(_Driver(int(arch.removeprefix("sm_"))))
    jit.JITFunction._do_compile = emulate
    gpu.gpu_of = lambda device: GPUS[arch]
    # Imported now, launchers ask the function above, and ops serve CPU tensors as if interpreted.
    from lcr_fast.ops import _triton

    _triton.INTERPRETED = True
