"""Counter-based noise and dropout, by the C++ extension on CPU and by plain torch elsewhere."""

from typing import NamedTuple

import torch
from torch import Tensor

from lcr_fast import noise
from lcr_fast.ops._dispatch import choose_backend, extension_obstacle
from lcr_fast.ops._extension import extension_error

if extension_error() is None:

    @torch.library.register_fake("lcr_fast::normal_noise")
    def _normal_noise_fake(rows, seed, n_trajectories, stream, length, dim):
        shape = (rows.shape[0], n_trajectories, length, dim)
        return rows.new_empty(shape, dtype=torch.float32)

    @torch.library.register_fake("lcr_fast::dropout_masks")
    def _dropout_masks_fake(rows, seed, first_site, n_sites, length, dim, threshold):
        shape = (n_sites, rows.shape[0], length, dim)
        return rows.new_empty(shape, dtype=torch.float32)


def _choose(op: str, backend: str, rows: Tensor, obstacle: str | None = None) -> str:
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 [B], got {rows.dtype} {list(rows.shape)}")
    if rows.device.type != "cpu":
        obstacle = "it needs CPU tensors"
    return choose_backend(op, backend, {"cpp": obstacle or extension_obstacle(), "reference": None})


def normal_noise(
    rows: Tensor,
    seed: int,
    n_trajectories: int,
    stream: int,
    length: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Draw the noise that :func:`lcr_fast.noise.normal_noise` defines, [B, N, length, dim].

    ``backend``: ``cpp`` on CPU tensors in float32 and halves, ``reference`` anywhere.
    Raises ValueError if ``rows`` is not an int64 vector or the backend cannot serve the call.
    """
    obstacle = "it draws float32" if dtype == torch.float64 else None
    if _choose("normal_noise", backend, rows, obstacle) == "cpp":
        drawn = torch.ops.lcr_fast.normal_noise(
            rows.contiguous(), seed, n_trajectories, stream, length, dim
        )
        return drawn.to(dtype)
    return noise.normal_noise(rows, seed, n_trajectories, stream, length, dim, dtype)


def dropout_masks(
    rows: Tensor,
    seed: int,
    first_site: int,
    n_sites: int,
    length: int,
    dim: int,
    rate: float,
    backend: str = "auto",
) -> Tensor:
    """Draw the masks that :func:`lcr_fast.noise.dropout_masks` defines, [n_sites, B, length, dim].

    ``rate`` in [0, 1). ``backend``: ``cpp`` on CPU tensors, ``reference`` anywhere.
    Raises ValueError on another rate, and as :func:`normal_noise` does.
    """
    threshold = noise.dropout_threshold(rate)
    if not 0 <= threshold < 65536:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    if _choose("dropout_masks", backend, rows) == "cpp":
        return torch.ops.lcr_fast.dropout_masks(
            rows.contiguous(), seed, first_site, n_sites, length, dim, threshold
        )
    return noise.dropout_masks(rows, seed, first_site, n_sites, length, dim, rate)


# Where the dropout layers of each part start; a part counts its own from there.
STREAM_SITES = 1 << 12  # added for the recommendation stream
ENCODER_SITES = 0
REASONING_SITES = 1 << 13
HEAD_SITES = 1 << 14


class Dropout(NamedTuple):
    """A dropout rate and the key of its masks."""

    rate: float
    seed: int
    rows: Tensor  # int64 [B]

    def check(self, states: Tensor) -> None:
        """Raise ValueError on states that are not [B, L, D]: a mask has no trajectory axis."""
        if states.ndim != 3:
            raise ValueError(f"dropout needs states [B, L, D], got {list(states.shape)}")

    def draw(self, first_site: int, n_sites: int, length: int, dim: int) -> Tensor:
        """Masks for ``n_sites`` layers on states [B, length, dim]: [n_sites, B, length, dim]."""
        return dropout_masks(self.rows, self.seed, first_site, n_sites, length, dim, self.rate)
