"""Files that are whole or refused: replaced atomically, with a checksum; nothing can run code.

Tensors and the JSON value beside them lie in one safetensors file, other values in JSON files. The
same content always has the same bytes.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_FORMAT_VERSION = 2
_PARTIAL = ".partial"  # how the name of a file ends that is not complete yet
_CHUNK = 1 << 22  # bytes read at a time while hashing
_NO_DIGEST = "0" * 64  # stands for the checksum where it is computed
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


_discards = False


@contextlib.contextmanager
def discarding() -> Iterator[None]:
    """Write no file meanwhile: another process writes the same ones."""
    global _discards
    _discards = True
    try:
        yield
    finally:
        _discards = False


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file that takes ``path``'s place once it is complete and on disk.

    A process killed at any moment leaves either the old file or the new one, and perhaps a
    temporary one, which the next that writes ``path`` removes. A link stays one, and the old file's
    permissions stay. Raises OSError, naming ``path``, where there is no room for it, or where it is
    no regular file.
    """
    path = Path(path)
    if path.is_symlink():
        try:
            path = path.resolve()
        except RuntimeError:  # as Python says before 3.13
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
    mode = None
    if path.exists():
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
    if _discards:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, f".{path.name}.*{_PARTIAL}")
    try:
        # Beside an old file nobody else may read the new one before it has that one's permissions.
        handle, temporary = _create(path, 0o666 if mode is None else 0o600)
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        yield temporary
        os.fsync(handle)
        if mode is not None:
            temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(path)
    except OSError as error:
        # Of a write that fails the system does not say to which file.
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _create(path: Path, mode: int) -> tuple[int, Path]:
    """Create a temporary file beside ``path``, locked as long as its handle is open."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
        try:  # not by tempfile: its files are for the owner alone, whatever the umask
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            continue
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if temporary.exists():
            return handle, temporary
        os.close(handle)  # taken for abandoned before it was locked


def remove_abandoned(folder: Path, pattern: str = f"**/.*{_PARTIAL}") -> None:
    """Remove temporary files of processes that are gone: those that nobody has locked."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder and keep it to this process; ValueError where another one writes into it.

    What processes that were killed have left half-written in it is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing into it") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF):
                raise
        remove_abandoned(folder)
        yield
    finally:
        os.close(handle)


def next_folder(parent: Path, name: str) -> Path:
    """Make the first folder ``name-1``, ``name-2``, ... that nobody has made."""
    parent.mkdir(exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = parent / f"{name}-{number}"
            folder.mkdir()
            return folder
    raise AssertionError("unreachable")


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], info: Any) -> None:
    """Write tensors and the JSON value ``info`` to ``path``, a file of the given ``kind``."""
    if _discards:  # neither copied nor hashed
        return
    # Large elements first, so that each tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    arrays = {name: tensors[name].detach().cpu().contiguous() for name in names}
    header: dict[str, Any] = {
        "__metadata__": {
            "kind": kind,
            "format_version": str(_FORMAT_VERSION),
            "info": json.dumps(info),
            "sha256": _NO_DIGEST,
        }
    }
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.numel() * array.element_size()
        header[name] = {
            "dtype": _DTYPES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    parts = [array.reshape(-1).view(torch.uint8).numpy().data for array in arrays.values()]
    digest = hashlib.sha256(_encode(header))
    for part in parts:
        digest.update(part)
    header["__metadata__"]["sha256"] = digest.hexdigest()
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_encode(header))
        for part in parts:
            file.write(part)


def _encode(header: dict[str, Any]) -> bytes:
    """Lay out the header of a safetensors file: its length, JSON, spaces up to 8 bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_tensors` wrote; ValueError with one sentence on anything else."""
    with _opened(Path(path), kind) as (file, info):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {name!r} has NaN or infinite values")
    return tensors, info


def load_info(path: str | Path, kind: str) -> Any:
    """Read the JSON value alone of a file of tensors, which is checked as a whole."""
    with _opened(Path(path), kind) as (_, info):
        return info


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[Any, Any]]:
    """Open and check a file of tensors: it, and the JSON value in it."""
    from safetensors import SafetensorError, safe_open

    _require_file(path, kind)
    path.open("rb").close()  # of a file that may not be read safetensors says that it is not there
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, kind, metadata)
            try:
                info = json.loads(metadata["info"])
            except (KeyError, ValueError):
                raise ValueError(f"{path}: a {kind} file that has no readable config") from None
            yield file, info
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None


def _require_file(path: Path, kind: str) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: a folder; expected a {kind} file of lcr_fast")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a {kind} file of lcr_fast")


def _check_metadata(path: Path, kind: str, metadata: dict[str, str]) -> None:
    """Raise ValueError unless a safetensors file is of this kind, version and checksum."""
    if metadata.get("kind") != kind:
        raise ValueError(f"{path}: not a {kind} file of lcr_fast (kind {metadata.get('kind')!r})")
    _check_version(path, metadata.get("format_version"))
    claimed = metadata.get("sha256", "")
    with path.open("rb") as file:
        if len(claimed) != len(_NO_DIGEST) or _digest(file, claimed) != claimed:
            raise ValueError(f"{path}: damaged, its content has another checksum than it says")


def _check_version(path: Path, version: Any) -> None:
    if str(version) == "1":
        raise ValueError(
            f"{path}: format version 1, which has no checksum, so damage would not show; this "
            f"lcr_fast reads {_FORMAT_VERSION}: make it again"
        )
    if str(version) != str(_FORMAT_VERSION):
        raise ValueError(
            f"{path}: format version {version!r}, this lcr_fast reads {_FORMAT_VERSION}"
        )


def _digest(file: IO[bytes], claimed: str) -> str:
    """SHA-256 of a safetensors file with zeros in place of the checksum that it claims."""
    size = file.read(8)
    header = file.read(int.from_bytes(size, "little"))
    digest = hashlib.sha256(size + header.replace(claimed.encode(), _NO_DIGEST.encode(), 1))
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def save_json(path: str | Path, kind: str, value: dict[str, Any]) -> None:
    """Write a JSON object, with its ``kind``, format version and checksum, to ``path``."""
    value = {"kind": kind, "format_version": _FORMAT_VERSION, **value}
    with replacing(path) as temporary:
        text = json.dumps({"sha256": _json_digest(value), **value}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


def load_json(path: str | Path, kind: str) -> dict[str, Any]:
    """Read what :func:`save_json` wrote; ValueError with one sentence on anything else."""
    path = Path(path)
    _require_file(path, kind)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged, not valid JSON") from None
    if not isinstance(value, dict) or value.get("kind") != kind:
        raise ValueError(f"{path}: damaged, or not a {kind} file of this lcr_fast")
    _check_version(path, value.get("format_version"))
    if value.pop("sha256", None) != _json_digest(value):
        raise ValueError(f"{path}: damaged, its content has another checksum than it says")
    del value["kind"], value["format_version"]
    return value


def _json_digest(value: dict[str, Any]) -> str:
    # Parsed first, so that a tuple is the list as which it will be read.
    parsed = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(parsed, sort_keys=True).encode()).hexdigest()
