"""Counter-based noise and dropout, by the C++ extension on CPU and by plain torch elsewhere."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lcr_fast import noise
from lcr_fast.ops._op import Backend, Op


class NoiseCase(NamedTuple):
    """All that decides which implementations can serve a call."""

    device: str
    dtype: torch.dtype = torch.float32


class _Normal(NamedTuple):
    """The arguments of the registered op, in the order of its schema."""

    rows: Tensor  # int64 [B]
    seed: Tensor  # int64 []
    n_trajectories: int
    stream: int
    length: int
    dim: int


class _Masks(NamedTuple):
    """The arguments of the registered op, in the order of its schema."""

    rows: Tensor  # int64 [B]
    seed: Tensor  # int64 []
    first_site: int
    n_sites: int
    length: int
    dim: int
    threshold: int


def _fake_normal(call: _Normal) -> Tensor:
    shape = (call.rows.shape[0], call.n_trajectories, call.length, call.dim)
    return call.rows.new_empty(shape, dtype=torch.float32)


def _fake_masks(call: _Masks) -> Tensor:
    shape = (call.n_sites, call.rows.shape[0], call.length, call.dim)
    return call.rows.new_empty(shape, dtype=torch.float32)


def _obstacle(case: NoiseCase) -> str | None:
    return "it draws float32" if case.dtype == torch.float64 else None


_BACKENDS = [Backend("cpp", "", ("cpu",), _obstacle)]
NORMAL_NOISE = Op("normal_noise", _Normal, ("eps",), _fake_normal, _BACKENDS)
DROPOUT_MASKS = Op("dropout_masks", _Masks, ("masks",), _fake_masks, _BACKENDS)


def _check_rows(rows: Tensor) -> None:
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 [B], got {rows.dtype} {list(rows.shape)}")


def _check_users(what: str, rows: Tensor, states: Tensor) -> None:
    """Raise ValueError where states are not [B, L, D], or rows do not name their B users."""
    if states.ndim != 3:
        raise ValueError(f"{what} needs states [B, L, D], got {list(states.shape)}")
    if rows.shape != states.shape[:1] or rows.dtype != torch.int64:
        raise ValueError(
            f"rows must be int64 [{states.shape[0]}], got {rows.dtype} {list(rows.shape)}"
        )


def seed_tensor(seed: int | Tensor, like: Tensor) -> Tensor:
    """Give a seed as fused ops take it, int64 [] on the device of ``like``.

    A tensor, so that a captured call draws anew where its seed was overwritten. Raises ValueError
    on another tensor.
    """
    if not isinstance(seed, Tensor):
        if not hasattr(seed, "__index__") or not -(2**63) <= seed < 2**63:
            raise ValueError(f"a seed must be an int of 64 bits with a sign, got {seed!r}")
        return torch.full((), seed, dtype=torch.int64, device=like.device)
    if seed.shape != () or seed.dtype != torch.int64 or seed.device != like.device:
        raise ValueError(
            f"a seed must be an int, or int64 [] on {like.device}, got {seed.dtype} "
            f"{list(seed.shape)} on {seed.device}"
        )
    return seed


def normal_noise(
    rows: Tensor,
    seed: int | Tensor,
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
    _check_rows(rows)
    chosen = NORMAL_NOISE.choose(backend, NoiseCase(rows.device.type, dtype))
    if chosen == "reference":
        return noise.normal_noise(rows, seed, n_trajectories, stream, length, dim, dtype)
    call = _Normal(rows.contiguous(), seed_tensor(seed, rows), n_trajectories, stream, length, dim)
    return NORMAL_NOISE(chosen, call).to(dtype)


def dropout_masks(
    rows: Tensor,
    seed: int | Tensor,
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
    _check_rows(rows)
    chosen = DROPOUT_MASKS.choose(backend, NoiseCase(rows.device.type))
    if chosen == "reference":
        return noise.dropout_masks(rows, seed, first_site, n_sites, length, dim, rate)
    call = _Masks(
        rows.contiguous(), seed_tensor(seed, rows), first_site, n_sites, length, dim, threshold
    )
    return DROPOUT_MASKS(chosen, call)


# Where the dropout layers of each part start; a part counts its own from there.
STREAM_SITES = 1 << 12  # added for the recommendation stream
ENCODER_SITES = 0
REASONING_SITES = 1 << 13
HEAD_SITES = 1 << 14


class Dropout(NamedTuple):
    """A dropout rate and the key of its masks."""

    rate: float
    seed: int | Tensor  # a tensor is int64 []
    rows: Tensor  # int64 [B]

    def check(self, states: Tensor) -> None:
        """Raise ValueError on another rate, states or rows.

        Rates are in [0, 1), states [B, L, D], and rows theirs.

        A mask has no trajectory axis.
        """
        if not 0 <= self.rate < 1 or noise.dropout_threshold(self.rate) > 65535:
            raise ValueError(f"dropout's rate must be in [0, 1), got {self.rate}")
        _check_users("dropout", self.rows, states)

    def again(self, k: int) -> "Dropout":
        """Give the k-th of other, independent keys of the same rate; 0 is this one."""
        return self._replace(seed=(self.seed + k) & (2**63 - 1))

    def draw(self, first_site: int, n_sites: int, length: int, dim: int) -> Tensor:
        """Masks for ``n_sites`` layers on states [B, length, dim]: [n_sites, B, length, dim]."""
        return dropout_masks(self.rows, self.seed, first_site, n_sites, length, dim, self.rate)


def dropout_key(dropout: Dropout | None, like: Tensor) -> tuple[Tensor, int, Tensor]:
    """Give what a fused op draws its masks from: rows, threshold and seed; none without dropout.

    ``like`` is an integer tensor of the call's device.
    """
    if dropout is None:
        # Two tensors: torch.compile takes none twice in one call.
        return like.new_empty(0), 0, like.new_empty(0)
    threshold = noise.dropout_threshold(dropout.rate)
    return dropout.rows.contiguous(), threshold, seed_tensor(dropout.seed, like)


class Noise(NamedTuple):
    """N noisy copies of every user's states, x + scale eps, and the key of the noise."""

    n_trajectories: int
    scale: float  # gamma
    seed: int | Tensor  # a tensor is int64 []
    rows: Tensor  # int64 [B] names the users for the generator, see lcr_fast.noise

    def check(self, states: Tensor) -> None:
        """Raise ValueError on numbers out of range, and as :meth:`Dropout.check` does."""
        if self.n_trajectories < 1:
            raise ValueError(f"n_trajectories must be at least 1, got {self.n_trajectories}")
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"the noise's scale must be finite and not negative, got {self.scale}")
        _check_users("noise", self.rows, states)

    def added(self, x: Tensor, stream: int) -> Tensor:
        """Give the copies of one stream's states: [B, L, D] -> [B, N, L, D]."""
        length, dim = x.shape[-2:]
        eps = normal_noise(self.rows, self.seed, self.n_trajectories, stream, length, dim, x.dtype)
        return x.unsqueeze(1) + self.scale * eps
