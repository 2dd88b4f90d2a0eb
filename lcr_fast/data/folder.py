"""A folder of plain ``.npy`` arrays with a JSON manifest: written atomically, checked when opened.

Nothing here knows what the arrays mean; ``prepared.py`` does.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "lcr_fast prepared data"
VERSION = 1
MANIFEST = "manifest.json"
_PARTIAL, _OLD = "partial", "old"  # folders beside the one to write, until they are in place
_ENTRY = ("dtype", "shape", "sha256")  # what a manifest says of an array
_CHUNK = 1 << 22  # bytes read at a time while hashing


class PreparedDataError(ValueError):
    """A prepared folder that is missing, incomplete, damaged or of another version."""


def write_folder(
    out: str | os.PathLike,
    manifest: Mapping[str, Any],
    fill: Callable[[Path], None],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a folder of arrays so that ``out`` is either complete or untouched.

    ``fill`` saves the ``.npy`` files into the temporary sibling folder it is given; ``manifest`` is
    completed with the format, its version, the checksum of every array and the fingerprint of them
    all. Raises ValueError if ``out`` is occupied: only a prepared folder is replaced, and only with
    ``overwrite``. Where ``out`` is a link, the folder is written that it names.
    """
    out = Path(os.path.realpath(out))
    require_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{_PARTIAL}-{uuid.uuid4().hex}")
    try:
        partial.mkdir()
    except OSError as error:
        error.filename = str(out)  # the name that its user knows
        raise
    try:
        with _held(partial):
            _write(partial, manifest, fill)
            _swap(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _fsync(out.parent)
    return out


def _write(folder: Path, manifest: Mapping[str, Any], fill: Callable[[Path], None]) -> None:
    fill(folder)
    arrays = {path.stem: _describe(path) for path in sorted(folder.glob("*.npy"))}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint_of(arrays),
        **manifest,
        "arrays": arrays,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for path in folder.iterdir():
        _fsync(path)
    _fsync(folder)


def open_folder(
    path: str | os.PathLike, *, verify: bool = True
) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Open the arrays of a folder memory-mapped, and its manifest.

    Raises PreparedDataError, naming the file and what is wrong with it, if the manifest is missing
    or of another version, or an array is missing, truncated or not as the manifest describes it;
    ``verify`` compares the checksum of every file too.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    arrays = {
        name: _open_array(path / f"{name}.npy", entry, verify)
        for name, entry in manifest["arrays"].items()
    }
    fingerprint = fingerprint_of(manifest["arrays"])
    if manifest.setdefault("fingerprint", fingerprint) != fingerprint:
        raise PreparedDataError(
            f"{path / MANIFEST}: the fingerprint is not that of the arrays it lists"
        )
    return arrays, manifest


def fingerprint_of(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the content of all arrays: SHA-256 of their names, dtypes, shapes and checksums.

    ``entries`` are those of a manifest, so no array is read. Hexadecimal.
    """
    told = [[name, *(entries[name][key] for key in _ENTRY)] for name in sorted(entries)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def require_free(out: str | os.PathLike, overwrite: bool) -> None:
    """Raise ValueError unless ``out`` is free to be written by ``write_folder``.

    What a killed writer left beside ``out`` is removed, or put back where it was ``out`` itself.
    """
    out = Path(os.path.realpath(out))
    _tidy(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file, not a folder")
    if not any(out.iterdir()):
        return
    try:
        _read_manifest(out)
    except PreparedDataError:
        raise ValueError(
            f"{out} is not empty and not prepared data: it is never overwritten"
        ) from None
    others = sorted(p.name for p in out.iterdir() if p.suffix != ".npy" and p.name != MANIFEST)
    if overwrite and others:
        raise ValueError(
            f"{out} holds {others[0]} beside prepared data, which would be lost: move it, or name "
            "another folder"
        )
    if not overwrite:
        raise ValueError(
            f"{out} already holds prepared data: name another folder, or overwrite it (--overwrite)"
        )


def _tidy(out: Path) -> None:
    """Remove what killed writers of ``out`` left: ours by name and content, and nobody's by lock.

    A writer that dies between its two renames leaves the old data alone; they are put back.
    """
    ours = re.compile(rf"\.{re.escape(out.name)}\.({_PARTIAL}|{_OLD})-[0-9a-f]{{32}}")
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.*")):
        named = ours.fullmatch(path.name)
        if named is None or path.is_symlink() or not path.is_dir():
            continue
        if any(file.suffix != ".npy" and file.name != MANIFEST for file in path.iterdir()):
            continue
        with contextlib.suppress(BlockingIOError), _held(path):
            if named[1] == _OLD and not out.exists():
                path.rename(out)
            else:
                shutil.rmtree(path)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a folder, under whatever name, until the block or the process ends.

    Raises BlockingIOError where another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _swap(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = out.with_name(f".{out.name}.{_OLD}-{uuid.uuid4().hex}")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_held(out))
        except BlockingIOError:
            raise ValueError(f"{out}: another process is writing it") from None
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old)


def _describe(path: Path) -> dict[str, Any]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        with path.open(encoding="utf-8") as file:
            manifest = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        raise PreparedDataError(f"{path}: not found, so {folder} is not prepared data") from None
    except OSError as error:
        raise PreparedDataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise PreparedDataError(f"{path}: not valid JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PreparedDataError(f"{path}: does not describe {FORMAT}")
    if manifest.get("version") != VERSION:
        raise PreparedDataError(
            f"{path}: format version {manifest.get('version')!r}, this release reads {VERSION}"
        )
    if not isinstance(manifest.get("arrays"), dict):
        raise PreparedDataError(f"{path}: lists no arrays")
    return manifest


def _open_array(path: Path, entry: Any, verify: bool) -> NDArray:
    if not isinstance(entry, dict) or not entry.keys() >= set(_ENTRY):
        raise PreparedDataError(f"{path}: its entry in the manifest is incomplete")
    if not path.is_file():
        raise PreparedDataError(f"{path}: missing")
    try:
        path.open("rb").close()
    except OSError as error:
        raise PreparedDataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:
        # NumPy reads the header as Python text: damaged, it raises nearly anything.
        raise PreparedDataError(f"{path}: truncated, or not a .npy array") from None
    if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
        raise PreparedDataError(f"{path}: not a .npy array in C order")
    for name, got in (("dtype", array.dtype.str), ("shape", list(array.shape))):
        if got != entry[name]:
            raise PreparedDataError(f"{path}: {name} {got}, but the manifest says {entry[name]}")
    expected = path.stat().st_size - array.offset - array.nbytes
    if expected != 0:
        raise PreparedDataError(f"{path}: {expected} bytes behind the array")
    if verify and _sha256(path) != entry["sha256"]:
        raise PreparedDataError(f"{path}: checksum differs from the manifest's: changed content")
    return array.view(np.ndarray)
