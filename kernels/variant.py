"""What a kernel module says about its kernels, so that they can be compiled without a GPU."""

from typing import Any, NamedTuple

LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Variant(NamedTuple):
    """One configuration of a Triton kernel.

    A module's ``variants(arch)`` yields all that it launches on ``sm_80`` and the like.
    ``signature`` gives the type of each argument as Triton writes it (``*bf16``, ``i32``), pointers
    and sizes known to divide by 16 with ``:16`` (pointers always are); an argument that stands in
    ``constexprs`` needs no type.
    """

    name: str  # unique in its module
    kernel: Any  # a function under @triton.jit
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]  # some of LAUNCH_OPTIONS
