"""What every Triton kernel costs on a GPU, found out without one.

    python tools/kernel_resources.py -o docs/kernel-resources.json

compiles each :class:`Variant` of each kernel module for each architecture with the ptxas that our
kernels are launched with, and writes a table: registers a thread, spilled bytes a thread, shared
memory a program, tensor-core instructions, how many programs fit one multiprocessor, and whether a
wgmma may read its operand at a garbage address; and beside it a page of Markdown with a row for
each kernel. Both are committed; tests check that they are complete, up to date and within limits.

    python tools/kernel_resources.py --check docs/kernel-resources.json --products wgmma

compiles rows of the table again, writes nothing, and fails if a descriptor may be garbage or if a
kernel does not compile or fit. ``--ptxas`` takes another one, to see what it makes of the kernels.

Interpreted kernels cannot be compiled, so this must run without ``TRITON_INTERPRET``.
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import json
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
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lcr_fast.kernels
import sass
from lcr_fast.kernels import ptxas
from lcr_fast.kernels.gpu import GPUS
from lcr_fast.kernels.launch import Type, Variant

ARCHS = ("sm_80", "sm_90", "sm_100")  # of the table
SHARED_BYTES = {arch: GPUS[arch].shared for arch in ARCHS}  # that a program may have
# What one multiprocessor has, by the CUDA programming guide: threads, 32-bit registers, programs.
# Of its shared memory a program takes 1 KiB for the system; one that takes all has the rest.
_SM_THREADS, _SM_REGISTERS, _SM_PROGRAMS = 2048, 65536, 32
_SYSTEM_SHARED = 1 << 10
_REGISTER_UNIT = 256  # registers are given to a warp in multiples of this

_TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b[^;]*")
_INPUT_TYPE = re.compile(r"\.(bf16|f16|tf32|kind::f16|kind::tf32)\b")


UNCOMPILED = "Triton fails"
TOO_MUCH_TENSOR_MEMORY = "tensor memory exceeded"
TENSOR_MEMORY = 512  # columns that a program may have (the PTX manual, tcgen05)


class Usage(NamedTuple):
    """One row of the table."""

    kernel: str  # module.variant
    arch: str
    warps: int
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    products: str  # tensor-core instructions and the type that they multiply, FMA, or - for none
    programs: int  # that fit one multiprocessor
    descriptors: str  # of wgmma: "good", how many may be garbage, or - for none


def _module_names() -> list[str]:
    return [info.name for info in pkgutil.iter_modules(lcr_fast.kernels.__path__)]


def kernel_modules() -> dict[str, ModuleType]:
    """Every op's package in lcr_fast.kernels, which lists variants, by its short name."""
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
    """Source of a module and of what it imports of lcr_fast.kernels, by name."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = inspect.getsource(importlib.import_module(f"lcr_fast.kernels.{module}"))
            waiting += re.findall(r"^from lcr_fast\.kernels\.([\w.]+) import", found[module], re.M)
    return dict(sorted(found.items()))


def _written(node: Any) -> str:
    """Write a syntax tree, the same in each Python, as ast.dump and ast.unparse do not."""
    if isinstance(node, list):
        return f"[{', '.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (f"{n}={_written(v)}" for n, v in ast.iter_fields(node) if v not in (None, []))
    return f"{type(node).__name__}({', '.join(fields)})"


def fingerprint(name: str) -> str:
    """Digest what a module compiles.

    That is its variants, and the kernels, device functions, NamedTuples and constants
    (tl.constexpr) of it and of the modules of lcr_fast.kernels that it imports, directly or not.
    Comments, docstrings, formatting and launchers do not count.
    """
    parts = [
        repr((arch, full, *v[2:]))
        for arch in SHARED_BYTES
        for full, v in all_variants(arch)
        if full.startswith(f"{name}.")
    ]
    for source in _sources(name).values():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                reasons = [*map(ast.unparse, node.decorator_list)]
                if isinstance(node, ast.ClassDef):  # its fields are arguments, or columns
                    reasons += map(ast.unparse, node.bases)
                counts = any(
                    reason.startswith(
                        ("triton.jit", "triton.constexpr_function", "kernel(", "NamedTuple")
                    )
                    for reason in reasons
                )
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
            else:
                counts = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("tl.")
            if counts:
                parts.append(_written(node))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _split_type(kind: Type, path: tuple[int, ...], attrs: dict[tuple[int, ...], Any]) -> Type:
    """Return a type as Triton takes it; what divides by 16 goes into ``attrs``, by its path."""
    if isinstance(kind, tuple):
        parts = (_split_type(k, (*path, i), attrs) for i, k in enumerate(kind))
        return type(kind)(*parts) if hasattr(kind, "_fields") else tuple(parts)
    kind, _, divisor = kind.partition(":")
    if kind.startswith("*") or divisor == "16":
        attrs[path] = [["tt.divisibility", 16]]
    return kind


def ast_source(variant: Variant) -> ASTSource:
    """Make what Triton's compiler takes."""
    signature: dict[str, Type] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(variant.kernel.arg_names):
        is_constant = name in variant.constexprs
        kind = "constexpr" if is_constant else variant.signature[name]
        signature[name] = _split_type(kind, (i,), attrs)
    return ASTSource(variant.kernel, signature, variant.constexprs, attrs)


def compile_variant(
    variant: Variant, arch: str, tool: ptxas.Ptxas | None = None
) -> triton.compiler.CompiledKernel:
    """Compile ahead of time, by ``tool`` or the ptxas of choice; no GPU is needed."""
    capability = int(arch.removeprefix("sm_"))
    return ptxas.compile_with(
        tool or ptxas.choose(capability),
        ast_source(variant),
        GPUTarget("cuda", capability, 32),
        dict(variant.options),
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


def _descriptors(cubin: bytes, products: str) -> str:
    if "wgmma" not in products:
        return "-"
    garbage = sass.garbage_descriptors(sass.disassemble(cubin))
    return f"{len(garbage)} garbage" if garbage else "good"


def measure(name: str, variant: Variant, arch: str, tool: ptxas.Ptxas | None = None) -> Usage:
    """Compile one variant and read what it uses; ``products`` say so where it cannot run."""
    warps = variant.options["num_warps"]
    try:
        compiled = compile_variant(variant, arch, tool)
    except RuntimeError:
        return Usage(name, arch, warps, 0, 0, 0, UNCOMPILED, 0, "-")
    if (getattr(compiled.metadata, "tmem_size", None) or 0) > TENSOR_MEMORY:
        return Usage(name, arch, warps, 0, 0, 0, TOO_MUCH_TENSOR_MEMORY, 0, "-")
    cubin, shared = compiled.asm["cubin"], compiled.metadata.shared
    registers, spilled = _dump_resources(cubin)
    products = _products(compiled.asm["ttir"], compiled.asm["ptx"])
    return Usage(
        name, arch, warps, registers, spilled, shared, products,
        _programs_per_sm(registers, shared, warps, arch), _descriptors(cubin, products),
    )  # fmt: skip


class _Job(NamedTuple):
    name: str
    arch: str
    tool: ptxas.Ptxas


def _measure_named(job: _Job) -> Usage:
    clock = time.monotonic()
    variant = dict(all_variants(job.arch))[job.name]
    usage = measure(job.name, variant, job.arch, job.tool)
    sys.stderr.write(f"{job.arch} {job.name}: {time.monotonic() - clock:.0f} s\n")
    return usage


def compiler(tool: ptxas.Ptxas) -> str:
    """Name what compiles, as the table does."""
    return f"Triton {triton.__version__}, ptxas {tool.release[0]}.{tool.release[1]}"


def faults(rows: list[Usage]) -> list[str]:
    """Say what keeps kernels from running correctly, a sentence each."""
    found = []
    for row in rows:
        name = f"{row.kernel} for {row.arch}"
        if row.products in (UNCOMPILED, TOO_MUCH_TENSOR_MEMORY):
            found.append(f"{name}: {row.products}")
        elif row.shared > SHARED_BYTES[row.arch] or row.programs < 1:
            found.append(f"{name}: {row.shared} bytes of shared memory do not fit")
        if row.descriptors not in ("good", "-"):
            found.append(f"{name}: {row.descriptors} descriptors")
    return found


class Table(NamedTuple):
    """All rows, and what they were made of."""

    compiled_by: str  # as :func:`compiler` says
    fingerprints: dict[str, str]  # by module
    rows: list[Usage]


def to_json(table: Table) -> str:
    """Write the committed table, a line a row; :func:`from_json` reads it."""
    head = {"compiled by": table.compiled_by, "sources": table.fingerprints}
    lines = [json.dumps(head)[:-1] + ",", f'"columns": {json.dumps(Usage._fields)},', '"rows": [']
    return "\n".join([*lines, ",\n".join(map(json.dumps, table.rows)), "]}"]) + "\n"


def from_json(text: str) -> Table:
    """Read what :func:`to_json` wrote."""
    try:
        table = json.loads(text)
        if tuple(table["columns"]) != Usage._fields:
            raise ValueError(f"the columns must be {', '.join(Usage._fields)}")
        rows = [Usage(*row) for row in table["rows"]]
        return Table(table["compiled by"], table["sources"], rows)
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no table of this tool ({error!r})") from None


_PAGE = """\
# Resources of the Triton kernels

Registers, spills and memory of every kernel, compiled ahead of time, without a GPU, by
`python tools/kernel_resources.py`: {compiled_by}. A kernel is compiled in variants of dtype, width,
history length and switches; [kernel-resources.json](kernel-resources.json) has a row for each.

The table shows the worst variant of each kernel, for sm_80 / sm_90 / sm_100; one number alone is
sm_90's, where only it has the kernel.

- Registers and spilled bytes are a thread's; in brackets is how many variants spill. What is
  fastest was timed on a GPU, spills or not.
- Shared memory is a program's, which may have 163 KiB on sm_80 and 227 KiB on the others.
- Programs / SM are those that fit one multiprocessor.
- Products are those on tensor cores (mma, wgmma, tcgen05). In the JSON file descriptors name the
  operands of wgmma in shared memory; none may be garbage on any path.

"""


def _summary(rows: list[Usage]) -> list[str]:
    """Sum up the variants of one kernel: the cells of its row, each for every architecture."""
    by_arch = [[row for row in rows if row.arch == arch] for arch in SHARED_BYTES]
    by_arch = [some for some in by_arch if some]
    spills = ([row.spilled for row in some if row.spilled] for some in by_arch)
    products = {part for row in rows for part in row.products.split(", ")}
    cells = (
        [len(some) for some in by_arch],
        [max(row.registers for row in some) for some in by_arch],
        [f"{max(some)} B ({len(some)})" if some else "0" for some in spills],
        [f"{max(row.shared for row in some) / 1024:.0f}" for some in by_arch],
        [min(row.programs for row in some) for some in by_arch],
    )
    return [*(" / ".join(map(str, cell)) for cell in cells), ", ".join(sorted(products))]


def to_page(table: Table) -> str:
    """Write the committed page, with a row for each kernel."""
    columns = ("kernel", "variants", "registers", "spilled (variants)", "shared KiB",
               "programs / SM", "products")  # fmt: skip
    kernels: dict[str, list[Usage]] = {}
    for row in table.rows:
        kernels.setdefault(row.kernel.partition("-")[0], []).append(row)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join((name, *_summary(rows)))} |" for name, rows in kernels.items()]
    return _PAGE.format(compiled_by=table.compiled_by) + "\n".join(lines) + "\n"


def _up_to_date(table: Table) -> dict[tuple[str, str], Usage]:
    """Rows whose sources have not changed, by name and architecture."""
    same = {n for n in kernel_modules() if table.fingerprints.get(n) == fingerprint(n)}
    return {(row.kernel, row.arch): row for row in table.rows if row.kernel.split(".")[0] in same}


def main(argv: list[str] | None = None) -> int:
    """Compile, measure, write the table or check it; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python tools/kernel_resources.py",
        description="Compile every variant of every Triton kernel and tabulate what it needs.",
    )
    parser.add_argument("--arch", nargs="+", choices=SHARED_BYTES, default=list(SHARED_BYTES))
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help="file of the table, else standard output; its rows that are up to date are kept, and "
        "the page is written beside it",
    )
    parser.add_argument("--only", default="", help="a regular expression that names must contain")
    parser.add_argument("--jobs", type=int, default=1, help="compile so many at once")
    parser.add_argument("--ptxas", help="path of another ptxas than the one that launches take")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="TABLE",
        help="compile the rows of a table again; write nothing, exit with 1 if one is faulty",
    )
    parser.add_argument("--products", default="", help="only rows of TABLE with such products")
    args = parser.parse_args(argv)

    if knobs.runtime.interpret:
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    tool = ptxas.find(args.ptxas, "--ptxas") if args.ptxas else ptxas.newest()
    if tool is None:
        parser.error(f"--ptxas {args.ptxas} is no ptxas that can be started")
    old = Table("", {}, [])
    if (path := args.check or args.out) and path.exists():
        try:
            old = from_json(path.read_text())
        except ValueError as error:
            if args.check:
                parser.error(f"{path}: {error}")
    jobs = [
        (name, arch)
        for arch in args.arch
        for name, _ in all_variants(arch)
        if re.search(args.only, name)
    ]
    known = {}
    if args.check:
        asked = {(row.kernel, row.arch) for row in old.rows if args.products in row.products}
        jobs = [job for job in jobs if job in asked]
    elif old.compiled_by == compiler(tool):
        known = _up_to_date(old)
    missing = [_Job(*job, tool) for job in jobs if job not in known]
    if args.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            measured = pool.map(_measure_named, missing, chunksize=1)
    else:
        measured = [_measure_named(job) for job in missing]
    known |= {job[:2]: usage for job, usage in zip(missing, measured, strict=True)}
    rows = [known[job] for job in jobs]
    if args.check:
        found = faults(rows)
        sys.stdout.write("".join(f"{sentence}\n" for sentence in found))
        sys.stdout.write(f"{compiler(tool)}: {len(rows)} kernels, {len(found)} faults\n")
        return int(bool(found) or not rows)
    table = Table(compiler(tool), {name: fingerprint(name) for name in kernel_modules()}, rows)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(to_json(table))
        args.out.with_suffix(".md").write_text(to_page(table))
    else:
        sys.stdout.write(to_json(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
