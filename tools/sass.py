"""Find wgmma whose operand may be at a garbage address, in compiled code and without a GPU.

    python tools/sass.py FILE.cubin ...

An operand in shared memory is named by a descriptor, 64 bits in two uniform registers: the low
word is an address cut to 14 bits, the high word is constant. ptxas 12.8 miscompiles some loops: a
copy of a descriptor is made at the end of the loop's body only, and the first pass reads whatever
the register held: an illegal access, or silently wrong numbers. Registers, spills and shared memory
do not show it, the machine code does. For each register of a descriptor all its definitions that
may reach the instruction are followed back through copies and additions; each must end in an
address that was cut or in a constant. What comes through a vector register (R2UR) is trusted.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from triton import knobs

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_REGISTER = re.compile(r"\bUR(\d+)\b")  # URZ, which is 0, is none
_MULTIPLIES = re.compile(r"(HGMMA|QGMMA|IGMMA|BGMMA)\b")
# Operations whose first operand is a uniform register that they read, not write.
_ONLY_READS = re.compile(r"(UISETP|UFSETP|UPLOP3|R2UP|UTMA|UBLK|UCGABAR|USETMAXREG|SYNCS)")
_KEEPS = re.compile(r"(UMOV|UIADD3|USEL|ULOP3|UPRMT)\b")  # words of descriptors stay such words
_ENDS_BLOCK = re.compile(r"(BRA|BRX|JMP|JMX|EXIT|RET|CALL)\b")

_ENTRY = -1  # the definition of a register that was never written


class Instruction(NamedTuple):
    address: str
    is_conditional: bool
    opcode: str
    operands: list[str]

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}"

    @property
    def written(self) -> range:
        """Uniform registers that it writes."""
        found = self.operands and re.fullmatch(r"UR(\d+)", self.operands[0])
        if not found or _ONLY_READS.match(self.opcode):
            return range(0)
        suffixes = self.opcode.split(".")[1:]
        size = 4 if "128" in suffixes else 2 if {"64", "WIDE"} & set(suffixes) else 1
        return range(int(found[1]), int(found[1]) + size)

    @property
    def read(self) -> set[int]:
        """Uniform registers that a copy or addition reads."""
        numbers = {int(n) for operand in self.operands[1:] for n in _REGISTER.findall(operand)}
        if self.opcode == "UIADD3.64":
            numbers |= {n + 1 for n in numbers}
        return numbers

    @property
    def makes_descriptor(self) -> bool:
        """Whether it cuts an address to 14 bits, or takes a word from a vector register."""
        return (
            self.opcode.startswith("R2UR")
            or (self.opcode.startswith("USGXT") and self.operands[-1] == "0xe")
            or (self.opcode.startswith("ULOP3") and "0x3fff" in self.operands)
        )

    @property
    def keeps_descriptor(self) -> bool:
        """Whether it makes words of descriptors from such words and constants."""
        return bool(_KEEPS.match(self.opcode)) and "c[" not in ", ".join(self.operands)

    @property
    def descriptors(self) -> range:
        """Uniform registers of a product's descriptors; A has none where it is in registers."""
        if not _MULTIPLIES.match(self.opcode):
            return range(0)
        for place, operand in enumerate(self.operands):
            if found := re.match(r"gdesc\[UR(\d+)\]", operand):
                first = int(found[1])
                return range(first + (2 if place == 2 else 0), first + 4)
        return range(0)


class Program:
    """One kernel: its instructions, and the blocks that they form."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.instructions: list[Instruction] = []
        starts, labels = {0}, {}
        for line in lines:
            if label := _LABEL.match(line):
                labels[label[1]] = len(self.instructions)
                starts.add(len(self.instructions))
            elif found := _INSTRUCTION.search(line):
                address, predicate, opcode, operands = found.groups()
                fields = [field.strip() for field in operands.split(",")]
                self.instructions.append(Instruction(address, bool(predicate), opcode, fields))
                if _ENDS_BLOCK.match(opcode):
                    starts.add(len(self.instructions))
        bounds = [*sorted(starts - {len(self.instructions)}), len(self.instructions)]
        self.blocks = dict(itertools.pairwise(bounds))  # start: end
        self._labels = labels

    def successors(self, start: int) -> Iterator[int]:
        """Yield the starts of the blocks that may come after one."""
        end = self.blocks[start]
        last = self.instructions[end - 1]
        # Some loops are left by a call that does not return.
        is_call = last.opcode.startswith("CALL")
        falls = not _ENDS_BLOCK.match(last.opcode) or last.is_conditional or is_call
        if last.opcode.startswith("BRA") or is_call:
            target = _TARGET.search(last.operands[-1])
            if target and self._labels.get(target[1]) in self.blocks:
                yield self._labels[target[1]]
            falls = falls or len(last.operands) > 1  # a condition among the operands
        if falls and end in self.blocks:
            yield end


_Definitions = dict[int, frozenset[int]]  # of a register: instructions that may have written it
_NEVER = frozenset({_ENTRY})


def _step(known: _Definitions, place: int, instruction: Instruction) -> None:
    for register in instruction.written:
        old = known.get(register, _NEVER) if instruction.is_conditional else frozenset()
        known[register] = old | {place}


def _reaching(program: Program) -> Iterator[tuple[int, _Definitions]]:
    """Yield each instruction that can be reached, with the definitions before it."""
    before: dict[int, _Definitions] = {0: {}}
    waiting = [0]
    while waiting:
        start = waiting.pop()
        known = dict(before[start])
        for place in range(start, program.blocks[start]):
            _step(known, place, program.instructions[place])
        for after in program.successors(start):
            old = before.get(after)
            merged = (
                known
                if old is None
                else {
                    register: known.get(register, _NEVER) | old.get(register, _NEVER)
                    for register in known.keys() | old.keys()
                }
            )
            if merged != old:
                before[after] = dict(merged)
                waiting.append(after)
    for start, known in sorted(before.items()):
        for place in range(start, program.blocks[start]):
            yield place, known
            _step(known, place, program.instructions[place])


def _garbage(program: Program) -> Iterator[str]:
    instructions = program.instructions
    sources: dict[int, set[int]] = {}  # of a copy or addition: definitions of what it reads
    products: list[tuple[int, dict[int, frozenset[int]]]] = []
    for place, known in _reaching(program):
        instruction = instructions[place]
        if instruction.keeps_descriptor and not instruction.makes_descriptor:
            read = [known.get(register, _NEVER) for register in instruction.read]
            is_cut = instruction.opcode.startswith("ULOP3") and any(
                all(d != _ENTRY and instructions[d].operands[1:] == ["0x3fff"] for d in definitions)
                for definitions in read
            )
            sources[place] = set() if is_cut else set().union(*read)
        if instruction.descriptors:
            products.append((place, {r: known.get(r, _NEVER) for r in instruction.descriptors}))
    for place, needed in products:
        for register, definitions in needed.items():
            origin = _stray_origin(definitions, sources, instructions)
            if origin is not None:
                cause = "what it held at the start"
                if origin != _ENTRY:
                    cause = f"what {instructions[origin].address}: {instructions[origin]} wrote"
                product = instructions[place]
                yield f"{product.address}: {product}: UR{register} may be {cause}"
                break  # one reason a product


def _stray_origin(
    definitions: frozenset[int], sources: dict[int, set[int]], instructions: list[Instruction]
) -> int | None:
    """Follow definitions back through copies; return one that ends in no descriptor, or None."""
    waiting, seen = list(definitions), set(definitions)
    while waiting:
        origin = waiting.pop()
        if origin in sources:
            waiting += sources[origin] - seen
            seen |= sources[origin]
        elif origin == _ENTRY or not instructions[origin].makes_descriptor:
            return origin
    return None


def programs(sass: str) -> Iterator[tuple[str, Program]]:
    """Yield the kernels of a listing by name."""
    for section in re.split(r"^\s*\.section\s+\.text\.", sass, flags=re.M)[1:]:
        name = re.split(r"[\s,]", section, maxsplit=1)[0]
        lines = re.split(r"^\s*\.section\s", section, maxsplit=1, flags=re.M)[0].splitlines()
        yield name, Program(lines)


def garbage_descriptors(sass: str) -> list[str]:
    """Describe each descriptor in a listing that is none on some path."""
    return [
        f"{name} {sentence}" for name, program in programs(sass) for sentence in _garbage(program)
    ]


def disassemble(cubin: bytes) -> str:
    """List a compiled program, by the nvdisasm of Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--print-code", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(paths: list[str]) -> int:
    """Check files; return how many have a garbage descriptor."""
    n_bad = 0
    for path in paths:
        found = garbage_descriptors(disassemble(Path(path).read_bytes()))
        n_bad += bool(found)
        for sentence in found:
            sys.stdout.write(f"{path}: {sentence}\n")
    sys.stdout.write(f"{n_bad} of {len(paths)} files multiply with a garbage descriptor\n")
    return n_bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
