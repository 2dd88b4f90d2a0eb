"""Read the PTX of a kernel, and run it on the CPU: machine.cpp says what it checks."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_FOLDER = Path(__file__).parent
_SHARED_BASE = 1024  # kSharedBase of machine.h
_SPECIAL = {"%tid.x", "%laneid"} | {f"%{n}ctaid.{axis}" for n in ("", "n") for axis in "xyz"}
_ERROR_SIZE = 4096


class FaultError(RuntimeError):
    """What compiled code must not do, or what cannot be emulated."""


class Counts(NamedTuple):
    """What all warps of a launch did."""

    instructions: int
    barriers: int
    bank_passes: int  # of shared memory
    fewest_passes: int  # without conflicts of banks


class _Argument(NamedTuple):  # bytes
    offset: int
    size: int


@functools.cache
def _machine() -> ctypes.CDLL:
    """Build the machine, which takes some seconds, into a folder that only this process keeps."""
    if shutil.which("g++") is None:
        raise RuntimeError("emulating PTX needs g++ with C++20")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "machine.so"
        words = [
            "g++",
            "-std=c++20",
            "-O2",
            "-march=native",
            "-ffp-contract=off",
            "-shared",
            "-fPIC",
        ]
        words += ["-Wall", "-Wextra", "-Werror", str(_FOLDER / "machine.cpp"), "-o", str(library)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        machine = ctypes.CDLL(str(library))
    machine.ptx_create.restype = ctypes.c_void_p
    machine.ptx_destroy.argtypes = [ctypes.c_void_p]
    return machine


class Program:
    """A kernel of PTX.

    Args:
        ptx: text with one entry, which has ``.reqntid``.

    Raises:
        FaultError: naming instructions that machine.cpp does not know.

    """

    def __init__(self, ptx: str) -> None:
        self._text = ptx.splitlines()
        self._registers: dict[str, int] = {}
        self._arguments: dict[str, _Argument] = {}
        self._constants: dict[int, int] = {}  # which register holds a number
        self._operands: list[int] = []
        self._names: list[str] = []
        self._layout: list[tuple[int, int, int, int]] = []
        self._lines: list[int] = []  # where instructions stand in the text
        self._sources: list[str] = []  # and the .loc before them
        self._jumps: list[tuple[int, str]] = []  # operands that are places of labels
        self._scope = ""  # of inline assembly, whose labels are its own
        labels = self._read()
        for operand, label in self._jumps:
            self._operands[operand] = labels[label]
        self._handle = self._create()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _machine().ptx_destroy(self._handle)

    def run(
        self,
        grid: Sequence[int],
        shared_bytes: int,
        arguments: Sequence[int],
        spans: Sequence[tuple[int, int]],
        programs_may_overwrite: bool = False,
    ) -> Counts:
        """Run all programs of a launch, one after the other.

        Args:
            grid: how many, in up to 3 axes.
            shared_bytes: dynamic shared memory of a program.
            arguments: bits of each, in the order of the entry's.
            spans: where the memory begins and ends that it may touch.
            programs_may_overwrite: whether it is no fault if several store to one byte.

        Raises:
            FaultError: naming program, fault, line of PTX and of source.

        """
        error, counts = ctypes.create_string_buffer(_ERROR_SIZE), np.zeros(4, np.uint64)
        laid_out = bytearray(max(map(sum, self._arguments.values())))
        for place, bits in zip(self._arguments.values(), arguments, strict=True):
            end = place.offset + place.size
            laid_out[place.offset : end] = (bits % 256**place.size).to_bytes(place.size, "little")
        at = _machine().ptx_run(
            ctypes.c_void_p(self._handle),
            np.asarray([*grid, 1, 1][:3], np.uint32).ctypes,
            self.n_threads // 32,
            shared_bytes,
            bytes(laid_out),
            len(laid_out),
            np.asarray(spans, np.uint64).ctypes,
            len(spans),
            int(programs_may_overwrite),
            counts.ctypes,
            error,
            _ERROR_SIZE,
        )
        if at >= 0:
            line = self._lines[at]
            raise FaultError(
                f"{error.value.decode()}\n  line {line + 1}: {self._text[line].strip()}\n"
                f"  {self._sources[at]}"
            )
        return Counts(*map(int, counts))

    def _create(self) -> int:
        arrays = (
            np.asarray(self._layout, np.int32),
            np.asarray(self._operands, np.int32),
            np.asarray([(r, n) for n, r in self._constants.items()] or [(0, 0)], np.uint64),
        )
        error = ctypes.create_string_buffer(_ERROR_SIZE)
        handle = _machine().ptx_create(
            "".join(f"{name}\n" for name in self._names).encode(),
            len(self._names),
            arrays[0].ctypes,
            arrays[1].ctypes,
            len(self._operands),
            arrays[2].ctypes,
            len(self._constants),
            self._next_register(),
            error,
            _ERROR_SIZE,
        )
        if handle is None:
            raise FaultError(error.value.decode())
        return handle

    def _read(self) -> dict[str, int]:
        """Read the body; return which instruction a label stands before."""
        labels: dict[str, int] = {}
        lines = iter(enumerate(line.split("//")[0].strip() for line in self._text))
        end = 0
        for _, line in lines:
            if m := re.match(r"\.reqntid (\d+)", line):
                self.n_threads = int(m[1])
            if m := re.match(r"\.param \.[a-z](\d+) .*?(\w+),?$", line):
                size = int(m[1]) // 8
                self._arguments[m[2]] = _Argument(-(-end // size) * size, size)
                end = self._arguments[m[2]].offset + size
            if line == "{":
                break
        depth, source, unfinished = 1, "", ""
        for number, line in lines:
            if line.startswith("{"):
                depth, line, self._scope = depth + 1, line[1:].strip(), f"{number}:"
            if line == "}":
                depth, self._scope = depth - 1, ""
                if depth == 0:
                    break
            elif line.startswith(".loc"):
                source = line
            elif m := re.match(r"(\$?\w+):$", line):
                labels[self._label(m[1])] = len(self._names)
            elif line and not line.startswith("."):
                unfinished += " " + line
                if line.endswith(";"):
                    for statement in filter(None, map(str.strip, unfinished.split(";"))):
                        self._read_statement(statement)
                        self._lines.append(number)
                        self._sources.append(source)
                    unfinished = ""
        return labels

    def _read_statement(self, statement: str) -> None:
        guard, negated = -1, 0
        if m := re.match(r"@(!?)(%?\w+)\s+(.*)", statement):
            guard, negated, statement = self._register(m[2]), int(bool(m[1])), m[3]
        name, *rest = statement.split(maxsplit=1)
        name = name.replace("shared::cta", "shared")  # the same, where there are no clusters
        first = len(self._operands)
        self._names.append(self._read_operands(name, "".join(rest)))
        self._layout.append((guard, negated, first, len(self._operands) - first))

    def _read_operands(self, name: str, text: str) -> str:
        """Append operands; return the name, as machine.cpp knows it."""
        if name in ("bra", "bra.uni"):
            self._jumps.append((len(self._operands), self._label(text)))
            self._operands.append(-1)
            return name
        tokens = re.findall(r"\[[^\]]*\]|[^\s,{}|]+", text)
        if name.startswith("mov.") and tokens[1] in _SPECIAL:
            self._operands.append(self._register(tokens[0]))
            return tokens[1]
        for token in tokens:
            if token.startswith("["):
                base, _, offset = token[1:-1].replace(" ", "").partition("+")
                self._operands += [self._value(base), int(offset or "0")]
            else:
                self._operands.append(self._value(token))
        if name.startswith("mov.") and "{" in text:
            several = "4" if len(tokens) == 5 else ""
            return name + (".unpack" if text.startswith("{") else ".pack") + several
        if m := re.match(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k\d+)\.f32\.(\w+)\.", name):
            a_in = "registers" if re.search(r"\}\s*,\s*\{", text) else "shared"
            return f"wgmma.{m[1]}.{m[2]}.{a_in}"
        if name.startswith(("max.", "min.")) and len(tokens) == 4:
            return name + ".of_3"
        if name.startswith("tcgen05.mma."):
            a_in = "tensor" if tokens[1].startswith("[") else "shared"
            return f"{name}.{a_in}"
        return name

    def _label(self, name: str) -> str:
        return name if name.startswith("$") else self._scope + name

    def _value(self, token: str) -> int:
        """Return the register of a name or a number."""
        if token == "_":  # what is not kept
            return 0
        if token == "global_smem":
            return self._constant(_SHARED_BASE)
        if token in self._arguments:
            return self._constant(self._arguments[token].offset)
        if re.match(r"%?[A-Za-z_]\w*$", token):
            return self._register(token)
        if token.startswith(("0f", "0d")):
            return self._constant(int(token[2:], 16))
        return self._constant(int(token.rstrip("U"), 0) % 2**64)

    def _register(self, name: str) -> int:
        if name not in self._registers:
            self._registers[name] = self._next_register()
        return self._registers[name]

    def _constant(self, number: int) -> int:
        if number not in self._constants:
            self._constants[number] = self._next_register()
        return self._constants[number]

    def _next_register(self) -> int:
        return len(self._registers) + len(self._constants) + 1  # 0 is for "_"
