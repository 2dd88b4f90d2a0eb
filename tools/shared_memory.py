"""Whether every case that reasoning's and scoring's kernels serve fits a GPU's shared memory.

Tensor memory, which compute capabilities 10 and 11 have, is counted too.

    python tools/shared_memory.py [--arch sm_89 ...] [--only REGEX]

tools/kernel_resources.py compiles what is common. Here are the corners too: all widths, slots,
heads, precisions and MLPs, on GPUs with less shared memory as well. A kernel is only lowered to
LLVM, as the layout of both memories is known then: seconds each, an hour or two for all on one
core. Prints a line a kernel; exits with 1 if one asks for more than there is. Needs no GPU, and no
``TRITON_INTERPRET``.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from kernel_resources import TENSOR_MEMORY, ast_source
from lcr_fast.kernels.gpu import GPUS
from lcr_fast.kernels.launch import Variant
from lcr_fast.kernels.reasoning import backward
from lcr_fast.kernels.reasoning.ahead_of_time import TRAIN, Call, make_variant
from lcr_fast.kernels.reasoning.config import obstacle
from lcr_fast.kernels.reasoning.forward import latent_reasoning_fwd_kernel
from lcr_fast.kernels.scoring.ahead_of_time import variants_of_one_head
from lcr_fast.kernels.scoring.config import MAX_HIDDEN

PRECISIONS = {"ieee": torch.bfloat16, "bf16x3": torch.float32, "bf16x6": torch.float32}
_KERNELS = {
    "fwd": ("fwd", latent_reasoning_fwd_kernel),
    "recompute_self": ("recompute", backward.recompute_self_kernel),
    "recompute_cross": ("recompute", backward.recompute_cross_kernel),
    "ffn_bwd": ("bwd", backward.ffn_bwd_kernel),
    "cross_bwd": ("cross_bwd", backward.cross_bwd_kernel),
    "self_bwd": ("bwd", backward.self_bwd_kernel),
}


def variants(arch: str) -> Iterator[Variant]:
    """Yield each kernel for every case served; FFNs are four times as wide as the states."""
    for precision, dim, size in itertools.product(PRECISIONS, (32, 64, 128), (16, 30, 50, 128)):
        for heads in sorted({1, 2, dim // 16}):
            call = Call(
                dim, size, PRECISIONS[precision], precision=precision, n_heads=heads, widening=4
            )
            is_served = obstacle(
                dim=dim, n_heads=heads, ffn_dim=4 * dim, search_len=size, rec_len=size,
                dtype=call.dtype, gpu=GPUS[arch] if precision == "bf16x6" else None,
            ) is None  # fmt: skip
            for name, (which, kernel) in _KERNELS.items() if is_served else ():
                full = f"{name}-{precision}-d{dim}-L{size}-H{heads}"
                yield make_variant(full, which, kernel, call, TRAIN, GPUS[arch])
    for hidden in ((200, 80), MAX_HIDDEN):
        for variant in variants_of_one_head(GPUS[arch], hidden, every=True):
            name = "-".join(["scoring", *map(str, hidden), variant.name])
            yield variant._replace(name=name)


def memory_of(variant: Variant, arch: str) -> tuple[int, int]:
    """Lower a kernel as ``triton.compile`` does, as far as LLVM, to tell what it asks for.

    Returns bytes of shared memory, and columns of tensor memory.
    """
    source = ast_source(variant)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(variant.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata: dict[str, Any] = {"target": target, **vars(options)}
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(),
        context,
    )  # fmt: skip
    for name, lower in stages.items():
        module = lower(module, metadata)
        if name == "llir":
            break
    return metadata["shared"], metadata.get("tmem_size") or 0


def main(argv: list[str] | None = None) -> int:
    """Lower what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--only", default="", help="a regular expression that names must contain")
    arguments = parser.parse_args(argv)
    too_much = 0
    for arch in arguments.arch:
        for variant in variants(arch):
            if re.search(arguments.only, variant.name):
                size, columns = memory_of(variant, arch)
                most = GPUS[arch].shared
                end = f", more than {most}" if size > most else ""
                end += f", {columns} columns of tensor memory" if columns else ""
                end += f", more than {TENSOR_MEMORY}" if columns > TENSOR_MEMORY else ""
                too_much += "more than" in end
                sys.stdout.write(f"{arch} {variant.name}: {size} bytes{end}\n")
                sys.stdout.flush()
    return int(too_much > 0)


if __name__ == "__main__":
    raise SystemExit(main())
