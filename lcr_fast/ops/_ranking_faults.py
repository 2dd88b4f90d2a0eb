"""What is wrong with a call of the ranking ops: arguments that do not fit, rows that are bad."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError for a tensor on another device."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def expand(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """View ``tensor`` in ``shape``, without a copy."""
    check_device(name, tensor, device)
    if tensor.shape == shape:  # the ordinary call, without a view
        return tensor
    missing = len(shape) - tensor.dim()
    if missing < 0 or any(
        size not in (1, wanted) for size, wanted in zip(tensor.shape, shape[missing:], strict=True)
    ):
        raise ValueError(f"{name} must broadcast to {list(shape)}, got {list(tensor.shape)}")
    return tensor.expand(shape)


def indices(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 indices in ``shape``, contiguous: one number a row."""
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {tensor.dtype}")
    return expand(name, tensor, shape, device).long().contiguous()


def first_of(flags: Tensor) -> int:
    """Return the number of the first True of ``flags``, or their number."""
    found = flags.flatten().nonzero()
    return int(found[0]) if len(found) else flags.numel()


def find_faults(
    rank: Tensor, target: Tensor | None, counts: Tensor | None, n_items: int
) -> list[int]:
    """Sort the NaN rows of the reference by their cause: [NaN, target, counts], as the op does."""
    bad = rank.isnan()
    wrong_count = torch.zeros_like(bad)
    wrong_target = torch.zeros_like(bad)
    if counts is not None:
        wrong_count = (counts < 0) | (counts > n_items)
    if target is not None:
        limit = n_items if counts is None else counts
        wrong_target = ((target < -1) | (target >= limit)) & ~wrong_count
    return [
        first_of(bad & ~wrong_count & ~wrong_target),
        first_of(bad & wrong_target),
        first_of(bad & wrong_count),
    ]


def raise_first(
    name: str,
    faults: list[int],
    leading: Sequence[int],
    target: Tensor | None,
    counts: Tensor | None,
    n_items: int,
) -> None:
    """Raise what the C++ path raises for ``faults``, the first row of each kind."""
    n_rows = 1
    for size in leading:
        n_rows *= size
    nan_row, target_row, counts_row = faults

    def at(row: int) -> str:
        place = []
        for size in reversed(leading):
            place.append(str(row % size))
            row //= size
        return ", ".join(reversed(place))

    if counts_row < n_rows:
        if counts is None:
            raise RuntimeError(
                f"seen[{at(counts_row)}] has an item out of range, expected indices below {n_items}"
            )
        raise RuntimeError(
            f"counts[{at(counts_row)}] is {counts.flatten()[counts_row].item()}, expected 0 to "
            f"{n_items}"
        )
    if target is not None and target_row < n_rows:
        limit = n_items if counts is None else counts.flatten()[target_row].item()
        raise RuntimeError(
            f"target[{at(target_row)}] is {target.flatten()[target_row].item()}, expected an index "
            f"below {limit}, or -1 for none"
        )
    if nan_row < n_rows and name == "users":
        raise RuntimeError(f"users[{at(nan_row)}] gives a NaN score, expected finite vectors")
    if nan_row < n_rows:
        raise RuntimeError(
            f"scores[{at(nan_row)}] has a NaN, expected numbers (infinities included)"
        )
