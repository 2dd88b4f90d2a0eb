"""The compiled extension lcr_fast._C: loaded once, its absence remembered and not fatal."""

import torch  # noqa: F401  _C links against the libraries that this import loads

_error: ImportError | None = None
try:
    import lcr_fast._C  # noqa: F401  registers torch.ops.lcr_fast.*
except ImportError as error:
    _error = error


def extension_error() -> ImportError | None:
    """Why the extension is not there, or None where it is."""
    return _error
