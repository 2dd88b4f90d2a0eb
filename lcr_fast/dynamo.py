"""What torch.compile is told of our functions."""

from collections.abc import Callable
from typing import TypeVar

_F = TypeVar("_F", bound=Callable)


def constant(function: _F) -> _F:
    """Mark a function as :func:`torch.compiler.assume_constant_result` does.

    That one imports all of Dynamo, for longer than everything else that this package needs.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
