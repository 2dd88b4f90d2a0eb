"""What torch's settings ask of products: TF32 for float32, and halves by torch.autocast."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lcr_fast.dynamo import constant

_F = TypeVar("_F", bound=Callable[..., Any])


@constant  # torch.compile cannot trace it, and compiles again where the answer changes
def allows_tf32() -> bool:
    """Whether torch may multiply float32 on a GPU in TF32.

    torch has two ways to say so, of which the older, ``torch.get_float32_matmul_precision()``,
    raises where the newer one was used. So this reads what both of them write:
    ``torch.backends.cuda.matmul.fp32_precision`` is ``tf32`` after
    ``torch.set_float32_matmul_precision("high")`` (or ``"medium"``),
    ``torch.backends.cuda.matmul.allow_tf32 = True`` and
    ``torch.backends.fp32_precision = "tf32"``, and ``ieee`` or ``none``, the default, elsewhere.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def high(x: Tensor) -> Tensor:
    """Give losses and log-probabilities float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_autocast(device: str) -> bool:
    """Tell whether ``torch.autocast`` is on for a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)  # which raises for meta


def autocast_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """Give the dtype that ``torch.autocast`` casts states of another one to: float32 to its own."""
    if dtype == torch.float32 and is_autocast(device):
        return torch.get_autocast_dtype(device)
    return dtype


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Leave ``torch.autocast`` for a while: products are in the dtypes that they are given."""
    if is_autocast(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def autocasts(op: _F) -> _F:
    """Let an op, which takes both streams first, follow ``torch.autocast``.

    Its float32 states are cast to autocast's dtype, which is then that of its results on every
    backend; weights, vectors of items and users, and gradients of what was given, keep theirs.
    Within, autocast is off: what a backend adds up in float32 stays so.
    """

    @functools.wraps(op)
    def call(search: Tensor, rec: Tensor, *args: Any, **kwargs: Any) -> Any:
        device = search.device.type
        if not is_autocast(device):
            return op(search, rec, *args, **kwargs)
        search, rec = (x.to(autocast_dtype(device, x.dtype)) for x in (search, rec))
        with without_autocast(device):
            return op(search, rec, *args, **kwargs)

    return cast(_F, call)
