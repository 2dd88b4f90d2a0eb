"""Tensors and JSON in one safetensors file, replaced atomically; nothing in it can run code."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FORMAT_VERSION = 1


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file that takes ``path``'s place once it is complete and on disk.

    A process killed at any moment leaves either the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], info: Any) -> None:
    """Write tensors and the JSON value ``info`` to ``path``, a file of the given ``kind``."""
    from safetensors.torch import save_file

    metadata = {"kind": kind, "format_version": str(_FORMAT_VERSION), "info": json.dumps(info)}
    contiguous = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata)


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_tensors` wrote; ValueError with one sentence on anything else."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected a {kind} file of lcr_fast")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    if metadata.get("kind") != kind:
        raise ValueError(f"{path}: not a {kind} file of lcr_fast (kind {metadata.get('kind')!r})")
    if metadata.get("format_version") != str(_FORMAT_VERSION):
        raise ValueError(
            f"{path}: format version {metadata.get('format_version')!r}, this lcr_fast reads "
            f"{_FORMAT_VERSION}"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {name!r} has NaN or infinite values")
    try:
        return tensors, json.loads(metadata["info"])
    except (KeyError, json.JSONDecodeError):
        raise ValueError(f"{path}: a {kind} file that has no readable config") from None
