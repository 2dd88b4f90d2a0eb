"""A model of how tensor cores multiply float32, for Triton's interpreter, which does so exactly.

A number is rounded to TF32, 10 bits of fraction, ties away from 0, and what is left of it is cut
to TF32. Eight products at a time are added to the accumulator, and the sum is truncated to float32.
A product in three TF32 ones has an accumulator of its own, which is added to what was there before;
one in TF32 goes on from it.
"""

import contextlib

import numpy as np

from lcr_fast.testing import tf32

_DEPTH = 8  # of one instruction


def _cut_to_tf32(x: np.ndarray, add: int = 0) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    cut = ((bits + np.uint32(add)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), cut, x)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest TF32."""
    return _cut_to_tf32(x, add=1 << 12)


def _truncate(x: np.ndarray) -> np.ndarray:
    """Round float64 to float32 towards 0."""
    nearest = x.astype(np.float32)
    is_beyond = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(is_beyond, np.nextafter(nearest, np.float32(0)), nearest)


def _accumulate(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], _DEPTH):
        total = _truncate(total + a[..., k : k + _DEPTH] @ b[..., k : k + _DEPTH, :])
    return total


def product(a: np.ndarray, b: np.ndarray, precision: str, before: np.ndarray) -> np.ndarray:
    """Multiply float32 matrices as ``tf32`` or ``tf32x3``, added to what was there before."""
    big_a, big_b = round_to_tf32(a), round_to_tf32(b)
    if precision == "tf32":
        return _accumulate(big_a, big_b, before)
    small_a, small_b = _cut_to_tf32(a - big_a), _cut_to_tf32(b - big_b)
    total = _accumulate(big_a, small_b, _accumulate(small_a, big_b, np.zeros_like(before)))
    return _accumulate(big_a, big_b, total) + before


@contextlib.contextmanager
def multiplying(monkeypatch, matmul_precision: str):
    """Let the interpreter multiply float32 so; torch allows no TF32 (``highest``), or ``high``."""
    from triton.runtime import interpreter

    exact = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, *options):
        if a.data.dtype != np.float32:
            return exact(self, a, b, d, input_precision, *options)
        with np.errstate(invalid="ignore", over="ignore"):
            total = product(a.data, b.data, input_precision.name.lower(), d.data)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    with monkeypatch.context() as patch, tf32({"highest": False, "high": True}[matmul_precision]):
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield
