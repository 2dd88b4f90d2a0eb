"""Damage models, checkpoints and run files at random: each is refused by one sentence, or is whole.

    python tests/fuzz_files.py --count 2000

``tests/test_fuzz_files.py`` runs a few. Flips of bits, overwritten bytes, zeroed blocks, what a
truncated copy loses and what a partial download appends: whatever is read must either raise a
ValueError of one line that names the file, or give what the whole file gives.
"""

import argparse
import collections
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcr_fast.config import LCRConfig
from lcr_fast.model import LCRSER
from lcr_fast.storage import load_json, load_tensors, save_json, save_tensors
from lcr_fast.testing import random_model
from lcr_fast.training.ranks import Ranks

CONFIG = LCRConfig(
    n_items=9, n_users=2, n_terms=4, dim=4, steps=1, max_search_len=2, max_rec_len=3,
    mlp_hidden=(5,),
)  # fmt: skip


def write_all(folder: Path) -> dict[str, Callable[[Path], Any]]:
    """Write a file of every kind; return, by name, how it is read: to values that compare."""
    generator = torch.Generator().manual_seed(0)
    model = random_model(CONFIG, generator, torch.float32)
    model.data_fingerprint, model.vocabulary = "0123abcd", "4567cdef"
    model.save(folder / "model.safetensors")
    state = {f"adam.{name}": t for name, t in model.state_dict().items()}
    state |= {"step": torch.tensor(3.0), "half": torch.rand(5, generator=generator).bfloat16()}
    progress = {"epoch": 2, "history": [{"valid_ndcg@5": 0.25}], "best": 0.25}
    save_tensors(folder / "checkpoint.safetensors", "checkpoint", state, {"progress": progress})
    some = np.arange(20)
    groups = {"all": some >= 0, "repeat": some % 3 == 0}
    Ranks("these", groups, {"sampled": 1 + some}, 99, "0123abcd").save(folder / "ranks.safetensors")
    result = {"seconds": 1.5, "rows": [{"mean": 0.123, "low": float("nan"), "n": 20}], "ü": None}
    save_json(folder / "evaluation.json", "evaluation", result)
    save_json(folder / "job.json", "job", {"train": {"seed": 1, "clip": 0.2}, "data": "0123"})
    return {
        "model.safetensors": _read_model,
        "checkpoint.safetensors": lambda path: _plain(*load_tensors(path, "checkpoint")),
        "ranks.safetensors": lambda path: repr(Ranks.load(path)),
        "evaluation.json": lambda path: repr(load_json(path, "evaluation")),
        "job.json": lambda path: repr(load_json(path, "job")),
    }


def _read_model(path: Path) -> Any:
    model = LCRSER.load(path)
    told = [model.config, model.data_fingerprint, model.vocabulary, model.training]
    return _plain(model.state_dict(), told)


def _plain(tensors: dict[str, torch.Tensor], info: Any) -> Any:
    values = {name: (t.dtype, t.shape, t.double().tolist()) for name, t in tensors.items()}
    return sorted(values.items()), repr(info)


def _damage(rng: random.Random, whole: bytes) -> bytes:
    """Change a file's content by one of the ways in which files go bad."""
    data, place = bytearray(whole), rng.randrange(len(whole))
    if rng.random() < 0.3:  # where its description stands
        place = rng.randrange(min(len(whole), 400))
    kind = rng.randrange(6)
    if kind <= 1:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        for i in range(place, min(place + rng.choice((1, 4, 16)), len(data))):
            data[i] = rng.randrange(256)
    elif kind == 3:
        end = min(place + rng.choice((8, 64, 512)), len(data))
        data[place:end] = bytes(end - place)
    elif kind == 4:
        del data[place:]
    else:
        data += rng.randbytes(rng.randrange(1, 64))
    return bytes(data)


def trials(folder: Path, count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Try ``count`` damages: the file's name, how its reading ended, and what it said.

    Ends are ``refused``, ``the same``, ``SILENT CHANGE``, ``UNCLEAR`` (not one line with the file's
    name) and ``TRACEBACK``.
    """
    rng = random.Random(seed)
    readers = write_all(folder)
    whole = {name: (folder / name).read_bytes() for name in readers}
    expected = {name: read(folder / name) for name, read in readers.items()}
    for _ in range(count):
        name = rng.choice(list(readers))
        path = folder / name
        damaged = _damage(rng, whole[name])
        path.write_bytes(damaged)
        try:
            same = readers[name](path) == expected[name]
            end, said = ("the same" if same else "SILENT CHANGE"), ""
        except ValueError as error:
            said = str(error)
            clear = said.startswith(f"{path}: ") and "\n" not in said
            end = "refused" if clear else "UNCLEAR"
        except Exception:
            end, said = "TRACEBACK", traceback.format_exc()
        path.write_bytes(whole[name])
        yield name, "unchanged" if damaged == whole[name] else end, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="files to damage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ends: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, end, said in trials(Path(folder), arguments.count, arguments.seed):
            ends[name][end] += 1
            if end.isupper():
                bad += 1
                print(f"{name}: {end}: {said}", file=sys.stderr)
    for name, counts in sorted(ends.items()):
        print(f"{name}: " + ", ".join(f"{n} {end}" for end, n in counts.most_common()))
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
