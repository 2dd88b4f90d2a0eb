"""A model of how tensor cores multiply float32, for Triton's interpreter, which does so exactly.

TF32 has 10 bits of fraction; float32 is rounded to it, ties away from 0. Eight products of it, or
sixteen of bfloat16, are added to the accumulator at a time, and the sum is truncated to float32. A
product of parts in bfloat16 has an accumulator of its own, which is added to what was there before;
one in TF32 goes on from it.
"""

import contextlib

import numpy as np
import torch

from lcr_fast.testing import tf32

_DEPTHS = {"tf32": 8, "bf16x3": 16, "bf16x6": 16}  # of one instruction
# Which parts of a and b are multiplied, from 0, and in which order; bf16x3 has the last three.
_PARTS = ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest TF32."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def split(x: np.ndarray) -> list[np.ndarray]:
    """Split float32 into three bfloat16 that add up to it, kept as float32."""
    parts = []
    for _ in range(3):
        part = torch.from_numpy(np.ascontiguousarray(x)).bfloat16().float().numpy()
        parts.append(part)
        x = x - part
    return parts


def _truncate(x: np.ndarray) -> np.ndarray:
    """Round float64 to float32 towards 0."""
    nearest = x.astype(np.float32)
    is_beyond = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(is_beyond, np.nextafter(nearest, np.float32(0)), nearest)


def _accumulate(a: np.ndarray, b: np.ndarray, total: np.ndarray, depth: int) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], depth):
        total = _truncate(total + a[..., k : k + depth] @ b[..., k : k + depth, :])
    return total


def product(a: np.ndarray, b: np.ndarray, precision: str, before: np.ndarray) -> np.ndarray:
    """Multiply float32 matrices by ``tf32``, ``bf16x3`` or ``bf16x6``, added to ``before``."""
    depth = _DEPTHS[precision]
    if precision == "tf32":
        return _accumulate(round_to_tf32(a), round_to_tf32(b), before, depth)
    of_a, of_b = split(a), split(b)
    total = np.zeros_like(before)
    for i, j in _PARTS if precision == "bf16x6" else _PARTS[-3:]:
        total = _accumulate(of_a[i], of_b[j], total, depth)
    return total + before


@contextlib.contextmanager
def multiplying(monkeypatch, matmul_precision: str):
    """Let the interpreter multiply float32 so; torch allows no TF32 (``highest``), or ``high``."""
    from triton.runtime import interpreter

    exact = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, *options):
        if a.data.dtype != np.float32:
            return exact(self, a, b, d, input_precision, *options)
        with np.errstate(invalid="ignore", over="ignore"):
            # What a GPU multiplies in parts is asked of the interpreter whole, by these names.
            names = {"TF32": "tf32", "TF32x3": "bf16x3", "IEEE": "bf16x6"}
            precision = names[input_precision.name]
            total = product(a.data, b.data, precision, d.data)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    with monkeypatch.context() as patch, tf32({"highest": False, "high": True}[matmul_precision]):
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield
