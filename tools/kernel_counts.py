"""What a user costs a kernel, counted in its machine code and without a GPU.

    python tools/kernel_counts.py [--arch sm_90] [--only REGEX]

Of reasoning and the encoders a step or layer is told, forward or (``--only "bwd|recompute"``) by
backward's kernels; of scoring's kernels (``--only "scoring.*d64.*C100|operands"``) a whole pass, of
one trajectory and 100 candidates with 30 + 30 events.

Forward, a program takes its sequences through the loop over the steps, in an encoder over the
layers; what that loop executes once, times the warps, over the sequences, is what is told. A
kernel of backward has a program for each stream, and is told whole. Loops inside have trip counts
known at compile time: over the two streams, if they take turns in the same code; over
blocks of heads, which exponentiate between their products; and over blocks of hidden units. Bytes
are those of a warp's loads and stores: addresses that its lanes share are counted for each. What
wgmma reads of shared memory by itself is not among them.

In a pass of scoring the loops are over blocks of events, candidates, or what a product is deep,
whichever the kernel has. Loops that the compiler unrolled are counted as they stand, and a kernel
of which it unrolled some is left out. A tile of rows that users share is divided among them, and of
the product of operands no more is told than its loop over chunks of those rows.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from triton import knobs

import kernel_resources
import sass
from lcr_fast.kernels.encoding.forward import encode_fwd_kernel
from lcr_fast.kernels.launch import Variant
from lcr_fast.kernels.reasoning.backward import (
    cross_bwd_kernel,
    ffn_bwd_kernel,
    recompute_cross_kernel,
    recompute_self_kernel,
    self_bwd_kernel,
)
from lcr_fast.kernels.reasoning.forward import latent_reasoning_fwd_kernel
from lcr_fast.kernels.weight_gradients import operands_product_kernel

_FORWARD = (latent_reasoning_fwd_kernel, encode_fwd_kernel)
_BACKWARD = (
    recompute_self_kernel, recompute_cross_kernel, ffn_bwd_kernel, cross_bwd_kernel,
    self_bwd_kernel,
)  # fmt: skip
_CANDIDATES, _EVENTS = 100, 30  # of a user, whom scoring's kernels are counted for
_LANES = 32
_PRODUCT = re.compile(r"HMMA|[HQI]GMMA|UTC\w*MMA")
_EXPONENTIAL = re.compile(r"MUFU\.EX2")
_SHARED = re.compile(r"(LDS|STS|LDSM|STSM)\b")
_DEVICE = re.compile(r"(LDG|LDGSTS)\b")
_SPILLED = re.compile(r"(LDL|STL)\b")


class Counts(NamedTuple):
    """Of one sequence in one step or layer, or of a user in one pass; barriers are a program's."""

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
    return _total(program, loops[steps], loops, trips)


def _total(
    program: sass.Program, blocks: Iterable[int], loops: dict[int, set[int]], trips: dict[int, int]
) -> Counts:
    """Add up blocks, each as often as the loops around it are passed."""
    total = Counts(*[0.0] * len(Counts._fields))
    for block in blocks:
        times = math.prod(trips[entry] for entry, body in loops.items() if block in body)
        found = _count(program.instructions[block : program.blocks[block]])
        total = Counts(*(t + times * n for t, n in zip(total, found, strict=True)))
    return total


def count_pass(listing: str, trips: Sequence[int]) -> Counts:
    """Count what one warp executes of a kernel, whose loops are passed so often, in their order.

    Loops may be missing, as they were unrolled: all of them, or those that are passed once. Raises
    ValueError where it cannot be told which are.
    """
    _, program = next(sass.programs(listing))
    loops = _loops(program)
    if len(loops) != len(trips):
        trips = [n for n in trips if n > 1]
    if len(loops) not in (0, len(trips)):
        raise ValueError(f"the kernel has {len(loops)} loops, not {len(trips)}")
    return _total(program, program.blocks, loops, dict(zip(sorted(loops), trips, strict=False)))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _scoring(variant: Variant) -> tuple[list[int], float] | None:
    """Give the trips of a scoring kernel's loops, in their order, and the programs of a user."""
    given = variant.constexprs
    name = variant.kernel.__name__.removesuffix("_kernel")
    rows = _CANDIDATES / given.get("ROWS", 1)
    if name in ("pool", "score_fwd", "candidate_bwd", "state_bwd"):
        tiles = _blocks(_CANDIDATES, given["CANDIDATES"])
        events = _blocks(_EVENTS, given["EVENTS"])
        # Of the run or the trajectories, of which there is one, and inside it of either stream.
        trips = {
            "pool": [1, events, events],
            "score_fwd": [1, events, events],
            "candidate_bwd": [1, events, 1, events, 1],
            "state_bwd": [tiles],
        }[name]
        if name == "score_fwd" and given["HEAD"].H1:
            trips.append(_blocks(given["HEAD"].H1, given["H1_BLOCK"]))
        return trips, 2 * events if name == "state_bwd" else tiles
    if name in ("hidden", "hidden_bwd", "inputs_bwd", "output", "output_bwd"):
        head, depth, D = given["HEAD"], given["BLOCK_DEPTH"], given.get("D", 0)
        inputs = [3 * D] + [D] * head.HAS_USER
        deep = {"hidden": inputs, "hidden_bwd": [head.H2]}.get(name, [head.H1])
        columns = _blocks(head.H1, given["BLOCK"]) if name.startswith("hidden") else 1
        return [_blocks(n, depth) for n in deep], rows * (3 if name == "inputs_bwd" else columns)
    return None


def counts(variant: Variant, compiled: Any) -> Counts | None:
    """Count a compiled variant, or return None of a kernel that is not counted."""
    listing = sass.disassemble(compiled.asm["cubin"])
    if variant.kernel in _BACKWARD:
        shape, parked = variant.constexprs["SHAPE"], variant.constexprs.get("PARKED", False)
        if variant.kernel is ffn_bwd_kernel:  # forward again, then backward
            trips = [shape.F // shape.BLOCK_F] * 2
        else:  # parked, gradients of the inputs have a loop of their own
            trips = [shape.D // shape.BLOCK_HEADS] * (1 + parked)
        of_warp = count_pass(listing, trips)
        programs = 2 / variant.constexprs["SEQUENCES"]
    elif variant.kernel in _FORWARD:
        shape = variant.constexprs["SHAPE"]
        of_warp = count_step(
            listing,
            shape.D // shape.BLOCK_HEADS,
            shape.F // shape.BLOCK_F,
            variant.constexprs.get("LOOPED", False),
        )
        programs = 1 / variant.constexprs["SEQUENCES"]
    elif variant.kernel is operands_product_kernel:  # its loop is over chunks of rows
        given = variant.constexprs
        across = (("OUT", "BLOCK_OUT"), ("WIDTH", "BLOCK_WIDTH"))
        tiles = math.prod(_blocks(given[n], given[block]) for n, block in across)
        of_warp = count_step(listing, 1, 1)
        programs = _CANDIDATES / given["ROWS"] * tiles
    else:
        asked = _scoring(variant)
        if asked is None:
            return None
        trips, programs = asked
        of_warp = count_pass(listing, trips)
    share = variant.options["num_warps"] * programs
    return Counts(*(n * share for n in of_warp))._replace(barriers=of_warp.barriers)


def main(argv: list[str] | None = None) -> int:
    """Print a table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python tools/kernel_counts.py",
        description="Count what a user costs a kernel.",
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
            if not re.search(args.only, name):
                continue
            try:
                found = counts(variant, kernel_resources.compile_variant(variant, arch))
            except ValueError as error:
                sys.stderr.write(f"{name} for {arch} is left out: {error}\n")
                continue
            if found is not None:
                cells = " | ".join(f"{n:,.0f}" for n in found)
                sys.stdout.write(f"| {name} | {arch} | {cells} |\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
