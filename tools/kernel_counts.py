"""What a user costs a forward kernel in a step, counted in its machine code and without a GPU.

    python tools/kernel_counts.py [--arch sm_90] [--only REGEX]

A program takes its sequences through the loop over the steps, in an encoder over the layers; what
that loop executes once, times the warps, over the sequences, is what is told. Loops inside have
trip counts known at compile time: over the two streams, if they take turns in the same code; over
blocks of heads, which exponentiate between their products; and over blocks of hidden units. Bytes
are those of a warp's loads and stores: addresses that its lanes share are counted for each. What
wgmma reads of shared memory by itself is not among them.
"""

import argparse
import re
import sys
from typing import Any, NamedTuple

from triton import knobs

import kernel_resources
import sass
from lcr_fast.kernels.encoding.forward import encode_fwd_kernel
from lcr_fast.kernels.launch import Variant
from lcr_fast.kernels.reasoning.forward import latent_reasoning_fwd_kernel

_KERNELS = (latent_reasoning_fwd_kernel, encode_fwd_kernel)
_LANES = 32
_PRODUCT = re.compile(r"HMMA|[HQI]GMMA|UTC\w*MMA")
_EXPONENTIAL = re.compile(r"MUFU\.EX2")
_SHARED = re.compile(r"(LDS|STS|LDSM|STSM)\b")
_DEVICE = re.compile(r"(LDG|LDGSTS)\b")
_SPILLED = re.compile(r"(LDL|STL)\b")


class Counts(NamedTuple):
    """Of one sequence in one step or layer; barriers are a program's."""

    instructions: float  # of all warps
    products: float  # those of them on tensor cores
    shared: float  # bytes to and from shared memory
    device: float  # bytes loaded from device memory, mostly weights in the cache
    spilled: float  # bytes to and from local memory
    barriers: float


def _bytes(instruction: sass.Instruction) -> int:
    """Count what a warp's load or store moves."""
    parts = instruction.opcode.split(".")
    if parts[0] in ("LDSM", "STSM"):  # matrices of 8 rows of 16 bytes
        return 128 * (4 if "4" in parts else 2 if "2" in parts else 1)
    width = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return _LANES * next((width[part] for part in parts if part in width), 4)


def _count(instructions: list[sass.Instruction]) -> Counts:
    def moved(kind: re.Pattern[str]) -> int:
        return sum(_bytes(i) for i in instructions if kind.match(i.opcode))

    return Counts(
        instructions=len(instructions),
        products=sum(bool(_PRODUCT.match(i.opcode)) for i in instructions),
        shared=moved(_SHARED),
        device=moved(_DEVICE),
        spilled=moved(_SPILLED),
        barriers=sum(i.opcode.startswith("BAR.SYNC") for i in instructions),
    )


def _loops(program: sass.Program) -> dict[int, set[int]]:
    """Find the natural loops: blocks by the block that each is entered at."""
    after = {start: list(program.successors(start)) for start in program.blocks}
    reached, waiting = {0}, [0]
    while waiting:
        for start in after[waiting.pop()]:
            if start not in reached:
                reached.add(start)
                waiting.append(start)
    before: dict[int, set[int]] = {start: set() for start in reached}
    for start in reached:
        for successor in after[start]:
            before[successor].add(start)
    dominators = {start: set(reached) for start in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for start in sorted(reached - {0}):
            found = set.intersection(*(dominators[b] for b in before[start])) | {start}
            changed |= found != dominators[start]
            dominators[start] = found
    loops: dict[int, set[int]] = {}
    for start in sorted(reached):
        for entry in set(after[start]) & dominators[start]:
            body = loops.setdefault(entry, {entry})
            inside = [start]
            while inside:
                block = inside.pop()
                if block not in body:
                    body.add(block)
                    inside += before[block]
    return loops


def count_step(listing: str, head_blocks: int, unit_blocks: int, looped: bool = False) -> Counts:
    """Count what one warp executes in one pass of a kernel's longest loop.

    Loops inside it that multiply are passed ``head_blocks`` times if they exponentiate too, else
    ``unit_blocks`` times; others once. If ``looped``, the outer ones of them are over two streams.
    Raises ValueError if there is no loop.
    """
    _, program = next(sass.programs(listing))
    loops = _loops(program)
    if not loops:
        raise ValueError("the kernel has no loop")

    def instructions(block: int) -> list[sass.Instruction]:
        return program.instructions[block : program.blocks[block]]

    def has(body: set[int], kind: re.Pattern[str]) -> bool:
        return any(kind.match(i.opcode) for block in body for i in instructions(block))

    steps = max(loops, key=lambda entry: sum(len(instructions(b)) for b in loops[entry]))
    trips = dict.fromkeys(loops, 1)
    inside = {n: body for n, body in loops.items() if n != steps and has(body, _PRODUCT)}
    for entry, body in inside.items():
        if looped and not any(body < other for other in inside.values()):
            trips[entry] = 2
        else:
            trips[entry] = head_blocks if has(body, _EXPONENTIAL) else unit_blocks
    total = Counts(*[0.0] * len(Counts._fields))
    for block in loops[steps]:
        times = 1
        for entry, body in loops.items():
            times *= trips[entry] if block in body else 1
        total = Counts(
            *(t + times * n for t, n in zip(total, _count(instructions(block)), strict=True))
        )
    return total


def counts(variant: Variant, compiled: Any) -> Counts:
    """Count a compiled variant of a forward kernel."""
    shape, sequences = variant.constexprs["SHAPE"], variant.constexprs["SEQUENCES"]
    of_warp = count_step(
        sass.disassemble(compiled.asm["cubin"]),
        shape.D // shape.BLOCK_HEADS,
        shape.F // shape.BLOCK_F,
        variant.constexprs.get("LOOPED", False),
    )
    share = variant.options["num_warps"] / sequences
    return Counts(*(n * share for n in of_warp))._replace(barriers=of_warp.barriers)


def main(argv: list[str] | None = None) -> int:
    """Print a table of the forward kernels; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python tools/kernel_counts.py",
        description="Count what a user costs reasoning in a step and an encoder in a layer.",
    )
    parser.add_argument("--arch", nargs="+", choices=("sm_80", "sm_90"), default=["sm_80", "sm_90"])
    parser.add_argument("--only", default="fwd-infer", help="a regular expression for names")
    args = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    sys.stdout.write(f"| kernel | arch | {' | '.join(Counts._fields)} |\n")
    sys.stdout.write(f"|---|---|{'--:|' * len(Counts._fields)}\n")
    for arch in args.arch:
        for name, variant in kernel_resources.all_variants(arch):
            if variant.kernel in _KERNELS and re.search(args.only, name):
                found = counts(variant, kernel_resources.compile_variant(variant, arch))
                cells = " | ".join(f"{n:,.0f}" for n in found)
                sys.stdout.write(f"| {name} | {arch} | {cells} |\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
