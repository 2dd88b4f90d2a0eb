"""What every Triton kernel costs on a GPU, found out without one.

    python -m lcr_fast.kernels.resources -o docs/kernel-resources.md

compiles each :class:`Variant` of each kernel module for each architecture with the ptxas that
Triton ships, and writes a Markdown table: registers a thread, spilled bytes a thread, shared
memory a program, tensor-core instructions, and how many programs fit one multiprocessor. The table
is committed; tests check that it is complete, up to date and within limits.

Interpreted kernels cannot be compiled, so this must run without ``TRITON_INTERPRET``.
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lcr_fast.kernels
from lcr_fast.kernels._launch import GPUS
from lcr_fast.kernels.variant import Variant

SHARED_BYTES = {arch: gpu.shared for arch, gpu in GPUS.items()}  # that a program may have
# What one multiprocessor has, by the CUDA programming guide: threads, 32-bit registers, programs.
# Of its shared memory a program takes 1 KiB for the system; one that takes all has the rest.
_SM_THREADS, _SM_REGISTERS, _SM_PROGRAMS = 2048, 65536, 32
_SYSTEM_SHARED = 1 << 10
_REGISTER_UNIT = 256  # registers are given to a warp in multiples of this

_TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b[^;]*")
_INPUT_TYPE = re.compile(r"\.(bf16|f16|tf32|kind::f16|kind::tf32)\b")


UNCOMPILED = "Triton fails"
TOO_MUCH_TENSOR_MEMORY = "tensor memory exceeded"
_TENSOR_MEMORY = 512  # columns that a program may have (the PTX manual, tcgen05)


class Usage(NamedTuple):
    """One row of the table."""

    kernel: str  # module.variant
    arch: str
    warps: int
    stages: int
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    products: str  # tensor-core instructions and the type that they multiply, FMA, or - for none
    programs: int  # that fit one multiprocessor


_COLUMNS = (
    "kernel", "arch", "warps", "stages", "registers", "spilled B", "shared B", "products",
    "programs / SM",
)  # fmt: skip
_ALIGNMENT = ["---" if kind is str else "--:" for kind in Usage.__annotations__.values()]


def _module_names() -> list[str]:
    tools = ("resources", "variant")
    names = (info.name for info in pkgutil.iter_modules(lcr_fast.kernels.__path__))
    return [name for name in names if name not in tools]


def kernel_modules() -> dict[str, ModuleType]:
    """Every module of this package that lists variants, by its short name."""
    modules = {
        name: importlib.import_module(f"lcr_fast.kernels.{name}") for name in _module_names()
    }
    return {name: module for name, module in modules.items() if hasattr(module, "variants")}


def all_variants(arch: str) -> Iterator[tuple[str, Variant]]:
    """Yield ("module.variant", variant) for every kernel module."""
    for name, module in kernel_modules().items():
        for fields in module.variants(arch):
            variant = Variant(*fields)
            yield f"{name}.{variant.name}", variant


def _sources(name: str) -> dict[str, str]:
    """Source of a module and of what it imports of this package, by name."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = inspect.getsource(importlib.import_module(f"lcr_fast.kernels.{module}"))
            waiting += re.findall(r"^from lcr_fast\.kernels\.(\w+) import", found[module], re.M)
    return dict(sorted(found.items()))


def fingerprint(name: str) -> str:
    """Digest what a module compiles.

    That is its variants, and the @triton.jit functions and their constants (tl.constexpr) of it and
    of the modules of this package that it imports, directly or not. Comments, docstrings,
    formatting and launchers do not count.
    """
    parts = [
        repr((arch, full, *v[2:]))
        for arch in SHARED_BYTES
        for full, v in all_variants(arch)
        if full.startswith(f"{name}.")
    ]
    for source in _sources(name).values():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                decorators = map(ast.unparse, node.decorator_list)
                counts = any(decorator.startswith("triton.jit") for decorator in decorators)
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
            else:
                counts = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("tl.")
            if counts:
                parts.append(ast.dump(node))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def compile_variant(variant: Variant, arch: str) -> triton.compiler.CompiledKernel:
    """Compile ahead of time; no GPU is needed."""
    names = variant.kernel.arg_names
    signature, attrs = {}, {}
    for i, name in enumerate(names):
        if name in variant.constexprs:
            signature[name] = "constexpr"
            continue
        kind, _, divisor = variant.signature[name].partition(":")
        signature[name] = kind
        if kind.startswith("*") or divisor == "16":
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, variant.constexprs, attrs)
    return triton.compile(
        source,
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )


def _dump_resources(cubin: bytes) -> tuple[int, int]:
    """Read registers and stack bytes a thread from the compiled program itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    # A kernel without calls uses its stack for nothing but spilled registers.
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def _products(ttir: str, ptx: str) -> str:
    found = set()
    for match in _TENSOR_CORE.finditer(ptx):
        kind = _INPUT_TYPE.search(match.group().partition("f32")[2] or match.group())
        family = match.group(1).partition(".")[0]
        found.add(f"{family} {kind.group(1).removeprefix('kind::')}" if kind else family)
    return ", ".join(sorted(found)) or ("FMA" if "tt.dot" in ttir else "-")


def _programs_per_sm(registers: int, shared: int, num_warps: int, arch: str) -> int:
    warp_registers = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    return min(
        _SM_PROGRAMS,
        _SM_THREADS // (32 * num_warps),
        _SM_REGISTERS // (warp_registers * num_warps),
        (SHARED_BYTES[arch] + _SYSTEM_SHARED) // (shared + _SYSTEM_SHARED),
    )


def measure(name: str, variant: Variant, arch: str) -> Usage:
    """Compile one variant and read what it uses; ``products`` say so where it cannot run."""
    warps, stages = variant.num_warps, variant.num_stages
    try:
        compiled = compile_variant(variant, arch)
    except RuntimeError:
        return Usage(name, arch, warps, stages, 0, 0, 0, UNCOMPILED, 0)
    if (getattr(compiled.metadata, "tmem_size", None) or 0) > _TENSOR_MEMORY:
        return Usage(name, arch, warps, stages, 0, 0, 0, TOO_MUCH_TENSOR_MEMORY, 0)
    registers, spilled = _dump_resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return Usage(
        name, arch, warps, stages, registers, spilled, shared,
        _products(compiled.asm["ttir"], compiled.asm["ptx"]),
        _programs_per_sm(registers, shared, warps, arch),
    )  # fmt: skip


def _measure_named(job: tuple[str, str]) -> Usage:
    name, arch = job
    clock = time.monotonic()
    usage = measure(name, dict(all_variants(arch))[name], arch)
    sys.stderr.write(f"{arch} {name}: {time.monotonic() - clock:.0f} s\n")
    return usage


def to_markdown(rows: list[Usage]) -> str:
    """Write the committed table; :func:`from_markdown` reads it."""
    prints = [f"{name} {fingerprint(name)}" for name in kernel_modules()]
    lines = [
        "# Resources of the Triton kernels",
        "",
        "Compiled ahead of time, without a GPU, by `python -m lcr_fast.kernels.resources`.",
        "Registers and spilled bytes are a thread's, shared bytes a program's; programs / SM is",
        "how many fit one multiprocessor. A program may have 163 KiB of shared memory on sm_80",
        "and 227 KiB on sm_90 and sm_100. Products are on tensor cores (mma, wgmma, tcgen05) or",
        "by FMA.",
        "",
        f"Triton {triton.__version__}; sources: {', '.join(prints)}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'|'.join(_ALIGNMENT)}|",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


class Table(NamedTuple):
    """A table read back."""

    triton: str  # the version that compiled it
    fingerprints: dict[str, str]  # by module
    rows: list[Usage]


def from_markdown(text: str) -> Table:
    """Read what :func:`to_markdown` wrote."""
    head = re.search(r"^Triton (\S+); sources: (.*)\.$", text, re.MULTILINE)
    if head is None:
        raise ValueError("there is no line that names Triton's version and the sources")
    types = list(Usage.__annotations__.values())
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(_COLUMNS) and cells[1].startswith("sm_"):
            rows.append(Usage(*(kind(cell) for kind, cell in zip(types, cells, strict=True))))
    sources = (part.split() for part in head[2].split(", "))
    return Table(head[1], dict(sources), rows)


def _up_to_date(table: Table) -> dict[tuple[str, str], Usage]:
    """Rows that need no compilation, by name and architecture."""
    if table.triton != triton.__version__:
        return {}
    same = {n for n in kernel_modules() if table.fingerprints.get(n) == fingerprint(n)}
    return {(row.kernel, row.arch): row for row in table.rows if row.kernel.split(".")[0] in same}


def main(argv: list[str] | None = None) -> None:
    """Compile, measure, write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m lcr_fast.kernels.resources",
        description="Compile every variant of every Triton kernel and tabulate what it needs.",
    )
    parser.add_argument("--arch", nargs="+", choices=SHARED_BYTES, default=list(SHARED_BYTES))
    parser.add_argument(
        "-o", "--out", type=Path,
        help="file of the table, else standard output; its rows that are up to date are kept",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="a regular expression that names must contain")
    parser.add_argument("--jobs", type=int, default=1, help="compile so many at once")
    args = parser.parse_args(argv)

    if knobs.runtime.interpret:
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    jobs = [
        (name, arch)
        for arch in args.arch
        for name, _ in all_variants(arch)
        if re.search(args.only, name)
    ]
    known = {}
    if args.out and args.out.exists():
        known = _up_to_date(from_markdown(args.out.read_text()))
    missing = [job for job in jobs if job not in known]
    if args.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            measured = pool.map(_measure_named, missing, chunksize=1)
    else:
        measured = [_measure_named(job) for job in missing]
    known |= dict(zip(missing, measured, strict=True))
    table = to_markdown([known[job] for job in jobs])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(table)
    else:
        sys.stdout.write(table)


if __name__ == "__main__":
    main()
