"""Load lcr_fast._C once, if it is there; every op asks here whether it is."""

import torch  # the extension needs the libraries of torch loaded

_error: ImportError | None = None
try:
    import lcr_fast._C  # noqa: F401
except ImportError as error:
    _error = error


def extension_error() -> ImportError | None:
    """Return why lcr_fast._C could not be loaded, or None where it was."""
    return _error


def has_kernel(op: str, device: str) -> bool:
    """Whether the loaded extension serves ``op`` on tensors of ``device`` (``cpu``, ``cuda``)."""
    name = f"lcr_fast::{op}"
    if not torch._C._dispatch_has_kernel(name):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())
