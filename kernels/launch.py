"""Launching a kernel, and describing the launch so that it can be compiled without a GPU.

The compile-time arguments of an op are one dict, of which every kernel takes those that it names.
"""

import functools
from typing import Any, NamedTuple

import torch

LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # Triton's names

Type = str | tuple[Any, ...]  # of an argument, or of each field of a NamedTuple


class Variant(NamedTuple):
    """One configuration of a Triton kernel.

    A module's ``variants(arch)`` yields all that it launches on ``sm_80`` and the like.
    ``signature`` gives the type of each argument as Triton writes it (``*bf16``, ``i32``), pointers
    and sizes known to divide by 16 with ``:16`` (pointers always are); an argument that stands in
    ``constexprs`` needs no type. An argument that is a NamedTuple has one of types.
    """

    name: str  # unique in its module
    kernel: Any  # a function under @triton.jit
    signature: dict[str, Type]
    constexprs: dict[str, Any]
    options: dict[str, Any]  # some of LAUNCH_OPTIONS


@functools.cache
def _names(kernel: Any) -> frozenset[str]:
    """Arguments and launch options of a kernel."""
    return frozenset((*kernel.arg_names, *LAUNCH_OPTIONS))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **compiled: Any) -> None:
    """Launch with those of the compile-time arguments that the kernel takes."""
    names = _names(kernel)
    kernel[grid](*arguments, **{n: v for n, v in compiled.items() if n in names})


def describe(
    name: str, kernel: Any, dtype: torch.dtype, types: dict[str, Type], compiled: dict[str, Any]
) -> Variant:
    """Describe what :func:`launch` compiles of a kernel.

    ``types`` names those of arguments; other pointers are to ``dtype``, other numbers int32.
    """

    def kind(argument: str) -> Type:
        return types.get(argument, f"*{TYPES[dtype]}" if argument.endswith("_ptr") else "i32")

    chosen = {n: v for n, v in compiled.items() if n in kernel.arg_names}
    signature = {n: kind(n) for n in kernel.arg_names if n not in chosen}
    return Variant(
        name, kernel, signature, chosen, {n: v for n, v in compiled.items() if n in LAUNCH_OPTIONS}
    )
